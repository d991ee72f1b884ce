"""Means over prompts: against Wilson's and Student's intervals, draws within a prompt first."""

from inspect import unwrap  # past the type checks that run in tests only

import numpy as np
import pandas as pd
import pytest
from scipy.stats import ttest_1samp

from spade_lens import Model, icl
from spade_lens.stats import proportion_interval, summarise
from spade_lens.stats.frames import as_frame
from spade_lens.stats.intervals import clustered_interval

ROWS = pd.DataFrame(
    {
        "layer": [1] * 5 + [0] * 5,
        "prompt": [*range(5)] * 2,
        "correct": [True, True, False, True, True, *[False] * 5],
        "change": [0.5, -1.0, 2.0, 0.0, 0.25, *[1.0, 2.0, 3.0, 4.0, 6.0]],
    }
)


def test_yes_or_no_has_wilsons_interval_in_the_frames_order() -> None:
    means = summarise(ROWS, "correct", by=["layer"])
    assert means["layer"].tolist() == [1, 0]
    for row, k in zip(means.itertuples(), (4, 0), strict=True):
        assert (row.mean, row.n) == (k / 5, 5)
        np.testing.assert_allclose((row.low, row.high), proportion_interval(k, 5), atol=1e-12)


def test_numbers_have_students_interval() -> None:
    means = summarise(ROWS, "change", by=["layer"], confidence=0.9)
    for row in means.itertuples():
        values = ROWS.loc[ROWS["layer"] == row.layer, "change"]
        expected = ttest_1samp(values, 0).confidence_interval(0.9)
        np.testing.assert_allclose((row.low, row.high), (expected.low, expected.high))
        assert row.mean == pytest.approx(values.mean())


@pytest.mark.parametrize("value", ["correct", "change"])
def test_draws_of_a_prompt_are_no_prompts(value: str) -> None:
    twice = pd.concat([ROWS.assign(draw=0), ROWS.assign(draw=1)])
    pd.testing.assert_frame_equal(
        summarise(twice, value, by=["layer"]), summarise(ROWS, value, by=["layer"])
    )
    both = pd.concat([ROWS.assign(task="a"), ROWS.assign(task="b")])
    assert summarise(both, value, by=["layer"])["n"].tolist() == [10, 10]


def test_missing_values_take_no_part() -> None:
    frame = ROWS.assign(correct=[True, None, None, False, None, *[True] * 5])
    means = summarise(frame, "correct", by=["layer"])
    assert means[["mean", "n"]].values.tolist() == [[0.5, 2], [1, 5]]
    np.testing.assert_allclose(means["low"].iloc[0], proportion_interval(1, 2)[0])


def test_one_prompt_has_no_students_interval() -> None:
    (row,) = summarise(ROWS.iloc[:1], "change", by=["layer"]).itertuples()
    assert row.mean == 0.5 and np.isnan(row.low) and np.isnan(row.high)


def test_what_has_no_mean_is_said() -> None:
    with pytest.raises(ValueError, match=r"lacks \['block'\]"):
        summarise(ROWS, "change", by=["block"])
    with pytest.raises(ValueError, match="No row of this table has a value in 'change'"):
        summarise(ROWS.assign(change=np.nan), "change", by=["layer"])


def test_random_draws_of_a_cut_are_no_prompts(tiny_llama: Model) -> None:
    # Ten prompts of which six are right, five draws each: 50 rows are not 50 prompts.
    right = np.repeat([True, False], [30, 20])
    keys = {"edges": "to the last", "control": True, "start": 0, "stop": 4}
    frame = pd.DataFrame(
        keys | {"prompt": np.repeat(range(10), 5), "draw": [*range(5)] * 10, "correct": right}
    )
    (row,) = summarise(frame).itertuples()
    assert (row.measure, row.n, row.mean) == ("accuracy", 10, 0.6)
    assert (round(row.low, 2), round(row.high, 2)) == (0.31, 0.83)
    # The same with the rows that a run gives.
    prompts = [tiny_llama.prompt(f"{a}b->AB,c->", target="C") for a in "abcdef"]
    edges = {"to the last": lambda p: [(p.answer, k) for k in range(p.answer)]}
    frame = icl.knockout(tiny_llama, prompts, edges=edges, windows=[(0, 4)], draws=4)
    control = frame[frame["control"]]
    assert len(control) == 6 * 4
    summary = summarise(frame, "agrees").query("control")
    assert summary["n"].tolist() == [6]
    share = control.groupby("prompt")["agrees"].mean().to_numpy(dtype=float)
    expected = clustered_interval(share, np.ones(6), rows=24)
    assert (summary["low"].item(), summary["high"].item()) == pytest.approx(expected)


def test_groups_measures_and_names_are_found_or_given() -> None:
    both = summarise(ROWS.assign(model="m", task="t"))
    assert list(both.columns[:2]) == ["task", "layer"]
    assert both["measure"].tolist() == ["accuracy", "change"] * 2
    two = pd.concat([ROWS.assign(model="m"), ROWS.assign(model="o")])
    assert summarise(two, by=[])["n"].tolist() == [10, 10]
    assert list(summarise(two).columns[:2]) == ["model", "layer"]
    named = summarise(ROWS, {"change": "less"}, by=["layer"])
    assert named["measure"].unique().tolist() == ["less"]


def test_a_result_or_several_are_tables() -> None:
    class Result:
        def to_frame(self) -> pd.DataFrame:
            return ROWS

    expected = summarise(ROWS)
    pd.testing.assert_frame_equal(summarise(Result()), expected)
    other = ROWS.assign(layer=7)
    assert summarise([Result(), other])["layer"].tolist() == [1, 1, 0, 0, 7, 7]
    for wrong, error in [("text", TypeError), (3, TypeError), ([], ValueError)]:
        with pytest.raises(error, match="expected a table|expected at least one table"):
            unwrap(as_frame)(wrong)


def test_flips_are_prompts_below_zero() -> None:
    frame = ROWS.assign(logit_diff=[1.0, -1, -2, 0, None, *[1.0] * 5])
    (first, second) = summarise(frame, "flips", by=["layer"]).itertuples()
    assert (first.mean, first.n, second.mean) == (0.5, 4, 0)
