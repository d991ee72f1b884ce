"""Confidence intervals: of proportions, of paired differences of them, of means and of ratios.

Tests simulate how often each covers the truth. This module knows numbers only.
"""

import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.stats import norm, t

from spade_lens.checks import checked


def _z(confidence: float) -> float:
    """Return the standard normal's quantile of an interval's upper end."""
    if not 0 < confidence < 1:
        raise ValueError(
            f"confidence={confidence} was given; expected a number between 0 and 1, as 0.95."
        )
    return float(norm.ppf((1 + confidence) / 2))


@checked
def proportion_interval(
    successes: float, n: int, *, confidence: float = 0.95
) -> tuple[float, float]:
    """Return Wilson's interval of a proportion, which stays sensible at 0 and at 1.

    Example:
        >>> low, high = proportion_interval(38, 40)
        >>> f"{low:.3f} to {high:.3f}"
        '0.835 to 0.986'

    Args:
        successes: How many of the ``n`` trials succeeded; a fraction where a trial is a mean of
            several.
        n: The number of independent trials, at least 1.
        confidence: Between 0 and 1.

    Returns:
        The lower and the upper end, between 0 and 1.

    Raises:
        ValueError: If ``successes`` does not lie between 0 and ``n``, ``n`` is 0, or ``confidence``
            is not between 0 and 1.
    """
    if not 0 <= successes <= n or n == 0:
        raise ValueError(
            f"{successes} successes of {n} trials have no interval; expected at least one trial "
            "and no more successes than trials."
        )
    low, high = _wilson(successes / n, n, _z(confidence))
    return (0.0 if successes == 0 else low, 1.0 if successes == n else high)


def clustered_interval(
    successes: NDArray[np.float64],
    trials: NDArray[np.float64],
    rows: int,
    *,
    confidence: float = 0.95,
) -> tuple[float, float]:
    """Return the interval of a proportion whose trials come in clusters, such as a prompt's draws.

    Wilson's interval at the effective number of trials: the number of independent ones that would
    vary as much as the clusters do. Source: Franco, Little, Louis and Slud (2019), Journal of
    Survey Statistics and Methodology 7, 334-364. Student's quantile in place of the normal one is
    ours.

    Args:
        successes: By cluster; a fraction where a cluster counts once.
        trials: By cluster.
        rows: The number of single trials, the most that the effective number may be.
        confidence: Between 0 and 1.
    """
    n, total = len(trials), float(trials.sum())
    p = min(max(float(successes.sum()) / total, 0.0), 1.0)
    # As many as there are clusters, and fewer where these are of unequal sizes.
    effective = total**2 / float(np.square(trials).sum())
    quantile = _z(confidence)
    if n > 1 and rows > n:
        variance = float(np.square(successes - p * trials).sum()) / total**2 * n / (n - 1)
        if variance * effective < p * (1 - p):
            effective = min(p * (1 - p) / variance, rows) if variance > 0 else rows
            quantile = float(t.ppf((1 + confidence) / 2, n - 1))
    low, high = _wilson(p, effective, quantile)
    return (0.0 if p == 0 else low, 1.0 if p == 1 else high)


def _wilson(p: float, n: float, z: float) -> tuple[float, float]:
    middle = (2 * n * p + z**2) / (2 * (n + z**2))
    half = z / (2 * (n + z**2)) * math.sqrt(4 * n * p * (1 - p) + z**2)
    return max(middle - half, 0.0), min(middle + half, 1.0)


@checked
def paired_interval(
    lost: float, gained: float, n: int, *, confidence: float = 0.95
) -> tuple[float, float]:
    """Return the score interval of a difference of two proportions of the same prompts.

    It stays sensible where hardly any prompt differs: with nothing lost and nothing gained it is
    not of width 0. Source: Tango (1998), Statistics in Medicine 17, 891-908.

    Example:
        >>> low, high = paired_interval(12, 2, 50)
        >>> f"{low:.3f} to {high:.3f}"
        '0.061 to 0.345'

    Args:
        lost: How many prompts only the first answers right.
        gained: How many only the second answers right.
        n: The number of prompts, at least 1.
        confidence: Between 0 and 1.

    Returns:
        The ends of the interval of the first proportion minus the second, ``(lost - gained) / n``.

    Raises:
        ValueError: If ``lost`` or ``gained`` is negative, they add up to more than ``n``, or
            ``confidence`` is not between 0 and 1.
    """
    if n == 0 or min(lost, gained) < 0 or lost + gained > n + 1e-9:
        raise ValueError(
            f"{lost} lost and {gained} gained of {n} prompts have no interval; expected counts "
            "from 0 on that add up to no more than the prompts, and at least one prompt."
        )
    return score_interval(lost, gained, n, confidence)


@lru_cache(maxsize=4096)
def score_interval(lost: float, gained: float, n: float, confidence: float) -> tuple[float, float]:
    """Return the interval of :func:`paired_interval`; counts need not be whole numbers."""
    z = _z(confidence)

    def score(difference: float) -> float:
        """Return how many standard errors the data lie above a difference."""
        # The likeliest chance to gain an answer, given the difference.
        linear = (2 * n - lost + gained) * difference - lost - gained
        constant = -gained * difference * (1 - difference)
        chance = (math.sqrt(max(linear**2 - 8 * n * constant, 0.0)) - linear) / (4 * n)
        variance = n * (2 * chance + difference * (1 - difference))
        distance = lost - gained - n * difference
        if variance > 1e-12:
            return distance / math.sqrt(variance)
        return 0.0 if abs(distance) < 1e-9 else math.copysign(1e9, distance)

    here, ends = (lost - gained) / n, []
    for end, sign in ((-1.0, -1), (1.0, 1)):
        border = end * (1 - 1e-12)
        # Where even the border is likely enough, the interval reaches it.
        reached = end * here > 1 - 1e-9 or abs(score(border)) < z
        ends.append(end if reached else brentq(lambda d, s=sign: score(d) + s * z, here, border))
    return float(ends[0]), float(ends[1])


