"""How much each demonstration contributes at each layer, as a heat map."""

from typing import Any, Literal

import matplotlib as mpl
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator

from spade_lens.plots.style import FULL_WIDTH, STYLE, by_task, check_table, legend_above, panel_grid
from spade_lens.report import prompt_means

_LABELS = {
    "shapley": "Shapley value",
    "leave_one_out": "lost when left out",
    "add_one_in": "gained when alone",
}
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
                means[name] = prompt_means(some, value, by=["demo", "layer"])
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
