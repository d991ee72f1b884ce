"""Accuracy or agreement by layer: one panel per task, one line per lens."""

from collections.abc import Sequence
from typing import Literal

import matplotlib as mpl
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from spade_lens.plots.style import (
    FULL_WIDTH,
    STYLE,
    check_table,
    legend_above,
    line_styles,
    panel_grid,
)
from spade_lens.stats.summary import full_model_accuracy

_LABELS = {"accuracy": "accuracy", "agreement": "agreement\nwith the full model"}


def plot_by_layer(
    summary: pd.DataFrame,
    value: Literal["accuracy", "agreement"] = "accuracy",
    *,
    lenses: Sequence[str] | None = None,
    width: float = FULL_WIDTH,
) -> Figure:
    """Lines with their intervals, by layer.

    Example:
        >>> from spade_lens.stats import summarise
        >>> frame = read(prompts, [LogitLens(model), Spade(model)]).to_frame()
        >>> figure = plot_by_layer(summarise(frame), "agreement")
        >>> len(figure.axes)
        1

    Args:
        summary: From :func:`spade_lens.stats.summarise`, by lens and layer, and by task for
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
    needed = ("lens", "layer", "measure", "mean", "low", "high")
    check_table("plot_by_layer", summary, needed, source="spade_lens.stats.summarise")
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

    with mpl.rc_context(STYLE):
        figure, panels = panel_grid(len(tasks), width=width)
        for task, panel in zip(tasks, panels, strict=True):
            _panel(panel, rows if task is None else rows[rows["task"] == task], lenses)
            if full is not None:
                own = full if task is None else full[full["task"] == task]
                for mean in own["mean"]:
                    panel.axhline(mean, color="black", lw=0.9, ls=(0, (4, 2)), label="full model")
            panel.set_title("" if task is None else str(task))
        panels[0].set_ylim(-0.03, 1.03)
        panels[0].set_yticks([0, 0.25, 0.5, 0.75, 1], ["0", "", "0.5", "", "1"])
        first, last = rows["layer"].min(), rows["layer"].max()
        margin = 0.03 * max(1, last - first)
        panels[0].set_xlim(first - margin, last + margin)
        panels[0].xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))
        figure.supxlabel("layer (residual stream after so many blocks)", fontsize=8)
        figure.supylabel(_LABELS[value], fontsize=8)
        legend_above(figure)
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
