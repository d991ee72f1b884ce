"""How much each demonstration contributes: by layer, by its place, and how many in effect."""

from collections.abc import Sequence
from math import pi
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator

from spade_lens.plots.lines import Layout, Level, choose, label_of, line_figure, means, of_measure
from spade_lens.plots.registry import figure
from spade_lens.plots.style import BY_LAYER, by_task, legend_above, panel_grid

_LABELS = {
    "shapley": "Shapley value",
    "leave_one_out": "loss when left out",
    "add_one_in": "gain when alone",
}
_SOURCE = "spade_lens.icl.measure_contributions"
_FEWEST = 5
"""Prompts of an interval that is drawn: those of two or three are as wide as the page is high."""
_SURE = "95% interval excludes 0"
_SAME, _OTHER = "label is the answer", "label is another"


@figure("contributions", needs=("prompt", "layer", "demo", "shapley"), source=_SOURCE)
def plot_contributions(
    frame: pd.DataFrame, value: str = "shapley", *, by_answer: bool = False
) -> Figure:
    """Draw mean contributions to the logit difference, demonstration by layer.

    Dots mark cells whose 95% interval over prompts (Student's) excludes 0. Where nothing
    contributes, one cell in twenty has a dot by chance.

    Example:
        >>> import pandas as pd
        >>> rows = {"prompt": [0, 1] * 4, "layer": [3] * 4 + [6] * 4, "demo": [0, 0, 1, 1] * 2,
        ...         "shapley": range(8)}
        >>> drawing = sl.plot(pd.DataFrame(rows))
        >>> len(drawing.axes)  # the panel and the colour bar
        2

    Args:
        frame: From :func:`spade_lens.icl.measure_contributions`.
        value: The column whose mean over prompts is drawn: ``"shapley"``, ``"leave_one_out"`` or
            ``"add_one_in"``.
        by_answer: Whether demonstrations whose label is the right answer (``same_label``) have
            a panel of their own.

    Returns:
        The figure, with a panel per task; its last axes are the colour bar.
    """
    label = label_of(value, _LABELS, frame)
    maps = {}
    for task, rows in by_task(frame).items():
        groups = {task: rows}
        if by_answer:
            label_of("same_label", {"same_label": ""}, frame)
            own = rows["same_label"].astype(bool)
            before = f"{task}, " if task else ""
            groups = {f"{before}{_SAME}": rows[own], f"{before}{_OTHER}": rows[~own]}
        for name, group in groups.items():
            if len(group):
                maps[name] = means(group, value, ["demo", "layer"])
    layers, demos = (sorted(frame[name].unique().tolist()) for name in ("layer", "demo"))
    most = max(float(table["mean"].abs().max()) for table in maps.values()) or 1.0
    height = min(3.4, 0.5 + 0.16 * max(len(demos), 6))
    drawing, panels = panel_grid(len(maps), across=min(2, len(maps)), height=height)
    for (name, table), panel in zip(maps.items(), panels, strict=True):
        mesh = _heat(panel, table, layers, demos, most)
        panel.set_title(name)
    panels[0].xaxis.set_major_locator(_ticks(layers))
    panels[0].xaxis.set_major_formatter(lambda x, _: f"{layers[round(x)]}")
    panels[0].yaxis.set_major_locator(_ticks(demos))
    panels[0].yaxis.set_major_formatter(lambda y, _: f"{demos[round(y)]}")
    panels[0].set_ylim(len(demos) - 0.5, -0.5)  # the first at the top, as in the prompt
    bar = drawing.colorbar(mesh, ax=panels, aspect=30, fraction=0.05, pad=0.02)
    bar.set_label(f"{label}\n(logit difference)")
    bar.outline.set_visible(False)
    drawing.supxlabel(BY_LAYER)
    drawing.supylabel("demonstration (0 comes first)")
    legend_above(drawing)
    return drawing


