"""Summaries as text for a terminal."""

from collections.abc import Sequence
from itertools import groupby
from math import ceil

import pandas as pd

from spade_lens.report.intervals import full_model_accuracy

_HEADINGS = {"accuracy": "accuracy [95% interval]", "agreement": "agreement with the full model"}
_CELL = 15
_LABEL = 7


def layer_table(summary: pd.DataFrame, *, layers: Sequence[int] | None = None) -> str:
    """One block of lines per task: accuracy and agreement of every lens, by layer.

    Neighbouring layers with the same numbers share a line. With two measures of three lenses it
    is 97 columns wide; with more lenses the measures come one below the other.

    Args:
        summary: From :func:`spade_lens.report.summarise`, by lens and layer and perhaps by task.
        layers: Which layers to show; by default every third or so, and for every lens the first
            layer at which it agrees with the model on half of the prompts.
    """
    if "task" not in summary.columns:
        return _block(summary, layers)
    tasks = summary["task"].unique()
    return "\n\n".join(_block(summary[summary["task"] == t], layers, str(t)) for t in tasks)


def first_layers(summary: pd.DataFrame, *, agreement: float = 0.9) -> pd.DataFrame:
    """The first layer at which each lens agrees with the model often enough.

    Args:
        summary: From :func:`spade_lens.report.summarise`, by lens and layer and perhaps more.
        agreement: The least share of prompts.

    Returns:
        One row per task (or whatever else groups the summary), one column per lens; missing
        where a lens never does.
    """
    rows = summary[summary["measure"] == "agreement"]
    values = ("lens", "layer", "measure", "mean", "low", "high", "n")
    group = [c for c in rows.columns if c not in values]
    lenses = list(rows["lens"].unique())
    keys = rows[group].drop_duplicates() if group else pd.DataFrame(index=[0])
    reached = rows[rows["mean"] >= agreement].groupby([*group, "lens"], sort=False)["layer"].min()
    found = reached.astype("Int64").unstack("lens").reindex(columns=lenses)
    if not group:
        return pd.DataFrame({lens: [reached.get(lens, pd.NA)] for lens in lenses}, dtype="Int64")
    return keys.merge(found.reset_index(), how="left", on=group)
