"""Confidence intervals of means: Wilson's, Student's and the bootstrap's.

This module knows numbers only.
"""

import math

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm, t

from spade_lens.checks import checked


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
        ValueError: If ``successes`` does not lie between 0 and ``n``, or ``n`` is 0.
    """
    if not 0 <= successes <= n or n == 0:
        raise ValueError(
            f"{successes} successes of {n} trials have no interval; expected at least one trial "
            "and no more successes than trials."
        )
    p = successes / n
    z = float(norm.ppf((1 + confidence) / 2))
    middle = (2 * n * p + z**2) / (2 * (n + z**2))
    half = z / (2 * (n + z**2)) * math.sqrt(4 * n * p * (1 - p) + z**2)
    return (0.0 if successes == 0 else middle - half, 1.0 if successes == n else middle + half)


def mean_interval(values: NDArray[np.float64], *, confidence: float = 0.95) -> tuple[float, float]:
    """Return Student's interval of a mean; NaN at both ends for a single value."""
    n = len(values)
    if n < 2:
        return math.nan, math.nan
    half = float(t.ppf((1 + confidence) / 2, n - 1)) * float(values.std(ddof=1)) / math.sqrt(n)
    return float(values.mean()) - half, float(values.mean()) + half


def bootstrap_interval(
    values: NDArray[np.float64], *, confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Return the percentile interval of a mean over values that are drawn anew with replacement."""
    draws = np.random.default_rng(seed).choice(values, size=(resamples, len(values)))
    tail = (1 - confidence) / 2
    low, high = np.quantile(draws.mean(axis=1), [tail, 1 - tail])
    return float(low), float(high)
