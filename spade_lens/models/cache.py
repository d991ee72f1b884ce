"""The key/value cache: what the blocks of a Hugging Face model see of it, and cached tokens.

A block makes its keys and values first and hands them to its cache. It attends to what the cache
returns. So a cache can put cached tokens before them, store them, or end the block there.
"""

from collections.abc import Sequence
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Int
from torch import Tensor

from spade_lens.models.backbone import Cache, CachedTokens, KeysValues


class BlockCache:
    """The object that a block takes for its cache; it passes on to ours.

    Args:
        cache: What is read and written.
        block: The block's place, which need not be the ``layer_idx`` that it gives: blocks may have
            been taken out or put elsewhere.
        home: The device of the cache, which need not be that of the block.
    """

    def __init__(self, cache: Cache, block: int, home: torch.device) -> None:
        self._cache, self._block, self._home = cache, block, home

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> KeysValues:
        """Return the keys and values to attend to; called by a block."""
        at = keys.device
        made = self._cache.update(self._block, keys.to(self._home), values.to(self._home))
        return made[0].to(at), made[1].to(at)


class KeysOnly:
    """A cache that ends the block as soon as its keys and values are made.

    Args:
        goes_on: Whether to let the block end by itself, and to keep its keys and values.
    """

    def __init__(self, *, goes_on: bool = False) -> None:
        self.made: KeysValues | None = None
        self._goes_on = goes_on

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> KeysValues:
        """Raise the keys and values, or return them; called by a block."""
        if not self._goes_on:
            raise KeysMade(keys, values)
        self.made = keys, values
        return keys, values


