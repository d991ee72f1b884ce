"""Accuracy or agreement by layer: one panel per task, one line per lens."""

from collections.abc import Sequence
from math import ceil
from typing import Literal

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from spade_lens.plots.style import FULL_WIDTH, STYLE, PageFigure, line_styles, text_width
from spade_lens.report import full_model_accuracy

_LABELS = {"accuracy": "accuracy", "agreement": "agreement\nwith the full model"}
_PANELS_ACROSS = 3


def plot_by_layer(
    summary: pd.DataFrame,
    value: Literal["accuracy", "agreement"] = "accuracy",
    *,
    lenses: Sequence[str] | None = None,
    width: float = FULL_WIDTH,
) -> Figure:
    """Lines with their intervals, by layer.

    Example:
        >>> from spade_lens.report import summarise
        >>> frame = read([LogitLens(model), Spade(model)], prompts).to_frame()
        >>> figure = plot_by_layer(summarise(frame), "agreement")
        >>> len(figure.axes)
        1

    Args:
        summary: From :func:`spade_lens.report.summarise`, by lens and layer, and by task for
            more than one panel.
        value: What to plot. With accuracy, a dashed line shows the full model's own, where the
            summary tells it (a lens that agrees with the model everywhere has its accuracy).
        lenses: Which lenses, in the legend's order; by default all.
        width: Of the figure, in inches.

    Returns:
        The figure, not shown.

    Raises:
        ValueError: If the summary lacks the measure, a column or a lens.
    """
    needed = {"lens", "layer", "measure", "mean", "low", "high"}
    if not needed <= set(summary.columns):
        raise ValueError(
            f"plot_by_layer needs the columns {sorted(needed)}; this table has "
            f"{list(summary.columns)}. Make it with spade_lens.report.summarise."
        )
    rows = summary[summary["measure"] == value]
    if rows.empty:
        raise ValueError(
            f"There is no {value!r} in this summary, only {sorted(summary['measure'].unique())}. "
            "Accuracy needs prompts with a target."
        )
    present = list(rows["lens"].unique())
    lenses = present if lenses is None else list(lenses)
    unknown = [lens for lens in lenses if lens not in present]
    if unknown:
        raise ValueError(f"No lens {unknown} in this summary, only {present}.")
    tasks = list(rows["task"].unique()) if "task" in rows.columns else [None]
    full = full_model_accuracy(summary) if value == "accuracy" else None

    across = min(len(tasks), _PANELS_ACROSS)
    down = ceil(len(tasks) / across)
    with mpl.rc_context(STYLE):
        figure = PageFigure(figsize=(width, 0.6 + 1.75 * down), layout="constrained")
        panels = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False)
        for number, panel in enumerate(panels.flat):
            if number >= len(tasks):
                panel.remove()
                continue
            task = tasks[number]
            _panel(panel, rows if task is None else rows[rows["task"] == task], lenses)
            if full is not None:
                own = full if task is None else full[full["task"] == task]
                for mean in own["mean"]:
                    panel.axhline(mean, color="black", lw=0.9, ls=(0, (4, 2)), label="full model")
            panel.set_title("" if task is None else str(task))
            # With the last row not full, the panels above its gap need their own layer numbers.
            if number + across >= len(tasks):
                panel.tick_params(labelbottom=True)
        panels[0, 0].set_ylim(-0.03, 1.03)
        panels[0, 0].set_yticks([0, 0.25, 0.5, 0.75, 1], ["0", "", "0.5", "", "1"])
        first, last = rows["layer"].min(), rows["layer"].max()
        margin = 0.03 * max(1, last - first)
        panels[0, 0].set_xlim(first - margin, last + margin)
        panels[0, 0].xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))
        figure.supxlabel("layer (residual stream after so many blocks)", fontsize=8)
        figure.supylabel(_LABELS[value], fontsize=8)
        _legend(figure)
    return figure


def _panel(panel: Axes, rows: pd.DataFrame, lenses: Sequence[str]) -> None:
    styles = line_styles(lenses)
    for lens in lenses:
        line = rows[rows["lens"] == lens].sort_values("layer")
        style = styles[lens]
        panel.fill_between(
            line["layer"], line["low"], line["high"], color=style["color"], alpha=0.16, lw=0
        )
        panel.plot(line["layer"], line["mean"], label=lens, clip_on=False, zorder=3, **style)


def _legend(figure: Figure) -> None:
    """One legend above all panels, where it covers nothing."""
    entries: dict[str, Artist] = {}
    for panel in figure.axes:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    columns = _legend_columns(list(entries), figure.get_figwidth() * 72)
    rows = ceil(len(entries) / columns)
    figure.set_figheight(figure.get_figheight() + 0.16 * (rows - 1))
    figure.legend(
        list(entries.values()),
        list(entries),
        loc="outside upper center",
        ncols=columns,
        frameon=False,
        handlelength=2.6,
    )


def _legend_columns(labels: Sequence[str], points: float) -> int:
    """The most columns that fit into a width, as matplotlib fills them: one after the other."""
    size = float(STYLE["legend.fontsize"])
    # A line, the pad behind it, and the space to the next column, in letters' sizes.
    beside = (2.6 + 0.8 + 2.0) * size
    widths = [text_width(label, size) + beside for label in labels]
    for columns in range(len(labels), 1, -1):
        held = np.array_split(widths, columns)
        if sum(column.max() for column in held) <= points:
            return columns
    return 1
