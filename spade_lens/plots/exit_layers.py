"""Where prompts leave: shares of them by exit layer, policies side by side."""

from itertools import pairwise
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator

from spade_lens.plots.style import FULL_WIDTH, STYLE, by_task, check_table, legend_above, panel_grid

_GROUP = 0.84
"""Of a layer's place on the axis, how much its bars fill."""


def plot_exit_layers(
    traces: pd.DataFrame, *, n_layers: int | None = None, width: float = FULL_WIDTH
) -> Figure:
    """Bars by exit layer; prompts that ran to the end have a hatched bar of their own.

    Example:
        >>> from spade_lens.exits import FixedLayer, Threshold, exit_tables, simulate
        >>> [table] = exit_tables(model, prompts, LogitLens(model), layers=[2, 3])
        >>> traces = [simulate(table, p).to_frame() for p in (FixedLayer(2), Threshold(0.5))]
        >>> figure = plot_exit_layers(pd.concat(traces), n_layers=model.n_layers)

    Args:
        traces: From :meth:`spade_lens.exits.ExitTrace.to_frame`, of one or several policies put
            together, with ``task`` added for more than one panel. Rows of one policy are counted
            together: traces of several lenses need policies' names of their own.
        n_layers: The number of the model's blocks, where the axis ends; by default what prompts
            that ran to the end say, or the last layer where one left.
        width: Of the figure, in inches.

    Returns:
        The figure, not shown.

    Raises:
        ValueError: If the table lacks a column, or its prompts are of models of other depths
            than ``n_layers`` or than each other.
    """
    columns = ("policy", "exit_layer", "early")
    check_table("plot_exit_layers", traces, columns, source="spade_lens.exits.ExitTrace.to_frame")
    last = _last_layer(traces, n_layers)
    policies = list(traces["policy"].unique())
    tasks = by_task(traces)
    early = sorted(traces.loc[traces["early"].astype(bool), "exit_layer"].unique().tolist())
    # Candidate layers are often some layers apart, and bars as wide as that allows.
    gap = min((b - a for a, b in pairwise(early)), default=1)
    # The bar of the prompts that stayed stands apart from the last layer's.
    end = last + max(2, gap)
    layers = range(early[0] if early else last - 1, last)
    with mpl.rc_context(STYLE):
        figure, panels = panel_grid(len(tasks), across=2, width=width)
        for (task, rows), panel in zip(tasks.items(), panels, strict=True):
            for number, policy in enumerate(policies):
                here = rows[rows["policy"] == policy]
                if len(here):
                    _bars(panel, here, layers, end, number, len(policies), gap)
            panel.set_title(task)
            panel.grid(visible=False, axis="x")
        panels[0].set_xlim(layers[0] - 0.6 * gap, end + 0.6 * max(gap, 1.6))
        ticks = list(MaxNLocator(nbins=7, integer=True).tick_values(layers[0], layers[-1]))
        if 1 < gap and len(early) <= 9:
            ticks = early
        panels[0].xaxis.set_major_locator(FixedLocator([*(t for t in ticks if t in layers), end]))
        panels[0].xaxis.set_major_formatter(lambda x, _: "to the\nend" if x == end else f"{x:g}")
        figure.supxlabel("exit layer (residual stream after so many blocks)", fontsize=8)
        figure.supylabel("share of prompts", fontsize=8)
        legend_above(figure)
    return figure


def _bars(
    panel: Axes, rows: pd.DataFrame, layers: range, end: int, number: int, of: int, gap: int
) -> None:
    """Those of policy ``number`` of so many, all of whose rows are given."""
    width = gap * _GROUP / of
    offset = (number + 0.5) * width - gap * _GROUP / 2
    # Lightness rises along cividis, so that bars are told apart in grey and by all eyes.
    color = mpl.colormaps["cividis"](np.linspace(0.12, 0.88, max(of, 2))[number])
    early = rows["early"].astype(bool)
    left = rows.loc[early, "exit_layer"].value_counts().reindex(layers, fill_value=0)
    shares = left.to_numpy() / len(rows)
    panel.bar(np.array(layers) + offset, shares, width, color=color, label=rows["policy"].iloc[0])
    # Wide enough for the hatch, which takes the colour of the edge.
    wider = max(1.0, 2 / gap)
    hatched: dict[str, Any] = {"facecolor": "white", "edgecolor": color, "hatch": "/////"}
    share = float((~early).mean())
    panel.bar(end + wider * offset, share, wider * width, lw=0.8, **hatched)


def _last_layer(traces: pd.DataFrame, n_layers: int | None) -> int:
    stayed = traces.loc[~traces["early"].astype(bool), "exit_layer"].unique().tolist()
    if n_layers is None:
        n_layers = int(stayed[0] if stayed else traces["exit_layer"].max())
    deeper = traces["exit_layer"].max() > n_layers
    if deeper or any(layer != n_layers for layer in stayed):
        raise ValueError(
            f"With n_layers={n_layers}, prompts that ran to the end have the exit layers "
            f"{sorted(stayed)} and the deepest exit is at {traces['exit_layer'].max()}; expected "
            "traces of one depth. Draw models of other depths in figures of their own."
        )
    return n_layers
