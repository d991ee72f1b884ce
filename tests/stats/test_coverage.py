"""How often the 95% intervals that the library prints hold the truth, by simulation."""

from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.optimize import minimize_scalar

from spade_lens.exits.reliability_curves import Bins, binned
from spade_lens.exits.wall_clock import _summary
from spade_lens.icl.geometry.convergence import pairs_interval
from spade_lens.stats import paired_interval, proportion_interval, summarise
from spade_lens.stats.intervals import (
    calibration_error_interval,
    clustered_interval,
    coefficient_intervals,
    mean_interval,
    ratio_interval,
    shuffled_interval,
)

RUNS = 1000
Ends = tuple[float, float]


def covered(intervals: list[Ends], truth: float) -> float:
    low, high = np.array(intervals).T
    return float(((low <= truth + 1e-9) & (truth <= high + 1e-9)).mean())


@pytest.mark.parametrize("n", [20, 60, 150])
@pytest.mark.parametrize("p", [0.02, 0.5, 0.9])
def test_proportions(n: int, p: float) -> None:
    right = np.random.default_rng(0).binomial(n, p, size=RUNS)
    assert 0.92 < covered([proportion_interval(float(k), n) for k in right], p) < 0.99


@pytest.mark.parametrize("n", [20, 60, 150])
@pytest.mark.parametrize(("lost", "gained"), [(0.01, 0), (0.02, 0.01), (0.15, 0.05), (0.1, 0.2)])
def test_paired_proportions(n: int, lost: float, gained: float) -> None:
    chances = [lost, gained, 1 - lost - gained]
    drawn = np.random.default_rng(1).multinomial(n, chances, size=2 * RUNS)
    intervals = [paired_interval(float(a), float(b), n) for a, b, _ in drawn]
    # Where hardly any prompt differs no exact interval comes nearer to .95 than from above.
    assert covered(intervals, lost - gained) > 0.93
    if n * (lost + gained) > 5:
        assert covered(intervals, lost - gained) < 0.98
    assert min(high - low for low, high in intervals) > 0


def test_a_percentile_bootstrap_of_small_losses_fails() -> None:
    # Why there is none: the figures that the score interval was taken for.
    rng = np.random.default_rng(2)
    intervals = []
    for lost in rng.binomial(150, 0.01, size=RUNS):
        again = rng.binomial(150, lost / 150, size=400) / 150
        intervals.append((np.quantile(again, 0.025), np.quantile(again, 0.975)))
    assert covered(intervals, 0.01) < 0.82
    assert np.mean([low == high for low, high in intervals]) > 0.15


@pytest.mark.parametrize(
    ("lost", "gained", "n"), [(12, 2, 50), (0, 0, 150), (1, 0, 150), (3, 9, 20)]
)
def test_the_score_interval_is_of_the_constrained_likelihood(
    lost: int, gained: int, n: int
) -> None:
    """Tango's score by another way: the nuisance chance from a search, not from its formula."""
    for difference in paired_interval(lost, gained, n):
        least = max(0.0, -difference)

        def against(chance: float, d: float = difference) -> float:
            same = 1 - 2 * chance - d
            parts = [(lost, chance + d), (gained, chance), (n - lost - gained, same)]
            return -sum(k * np.log(max(p, 1e-300)) for k, p in parts if k)

        most = (1 - difference) / 2
        chance = minimize_scalar(against, bounds=(least, most), method="bounded").x
        variance = n * (2 * chance + difference * (1 - difference))
        score = (lost - gained - n * difference) / np.sqrt(variance)
        assert abs(score) == pytest.approx(1.959964, abs=0.01)


def test_what_is_lost_and_gained_must_be_of_the_prompts() -> None:
    for wrong in [(-1, 0, 5), (3, 3, 5), (0, 0, 0)]:
        with pytest.raises(ValueError, match="lost and .* gained of"):
            paired_interval(*wrong)
    assert paired_interval(5, 0, 5)[1] == 1 and paired_interval(0, 5, 5)[0] == -1
    low, high = paired_interval(2, 7, 30)
    assert paired_interval(7, 2, 30) == pytest.approx((-high, -low))


