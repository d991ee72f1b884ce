"""Choose the layer to report from a summary by layer."""

from collections.abc import Sequence

import pandas as pd


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
