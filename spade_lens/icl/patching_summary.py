"""From the rows of a patching sweep to means with intervals, and a layer chosen fairly."""

from collections.abc import Sequence

import pandas as pd
from scipy.stats import sem, t

from spade_lens.report.intervals import proportion_interval

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


def choose_layer(
    frame: pd.DataFrame,
    condition: str,
    *,
    measures: Sequence[str] = ("correct", "logit_diff"),
    held_out: float = 0.5,
) -> tuple[int, pd.DataFrame]:
    """The best layer of a condition on some prompts, and the rows of all the others.

    A layer that is chosen and reported on the same prompts looks better than it is.

    Example:
        >>> import pandas as pd
        >>> frame = pd.DataFrame({"condition": "labels", "layer": [1] * 4 + [2] * 4,
        ...                       "prompt": [0, 1, 2, 3] * 2, "logit_diff": range(8)})
        >>> layer, rest = choose_layer(frame, "labels", measures=["logit_diff"])
        >>> layer, sorted(set(rest["prompt"]))
        (2, [2, 3])

    Args:
        frame: From :func:`spade_lens.icl.patch_sweep`.
        condition: The condition whose layer is chosen.
        measures: The column whose mean is to be highest, and those that decide between layers
            where it is equal. Ours: accuracy, and then the logit difference, which alone can be
            highest where nothing happens.
        held_out: Which share of the prompts, the first ones, the choice is made on.

    Returns:
        The layer (the lowest of the best), and the frame of the prompts that had no part in it,
        all conditions and layers.

    Raises:
        ValueError: If the condition or a measure is not in the frame, or nothing is left on one
            side.
    """
    unknown = [measure for measure in measures if measure not in frame.columns]
    if unknown or not measures:
        raise ValueError(
            f"measures={list(measures)} were given; expected some of the frame's columns, which "
            f"are {list(frame.columns)}."
        )
    mine = frame[(frame["condition"] == condition) & (frame["layer"] >= 0)]
    if mine.empty:
        known = list(frame.loc[frame["layer"] >= 0, "condition"].unique())
        raise ValueError(f"condition={condition!r} was given; the frame's conditions are {known}.")
    prompts = sorted(mine["prompt"].unique().tolist())
    n = round(held_out * len(prompts))
    if not 0 < n < len(prompts):
        raise ValueError(
            f"held_out={held_out} of {len(prompts)} prompts leaves {n} to choose on and "
            f"{len(prompts) - n} to report; expected at least one on both sides."
        )
    chosen_on = set(prompts[:n])
    means = mine[mine["prompt"].isin(chosen_on)].groupby("layer")[list(measures)].mean()
    best = means.sort_values(list(measures), ascending=False, kind="stable").index[0]
    return int(best), frame[~frame["prompt"].isin(chosen_on)]
