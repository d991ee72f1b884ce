"""The area under the ROC curve: known values, ties, and intervals over prompts."""

import math

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import norm, t
from sklearn.metrics import roc_auc_score

from spade_lens.stats.auroc import auroc


def test_known_areas() -> None:
    prompt = np.arange(4)
    happened = np.array([False, False, True, True])
    assert auroc(np.array([0.1, 0.2, 0.3, 0.4]), happened, prompt)[0] == 1.0
    assert auroc(np.array([0.4, 0.3, 0.2, 0.1]), happened, prompt)[0] == 0.0
    assert auroc(np.full(4, 0.5), happened, prompt)[0] == 0.5
    assert all(map(math.isnan, auroc(np.arange(4.0), np.ones(4, dtype=bool), prompt)))
    value, low, high = auroc(np.arange(4.0), happened, np.zeros(4, dtype=int))
    assert value == 1.0 and math.isnan(low) and math.isnan(high)


def drawn(
    draws: np.random.Generator, n: int, each: int, rate: float, slope: float
) -> tuple[NDArray[np.float64], NDArray[np.bool_], NDArray[np.int64]]:
    """Prompts that differ in how often it happens and in their scores."""
    often, high = draws.normal(0, 1, (2, n, 1))
    happened = draws.random((n, each)) < norm.cdf(norm.ppf(rate) + often)
    score = draws.normal(0, 1, (n, each)) + slope * happened + high
    return score.ravel(), happened.ravel(), np.repeat(np.arange(n), each)


@pytest.mark.parametrize(("rate", "slope"), [(0.3, 1.0), (0.1, 1.5), (0.05, 0.0)])
def test_the_interval_holds_the_truth(rate: float, slope: float) -> None:
    draws = np.random.default_rng(0)
    truth = auroc(*drawn(draws, 20_000, 47, rate, slope)[:2], np.zeros(940_000, dtype=int))[0]
    ends = [auroc(*drawn(draws, 24, 47, rate, slope))[1:] for _ in range(1000)]
    assert 0.93 < np.mean([low <= truth <= high for low, high in ends]) < 0.97


def test_it_is_the_area_and_the_jackknife() -> None:
    draws = np.random.default_rng(2)
    score, happened, prompt = drawn(draws, 8, 9, 0.4, 1.0)
    score = score.round(1)  # ties
    value, low, high = auroc(score, happened, prompt)
    assert value == pytest.approx(roc_auc_score(happened, score))
    areas = [roc_auc_score(happened[prompt != i], score[prompt != i]) for i in range(8)]
    odds = np.log(np.array(areas) / (1 - np.array(areas)))
    half = t.ppf(0.975, 7) * math.sqrt(7 / 8 * np.square(odds - odds.mean()).sum())
    middle = math.log(value / (1 - value))
    assert [low, high] == pytest.approx([1 / (1 + math.exp(s * half - middle)) for s in (1, -1)])
    # One prompt alone has all that happened; and nothing says how far from 1 the area is.
    for rare in (prompt == 0, score > 0):
        assert all(map(math.isnan, auroc(score, rare, prompt)[1:]))
    with pytest.raises(ValueError, match="1 of 72 scores are not finite"):
        auroc(np.where(np.arange(72) == 3, np.nan, score), happened, prompt)


def test_the_interval_is_over_prompts() -> None:
    draws = np.random.default_rng(1)
    n, each = 40, 20
    prompt = np.repeat(np.arange(n), each)
    happened = draws.random(n * each) < 0.4
    score = draws.normal(happened * 1.0, 1.0)
    value, low, high = auroc(score, happened, prompt)
    # Of two normal distributions one standard deviation apart: Phi(1 / sqrt 2).
    assert value == pytest.approx(0.76, abs=0.04)
    assert low < value < high and high - low < 0.12
    # The same values in fewer prompts, which are more alike, are worth less.
    of_prompt = draws.normal(0.0, 2.0, n)[prompt]
    *_, wide = [auroc(score + of_prompt, happened, prompt)[1:]]
    *_, narrow = [auroc(score + of_prompt, happened, np.arange(n * each))[1:]]
    assert wide != narrow
