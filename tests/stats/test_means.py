"""Means over prompts: against Wilson's and Student's intervals, draws within a prompt first."""

import numpy as np
import pandas as pd
import pytest
from scipy.stats import ttest_1samp

from spade_lens.stats import prompt_means, proportion_interval

ROWS = pd.DataFrame(
    {
        "layer": [1] * 5 + [0] * 5,
        "prompt": [*range(5)] * 2,
        "correct": [True, True, False, True, True, *[False] * 5],
        "change": [0.5, -1.0, 2.0, 0.0, 0.25, *[1.0, 2.0, 3.0, 4.0, 6.0]],
    }
)


def test_yes_or_no_has_wilsons_interval_in_the_frames_order() -> None:
    means = prompt_means(ROWS, "correct", by=["layer"])
    assert means["layer"].tolist() == [1, 0]
    for row, k in zip(means.itertuples(), (4, 0), strict=True):
        assert (row.mean, row.n) == (k / 5, 5)
        np.testing.assert_allclose((row.low, row.high), proportion_interval(k, 5), atol=1e-12)


def test_numbers_have_students_interval() -> None:
    means = prompt_means(ROWS, "change", by=["layer"], confidence=0.9)
    for row in means.itertuples():
        values = ROWS.loc[ROWS["layer"] == row.layer, "change"]
        expected = ttest_1samp(values, 0).confidence_interval(0.9)
        np.testing.assert_allclose((row.low, row.high), (expected.low, expected.high))
        assert row.mean == pytest.approx(values.mean())


@pytest.mark.parametrize("value", ["correct", "change"])
def test_draws_of_a_prompt_are_no_prompts(value: str) -> None:
    twice = pd.concat([ROWS.assign(draw=0), ROWS.assign(draw=1)])
    pd.testing.assert_frame_equal(
        prompt_means(twice, value, by=["layer"]), prompt_means(ROWS, value, by=["layer"])
    )
    both = pd.concat([ROWS.assign(task="a"), ROWS.assign(task="b")])
    assert prompt_means(both, value, by=["layer"])["n"].tolist() == [10, 10]


def test_missing_values_take_no_part() -> None:
    frame = ROWS.assign(correct=[True, None, None, False, None, *[True] * 5])
    means = prompt_means(frame, "correct", by=["layer"])
    assert means[["mean", "n"]].values.tolist() == [[0.5, 2], [1, 5]]
    np.testing.assert_allclose(means["low"].iloc[0], proportion_interval(1, 2)[0])


def test_one_prompt_has_no_students_interval() -> None:
    (row,) = prompt_means(ROWS.iloc[:1], "change", by=["layer"]).itertuples()
    assert row.mean == 0.5 and np.isnan(row.low) and np.isnan(row.high)


def test_what_has_no_mean_is_said() -> None:
    with pytest.raises(ValueError, match=r"lacks \['block'\]; expected the columns \['block', 'pr"):
        prompt_means(ROWS, "change", by=["block"])
    with pytest.raises(ValueError, match="No row of this frame has a value in 'change'"):
        prompt_means(ROWS.assign(change=np.nan), "change", by=["layer"])
