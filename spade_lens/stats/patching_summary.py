"""From the rows of a patching sweep to means with intervals, and a layer chosen fairly."""

from collections.abc import Sequence

import pandas as pd
from scipy.stats import sem, t

from spade_lens.stats.intervals import proportion_interval

_SHARES = {"correct": "accuracy", "prefers": "preference"}


def summarise_patching(
    frame: pd.DataFrame, *, by: Sequence[str] = ("task", "condition", "layer")
) -> pd.DataFrame:
    """Accuracy, preference, flips and logit difference, each with its 95% interval.

    Example:
        >>> import pandas as pd
        >>> rows = {"task": "t", "condition": "labels", "layer": 3, "prompt": [0, 1],
        ...         "correct": [True, False], "prefers": [True, False], "logit_diff": [2.0, -1.0]}
        >>> summarise_patching(pd.DataFrame(rows))["measure"].tolist()
        ['accuracy', 'preference', 'flips', 'logit_diff']

    Args:
        frame: From :func:`spade_lens.icl.patch_sweep` or :func:`spade_lens.icl.accuracy_by_shots`.
        by: Columns that name a group.

    Returns:
        One row per group and measure: ``mean``, ``low``, ``high`` and ``n``, the number of
        prompts. ``accuracy``: the right answer is the top token. ``preference``: it is preferred
        to the wrong ones. ``flips``: a wrong one is preferred to it, the answer of the opposite
        mapping. The first three have Wilson's intervals, the logit difference Student's (missing
        for a single prompt).

    Raises:
        ValueError: If the frame is empty or lacks a column.
    """
    needed = [*by, *_SHARES, "logit_diff"]
    missing = [column for column in needed if column not in frame.columns]
    if missing or frame.empty:
        what = f"lacks {missing}" if missing else "has no rows"
        raise ValueError(f"This frame cannot be summed up: it {what}. Expected {needed}.")
    rows = []
    for key, group in frame.groupby(list(by), sort=False):
        about = dict(zip(by, key, strict=True))
        n = len(group)
        shares = {name: int(group[column].sum()) for column, name in _SHARES.items()}
        shares["flips"] = int((group["logit_diff"] < 0).sum())
        for measure, count in shares.items():
            low, high = proportion_interval(count, n)
            rows.append({**about, "measure": measure, "mean": count / n, "low": low, "high": high})
        mean = float(group["logit_diff"].mean())
        half = float("nan")
        if n > 1:
            half = float(t.ppf(0.975, n - 1) * sem(group["logit_diff"]))
        rows.append(
            {
                **about,
                "measure": "logit_diff",
                "mean": mean,
                "low": mean - half,
                "high": mean + half,
            }
        )
        for row in rows[-4:]:
            row["n"] = n
    return pd.DataFrame(rows)
