"""Choose the layer to report on some prompts, and report it on the others."""

from collections.abc import Sequence

import pandas as pd

from spade_lens.checks import checked
from spade_lens.stats.frames import TableLike, as_frame, check_columns


@checked
def choose_layer(
    table: TableLike,
    condition: str,
    *,
    measures: Sequence[str] = ("correct", "logit_diff"),
    held_out: float = 0.5,
) -> tuple[int, pd.DataFrame]:
    """Return the best layer of a condition on some prompts, and the rows of all other prompts.

    A layer that is chosen and reported on the same prompts looks better than it is.

    Example:
        >>> import pandas as pd
        >>> frame = pd.DataFrame({"condition": "labels", "layer": [1] * 4 + [2] * 4,
        ...                       "prompt": [0, 1, 2, 3] * 2, "logit_diff": range(8)})
        >>> layer, rest = choose_layer(frame, "labels", measures=["logit_diff"])
        >>> layer, sorted(set(rest["prompt"]))
        (2, [2, 3])

    Args:
        table: From :func:`spade_lens.icl.patch_sweep`.
        condition: The condition whose layer is chosen.
        measures: The column whose mean is to be highest, and columns that decide between layers
            where it is equal. Ours: accuracy, and then the logit difference, which alone can be
            highest where nothing happens.
        held_out: The fraction of the prompts, the first ones, that the choice is made on.

    Returns:
        The layer (the lowest of the best), and the rows of the prompts that had no part in the
        choice, of all conditions and layers.

    Raises:
        ValueError: If a column or the condition is missing, or no prompt is left on one side.
    """
    frame = as_frame(table)
    check_columns(
        frame,
        ["condition", "layer", "prompt", *measures],
        what=f"choose_layer(measures={list(measures)})",
        source="spade_lens.icl.patch_sweep",
    )
    if not measures:
        raise ValueError(
            f"measures=[] was given; expected some of the columns {list(frame.columns)}."
        )
    patched = frame[frame["layer"] >= 0]
    rows = patched[patched["condition"] == condition]
    if rows.empty:
        raise ValueError(
            f"condition={condition!r} was given; the frame's conditions are "
            f"{list(patched['condition'].unique())}."
        )
    prompts = sorted(rows["prompt"].unique().tolist())
    n = round(min(max(held_out, 0.0), 1.0) * len(prompts))
    if not 0 < n < len(prompts):
        raise ValueError(
            f"held_out={held_out} of {len(prompts)} prompts leaves {n} to choose on and "
            f"{len(prompts) - n} to report; expected at least one on both sides."
        )
    first = set(prompts[:n])
    means = rows[rows["prompt"].isin(first)].groupby("layer")[list(measures)].mean()
    best = means.sort_values(list(measures), ascending=False, kind="stable").index[0]
    return int(best), frame[~frame["prompt"].isin(first)]
