"""How good lenses are by layer: on prompts, and fitted ones on text not fitted on."""

from collections.abc import Sequence

import pandas as pd
from matplotlib.figure import Figure

from spade_lens.plots.lines import Layout, Level, choose, label_of, line_figure, of_measure
from spade_lens.plots.registry import figure
from spade_lens.plots.style import by_task, fraction_axis, line_styles
from spade_lens.stats.summary import full_model_accuracy, summarise

_LABELS = {"accuracy": "accuracy", "agreement": "agreement\nwith the full model"}


@figure("by_layer", needs=("lens", "layer"), source="spade_lens.read or stats.summarise")
def plot_by_layer(
    table: pd.DataFrame, value: str | None = None, *, lenses: Sequence[str] | None = None
) -> Figure:
    """Draw how often lenses are right, or agree with the model, by layer.

    Example:
        >>> readout = sl.read(["ab->AB,cd->", "q->"], ["logit", "spade"], model=model)
        >>> len(sl.plots.plot_by_layer(readout, "agreement").axes)
        1

    Args:
        table: A readout, or a summary of one from :func:`spade_lens.stats.summarise`; with
            ``task`` for a panel per task.
        value: ``"accuracy"`` or ``"agreement"``; by default accuracy, if the table has it. With
            accuracy, a dashed line shows the full model's own, where the table tells it: a lens
            that agrees with the model on every prompt has its accuracy.
        lenses: Which lenses, in the legend's order; by default all.

    Returns:
        The figure, not shown.

    Raises:
        ValueError: If the table lacks the value or a lens.
    """
    summary = table
    if "measure" not in table.columns:
        by = [c for c in ("model", "task", "lens", "layer") if c in table.columns]
        by = [c for c in by if c != "model" or table["model"].nunique() > 1]
        summary = summarise(table, by=by)
    if value is None:
        value = "accuracy" if "accuracy" in set(summary["measure"]) else "agreement"
    ylabel = label_of(value, _LABELS)
    rows = choose(of_measure(summary, value, ()), "lens", lenses)
    full = full_model_accuracy(summary) if value == "accuracy" else pd.DataFrame()
    levels = [
        Level("full model", mean, task or None)
        for task, own in by_task(full).items()
        for mean in (own["mean"] if len(own) else ())
    ]
    return line_figure(
        rows.assign(line=rows["lens"], x=rows["layer"]),
        Layout(ylabel=ylabel, fraction=True),
        levels=levels,
        looks=line_styles(list(rows["lens"].unique())),
    )


_FITTED = {
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
    values = list(_FITTED) if value is None else [value]
    labels = {name: label_of(name, _FITTED, held_out) for name in values}
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
