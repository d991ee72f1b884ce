"""Which tokens of patched rows have to run, and which of them rows share.

Attention is causal: two rows are equal up to the first token at which they differ. So rows form a
tree. Its branches are *segments*: tokens that run once for all rows that continue from them. This
module knows numbers, not models.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter

_WORTHWHILE = 0.75
"""Share prefixes if at most this fraction of the tokens has to run.

Segments wait for each other and run in smaller batches, which costs more than the rest saves.
"""

_FREE_PADDING = 128
"""Padding of so many tokens costs no more than another pass over the weights."""


@dataclass(frozen=True)
class RowPath:
    """One row.

    Args:
        path: A number for every position. Two rows have the same number where they are equal up
            to that position.
        running: The positions of the tokens that have to run.
    """

    path: tuple[int, ...]
    running: tuple[int, ...]


@dataclass(eq=False)
class Segment:
    """Tokens that run once, after those of ``parent``.

    Args:
        row: One of the rows that they belong to.
        positions: Where they stand.
        parent: The segment before; None for the first.
        is_end: Whether ``row`` ends here, so that its last token is read.
        is_shared: Whether other segments continue from here.
    """

    row: int
    positions: tuple[int, ...]
    parent: "Segment | None" = None
    is_end: bool = False
    is_shared: bool = False

    @property
    def level(self) -> int:
        """The number of segments before this one."""
        return 0 if self.parent is None else self.parent.level + 1

    def ancestors(self) -> Iterator["Segment"]:
        """Yield the segments before this one, the last one first."""
        segment = self.parent
        while segment is not None:
            yield segment
            segment = segment.parent


def find_segments(rows: Mapping[int, RowPath], *, most_shared: int) -> list[list[Segment]]:
    """Cut distinct rows into segments, in groups that can run one after the other.

    The shared segments of a group have at most so many tokens, but for those of a single row. Each
    segment of a group stands after its parent.

    Example:
        Three rows of four tokens. The first differs from the others after the second token::

            >>> from spade_lens.replay.prefix_tree import RowPath, find_segments
            >>> paths = (1, 2, 3, 4), (1, 2, 5, 6), (1, 2, 5, 7)
            >>> rows = {number: RowPath(path, (0, 1, 2, 3)) for number, path in enumerate(paths)}
            >>> [[s.positions for s in group] for group in find_segments(rows, most_shared=9)]
            [[(0, 1), (2, 3), (2,), (3,), (3,)]]
    """
    times = Counter(row.path[p] for row in rows.values() for p in row.running)
    if len(times) > _WORTHWHILE * times.total():
        return [whole_rows(rows)]
    groups: list[list[int]] = []
    shared_in_group: set[int] = set()
    # In this order the rows that share most are neighbours.
    for number in sorted(rows, key=lambda number: rows[number].path):
        row = rows[number]
        shared = {row.path[p] for p in row.running if times[row.path[p]] > 1}
        if not groups or len(shared_in_group | shared) > most_shared:
            groups.append([])
            shared_in_group = set()
        groups[-1].append(number)
        shared_in_group |= shared
    return [_segments_of({number: rows[number] for number in group}) for group in groups]


def whole_rows(rows: Mapping[int, RowPath]) -> list[Segment]:
    """Make one segment of every row."""
    return [Segment(number, row.running, is_end=True) for number, row in rows.items()]


def _segments_of(rows: Mapping[int, RowPath]) -> list[Segment]:
    times = Counter(row.path[p] for row in rows.values() for p in row.running)
    segments: dict[int, Segment] = {}
    for number, row in rows.items():
        segment: Segment | None = None
        # Tokens of a row that are shared by equally many rows are shared by the same rows.
        counted = [(times[row.path[p]], p) for p in row.running]
        for _, shared_alike in groupby(counted, key=itemgetter(0)):
            positions = tuple(p for _, p in shared_alike)
            last = row.path[positions[-1]]
            if segment is not None:
                segment.is_shared = True
            segment = segments.setdefault(last, Segment(number, positions, segment))
        assert segment is not None
        # A segment knows the row that ends there; others only pass.
        segment.row, segment.is_end = number, True
    return list(segments.values())


def batches(
    segments: Sequence[Segment],
    cost: Callable[[Segment], float],
    *,
    most: float,
    most_tokens: int,
    in_order: bool = False,
) -> Iterator[list[Segment]]:
    """Yield batches of one level and similar lengths, within so many bytes and tokens each.

    With ``in_order``, segments of one level keep their order, whatever their lengths.
    """
    batch: list[Segment] = []
    n_tokens, length, most_expensive = 0, 0, 0.0
    for segment in sorted(segments, key=lambda s: (s.level, in_order or len(s.positions))):
        n, length = len(batch) + 1, max(length, len(segment.positions))
        # All are padded to the longest, and so are the tokens they attend to: the most expensive
        # segment need not be the last one.
        most_expensive = max(most_expensive, cost(segment))
        if batch and (
            segment.level != batch[0].level
            or n * length > most_tokens
            or n * most_expensive > most
            or n * length > 4 / 3 * (n_tokens + len(segment.positions)) + _FREE_PADDING
        ):
            yield batch
            batch, n_tokens, most_expensive = [], 0, cost(segment)
            length = len(segment.positions)
        batch.append(segment)
        n_tokens += len(segment.positions)
    yield batch
