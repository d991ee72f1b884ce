"""How much each demonstration contributes: by layer, by its place, and how many do in effect."""

from collections.abc import Sequence
from math import pi
from typing import Any, Literal

import matplotlib as mpl
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator

from spade_lens.plots.lines import Level, choose, line_figure
from spade_lens.plots.style import FULL_WIDTH, STYLE, by_task, check_table, legend_above, panel_grid
from spade_lens.stats.summary import summarise

_LABELS = {
    "shapley": "Shapley value",
    "leave_one_out": "lost when left out",
    "add_one_in": "gained when alone",
}
_FEWEST = 5
"""Prompts of an interval that is drawn: those of two or three are as wide as the page is high."""
_SURE = "95% interval excludes 0"
_SAME, _OTHER = "label is the answer", "label is another"


def plot_contributions(
    frame: pd.DataFrame,
    value: Literal["shapley", "leave_one_out", "add_one_in"] = "shapley",
    *,
    by_answer: bool = False,
    width: float = FULL_WIDTH,
) -> Figure:
    """Mean contributions to the logit difference, demonstration by layer; a panel per task.

    Dotted are cells whose 95% interval over prompts (Student's) excludes 0. Where nothing
    contributes, one cell in twenty has a dot by chance.

    Example:
        >>> import pandas as pd
        >>> rows = {"prompt": [0, 1] * 4, "layer": [3] * 4 + [6] * 4, "demo": [0, 0, 1, 1] * 2,
        ...         "shapley": range(8)}
        >>> figure = plot_contributions(pd.DataFrame(rows))
        >>> len(figure.axes)  # the panel and the colour bar
        2

    Args:
        frame: From ``icl.measure_contributions``.
        value: What to plot: the mean over prompts of this column.
        by_answer: Whether demonstrations whose label is the right answer (``same_label``) have
            a panel of their own.
        width: Of the figure, in inches.

    Returns:
        The figure, not shown; its last axes are the colour bar.

    Raises:
        ValueError: If the table lacks a column.
    """
    needed = ["prompt", "layer", "demo", value, *(["same_label"] if by_answer else [])]
    check_table("plot_contributions", frame, needed, source="spade_lens.icl.measure_contributions")
    means = {}
    for task, rows in by_task(frame).items():
        groups = {task: rows}
        if by_answer:
            own = rows["same_label"].astype(bool)
            before = f"{task}, " if task else ""
            groups = {f"{before}{_SAME}": rows[own], f"{before}{_OTHER}": rows[~own]}
        for name, some in groups.items():
            if len(some):
                means[name] = summarise(some, value, by=["demo", "layer"])
    layers, demos = (sorted(frame[name].unique().tolist()) for name in ("layer", "demo"))
    most = max(float(table["mean"].abs().max()) for table in means.values()) or 1.0
    height = min(3.4, 0.5 + 0.16 * max(len(demos), 6))
    with mpl.rc_context(STYLE):
        across = 2 if len(means) > 1 else 1
        figure, panels = panel_grid(len(means), across=across, width=width, height=height)
        for (name, table), panel in zip(means.items(), panels, strict=True):
            mesh = _heat(panel, table, layers, demos, most)
            panel.set_title(name)
        panels[0].xaxis.set_major_locator(_some(layers))
        panels[0].xaxis.set_major_formatter(lambda x, _: f"{layers[round(x)]}")
        panels[0].yaxis.set_major_locator(_some(demos))
        panels[0].yaxis.set_major_formatter(lambda y, _: f"{demos[round(y)]}")
        panels[0].set_ylim(len(demos) - 0.5, -0.5)  # the first at the top, as in the prompt
        bar = figure.colorbar(mesh, ax=panels, aspect=30, fraction=0.05, pad=0.02)
        bar.set_label(f"{_LABELS[value]}\n(logit difference)", fontsize=8)
        bar.outline.set_visible(False)
        figure.supxlabel("layer (residual stream after so many blocks)", fontsize=8)
        figure.supylabel("demonstration (0 comes first)", fontsize=8)
        legend_above(figure)
    return figure


