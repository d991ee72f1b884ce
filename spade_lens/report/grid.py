"""Means with intervals as lines of text: groups downwards, the values of a column across."""

from collections.abc import Iterable, Sequence

import pandas as pd

from spade_lens.stats.frames import TableLike, as_frame, check_columns


def grid(
    means: TableLike, rows: Sequence[str], column: str, *, digits: int = 2, signed: bool = False
) -> str:
    """Return a table of means with their intervals, as text.

    Example:
        >>> import pandas as pd
        >>> means = pd.DataFrame({"lens": ["SPADE", "SPADE"], "layer": [1, 2], "mean": [0.25, 1.0],
        ...                       "low": [0.1, 0.9], "high": [0.4, 1.0]})
        >>> print(grid(means, ["lens"], "layer"))
         lens                 1                 2
        SPADE 0.25 [0.10, 0.40] 1.00 [0.90, 1.00]
    """
    frame = as_frame(means)
    check_columns(frame, [*rows, column, "mean", "low", "high"], what="grid")
    form = f"+.{digits}f" if signed else f".{digits}f"
    cells = frame.assign(
        cell=[
            f"{m:{form}} [{low:{form}}, {high:{form}}]" if pd.notna(low) else f"{m:{form}}"
            for m, low, high in zip(frame["mean"], frame["low"], frame["high"], strict=True)
        ]
    )
    across = list(dict.fromkeys(cells[column]))
    lines = []
    for key, group in cells.groupby(list(rows), sort=False):
        cell = dict(zip(group[column], group["cell"], strict=True))
        named = dict(zip(rows, key, strict=True))
        lines.append({**named, **{str(value): cell.get(value, "-") for value in across}})
    return pd.DataFrame(lines).to_string(index=False)


def spread(layers: Iterable[int], most: int = 5) -> list[int]:
    """Return as many of the layers as fit a line of text, at equal steps, the last among them.

    Example:
        >>> spread(range(31))
        [2, 9, 16, 23, 30]
    """
    layers = sorted(set(layers))
    step = -(-len(layers) // most)
    return layers[::-1][::step][::-1]
