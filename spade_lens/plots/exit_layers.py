"""Early exit: where prompts exit, and what an exit at every layer would be worth."""

from itertools import pairwise
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator

from spade_lens.plots.lines import Layout, line_figure, means
from spade_lens.plots.registry import figure
from spade_lens.plots.style import by_task, legend_above, panel_grid

_GROUP = 0.84
"""How much of a layer's place on the axis its bars fill."""
_CURVES = {
    "confidence": "mean confidence of the check",
    "agrees": "agreement with the full model",
    "correct": "accuracy",
}


@figure(
    "exit_table",
    needs=("check", "keep", "layer", "prompt", "confidence", "agrees"),
    source="spade_lens.exits.exit_tables",
)
def plot_exit_table(frame: pd.DataFrame) -> Figure:
    """Draw what an exit at every candidate layer would be worth, beside the mean confidence.

    Example:
        >>> from spade_lens.exits import exit_tables
        >>> drawing = sl.plot(exit_tables(model, prompts, LogitLens(model), layers=[1, 2, 3]))
        >>> [t.get_text() for t in drawing.legends[0].texts]
        ['mean confidence of the check', 'agreement with the full model']

    Args:
        frame: From :meth:`spade_lens.exits.ExitTable.to_frame`, of one or several tables.

    Returns:
        The figure, with a panel per check (and keep set, where there are several).
    """
    points = [
        means(frame, column, ["check", "keep", "layer"]).assign(line=label)
        for column, label in _CURVES.items()
        if column in frame.columns and frame[column].notna().any()
    ]
    table = pd.concat(points)
    several = frame["keep"].nunique() > 1
    panel = table["check"] + (", answer from " + table["keep"] if several else "")
    return line_figure(
        table.assign(panel=panel, x=table["layer"]),
        Layout(ylabel="mean over prompts", fraction=True, across=2, height=2.0),
    )


@figure(
    "exit_layers",
    needs=("policy", "exit_layer", "early"),
    source="spade_lens.exits.ExitTrace.to_frame",
    fits=lambda frame: "compute" not in frame.columns,  # not the means of a sweep
)
def plot_exit_layers(traces: pd.DataFrame, *, n_layers: int | None = None) -> Figure:
    """Draw where prompts exit: the fraction by exit layer, policies side by side.

    Prompts that ran to the end have a hatched bar of their own.

    Example:
        >>> from spade_lens.exits import FixedLayer, Threshold, exit_tables
        >>> [table] = exit_tables(model, prompts, LogitLens(model), layers=[2, 3])
        >>> drawing = sl.plot([table.simulate(p) for p in (FixedLayer(2), Threshold(0.5))])

    Args:
        traces: From :meth:`spade_lens.exits.ExitTrace.to_frame`, of one or several policies,
            with ``task`` added for more than one panel. Rows of one policy are counted together:
            traces of several lenses need policies' names of their own.
        n_layers: The number of the model's blocks, where the axis ends; by default what prompts
            that ran to the end say, or the last layer where one exited.
    """
    last = _last_layer(traces, n_layers)
    policies = list(traces["policy"].unique())
    tasks = by_task(traces)
    early = sorted(traces.loc[traces["early"].astype(bool), "exit_layer"].unique().tolist())
    # Candidate layers are often some layers apart, and bars as wide as that allows.
    gap = min((b - a for a, b in pairwise(early)), default=1)
    # The bar of the prompts that ran to the end stands apart from the last layer's.
    end = last + max(2, gap)
    layers = range(early[0] if early else last - 1, last)
    drawing, panels = panel_grid(len(tasks), across=2)
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
    drawing.supxlabel("exit layer (residual stream after so many blocks)")
    drawing.supylabel("fraction of prompts")
    legend_above(drawing)
    return drawing


def _bars(
    panel: Axes, rows: pd.DataFrame, layers: range, end: int, number: int, of: int, gap: int
) -> None:
    """Draw the bars of policy ``number`` of so many, all of whose rows are given."""
    width = gap * _GROUP / of
    offset = (number + 0.5) * width - gap * _GROUP / 2
    # Lightness rises along cividis, so that bars differ in grey and to all eyes.
    color = mpl.colormaps["cividis"](np.linspace(0.12, 0.88, max(of, 2))[number])
    early = rows["early"].astype(bool)
    left = rows.loc[early, "exit_layer"].value_counts().reindex(layers, fill_value=0)
    fractions = left.to_numpy() / len(rows)
    panel.bar(
        np.array(layers) + offset, fractions, width, color=color, label=rows["policy"].iloc[0]
    )
    # Wide enough for the hatch, which takes the colour of the edge.
    wider = max(1.0, 2 / gap)
    hatched: dict[str, Any] = {"facecolor": "white", "edgecolor": color, "hatch": "/////"}
    stayed = float((~early).mean())
    panel.bar(end + wider * offset, stayed, wider * width, lw=0.8, **hatched)


def _last_layer(traces: pd.DataFrame, n_layers: int | None) -> int:
    stayed = traces.loc[~traces["early"].astype(bool), "exit_layer"].unique().tolist()
    if n_layers is None:
        n_layers = int(stayed[0] if stayed else traces["exit_layer"].max() + 1)
    deeper = traces["exit_layer"].max() > n_layers
    if deeper or any(layer != n_layers for layer in stayed):
        raise ValueError(
            f"With n_layers={n_layers}, prompts that ran to the end have the exit layers "
            f"{sorted(stayed)} and the deepest exit is at {traces['exit_layer'].max()}; expected "
            "traces of one depth. Draw models of other depths in figures of their own."
        )
    return n_layers
