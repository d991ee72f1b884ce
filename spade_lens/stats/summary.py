"""Means over prompts with intervals: the one summary of every table that has prompts.

This module knows columns, not what made them.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from spade_lens.checks import checked
from spade_lens.columns import KEYS, MEASURES
from spade_lens.stats.frames import TableLike, as_frame, check_columns
from spade_lens.stats.intervals import clustered_interval, mean_interval


@checked
def summarise(
    table: TableLike,
    values: str | Sequence[str] | Mapping[str, str] | None = None,
    *,
    by: Sequence[str] | None = None,
    over: Literal["prompts", "tasks"] = "prompts",
    confidence: float = 0.95,
) -> pd.DataFrame:
    """Return means over prompts with their intervals.

    The unit is the prompt. Several rows of a prompt in a group, such as random draws of a control
    or several positions, are averaged first, and count once. With ``over="tasks"`` tasks are the
    unit: every task counts the same, and the interval is for other tasks of the same kind.

    Example:
        >>> readout = read(["ab->AB,cd->", "q->"], ["logit", "spade"], model=model, layers=[2, 4])
        >>> summary = summarise(readout)
        >>> list(summary.columns)
        ['lens', 'layer', 'measure', 'mean', 'low', 'high', 'n']
        >>> summary.query("layer == 4")["mean"].tolist()
        [1.0, 1.0]

        >>> import pandas as pd
        >>> frame = pd.DataFrame({"layer": 3, "prompt": [0, 0, 1], "correct": [True, False, True]})
        >>> summarise(frame, "correct", by=["layer"])[["measure", "mean", "n"]].values.tolist()
        [['accuracy', 0.75, 2]]

    Args:
        table: A table with the column ``prompt``, a result with ``to_frame()``, or several.
            Prompts of several values of ``task`` or ``model`` are different ones.
        values: The columns to average. A mapping gives each the name it has as a measure. By
            default all of :data:`spade_lens.columns.MEASURES` that the table has. ``"flips"``
            may be asked for where there is a ``logit_diff``: it is the fraction of prompts below 0.
        by: Columns that name a group. By default those of :data:`spade_lens.columns.KEYS` that
            the table has; ``model`` only where there are several.
        over: What the interval takes as drawn at random. ``"prompts"``: the prompts, of these
            tasks. ``"tasks"``: the tasks, and the prompts in them; ``by`` must not hold ``task``,
            and by default does not.
        confidence: Confidence of the intervals.

    Returns:
        One row per group and measure, in the table's order: the columns of ``by``, ``measure``,
        ``mean``, ``low``, ``high`` and ``n``, the number of prompts. Yes-or-no columns have
        Wilson's interval; where prompts have several rows, at the effective number of rows.
        Others have Student's, which a single prompt lacks (NaN). With ``over="tasks"`` all have
        Student's over the means of tasks, and ``tasks`` says how many there are. Rows without a
        value are left out.

    Raises:
        TypeError: If ``table`` is not a table.
        ValueError: If a column is missing, no row has a value, or tasks are both the unit and a
            group.
    """
    frame = as_frame(table)
    if by is None:
        by = [key for key in KEYS if key in frame.columns and (key, over) != ("task", "tasks")]
        if "model" in by and frame["model"].nunique() == 1:
            by.remove("model")
    by = list(by)
    if over == "tasks" and "task" in by:
        raise ValueError(
            f"by={by} and over='tasks' were given; expected groups that hold several tasks."
        )
    frame = _with_flips(frame, values)
    names = _measures(frame, values)
    needed = ["prompt", "task"] if over == "tasks" else ["prompt"]
    check_columns(frame, [*by, *needed, *names], what="summarise")
    unit = [c for c in ("model", "task") if c in frame.columns and c not in by] + ["prompt"]
    groups = frame[by].drop_duplicates(ignore_index=True)
    group = pd.Series(0, index=frame.index)
    if by:
        group = frame.groupby(by, sort=False, dropna=False).ngroup()
    rows = []
    for column, measure in names.items():
        present = frame[column].notna()
        values_there = frame.loc[present, column].infer_objects()
        if values_there.empty:
            if values is not None:
                raise ValueError(f"No row of this table has a value in {column!r}.")
            continue
        yes_or_no = pd.api.types.is_bool_dtype(values_there)
        keys = [group[present].rename("group"), *(frame.loc[present, name] for name in unit)]
        prompts = values_there.astype(float).groupby(keys, sort=False).agg(["mean", "size"])
        for number, some in prompts.groupby(level="group", sort=False):
            means: NDArray[np.float64] = some["mean"].to_numpy(dtype=np.float64)
            n, single = len(means), int(some["size"].sum())
            if over == "tasks":
                means = some["mean"].groupby(level="task", sort=False).mean().to_numpy()
            if yes_or_no and over == "prompts":
                ends = clustered_interval(means, np.ones(n), single, confidence=confidence)
            else:
                ends = mean_interval(means, confidence=confidence)
            rows.append((number, measure, float(means.mean()), *ends, n, len(means)))
    if not rows:
        raise ValueError(f"No row of this table has a value in any of {list(names)}.")
    found = pd.DataFrame(rows, columns=["group", "measure", "mean", "low", "high", "n", "tasks"])
    found = found.sort_values("group", kind="stable", ignore_index=True)
    named = groups.iloc[found.pop("group")].reset_index(drop=True)
    summary = pd.concat([named, found], axis=1)
    return summary if over == "tasks" else summary.drop(columns="tasks")


def full_model_accuracy(summary: pd.DataFrame) -> pd.DataFrame:
    """Return the full model's own accuracy, where a summary tells it.

    A lens that agrees with the model on every prompt has the model's accuracy. Every lens does at
    the last layer.

    Returns:
        One row per remaining group (such as a task) whose accuracy can be told: the columns that
        name it, and ``mean``, ``low``, ``high`` and ``n``.
    """
    values = ["mean", "low", "high", "n"]
    cell = [c for c in summary.columns if c not in ("measure", *values)]
    group = [c for c in cell if c not in ("lens", "layer")]
    agreement = summary[(summary["measure"] == "agreement") & (summary["mean"] == 1)]
    accuracy = summary[summary["measure"] == "accuracy"]
    # Both of as many prompts: one without a target has an agreement all the same.
    both = accuracy.merge(agreement[[*cell, "n"]], on=[*cell, "n"])[[*group, *values]]
    # All rows of a group say the same.
    return both.drop_duplicates(group or ["n"], ignore_index=True)


def _with_flips(
    frame: pd.DataFrame, values: str | Sequence[str] | Mapping[str, str] | None
) -> pd.DataFrame:
    wanted = "prefers" in frame.columns if values is None else "flips" in values
    if not wanted or "flips" in frame.columns or "logit_diff" not in frame.columns:
        return frame
    flips = (frame["logit_diff"] < 0).astype("boolean")
    return frame.assign(flips=flips.mask(frame["logit_diff"].isna()))


def _measures(
    frame: pd.DataFrame, values: str | Sequence[str] | Mapping[str, str] | None
) -> dict[str, str]:
    """The columns to average, and what their means are called."""
    if isinstance(values, Mapping):
        return dict(values)
    if values is None:
        present = {column: name for column, name in MEASURES.items() if column in frame.columns}
        if not present:
            raise ValueError(
                f"summarise found none of {list(MEASURES)} among the columns {list(frame.columns)};"
                " give the columns to average as values=."
            )
        return present
    columns = [values] if isinstance(values, str) else values
    return {column: MEASURES.get(column, column) for column in columns}