@figure(
    "by_demonstration",
    needs=("prompt", "layer", "demo", "same_label"),
    source=_SOURCE,
    fits=False,
)
def plot_by_demonstration(
    frame: pd.DataFrame, value: str = "shapley", *, layers: Sequence[int] | None = None
) -> Figure:
    """Draw mean contributions by a demonstration's place in the prompt, a panel per layer.

    One line is of demonstrations whose label is the right answer, one of all others. So recency
    and the effect of a label itself can be distinguished.

    Example:
        >>> import pandas as pd
        >>> rows = {"prompt": [0, 1] * 4, "layer": 3, "demo": [0, 0, 1, 1] * 2,
        ...         "same_label": [True] * 4 + [False] * 4, "shapley": range(8)}
        >>> drawing = sl.plot(pd.DataFrame(rows), "by_demonstration")
        >>> [t.get_text() for t in drawing.legends[0].texts]
        ['label is the answer', 'label is another']

    Args:
        frame: From :func:`spade_lens.icl.measure_contributions`.
        value: As in ``"contributions"``. Student's interval is drawn where at least five prompts
            have such a demonstration at the place.
        layers: Which layers, in the panels' order; all by default.
    """
    label = label_of(value, _LABELS, frame)
    rows = choose(frame, "layer", layers)
    points = means(rows, value, ["layer", "same_label", "demo"])
    points = points.sort_values("same_label", ascending=False, kind="stable")  # the answer's first
    order = list(rows["layer"].unique())
    points = points.sort_values("layer", key=lambda x: x.map(order.index), kind="stable")
    ends = ["low", "high"]
    points[ends] = points[ends].where(points["n"] >= _FEWEST)
    line = points["same_label"].astype(bool).map({True: _SAME, False: _OTHER})
    panel = "layer " + points["layer"].astype(str)
    return line_figure(
        points.assign(line=line, panel=panel, x=points["demo"]),
        Layout(xlabel="demonstration (0 comes first)", ylabel=f"{label}\n(logit difference)"),
    )


@figure(
    "effective_number",
    needs=("layer", "measure", "mean", "low", "high"),
    source="spade_lens.stats.summarise(contributions, 'effective')",
    fits=lambda frame: bool((frame["measure"] == "effective").all()),
)
def plot_effective_number(frame: pd.DataFrame, *, shots: int | None = None) -> Figure:
    """Draw how many demonstrations contribute in effect, by layer, a panel per task.

    Example:
        >>> import pandas as pd
        >>> rows = {"layer": [3, 6], "measure": "effective", "mean": [2.0, 3.0],
        ...         "low": [1.5, 2.5], "high": [2.5, 3.5]}
        >>> drawing = sl.plot(pd.DataFrame(rows), shots=4)
        >>> [t.get_text() for t in drawing.legends[0].texts]
        ['effective number', 'all alike', 'noise alone']

    Args:
        frame: From ``stats.summarise(contributions, "effective")``.
        shots: How many demonstrations there are. Lines show where the number would be if all of
            them did the same, and its expectation if Shapley values were nothing but noise,
            normal and alike for all: 1 + (shots - 1) 2 / π. Contributions that are few lie below
            the noise, those that are many and alike above it.
    """
    if shots is not None and shots < 1:
        raise ValueError(f"shots={shots} was given; expected at least one demonstration.")
    rows = of_measure(frame, "effective", ())
    # Of a normal direction the mean of (sum of |s|)^2 / (sum of s^2).
    levels = {} if shots is None else {"all alike": shots, "noise alone": 1 + (shots - 1) * 2 / pi}
    drawing = line_figure(
        rows.assign(line="effective number", x=rows["layer"]),
        Layout(ylabel="demonstrations that\ncontribute in effect", across=2, height=2.0),
        levels=[Level(label, value) for label, value in levels.items()],
    )
    drawing.axes[0].set_ylim(bottom=0)
    return drawing


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


def _ticks(values: list[int]) -> FixedLocator:
    """At most eight ticks, at round places among the values."""
    places = MaxNLocator(nbins=8, integer=True).tick_values(0, len(values) - 1)
    return FixedLocator([place for place in places if 0 <= place < len(values)])