def effective(rng: np.random.Generator, size: tuple[int, ...]) -> np.ndarray:
    """Effective numbers of 16 unequal parts: skewed, from 1 to 16."""
    weights = np.exp(3 * rng.standard_normal((*size, 16)))
    parts = weights / weights.sum(axis=-1, keepdims=True)
    return 1 / np.square(parts).sum(axis=-1)


DRAWS: dict[str, Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]] = {
    "normal": lambda rng, size: rng.standard_normal(size),
    "effective numbers": effective,
    "Brier scores": lambda rng, size: np.square(
        (rng.random(size) < (c := rng.beta(4, 1, size))) - c
    ),
    "logarithms of ratios": lambda rng, size: 0.3 * rng.standard_normal(size),
}


@pytest.mark.parametrize("name", DRAWS)
@pytest.mark.parametrize("n", [32, 150])
def test_means(name: str, n: int) -> None:
    rng = np.random.default_rng(3)
    truth = float(DRAWS[name](rng, (200_000,)).mean())
    intervals = [mean_interval(row) for row in DRAWS[name](rng, (RUNS, n))]
    assert 0.91 < covered(intervals, truth) < 0.975


def test_means_over_seven_tasks() -> None:
    # The bootstrap over seven covers .87.
    intervals = [mean_interval(row) for row in np.random.default_rng(10).random((2 * RUNS, 7))]
    assert 0.93 < covered(intervals, 0.5) < 0.97


@pytest.mark.parametrize("n", [8, 20, 60])
@pytest.mark.parametrize(("a", "b"), [(1, 1), (9, 1), (0.3, 0.3)])
def test_proportions_of_clusters(n: int, a: float, b: float) -> None:
    rng = np.random.default_rng(4)
    sizes = rng.integers(4, 17, size=n).astype(float)
    drawn = rng.binomial(sizes.astype(int), rng.beta(a, b, size=(RUNS, n))).astype(float)
    rows = int(sizes.sum())
    truth = a / (a + b)
    assert 0.92 < covered([clustered_interval(d, sizes, rows) for d in drawn], truth) < 0.99
    # As in a summary, where every prompt counts the same.
    means = [clustered_interval(d / sizes, np.ones(n), rows) for d in drawn]
    assert 0.92 < covered(means, truth) < 0.99


@pytest.mark.parametrize("early", [0.1, 0.5, 0.9])
def test_speedups(early: float) -> None:
    rng = np.random.default_rng(5)
    full = np.exp(0.25 * rng.standard_normal((RUNS, 150)))
    spent = np.where(rng.random(full.shape) < early, 0.55, 1.08) * full
    truth = 1 / (0.55 * early + 1.08 * (1 - early))
    intervals = [ratio_interval(a, b) for a, b in zip(full, spent, strict=True)]
    assert 0.91 < covered(intervals, truth) < 0.975


@pytest.mark.parametrize("n", [20, 60, 250])
def test_weights_of_least_squares(n: int) -> None:
    rng = np.random.default_rng(9)
    x = rng.standard_normal((RUNS, n, 2)) @ np.array([[1.0, 0.6], [0.0, 0.8]])
    noise = rng.standard_normal((RUNS, n)) * (0.2 + np.abs(x[:, :, 0]))  # it differs by row
    values = x @ np.array([0.7, -0.2]) + noise
    fitted = [coefficient_intervals(a, b) for a, b in zip(x, values, strict=True)]
    for at, truth in enumerate((0.7, -0.2)):
        assert 0.93 < covered([(rows[at][1], rows[at][2]) for rows in fitted], truth) < 0.985
    assert fitted[0][0][0] == pytest.approx(np.linalg.lstsq(x[0], values[0])[0][0])
    with pytest.raises(ValueError, match="none of them a sum of others"):
        coefficient_intervals(np.ones((n, 2)), np.ones(n))
    with pytest.raises(ValueError, match="NaN or infinite"):
        coefficient_intervals(x[0], np.where(x[0, :, 0] > 0, values[0], np.nan))