class KeysMade(Exception):
    """Carries keys and values out of a block that need not go on."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.keys, self.values = keys, values


def select_tokens(cached: CachedTokens, columns: Sequence[Sequence[int]]) -> CachedTokens | None:
    """Select, for each batch row, which cached tokens it attends to; None if no row needs any."""
    longest = max(len(row) for row in columns)
    if not longest:
        return None
    device = cached.positions.device
    index = torch.tensor([[*row, *[0] * (longest - len(row))] for row in columns], device=device)
    lengths = torch.tensor([len(row) for row in columns], device=device)
    valid = torch.arange(longest, device=device) < rearrange(lengths, "batch -> batch 1")

    def keys_values(block: int) -> KeysValues:
        keys, values = (
            rearrange(x[0][:, index], "kv_head batch cached d_head -> batch kv_head cached d_head")
            for x in cached.keys_values(block)
        )
        return keys, values

    return CachedTokens(cached.positions[0][index], keys_values, valid)


def join_tokens(*parts: CachedTokens | None) -> CachedTokens | None:
    """Join several groups of cached tokens of one batch; None where there are none."""
    present = [part for part in parts if part is not None]
    if len(present) < 2:
        return present[0] if present else None
    valid = [
        torch.ones_like(part.positions, dtype=torch.bool) if part.valid is None else part.valid
        for part in present
    ]

    def keys_values(block: int) -> KeysValues:
        keys, values = zip(*(part.keys_values(block) for part in present), strict=True)
        return torch.cat(keys, dim=2), torch.cat(values, dim=2)

    positions = torch.cat([part.positions for part in present], dim=1)
    return CachedTokens(positions, keys_values, torch.cat(valid, dim=1))


class TokenCache:
    """Keys and values of tokens that have run, in room made beforehand, for a span of blocks.

    Tokens stand in columns, each row's without holes, so that to crop is to write down a number.
    A run writes its columns after those of the longest row. :meth:`keep` then says how many of
    them are real tokens.

    Args:
        n_rows: How many rows.
        room: How many tokens a row has at most.
        device: Where they stand.
    """

    def __init__(self, n_rows: int, room: int, device: torch.device) -> None:
        self.lengths = [0] * n_rows
        self._positions = torch.zeros(n_rows, room, dtype=torch.long, device=device)
        self._made: dict[int, KeysValues] = {}
        self._room = room

    @property
    def nbytes(self) -> int:
        """The bytes of keys and values of the tokens, without the room that is left."""
        filled = sum(self.lengths) / (len(self.lengths) * self._room)
        return int(filled * sum(x.nbytes for made in self._made.values() for x in made))

    @property
    def tokens(self) -> CachedTokens | None:
        """The cached tokens."""
        width = max(self.lengths)
        if not width:
            return None
        valid = None
        if min(self.lengths) < width:
            ends = torch.tensor(self.lengths, device=self._positions.device)
            valid = torch.arange(width, device=ends.device) < rearrange(ends, "row -> row 1")

        def keys_values(block: int) -> KeysValues:
            keys, values = self._made[block]
            return keys[:, :, :width], values[:, :, :width]

        return CachedTokens(self._positions[:, :width], keys_values, valid)

    def update(self, block: int, keys: Tensor, values: Tensor) -> KeysValues:
        """Write the keys and values of the tokens that run; return those of all columns."""
        return self.write(block, keys, values, max(self.lengths))

    def write(self, block: int, keys: Tensor, values: Tensor, first: int) -> KeysValues:
        """Write keys and values from a column on; return those of all columns up to their end."""
        if block not in self._made:
            self._made[block] = (self._room_for(keys), self._room_for(values))
        stop = first + keys.shape[2]
        of_keys, of_values = self._made[block]
        of_keys[:, :, first:stop] = keys
        of_values[:, :, first:stop] = values
        return of_keys[:, :, :stop], of_values[:, :, :stop]

    def keep(self, positions: Int[Tensor, "row pos"], counts: Sequence[int]) -> None:
        """Keep the first tokens of the run that has just ended, ``counts`` of every row."""
        first, n = max(self.lengths), positions.shape[1]
        gaps = [row for row, length in enumerate(self.lengths) if length < first and counts[row]]
        if gaps:  # close them
            ran = torch.arange(first, first + n, device=positions.device)
            rows = torch.tensor(gaps, device=ran.device)[:, None]
            to = (
                ran
                - first
                + torch.tensor([self.lengths[row] for row in gaps], device=ran.device)[:, None]
            )
            for x in (x for made in self._made.values() for x in made):
                x[rows, :, to] = x[rows, :, ran]  # [row pos head d_head]
        if min(self.lengths) == first and min(counts) == n:
            self._positions[:, first : first + n] = positions
        else:
            of_rows = torch.tensor([self.lengths, counts], device=positions.device)[..., None]
            real = torch.arange(n, device=positions.device) < of_rows[1]
            at, columns = real.nonzero(as_tuple=True)
            self._positions[at, of_rows[0, at, 0] + columns] = positions[at, columns]
        self.lengths = [a + b for a, b in zip(self.lengths, counts, strict=True)]

    def crop(self, lengths: Sequence[int]) -> None:
        """Forget all tokens of a row but the first ``lengths``."""
        self.lengths = list(lengths)

    def branches(self, bases: Sequence[int]) -> "Branches":
        """Return where continuations of the first ``bases`` tokens of every row can run."""
        return Branches(self, self._positions, bases)

    def adopt(self, lengths: Sequence[int], columns: Sequence[Sequence[int]]) -> None:
        """Keep the first ``lengths`` tokens of every row, and after them those at ``columns``."""
        places = [
            (row, length + n, column)
            for row, (length, of_row) in enumerate(zip(lengths, columns, strict=True))
            for n, column in enumerate(of_row)
        ]
        if places:
            rows, to, of = torch.tensor(places, device=self._positions.device).T
            for x in (x for made in self._made.values() for x in made):
                x[rows, :, to] = x[rows, :, of]  # [token head d_head]
            self._positions[rows, to] = self._positions[rows, of]
        self.lengths = [n + len(of_row) for n, of_row in zip(lengths, columns, strict=True)]

    def select(self, rows: Sequence[int]) -> None:
        """Keep some of the rows, in the order given."""
        self.lengths = [self.lengths[row] for row in rows]
        self._positions = self._positions[list(rows)]
        self._made = {
            block: (keys[list(rows)], values[list(rows)])
            for block, (keys, values) in self._made.items()
        }

    def _room_for(self, x: Tensor) -> Tensor:
        return x.new_empty(x.shape[0], x.shape[1], self._room, x.shape[3])


class Branches:
    """Several continuations of every row of a cache, which run side by side and copy nothing.

    A branch is a list of tokens after the first tokens of its row. A run holds the next token of
    some branches of every row. Each attends to its row's first tokens, to its own branch and to
    itself. Keys and values are written after the columns of the longest row, so the cache is as it
    was until :meth:`TokenCache.adopt`.

    Args:
        cache: The cache, with room for all of the branches' tokens.
        positions: The positions of its columns.
        bases: How many first tokens of every row the branches continue.
    """

    def __init__(
        self, cache: TokenCache, positions: Int[Tensor, "row room"], bases: Sequence[int]
    ) -> None:
        self._cache, self._positions = cache, positions
        self.width = max(cache.lengths)
        self._branch_of = torch.full_like(positions, -1)
        ends = torch.tensor(bases, device=positions.device)[:, None, None]
        self._of_row = torch.arange(positions.shape[1], device=positions.device) < ends
        self._running = positions[:, :0]

    @property
    def tokens(self) -> CachedTokens:
        """The cached tokens, with those that each running token attends to."""
        known = self._branch_of[:, None, : self.width]
        own = (known == self._running[:, :, None]) & (known >= 0)
        paths = own | self._of_row[:, :, : self.width]
        # Blocks take keys from update(): nothing asks for them here.
        return CachedTokens(self._positions[:, : self.width], _no_keys, paths=paths)

    def run(self, branches: Int[Tensor, "row pos"]) -> None:
        """Say which branch each token of the next run continues; -1 for padding."""
        self._running = branches

    def update(self, block: int, keys: Tensor, values: Tensor) -> KeysValues:
        """Write the keys and values of the tokens that run; return those of all columns."""
        return self._cache.write(block, keys, values, self.width)

    def keep(self, positions: Int[Tensor, "row pos"]) -> range:
        """Keep the tokens of the run that has just ended; return their columns."""
        columns = range(self.width, self.width + positions.shape[1])
        self._positions[:, columns.start : columns.stop] = positions
        self._branch_of[:, columns.start : columns.stop] = self._running
        self.width = columns.stop
        return columns


def _no_keys(block: int) -> KeysValues:
    raise NotImplementedError
