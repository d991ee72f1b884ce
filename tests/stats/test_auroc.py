"""The area under the ROC curve: known values, ties, and intervals over prompts."""

import math

import numpy as np
import pytest

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
    assert auroc(score, happened, prompt) == auroc(score, happened, prompt)
