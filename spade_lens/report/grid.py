"""Means with intervals as lines of text."""

from collections.abc import Sequence

import pandas as pd


def grid(
    means: pd.DataFrame, rows: Sequence[str], column: str, *, digits: int = 2, signed: bool = False
) -> str:
    """A table of means with their intervals: groups downwards, the values of a column across.

    Args:
        means: A row per cell, with ``mean``, ``low`` and ``high``.
        rows: The columns that name a row of the table.
        column: The column whose values are the table's columns.
        digits: Behind the point.
        signed: Whether a sign stands before positive numbers too, as for differences.
    """
    form = f"+.{digits}f" if signed else f".{digits}f"
    cells = means.assign(
        cell=[
            f"{m:{form}} [{low:{form}}, {high:{form}}]" if pd.notna(low) else f"{m:{form}}"
            for m, low, high in zip(means["mean"], means["low"], means["high"], strict=True)
        ]
    )
    across = list(dict.fromkeys(cells[column]))
    lines = []
    for key, some in cells.groupby(list(rows), sort=False):
        at = dict(zip(some[column], some["cell"], strict=True))
        named = dict(zip(rows, key, strict=True))
        lines.append({**named, **{str(value): at.get(value, "-") for value in across}})
    return pd.DataFrame(lines).to_string(index=False)


def spread(layers: Sequence[int], most: int = 5) -> list[int]:
    """Of many layers as many as fit a line of text, evenly, the last among them.

    Example:
        >>> spread(range(31))
        [2, 9, 16, 23, 30]
    """
    layers = sorted(set(layers))
    step = -(-len(layers) // most)
    return layers[::-1][::step][::-1]
