"""How good a fitted lens is on text that it was not fitted on, layer by layer."""

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

_LABELS = {
    "kl_to_model": "KL from the full model (nats)",
    "agrees_with_model": "agreement with the full model",
    "kl_to_spade": "KL from SPADE (nats)",
    "agrees_with_spade": "agreement with SPADE",
}

Value = Literal["kl_to_model", "agrees_with_model", "kl_to_spade", "agrees_with_spade"]


def plot_held_out(
    held_out: pd.DataFrame, value: Value | None = "kl_to_model", *, width: float = FULL_WIDTH
) -> Figure:
    """A held-out figure by layer, one line per lens.

    Divergences are KL(reference || lens), lower is better; agreement is of the likeliest tokens.

    Example:
        >>> lens = sl.fit("spade", model, n_pieces=30, n_tokens=16, per_piece="all")
        >>> len(plot_held_out(lens.held_out, None).axes)
        4

    Args:
        held_out: From :attr:`spade_lens.lenses.linear.LinearLens.held_out`, of one lens or of
            several put together; the rows that they share count once.
        value: Which figure; None for all four, a panel each.
        width: Of the figure, in inches.

    Returns:
        The figure, not shown.

    Raises:
        ValueError: If the table has no rows or lacks a column, the value is none of those, or two
            different rows are of one lens and layer.
    """
    if value is not None and value not in _LABELS:
        raise ValueError(f"value={value!r} was given; expected one of {list(_LABELS)} or None.")
    values = list(_LABELS) if value is None else [value]
    source = "LinearLens.held_out of a lens fitted here"
    check_table("plot_held_out", held_out, ["lens", "layer", *values], source=source)
    # The logit lens and SPADE stand in the table of every lens.
    rows = held_out[["lens", "layer", *values]].drop_duplicates()
    if rows.duplicated(["lens", "layer"]).any():
        twice = rows.loc[rows.duplicated(["lens", "layer"]), "lens"].unique()
        raise ValueError(
            f"Several different rows of one layer are of {list(twice)}. Fit lenses on the same "
            "text to compare them, and give each a name of its own."
        )
    with mpl.rc_context(STYLE):
        height = 2.6 if len(values) == 1 else 1.9
        figure, panels = panel_grid(len(values), across=2, width=width, height=height, sharey=False)
        for name, panel in zip(values, panels, strict=True):
            _panel(panel, rows, name)
        panels[0].xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))
        figure.supxlabel("layer (residual stream after so many blocks)", fontsize=8)
        legend_above(figure)
    return figure


def _panel(panel: Axes, rows: pd.DataFrame, value: str) -> None:
    looks = line_styles(list(rows["lens"].unique()))
    for lens, look in looks.items():
        line = rows[rows["lens"] == lens].sort_values("layer")
        panel.plot(line["layer"], line[value], label=lens, clip_on=False, zorder=3, **look)
    panel.set_ylabel(_LABELS[value])
    if value.startswith("agrees"):
        panel.set_ylim(-0.03, 1.03)
        panel.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0", "", "0.5", "", "1"])
    else:
        panel.set_ylim(bottom=0)
