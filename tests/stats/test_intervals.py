"""Summaries against the formula and against counting by hand."""

import math

import pandas as pd
import pytest
from graded import graded_frame

from spade_lens.stats import paired_interval, proportion_interval, summarise
from spade_lens.stats.summary import full_model_accuracy


def wilson(successes: int, n: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """The formula of Wilson (1927), written out."""
    p = successes / n
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return middle - half, middle + half


@pytest.mark.parametrize(("successes", "n"), [(0, 40), (1, 3), (38, 40), (40, 40), (1, 1)])
def test_interval_is_wilsons(successes: int, n: int) -> None:
    assert proportion_interval(successes, n) == pytest.approx(wilson(successes, n), abs=1e-12)


@pytest.mark.parametrize(("successes", "n"), [(0, 0), (3, 2), (-1, 2)])
def test_impossible_counts_are_refused(successes: int, n: int) -> None:
    with pytest.raises(ValueError, match=f"{successes} successes of {n} trials"):
        proportion_interval(successes, n)


def test_a_surer_interval_is_wider_up_to_the_border() -> None:
    wider = [paired_interval(1, 0, 1, confidence=1 - 10.0**-k) for k in (1, 4, 9, 15)]
    assert all(a[0] >= b[0] and a[1] <= b[1] for a, b in zip(wider, wider[1:], strict=False))
    for confidence in (0.0, 1.0, math.nan, 3.0):
        with pytest.raises(ValueError, match="confidence="):
            paired_interval(1, 0, 4, confidence=confidence)


@pytest.fixture
def frame() -> pd.DataFrame:
    return graded_frame()


def test_summary_counts_every_group(frame: pd.DataFrame) -> None:
    summary = summarise(frame)
    assert list(summary.columns) == [
        *("task", "lens", "layer", "measure", "mean", "low", "high", "n")
    ]
    assert len(summary) == 2 * 2 * 3 * 2
    for row in summary.itertuples():
        some = frame.query("task == @row.task and lens == @row.lens and layer == @row.layer")
        column = {"accuracy": "correct", "agreement": "agrees"}[row.measure]
        assert row.mean == some[column].mean()
        assert (row.low, row.high) == proportion_interval(int(some[column].sum()), 4)
        assert row.n == 4


def test_readings_without_target_take_no_part_in_accuracy(frame: pd.DataFrame) -> None:
    frame["correct"] = frame["correct"].astype("boolean").mask(frame["prompt"] == 0)
    n = summarise(frame).groupby("measure")["n"].unique()
    assert n["accuracy"].tolist() == [3]
    assert n["agreement"].tolist() == [4]


def test_by_chooses_the_groups(frame: pd.DataFrame) -> None:
    pooled = summarise(frame, by=["lens", "layer"])
    assert pooled["n"].unique().tolist() == [8]
    two = pd.concat([frame, frame.assign(model="other")])
    assert list(summarise(two).columns[:4]) == ["model", "task", "lens", "layer"]


def test_what_cannot_be_summed_up_is_said(frame: pd.DataFrame) -> None:
    with pytest.raises(ValueError, match=r"lacks \['shots'\]"):
        summarise(frame, by=["shots"])
    with pytest.raises(ValueError, match="has no rows"):
        summarise(frame.iloc[:0])
    with pytest.raises(ValueError, match="none of .*'agrees'"):
        summarise(frame.drop(columns=["correct", "agrees"]))


def test_the_full_model_is_told_by_full_agreement(frame: pd.DataFrame) -> None:
    full = full_model_accuracy(summarise(frame)).set_index("task")["mean"]
    assert full.to_dict() == {"easy": 0.75, "hard": 0.25}
    assert full_model_accuracy(summarise(frame[frame["layer"] < 2])).empty
    one = full_model_accuracy(summarise(frame[frame["task"] == "easy"].drop(columns="task")))
    assert one["mean"].tolist() == [0.75]
