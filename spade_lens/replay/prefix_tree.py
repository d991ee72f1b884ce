"""Which tokens of patched rows have to run, and which of them rows have in common.

Attention is causal: up to the first token that tells two rows apart, all that happens in them is
the same. Rows so form a tree, whose branches are *stretches* of tokens that run once for all rows
that go on from them. This module knows of numbers only, not of models.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter

_WORTHWHILE = 0.75
"""Stretches wait for each other, in smaller batches: not worth it above this share of tokens."""

_FREE_PADDING = 128
"""Padding of so many tokens costs no more than another pass over the weights."""


@dataclass(frozen=True)
class RowPath:
    """One row.

    Args:
        path: A number for every position, which two rows share where they are alike up to there.
        running: The positions of the tokens that have to run.
    """

    path: tuple[int, ...]
    running: tuple[int, ...]


@dataclass(eq=False)
class Stretch:
    """Tokens that run once, after those of ``parent``.

    Args:
        row: One of the rows that they belong to.
        positions: Where they stand.
        parent: The stretch before; None for the first.
        is_end: Whether ``row`` is read at the last of them.
        is_shared: Whether other stretches go on from here.
    """

    row: int
    positions: tuple[int, ...]
    parent: "Stretch | None" = None
    is_end: bool = False
    is_shared: bool = False

    @property
    def level(self) -> int:
        """How many stretches come before."""
        return 0 if self.parent is None else self.parent.level + 1

    def ancestors(self) -> Iterator["Stretch"]:
        """The stretches before, last first."""
        before = self.parent
        while before is not None:
            yield before
            before = before.parent


def find_stretches(rows: Mapping[int, RowPath], *, most_shared: int) -> list[list[Stretch]]:
    """The stretches of rows that differ, in groups that can be run one after the other.

    Example:
        Three rows of four tokens; the first parts from the others after the second::

            >>> from spade_lens.replay.prefix_tree import RowPath, find_stretches
            >>> paths = (1, 2, 3, 4), (1, 2, 5, 6), (1, 2, 5, 7)
            >>> rows = {number: RowPath(path, (0, 1, 2, 3)) for number, path in enumerate(paths)}
            >>> [[s.positions for s in group] for group in find_stretches(rows, most_shared=9)]
            [[(0, 1), (2, 3), (2,), (3,), (3,)]]

    Args:
        rows: By number; no two of them with the same path.
        most_shared: Of shared stretches a group has no more tokens than this, unless one row
            alone has.

    Returns:
        Groups of stretches, parents before those that go on from them.
    """
    times = Counter(row.path[p] for row in rows.values() for p in row.running)
    if len(times) > _WORTHWHILE * times.total():
        return [whole_rows(rows)]
    groups: list[list[int]] = []
    held: set[int] = set()
    # In this order rows that have most in common are neighbours.
    for number in sorted(rows, key=lambda number: rows[number].path):
        row = rows[number]
        shared = {row.path[p] for p in row.running if times[row.path[p]] > 1}
        if not groups or len(held | shared) > most_shared:
            groups.append([])
            held = set()
        groups[-1].append(number)
        held |= shared
    return [_of_group({number: rows[number] for number in group}) for group in groups]


def whole_rows(rows: Mapping[int, RowPath]) -> list[Stretch]:
    """Every row as one stretch of its own."""
    return [Stretch(number, row.running, is_end=True) for number, row in rows.items()]


def _of_group(rows: Mapping[int, RowPath]) -> list[Stretch]:
    times = Counter(row.path[p] for row in rows.values() for p in row.running)
    found: dict[int, Stretch] = {}
    for number, row in rows.items():
        before: Stretch | None = None
        # Tokens of a row that belong to as many rows belong to the same ones.
        counted = [(times[row.path[p]], p) for p in row.running]
        for _, some in groupby(counted, key=itemgetter(0)):
            positions = tuple(p for _, p in some)
            last = row.path[positions[-1]]
            if before is not None:
                before.is_shared = True
            before = found.setdefault(last, Stretch(number, positions, before))
        assert before is not None
        # The number of a row that ends here; others only pass.
        before.row, before.is_end = number, True
    return list(found.values())


def batches(
    stretches: Sequence[Stretch], cost: Callable[[Stretch], float], *, most: float, most_tokens: int
) -> Iterator[list[Stretch]]:
    """Stretches of one level, of like lengths, as many as fit.

    Args:
        stretches: Of one group.
        cost: Gives the bytes that one takes in a batch.
        most: The bytes that a batch may take.
        most_tokens: The tokens that a batch may have, its padding included.
    """
    batch: list[Stretch] = []
    real, dearest = 0, 0.0
    for stretch in sorted(stretches, key=lambda s: (s.level, len(s.positions))):
        n, length = len(batch) + 1, len(stretch.positions)
        # All are padded to the longest, in what they see as well: that need not be the last one.
        dearest = max(dearest, cost(stretch))
        if batch and (
            stretch.level != batch[0].level
            or n * length > most_tokens
            or n * dearest > most
            or n * length > 4 / 3 * (real + length) + _FREE_PADDING
        ):
            yield batch
            batch, real, dearest = [], 0, cost(stretch)
        batch.append(stretch)
        real += length
    yield batch
