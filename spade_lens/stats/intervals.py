"""Means of yes-or-no results, each with its interval."""

from collections.abc import Sequence
from functools import cache

import pandas as pd
from scipy.stats import binomtest

_MEASURES = {"correct": "accuracy", "agrees": "agreement"}
"""Columns of a readout's frame and what their mean is called."""


@cache
def proportion_interval(successes: int, n: int, *, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's interval of a proportion, which stays sensible at 0 and at 1.

    Example:
        >>> low, high = proportion_interval(38, 40)
        >>> f"{low:.3f} to {high:.3f}"
        '0.835 to 0.986'

    Args:
        successes: How many of the ``n`` trials went well.
        n: The number of independent trials, at least 1.
        confidence: Between 0 and 1.

    Returns:
        The lower and the upper end, between 0 and 1.

    Raises:
        ValueError: If ``successes`` does not lie between 0 and ``n``, or ``n`` is 0.
    """
    if not 0 <= successes <= n or n == 0:
        raise ValueError(
            f"{successes} successes of {n} trials have no interval; expected at least one trial "
            "and no more successes than trials."
        )
    interval = binomtest(successes, n).proportion_ci(confidence_level=confidence, method="wilson")
    return float(interval.low), float(interval.high)


def summarise(
    frame: pd.DataFrame, *, by: Sequence[str] | None = None, confidence: float = 0.95
) -> pd.DataFrame:
    """Accuracy and agreement with the full model, with Wilson's intervals.

    Example:
        >>> frame = read(prompts, [LogitLens(model), Spade(model)], layers=[2, 4]).to_frame()
        >>> summary = summarise(frame)
        >>> list(summary.columns)
        ['lens', 'layer', 'measure', 'mean', 'low', 'high', 'n']
        >>> summary.query("layer == 4")["mean"].tolist()
        [1.0, 1.0]

    Args:
        frame: One row per reading, as ``Readout.to_frame`` gives it, columns added at will.
        by: Columns that name a group; by default those of ``model``, ``task``, ``lens`` and
            ``layer`` that the frame has.
        confidence: Of the intervals.

    Returns:
        One row per group and measure, groups in the frame's order: the columns of ``by``,
        ``measure`` (``"accuracy"``, where the frame has the column ``correct``, and
        ``"agreement"``), ``mean``, ``low``, ``high`` and ``n``, the number of readings. Readings
        without a target take no part in accuracy. ``model`` is left out of the default where
        there is only one.

    Raises:
        ValueError: If the frame is empty or lacks a column that is needed.
    """
    if by is None:
        by = [c for c in ("model", "task", "lens", "layer") if c in frame.columns]
        if "model" in by and frame["model"].nunique() == 1:
            by.remove("model")
    measured = [column for column in _MEASURES if column in frame.columns]
    missing = [c for c in by if c not in frame.columns]
    if missing or not measured or frame.empty:
        what = f"lacks {missing}" if missing else "has no rows" if frame.empty else "lacks 'agrees'"
        raise ValueError(
            f"This frame cannot be summed up: it {what}. Expected a readout's to_frame(), with "
            f"the columns {[*by, 'correct', 'agrees']}; got {list(frame.columns)}."
        )
    by = list(by)
    long = frame.melt(id_vars=by, value_vars=measured, var_name="measure", value_name="value")
    long = long.dropna(subset="value").astype({"value": bool})
    long["measure"] = long["measure"].map(_MEASURES)
    grouped = long.groupby([*by, "measure"], sort=False)["value"]
    summary = grouped.agg(successes="sum", n="count").reset_index()
    ends = [
        proportion_interval(successes, n, confidence=confidence)
        for successes, n in zip(summary.pop("successes").tolist(), summary["n"], strict=True)
    ]
    summary.insert(len(by) + 1, "mean", grouped.mean().to_numpy(dtype=float))
    summary.insert(len(by) + 2, "low", [low for low, _ in ends])
    summary.insert(len(by) + 3, "high", [high for _, high in ends])
    return summary


def full_model_accuracy(summary: pd.DataFrame) -> pd.DataFrame:
    """The full model's own accuracy, as far as a summary tells it.

    Where a lens agrees with the model on every prompt, as every lens does that is read at the
    last layer, its accuracy is the model's.

    Args:
        summary: From :func:`summarise`, grouped by lens and layer and perhaps more.

    Returns:
        One row per remaining group (a task, say), for those where it can be told: the columns
        that name it, and ``mean``, ``low``, ``high`` and ``n``.
    """
    values = ["mean", "low", "high", "n"]
    cell = [c for c in summary.columns if c not in ("measure", *values)]
    group = [c for c in cell if c not in ("lens", "layer")]
    agreement = summary[(summary["measure"] == "agreement") & (summary["mean"] == 1)]
    accuracy = summary[summary["measure"] == "accuracy"]
    # With as many readings on both sides: a reading without a target has an agreement all the same.
    known = accuracy.merge(agreement[[*cell, "n"]], on=[*cell, "n"])[[*group, *values]]
    # The first of each group: all of a group say the same.
    return known.drop_duplicates(group or ["n"], ignore_index=True)