def plot_by_demonstration(
    frame: pd.DataFrame,
    value: Literal["shapley", "leave_one_out", "add_one_in"] = "shapley",
    *,
    layers: Sequence[int] | None = None,
    width: float = FULL_WIDTH,
) -> Figure:
    """Mean contributions by a demonstration's place in the prompt; a panel per layer.

    A line for demonstrations whose label is the right answer and one for all others, so that
    recency and a label's own push can be told apart.

    Example:
        >>> import pandas as pd
        >>> rows = {"prompt": [0, 1] * 4, "layer": 3, "demo": [0, 0, 1, 1] * 2,
        ...         "same_label": [True] * 4 + [False] * 4, "shapley": range(8)}
        >>> figure = plot_by_demonstration(pd.DataFrame(rows))
        >>> [t.get_text() for t in figure.legends[0].texts]
        ['label is the answer', 'label is another']

    Args:
        frame: From ``icl.measure_contributions``.
        value: What to plot: the mean over prompts of this column, with Student's interval where
            at least five prompts have such a demonstration at the place.
        layers: Which layers, in the panels' order; all by default.
        width: Of the figure, in inches.

    Returns:
        The figure, not shown. With several tasks, each has a row of panels.

    Raises:
        ValueError: If the table lacks a column or a layer, or has too much for a page.
    """
    needed = ["prompt", "layer", "demo", "same_label", value]
    source = "spade_lens.icl.measure_contributions"
    check_table("plot_by_demonstration", frame, needed, source=source)
    wanted = None if layers is None else [f"layer {layer}" for layer in layers]
    named = frame.assign(layer=[f"layer {layer}" for layer in frame["layer"]])
    rows = choose("plot_by_demonstration", named, "layer", wanted)
    task = ["task"] if "task" in frame.columns else []
    means = summarise(rows, value, by=[*task, "layer", "same_label", "demo"])
    means = means.sort_values("same_label", ascending=False, kind="stable")  # the answer's first
    order = list(rows["layer"].unique())
    means = means.sort_values("layer", key=lambda x: x.map(order.index), kind="stable")
    ends = ["low", "high"]
    means[ends] = means[ends].where(means["n"] >= _FEWEST)
    line = means["same_label"].astype(bool).map({True: _SAME, False: _OTHER})
    return line_figure(
        "plot_by_demonstration",
        means.assign(line=line, panel=means["layer"], x=means["demo"]),
        xlabel="demonstration (0 comes first)",
        ylabel=f"{_LABELS[value]}\n(logit difference)",
        width=width,
    )


def plot_effective_number(
    frame: pd.DataFrame, *, shots: int | None = None, width: float = FULL_WIDTH
) -> Figure:
    """How many demonstrations contribute in effect, by layer; a panel per task.

    Example:
        >>> import pandas as pd
        >>> found = {"layer": [3, 6], "mean": [2.0, 3.0], "low": [1.5, 2.5], "high": [2.5, 3.5]}
        >>> figure = plot_effective_number(pd.DataFrame(found), shots=4)
        >>> [t.get_text() for t in figure.legends[0].texts]
        ['effective number', 'all alike', 'noise alone']

    Args:
        frame: From :func:`spade_lens.stats.summarise`.
        shots: How many demonstrations there are. Lines show where the number would be if all of
            them did the same, and its expectation if Shapley values were nothing but noise,
            normal and alike for all: 1 + (shots - 1) 2 / π. Contributions that are few lie below
            the noise, those that are many and alike above it.
        width: Of the figure, in inches.

    Returns:
        The figure, not shown.

    Raises:
        ValueError: If the table lacks a column, or ``shots`` is not positive.
    """
    needed = ("layer", "mean", "low", "high")
    check_table("plot_effective_number", frame, needed, source="spade_lens.stats.summarise")
    if shots is not None and shots < 1:
        raise ValueError(f"shots={shots} was given; expected at least one demonstration.")
    # Of a normal direction the mean of (sum of |s|)^2 / (sum of s^2).
    known = {} if shots is None else {"all alike": shots, "noise alone": 1 + (shots - 1) * 2 / pi}
    figure = line_figure(
        "plot_effective_number",
        frame.assign(line="effective number", x=frame["layer"]),
        ylabel="demonstrations that\ncontribute in effect",
        levels=[Level(label, value) for label, value in known.items()],
        across=2,
        height=2.0,
        width=width,
    )
    figure.axes[0].set_ylim(bottom=0)
    return figure


def _heat(
    panel: Axes, table: pd.DataFrame, layers: list[int], demos: list[int], most: float
) -> QuadMesh:
    cells = table.pivot(index="demo", columns="layer", values="mean").reindex(demos, columns=layers)
    # White is 0: the map is symmetric, with one scale for all panels.
    colors: dict[str, Any] = {"cmap": "RdBu_r", "vmin": -most, "vmax": most}
    places = range(len(layers)), range(len(demos))
    mesh = panel.pcolormesh(*places, cells.to_numpy(dtype=float), shading="nearest", **colors)
    sure = table[(table["low"] > 0) | (table["high"] < 0)]
    x = [layers.index(layer) for layer in sure["layer"]]
    y = [demos.index(demo) for demo in sure["demo"]]
    panel.plot(x, y, ls="none", marker="o", ms=1.4, color="black", label=_SURE if x else None)
    panel.grid(visible=False)
    return mesh


def _some(values: list[int]) -> FixedLocator:
    """Ticks at round places among these, at most eight."""
    places = MaxNLocator(nbins=8, integer=True).tick_values(0, len(values) - 1)
    return FixedLocator([place for place in places if 0 <= place < len(values)])