def test_weights_of_regressors_that_are_nearly_one() -> None:
    x = np.random.default_rng(0).standard_normal((50, 2)) @ np.array([[1.0, 1.0], [0.0, 1e-9]])
    for weight, _, _ in coefficient_intervals(x, x.sum(axis=1)):
        assert weight == pytest.approx(1, abs=1e-4)
    alone = np.column_stack([x[:, 0], np.arange(50) == 0])  # nothing tells the noise of that row
    assert np.isnan(coefficient_intervals(alone, x[:, 1])[1][1])


@pytest.mark.parametrize("rounds", [6, 9, 25])
def test_medians_of_ratios_by_the_clock(rounds: int) -> None:
    # Neighbouring ratios share a turn of the base.
    rng = np.random.default_rng(6)
    bases = np.exp(0.1 * rng.standard_normal((RUNS, rounds + 1)))
    own = 0.5 * np.exp(0.1 * rng.standard_normal((RUNS, rounds)))
    ratios = (bases[:, :-1] + bases[:, 1:]) / 2 / own
    timed = [_summary(row.tolist(), [1.0], [1.0], "") for row in ratios]
    intervals = [(one.low, one.high) for one in timed]
    assert 0.93 < covered(intervals, float(np.median(ratios))) < 0.99


@pytest.mark.parametrize("n", [8, 16, 32])
def test_mean_similarities_of_pairs_of_prompts(n: int) -> None:
    rng = np.random.default_rng(7)
    middle = 0.6 * rng.standard_normal(32)

    def units(count: int) -> np.ndarray:
        x = middle + rng.standard_normal((count, 32)) * np.exp(
            0.5 * rng.standard_normal((count, 1))
        )
        return x / np.linalg.norm(x, axis=1, keepdims=True)

    truth = float(np.square(units(200_000).mean(axis=0)).sum())
    different = ~np.eye(n, dtype=bool)
    intervals = []
    for _ in range(RUNS):
        one = units(n)
        intervals.append(pairs_interval(one @ one.T, different))
    assert 0.92 < covered(intervals, truth) < 0.985
    # Pairs of a prompt with itself are prompts, with Student's interval.
    assert pairs_interval(one @ one.T * 3 + np.diag(np.arange(n)), ~different) == pytest.approx(
        mean_interval(3 + np.arange(n, dtype=float))
    )
    assert np.isnan(pairs_interval(np.ones((2, 2)), ~np.eye(2, dtype=bool))).all()


@pytest.mark.parametrize(("shuffles", "expected"), [(39, 0.95), (20, 19 / 21), (199, 0.95)])
def test_one_more_shuffle(shuffles: int, expected: float) -> None:
    drawn = np.random.default_rng(8).standard_exponential((4 * RUNS, shuffles + 1))
    held = [low <= d[0] <= high for d in drawn for low, high in [shuffled_interval(d[1:])]]
    assert np.mean(held) == pytest.approx(expected, abs=0.015)


