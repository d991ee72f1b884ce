"""How well a score separates what happened from what did not, with an interval over prompts."""

import math

import numpy as np
from numpy.typing import NDArray


def auroc(
    score: NDArray[np.float64],
    happened: NDArray[np.bool_],
    prompt: NDArray[np.int64],
    *,
    confidence: float = 0.95,
    resamples: int = 500,
    seed: int = 0,
) -> tuple[float, float, float]:
    """Return the area under the ROC curve, and its bootstrap interval over whole prompts.

    Example:
        >>> score = np.array([0.1, 0.4, 0.35, 0.8])
        >>> value, *_ = auroc(score, np.array([False, False, True, True]), np.arange(4))
        >>> value
        0.75

    Args:
        score: What should be higher where it happened.
        happened: Whether it did.
        prompt: The prompt of every value. Prompts are drawn anew, with all of their values.
        confidence: Between 0 and 1.
        resamples: How often they are drawn.
        seed: Seed of the draws.

    Returns:
        The area and the ends of its interval. All are NaN where everything happened or nothing;
        so are the ends with a single prompt.
    """
    value = _area(score, happened)
    numbers = np.unique(prompt)
    if math.isnan(value) or len(numbers) < 2:
        return value, math.nan, math.nan
    places = [np.flatnonzero(prompt == number) for number in numbers]
    draws = np.random.default_rng(seed)
    areas = []
    for _ in range(resamples):
        chosen = np.concatenate([places[i] for i in draws.integers(len(places), size=len(places))])
        areas.append(_area(score[chosen], happened[chosen]))
    tail = (1 - confidence) / 2
    low, high = np.nanquantile(areas, [tail, 1 - tail])
    return value, float(low), float(high)


def _area(score: NDArray[np.float64], happened: NDArray[np.bool_]) -> float:
    from sklearn.metrics import roc_auc_score

    if happened.all() or not happened.any():
        return math.nan
    return float(roc_auc_score(happened, score))
