"""How well a score separates what happened from what did not, with an interval over prompts."""

import math

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, logit
from scipy.stats import t


def auroc(
    score: NDArray[np.float64],
    happened: NDArray[np.bool_],
    prompt: NDArray[np.int64],
    *,
    confidence: float = 0.95,
) -> tuple[float, float, float]:
    """Return the area under the ROC curve, and its interval over whole prompts.

    Student's interval of the jackknife over prompts, on the scale of log-odds. In simulations of
    24 prompts with effects of their own it covers .94 to .96, and the percentiles of a bootstrap
    .90 to .94. The choice is ours.

    Example:
        >>> score = np.array([0.1, 0.4, 0.35, 0.8])
        >>> value, *_ = auroc(score, np.array([False, False, True, True]), np.arange(4))
        >>> value
        0.75

    Args:
        score: What should be higher where it happened. Equal scores count half.
        happened: Whether it did.
        prompt: The prompt of every value. A prompt is left out with all of its values.
        confidence: Between 0 and 1.

    Returns:
        The area and the ends of its interval. All are NaN where everything happened or nothing.
        The ends alone are NaN with a single prompt, and where the area is 0 or 1 or undefined
        without one of the prompts.

    Raises:
        ValueError: If a score is not a finite number.
    """
    if not np.isfinite(score).all():
        raise ValueError(
            f"{int((~np.isfinite(score)).sum())} of {len(score)} scores are not finite; expected "
            "none. Leave them out."
        )
    _, place = np.unique(prompt, return_inverse=True)
    n = int(place.max(initial=-1)) + 1
    won = _wins(score, happened)
    right, wrong = (np.bincount(place[of], minlength=n) for of in (happened, ~happened))
    pairs = float(right.sum()) * float(wrong.sum())
    if not pairs:
        return math.nan, math.nan, math.nan
    value = float(won[happened].sum()) / pairs
    # The pairs of a prompt with itself are counted twice among those that are lost without it.
    inside = [_wins(score[place == i], happened[place == i]) for i in range(n)]
    own = [float(w[happened[place == i]].sum()) for i, w in enumerate(inside)]
    rest = won[happened].sum() - np.bincount(place, weights=won, minlength=n) + own
    left = (right.sum() - right) * (wrong.sum() - wrong)
    if n < 2 or not left.all():
        return value, math.nan, math.nan
    without = rest / left
    if not ((0 < without) & (without < 1)).all() or not 0 < value < 1:
        return value, math.nan, math.nan
    error = math.sqrt((n - 1) ** 2 / n * float(logit(without).var(ddof=1)))
    half = float(t.ppf((1 + confidence) / 2, n - 1)) * error
    return value, float(expit(logit(value) - half)), float(expit(logit(value) + half))


def _wins(score: NDArray[np.float64], happened: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Return in how many pairs with the other kind a value is on the right side; half for ties."""
    wins = np.empty(len(score))
    for of, sign in ((happened, 1), (~happened, -1)):
        others = np.sort(sign * score[~of])
        ends = [np.searchsorted(others, sign * score[of], side=s) for s in ("left", "right")]
        wins[of] = (ends[0] + ends[1]) / 2
    return wins