def test_tasks_or_their_prompts_at_random() -> None:
    """Seven tasks of forty prompts: the interval over tasks is for other tasks of the kind."""
    rng, runs = np.random.default_rng(9), 500
    chances = rng.beta(6, 3, size=(runs, 7))
    right = rng.random((runs, 7, 40)) < chances[..., None]
    place = dict(
        zip(("run", "task", "prompt"), np.indices(right.shape).reshape(3, -1), strict=True)
    )
    frame = pd.DataFrame(place | {"correct": right.ravel()})
    tasks = summarise(frame, "correct", by=["run"], over="tasks")
    assert set(zip(tasks["n"], tasks["tasks"], strict=True)) == {(280, 7)}
    assert 0.925 < covered(list(zip(tasks["low"], tasks["high"], strict=True)), 2 / 3) < 0.975
    # Over prompts it is for these tasks alone, and says little of others.
    prompts = summarise(frame, "correct", by=["run"])
    low, high = prompts["low"].to_numpy(), prompts["high"].to_numpy()
    these = chances.mean(axis=1)
    assert 0.93 < covered(list(zip(low - these, high - these, strict=True)), 0) < 0.985
    assert covered(list(zip(low, high, strict=True)), 2 / 3) < 0.8


def test_what_is_random_is_asked_for_rightly() -> None:
    frame = pd.DataFrame({"task": ["a", "a", "b"], "prompt": [0, 1, 0], "correct": [True] * 3})
    with pytest.raises(ValueError, match="over='tasks' were given"):
        summarise(frame, "correct", by=["task"], over="tasks")
    with pytest.raises(ValueError, match=r"lacks \['task'\]"):
        summarise(frame.drop(columns="task"), "correct", over="tasks")
    with pytest.raises(ValueError, match="over='layers'"):
        summarise(frame, "correct", over="layers")  # type: ignore[arg-type]
    # Every task counts the same, whatever its prompts.
    frame["correct"] = [True, False, True]
    assert summarise(frame, "correct", over="tasks")["mean"].item() == 0.75


@pytest.mark.parametrize("bins", ["equal-mass", "equal-width"])
@pytest.mark.parametrize(("n", "n_bins"), [(60, 4), (150, 7)])
def test_calibration_errors(bins: Bins, n: int, n_bins: int) -> None:
    chances: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "calibrated": lambda c: c,
        "too sure": lambda c: np.clip(c - 0.1, 0, 1),
        "too careful": np.sqrt,
    }
    rng = np.random.default_rng(11)
    for name, chance in chances.items():
        many = torch.from_numpy(0.4 + 0.6 * rng.beta(2, 1.2, 100_000))
        every = binned(many, many < 0, bins=bins, n_bins=n_bins)
        places = np.repeat(every["bin"], every["n"]).to_numpy()
        gaps = pd.Series(np.sort(many.numpy()) - chance(np.sort(many.numpy()))).groupby(places)
        truth = float(gaps.sum().abs().sum() / len(many))
        intervals = []
        for _ in range(500):
            drawn = 0.4 + 0.6 * rng.beta(2, 1.2, n)
            happened = rng.random(n) < chance(drawn)
            intervals.append(error_interval(drawn, happened, bins, n_bins))
        assert covered(intervals, truth) > 0.885, name
        if name == "calibrated":
            assert truth < 1e-9 and max(low for low, _ in intervals) > 0


@pytest.mark.parametrize("n_bins", [4, 15])
def test_the_interval_holds_the_error_that_was_measured(n_bins: int) -> None:
    rng = np.random.default_rng(3)
    for _ in range(200):
        drawn = 0.4 + 0.6 * rng.beta(2, 1.2, 24)
        curve = binned(
            torch.from_numpy(drawn), torch.from_numpy(rng.random(24) < drawn), n_bins=n_bins
        ).iloc[0]
        assert curve["ece_low"] <= curve["ece"] <= curve["ece_high"]


def error_interval(drawn: np.ndarray, happened: np.ndarray, bins: str, n_bins: int) -> Ends:
    order = drawn.argsort()
    place = np.arange(len(drawn)) * n_bins // len(drawn)
    if bins == "equal-width":
        place = (drawn[order] * n_bins).astype(int).clip(0, n_bins - 1)
    counts = np.bincount(place)
    kept = counts > 0
    confidence, frequency = (
        np.bincount(place, values[order])[kept] / counts[kept] for values in (drawn, happened)
    )
    return calibration_error_interval(confidence, frequency, counts[kept])
