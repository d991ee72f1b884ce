"""Tables of text hold the numbers of the summary, whatever they were made from."""

import pandas as pd
import pytest
from graded import graded_frame

import spade_lens as sl
from spade_lens.report import first_layers, layer_table
from spade_lens.report.tables import grid, spread
from spade_lens.stats import summarise


@pytest.fixture
def frame() -> pd.DataFrame:
    return graded_frame()


def test_first_layers(frame: pd.DataFrame) -> None:
    reached = first_layers(summarise(frame), agreement=0.75).set_index(["task", "lens"])["layer"]
    assert reached.to_dict() == {
        ("easy", "a"): 2,
        ("easy", "b"): 0,
        ("hard", "a"): 2,
        ("hard", "b"): 0,
    }
    ends = first_layers(summarise(frame), agreement=0.75)
    assert (ends["layer_low"] <= ends["layer"]).all()
    # Four prompts never make it sure.
    assert ends["layer_high"].isna().all()
    never = first_layers(summarise(frame[frame["layer"] < 2])).query("lens == 'a'")
    assert never["layer"].isna().all()


def test_table_fits_a_terminal_and_joins_equal_layers(frame: pd.DataFrame) -> None:
    summary = summarise(frame)
    lines = layer_table(summary).splitlines()
    assert max(map(len, lines)) <= 100
    assert lines[0] == "easy: 4 prompts, accuracy of the full model .75 [.30 .95]"
    assert lines[2].split("  ")[0].strip() == ""
    assert lines[4] == ("0     .00 [.00 .49]  .25 [.05 .70]  .00 [.00 .49]  .75 [.30 .95]")
    still = summary.assign(mean=0.5, low=0.25, high=0.75)
    assert any(line.startswith("0-2   .50 [.25 .75]") for line in layer_table(still).splitlines())


def test_table_of_many_lenses_puts_measures_one_below_the_other(frame: pd.DataFrame) -> None:
    many = pd.concat([frame.assign(lens=frame["lens"] + end) for end in ("", "2")])
    lines = layer_table(summarise(many), layers=[2]).splitlines()
    assert max(map(len, lines)) <= 100
    assert sum(line.startswith("2 ") for line in lines) == 4  # two tasks, two measures


def test_a_readout_is_summarised_first(tiny_llama: sl.Model) -> None:
    readout = tiny_llama.read(["ab->AB,cd->", "q->"])
    assert layer_table(readout) == layer_table(summarise(readout))
    pd.testing.assert_frame_equal(first_layers(readout), first_layers(summarise(readout)))
    for function in (layer_table, first_layers):
        with pytest.raises(ValueError, match=r"lacks \['lens'\].*spade_lens.read"):
            function(pd.DataFrame({"layer": [1], "measure": "agreement"}))


def test_a_grid_has_a_cell_for_every_mean() -> None:
    rows = {"lens": ["a", "a", "b"], "layer": [1, 2, 1], "mean": [0.5, -1, 0.25]}
    means = pd.DataFrame(rows | {"low": [0.25, None, 0], "high": [0.75, None, 0.5]})
    lines = grid(means, ["lens"], "layer").splitlines()
    assert lines[1].endswith(" -1.00") and "0.50 [0.25, 0.75]" in lines[1]
    assert lines[2].split()[-1] == "-"
    assert "+0.50 [+0.25, +0.75]" in grid(means, ["lens"], "layer", signed=True)
    with pytest.raises(ValueError, match=r"grid needs .*lacks \['task'\]"):
        grid(means, ["task"], "layer")
    assert spread(range(31)) == [2, 9, 16, 23, 30] and spread([3, 1]) == [1, 3]
