"""Means over prompts with intervals, for any column of a table that has one row per prompt."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy.stats import norm, t


def prompt_means(
    frame: pd.DataFrame, value: str, *, by: Sequence[str], confidence: float = 0.95
) -> pd.DataFrame:
    """The mean of a column over prompts, with its interval.

    Several rows of one prompt in a group, such as draws of a random control, are averaged first:
    they do not count as prompts.

    Example:
        >>> import pandas as pd
        >>> frame = pd.DataFrame({"layer": 3, "prompt": [0, 0, 1], "correct": [True, False, True]})
        >>> prompt_means(frame, "correct", by=["layer"])[["mean", "n"]].values.tolist()
        [[0.75, 2.0]]

    Args:
        frame: With the column ``prompt``; prompts of several values of ``task`` or ``model`` are
            different ones.
        value: The column. Where it is yes or no, intervals are Wilson's, with the share of a
            prompt's draws as its part of a success; else Student's.
        by: Columns that name a group.
        confidence: Of the intervals.

    Returns:
        One row per group, in the frame's order: the columns of ``by``, ``mean``, ``low``,
        ``high`` and ``n``, the number of prompts. Rows without a value take no part. Student's
        interval of a single prompt is missing.

    Raises:
        ValueError: If the frame lacks a column, or has no row with a value.
    """
    needed = [*by, "prompt", value]
    missing = [column for column in needed if column not in frame.columns]
    if missing:
        raise ValueError(f"The frame lacks {missing}; expected the columns {needed}.")
    rows = frame.dropna(subset=[value])
    if rows.empty:
        raise ValueError(f"No row of this frame has a value in {value!r}.")
    yes_or_no = pd.api.types.is_bool_dtype(rows[value].infer_objects())
    prompt = [c for c in ("model", "task") if c in frame.columns and c not in by] + ["prompt"]
    rows = rows.assign(**{value: rows[value].astype(float)})
    each = rows.groupby([*by, *prompt], sort=False)[value].mean()
    means = each.groupby(list(by), sort=False).agg(["mean", "std", "count"]).reset_index()
    mean, n = means["mean"].to_numpy(), means["count"].to_numpy()
    if yes_or_no:
        z = norm.ppf((1 + confidence) / 2)
        middle = (mean * n + z**2 / 2) / (n + z**2)
        half = z / (n + z**2) * np.sqrt(mean * (1 - mean) * n + z**2 / 4)
    else:
        middle = mean
        half = t.ppf((1 + confidence) / 2, np.maximum(n - 1, 1)) * means["std"] / np.sqrt(n)
    return means[list(by)].assign(mean=mean, low=middle - half, high=middle + half, n=n)
