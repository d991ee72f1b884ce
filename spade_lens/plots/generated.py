"""Generated text: how sure the model was of every token, and which tokens were accepted drafts."""

from collections.abc import Sequence
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from spade_lens.plots.grid import shown_word
from spade_lens.plots.lines import choose, crossed_looks
from spade_lens.plots.registry import figure
from spade_lens.plots.style import legend_above, panel_grid, whole_numbers

_MOST_PANELS = 6
_MOST_WORDS = 40
"""So many tokens fit below one axis."""
_WORD_ROOM = 60
"""Points for a token there."""


@figure(
    "generated",
    needs=("strategy", "prompt", "step", "token", "logprob", "accepted"),
    source="spade_lens.generate",
)
def plot_generated(frame: pd.DataFrame, *, prompts: Sequence[int] | None = None) -> Figure:
    """Draw the log-probability of every new token, with accepted drafts filled.

    Example:
        >>> drawing = sl.generate("ab", 6, model=model, stop=()).plot()
        >>> drawing.get_supxlabel()
        'new token'

    Args:
        frame: From :meth:`spade_lens.generation.Generated.to_frame`, of one or several strategies.
        prompts: The numbers of the prompts to draw; the first six by default.

    Returns:
        The figure, with a panel for every prompt.

    Raises:
        ValueError: If a prompt is not in the table, more than six are asked for, or a strategy has
            two tokens at one step.
    """
    here = ["strategy", "prompt", "step"]
    if frame.duplicated(here).any():
        raise ValueError(
            "Several tokens are of one strategy, prompt and step. Give results of other models and "
            "seeds figures of their own, or name them in the column 'strategy'."
        )
    total = frame["prompt"].nunique()
    some = sorted(frame["prompt"].unique())[:_MOST_PANELS] if prompts is None else list(prompts)
    if len(some) > _MOST_PANELS:
        raise ValueError(f"prompts={some} was given; expected at most {_MOST_PANELS} of them.")
    frame = choose(frame, "prompt", some)
    strategies = list(frame["strategy"].unique())
    looks = {
        name: look | {"marker": ""}
        for name, look in crossed_looks({s: (n, n) for n, s in enumerate(strategies)}).items()
    }
    drawing, panels = panel_grid(len(some), across=2, height=1.9, sharex=False)
    for prompt, panel in zip(some, panels, strict=True):
        rows = frame[frame["prompt"] == prompt]
        for name, line in rows.groupby("strategy", sort=False):
            _line(panel, line.sort_values("step"), str(name), looks[str(name)])
        panel.set_title(f"prompt {prompt}" if total > 1 else "")
        whole_numbers(panel, rows["step"])
        if len(some) == 1:
            _words(panel, rows[rows["strategy"] == strategies[0]].sort_values("step"))
    if frame["accepted"].any():
        look: dict[str, Any] = {"ls": "none", "marker": "o", "ms": 3.6, "color": "0.3"}
        panels[0].add_line(Line2D([], [], label="accepted draft", **look))
        panels[0].add_line(Line2D([], [], label="the model's own", mfc="white", **look))
    left_out = prompts is None and len(some) < total
    drawing.supxlabel(
        f"new token (the first {len(some)} of {total} prompts)" if left_out else "new token"
    )
    drawing.supylabel("log-probability (nats)")
    legend_above(drawing, first=strategies)
    return drawing


def _line(panel: Axes, line: pd.DataFrame, name: str, look: dict[str, Any]) -> None:
    color = look["color"]
    panel.plot(line["step"], line["logprob"], label=name, lw=1.0, **look)
    for accepted, fill in ((False, "white"), (True, color)):
        points = line[line["accepted"] == accepted]
        if points.empty:  # matplotlib would make room for markers that are not there
            continue
        marker: dict[str, Any] = {"ls": "none", "marker": "o", "ms": 3.2, "color": color}
        panel.plot(points["step"], points["logprob"], mfc=fill, clip_on=False, zorder=3, **marker)


def _words(panel: Axes, line: pd.DataFrame) -> None:
    """Write the tokens themselves below the axis, where they fit."""
    if len(line) <= _MOST_WORDS:
        names = [shown_word(word, _WORD_ROOM) for word in line["token"]]
        panel.set_xticks(line["step"], names, rotation=90, parse_math=False)