def mean_interval(values: NDArray[np.float64], *, confidence: float = 0.95) -> tuple[float, float]:
    """Return Student's interval of a mean; NaN at both ends for a single value."""
    n = len(values)
    if n < 2:
        return math.nan, math.nan
    half = float(t.ppf((1 + confidence) / 2, n - 1)) * float(values.std(ddof=1)) / math.sqrt(n)
    return float(values.mean()) - half, float(values.mean()) + half


def ratio_interval(
    above: NDArray[np.float64], below: NDArray[np.float64], *, confidence: float = 0.95
) -> tuple[float, float]:
    """Return the interval of a ratio of two sums over the same prompts; NaN for a single prompt.

    Student's interval of the ratio's linear part. It is too narrow where fewer than about ten
    prompts differ from the others: of 150 prompts, 5 that leave early make it cover .90.
    """
    ratio = float(above.sum() / below.sum())
    low, high = mean_interval((above - ratio * below) / below.mean(), confidence=confidence)
    return ratio + low, ratio + high


def coefficient_intervals(
    regressors: NDArray[np.float64], values: NDArray[np.float64]
) -> list[tuple[float, float, float]]:
    """Return every weight of a least-squares fit without an intercept, with its 95% interval.

    Standard errors hold where the noise differs by row: HC3 of MacKinnon and White (1985), Journal
    of Econometrics 29, 305-325, with Student's quantile.

    Args:
        regressors: ``[row weight]``; more rows than weights.
        values: What is explained, by row.

    Returns:
        Weight and interval of every regressor. Ends are NaN where one row alone decides a weight,
        since nothing then tells the noise.

    Raises:
        ValueError: If there are too few rows, a number is not finite, or one regressor is a sum of
            others.
    """
    n, k = regressors.shape
    if not (np.isfinite(regressors).all() and np.isfinite(values).all()):
        raise ValueError("Regressors or values hold NaN or infinite numbers; expected none.")
    # Squares of regressors are never added up: that would halve the digits that tell two apart.
    left, sizes, right = np.linalg.svd(regressors, full_matrices=False)
    if n <= k or sizes[-1] <= sizes[0] * n * np.finfo(float).eps:
        raise ValueError(
            f"{n} rows of {k} regressors were given; expected more rows than regressors, none of "
            "them a sum of others."
        )
    inverse = (right.T / sizes) @ left.T
    weights = inverse @ values
    leverage = np.square(left).sum(axis=1)
    errors = (values - regressors @ weights) / np.where(leverage > 1 - 1e-9, np.nan, 1 - leverage)
    spread = np.sqrt(np.square(inverse * errors).sum(axis=1))
    half = float(t.ppf(0.975, n - k)) * spread
    return [(float(w), float(w - h), float(w + h)) for w, h in zip(weights, half, strict=True)]


def calibration_error_interval(
    confidence: NDArray[np.float64], frequency: NDArray[np.float64], n: NDArray[np.int64]
) -> tuple[float, float]:
    """Return the 95% interval of an expected calibration error, from its bins. Ours.

    Noise alone makes the error larger than 0, so resampling it would never give an interval that
    holds 0. This tests instead which errors could have given the one that was measured. The gaps
    of the bins are scaled, and noise as large as that of the frequencies is added, 1000 times.
    The measured error is always held. Where bins hold 20 prompts it covers .89 to .99.

    Args:
        confidence: The mean confidence of every bin.
        frequency: How often the event happened in it.
        n: How many prompts are in it.
    """
    gap, weight = confidence - frequency, n / n.sum()
    # As if one more prompt of each kind had been there, so that no bin is without noise.
    chance = (frequency * n + 1) / (n + 2)
    spread = np.sqrt(chance * (1 - chance) / np.maximum(n - 1, 1))
    freedom = np.maximum(n - 1, 3)
    noise = spread * np.random.default_rng(0).standard_t(freedom, size=(1000, len(n)))
    error = float((weight * np.abs(gap)).sum())

    def simulated(scale: float) -> NDArray[np.float64]:
        drawn: NDArray[np.float64] = (weight * np.abs(scale * gap + noise)).sum(axis=1)
        return drawn

    def largest(low: float, high: float, fits: Callable[[float], bool]) -> float:
        for _ in range(25):
            middle = (low + high) / 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return low

    low, high = 0.0, 1.0
    if (simulated(0) >= error).mean() < 0.025:
        low = largest(0.0, 1.0, lambda scale: bool((simulated(scale) >= error).mean() < 0.025))
    if (simulated(1) <= error).mean() >= 0.025:
        high = largest(1.0, 16.0, lambda scale: bool((simulated(scale) <= error).mean() >= 0.025))
    return low * error, high * error


def shuffled_interval(values: NDArray[np.float64]) -> tuple[float, float]:
    """Return the interval that one more shuffle falls into 19 times in 20.

    By rank: with 39 shuffles it goes from the lowest to the highest. With fewer it does too, and
    holds less: 19 of 21 with 20.
    """
    low, high = np.quantile(values, [0.025, 0.975], method="weibull")
    return float(low), float(high)
