"""Tables at the door: a data frame, a result that gives one, or several of them.

This module knows nothing of what the columns mean.
"""

from collections.abc import Iterable, Sequence
from typing import Protocol, runtime_checkable

import pandas as pd


@runtime_checkable
class HasFrame(Protocol):
    """A result that gives its table, such as a :class:`~spade_lens.Readout`."""

    def to_frame(self) -> pd.DataFrame:
        """Return the tidy table."""
        ...


TableLike = pd.DataFrame | HasFrame | Sequence[pd.DataFrame | HasFrame]
"""What every function that takes a table takes."""


def as_frame(table: TableLike) -> pd.DataFrame:
    """Return the data frame of a table, a result, or several of them, one below the other.

    Example:
        >>> as_frame(read("ab->AB,cd->", model=model)).shape[0]  # two lenses, layers 0 to 4
        10
    """
    if isinstance(table, pd.DataFrame):
        return table
    if isinstance(table, HasFrame):
        return table.to_frame()
    if isinstance(table, Sequence) and not isinstance(table, str):
        if not table:
            raise ValueError("An empty list was given; expected at least one table or result.")
        return pd.concat([as_frame(one) for one in table], ignore_index=True)
    raise TypeError(
        f"{type(table).__name__} {str(table)[:60]!r} was given; expected a table: a pandas "
        "DataFrame, a result with to_frame() such as a Readout, or a list of them."
    )


def check_columns(
    frame: pd.DataFrame, columns: Iterable[str], *, what: str, source: str = ""
) -> None:
    """Raise a ValueError unless a frame has rows, and all the columns that ``what`` needs."""
    columns = list(columns)
    made = f" Make it with {source}." if source else ""
    missing = [column for column in columns if column not in frame.columns]
    if missing:
        raise ValueError(
            f"{what} needs the columns {columns}; this table lacks {missing}, it has "
            f"{list(frame.columns)}.{made}"
        )
    if frame.empty:
        raise ValueError(f"{what} was given a table that has no rows.{made}")
