"""The figure of generated text holds its table, and refuses what is no such table."""

from typing import Any

import numpy as np
import pandas as pd
import pytest
from figures import assert_readable, legend, line, titles
from matplotlib.figure import Figure

import spade_lens as sl
from spade_lens.generation import ExitPrefill, Generated, PromptLookup, Speculate


@pytest.fixture(scope="module")
def drafted(tiny_llama: sl.Model) -> Generated:
    strategy = Speculate(PromptLookup(1))
    return sl.generate(["abcdabcdabcd", "ab"], 20, model=tiny_llama, strategy=strategy, stop=())


def points(panel: Any, fill: str | None) -> list[tuple[float, float]]:
    """Where the markers are whose inside is white, or not."""
    drawn = [x for x in panel.lines if x.get_marker() == "o" and len(x.get_xdata())]
    some = [x for x in drawn if (x.get_markerfacecolor() == "white") == (fill == "white")]
    return sorted((float(x), float(y)) for line in some for x, y in line.get_xydata())


def test_it_shows_log_probabilities_and_accepted_drafts(drafted: Generated) -> None:
    figure = drafted.plot()
    assert isinstance(figure, Figure)
    assert titles(figure) == ["prompt 0", "prompt 1"]
    assert legend(figure) == [drafted.strategy, "accepted draft", "the model's own"]
    frame = drafted.to_frame()
    assert 0 < frame["accepted"].sum() < len(frame)
    for prompt, panel in enumerate(figure.axes):
        rows = frame[frame["prompt"] == prompt]
        np.testing.assert_allclose(line(panel, drafted.strategy).get_ydata(), rows["logprob"])
        for accepted, fill in ((False, "white"), (True, None)):
            some = rows[rows["accepted"] == accepted]
            expected = sorted(zip(some["step"], some["logprob"], strict=True))
            np.testing.assert_allclose(points(panel, fill), np.array(expected).reshape(-1, 2))
    assert_readable(figure)


def test_one_text_has_its_tokens_below(tiny_llama: sl.Model) -> None:
    written = sl.generate("a$b", 5, model=tiny_llama, stop=())
    rows = written.to_frame().assign(token=["$x$", " y", "\n", "z" * 40, "\u4f60"])
    figure = sl.plot(rows)
    shown = [t.get_text() for t in figure.axes[0].get_xticklabels()]
    assert shown[:3] == ["$x$", "·y", "↵"] and shown[3].endswith("…") and shown[4] == "□"
    assert legend(figure) == ["plain"]
    assert_readable(figure)


def test_strategies_are_lines_of_one_panel(tiny_llama: sl.Model, drafted: Generated) -> None:
    other = sl.generate("abcdabcdabcd", 20, model=tiny_llama, strategy=ExitPrefill(2), stop=())
    figure = sl.plot([drafted, other], prompts=[0])
    assert legend(figure)[:2] == [drafted.strategy, other.strategy]
    (panel,) = figure.axes
    np.testing.assert_allclose(line(panel, other.strategy).get_ydata(), other.logprob)
    assert_readable(figure)


def test_only_the_first_prompts_are_drawn(tiny_llama: sl.Model) -> None:
    written = sl.generate(["ab"] * 8, 2, model=tiny_llama, stop=())
    figure = sl.plot(written)
    assert len(figure.axes) == 6 and figure.get_supxlabel().endswith("(the first 6 of 8 prompts)")
    assert titles(sl.plot(written, prompts=[7, 2])) == ["prompt 7", "prompt 2"]
    assert_readable(figure)


def test_what_does_not_fit_is_refused(tiny_llama: sl.Model, drafted: Generated) -> None:
    with pytest.raises(ValueError, match=r"prompt=\[9\] was asked for"):
        sl.plot(drafted, prompts=[0, 9])
    with pytest.raises(ValueError, match="one strategy, prompt and step"):
        sl.plot(pd.concat([drafted.to_frame()] * 2))
    many = sl.generate(["ab"] * 7, 1, model=tiny_llama, stop=())
    with pytest.raises(ValueError, match="at most 6"):
        sl.plot(many, prompts=range(7))
