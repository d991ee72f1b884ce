"""Accuracy or agreement of lenses by layer: one panel per task, one line per lens."""

from collections.abc import Sequence

import pandas as pd
from matplotlib.figure import Figure

from spade_lens.plots.lines import Layout, Level, choose, label_of, line_figure, of_measure
from spade_lens.plots.registry import figure
from spade_lens.plots.style import by_task, line_styles
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
