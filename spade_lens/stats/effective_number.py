"""Whether few demonstrations do it all or many do a little: means over prompts, bootstrapped."""

from collections.abc import Sequence

import numpy as np
import pandas as pd


def concentration(
    frame: pd.DataFrame,
    *,
    by: Sequence[str] = ("task", "layer"),
    resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> pd.DataFrame:
    """The mean effective number of contributing demonstrations, with a bootstrap interval.

    Example:
        >>> import pandas as pd
        >>> frame = pd.DataFrame({"task": "t", "layer": 3, "prompt": [0, 0, 1, 1],
        ...                       "effective": [1.0, 1.0, 2.0, 2.0]})
        >>> concentration(frame)[["mean", "low", "high", "n"]].iloc[0].tolist()
        [1.5, 1.0, 2.0, 2.0]

    Args:
        frame: From :func:`spade_lens.icl.measure_contributions`.
        by: Columns that name a group.
        resamples: How many times the prompts are drawn anew, with replacement.
        confidence: Of the percentile interval.
        seed: Seed of the drawing.

    Returns:
        One row per group: the columns of ``by``, ``mean``, ``low``, ``high`` and ``n``, the
        number of prompts. Prompts without any contribution (all Shapley values zero) are left
        out.

    Raises:
        ValueError: If the frame is empty or lacks a column.
    """
    needed = [*by, "prompt", "effective"]
    missing = [column for column in needed if column not in frame.columns]
    if missing or frame.empty:
        what = f"lacks {missing}" if missing else "has no rows"
        raise ValueError(f"This frame cannot be summed up: it {what}. Expected {needed}.")
    rows = []
    # The effective number stands in every demonstration's row of a prompt.
    once = frame.drop_duplicates([*by, "prompt"]).dropna(subset="effective")
    for key, group in once.groupby(list(by), sort=False):
        values = group["effective"].to_numpy(dtype=float)
        drawn = np.random.default_rng(seed).choice(values, size=(resamples, len(values)))
        tail = (1 - confidence) / 2
        low, high = np.quantile(drawn.mean(axis=1), [tail, 1 - tail])
        about = dict(zip(by, key, strict=True))
        mean = float(values.mean())
        rows.append({**about, "mean": mean, "low": low, "high": high, "n": len(values)})
    return pd.DataFrame(rows)
