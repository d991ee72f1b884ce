"""How good a fitted lens is on text that it was not fitted on, layer by layer."""

import pandas as pd
from matplotlib.figure import Figure

from spade_lens.plots.lines import Layout, label_of, line_figure
from spade_lens.plots.registry import figure
from spade_lens.plots.style import fraction_axis, line_styles

_LABELS = {
    "kl_to_model": "KL from the full model (nats)",
    "agrees_with_model": "agreement with the full model",
    "kl_to_spade": "KL from SPADE (nats)",
    "agrees_with_spade": "agreement with SPADE",
}


@figure(
    "held_out",
    needs=("lens", "layer", "kl_to_model"),
    source="LinearLens.held_out of a lens fitted here",
)
def plot_held_out(held_out: pd.DataFrame, value: str | None = "kl_to_model") -> Figure:
    """Draw how close fitted lenses come to the model on held-out text, by layer.

    Divergences are KL(reference || lens), lower is better; agreement is of the likeliest tokens.

    Example:
        >>> lens = sl.fit("l-spade", model, n_pieces=30, n_tokens=16, per_piece="all")
        >>> len(sl.plot(lens.held_out, value=None).axes)
        4

    Args:
        held_out: From :attr:`spade_lens.lenses.linear.LinearLens.held_out`, of one lens or of
            several put together; the rows that they share count once.
        value: ``"kl_to_model"``, ``"agrees_with_model"``, ``"kl_to_spade"`` or
            ``"agrees_with_spade"``; None for all four, a panel each.
    """
    values = list(_LABELS) if value is None else [value]
    labels = {name: label_of(name, _LABELS, held_out) for name in values}
    # The logit lens and SPADE stand in the table of every lens.
    rows = held_out[["lens", "layer", *values]].drop_duplicates()
    twice = rows.loc[rows.duplicated(["lens", "layer"]), "lens"].unique()
    if len(twice):
        raise ValueError(
            f"Several different rows of one layer are of {list(twice)}. Fit lenses on the same "
            "text to compare them, and give each a name of its own."
        )
    table = pd.concat(rows.assign(panel=labels[name], mean=rows[name]) for name in values)
    drawing = line_figure(
        table.assign(line=table["lens"], x=table["layer"], low=float("nan"), high=float("nan")),
        Layout(ylabel="on held-out text", sharey=False, across=2, height=2.0),
        looks=line_styles(list(rows["lens"].unique())),
    )
    for name, panel in zip(values, drawing.axes, strict=True):
        if name.startswith("agrees"):
            fraction_axis(panel)
        else:
            panel.set_ylim(bottom=0)
    return drawing
