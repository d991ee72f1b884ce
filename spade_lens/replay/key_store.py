"""Cached keys and values, stored once and shared by the rows of a batch.

Each token is stored once. Every row of a batch selects the tokens that it attends to. This module
knows segments, not patches.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from spade_lens.models.backbone import CachedTokens, KeysValues, StoreKeys
from spade_lens.models.cache import select_tokens
from spade_lens.replay.prefix_tree import Segment


class KeyStore:
    """Keys and values of the shared segments of one group, for the segments that follow them."""

    def __init__(self, segments: Sequence[Segment], device: torch.device) -> None:
        self._first: dict[Segment, int] = {}
        positions: list[int] = []
        for segment in segments:
            if segment.is_shared:
                self._first[segment] = len(positions)
                positions += segment.positions
        self._by_block: dict[int, KeysValues] = {}
        row = torch.tensor([positions], dtype=torch.long, device=device)  # [1 cached]
        self._tokens = CachedTokens(row, self._by_block.__getitem__)

    def storing(self, batch: Sequence[Segment]) -> StoreKeys | None:
        """Return what stores the keys of a batch's shared segments; None if it has none."""
        places = [
            (row, column, self._first[segment] + column)
            for row, segment in enumerate(batch)
            if segment.is_shared
            for column in range(len(segment.positions))
        ]
        if not places:
            return None
        rows, columns, stored_at = (list(numbers) for numbers in zip(*places, strict=True))

        def store(block: int, *keys_values: Tensor) -> None:
            if block not in self._by_block:
                n = self._tokens.positions.shape[1]
                # [1 kv_head cached d_head]
                keys, values = (x.new_empty(1, x.shape[1], n, x.shape[3]) for x in keys_values)
                self._by_block[block] = keys, values
            for stored, x in zip(self._by_block[block], keys_values, strict=True):
                # x[rows, :, columns] is [place kv_head d_head]: indexing puts the places first.
                stored[0, :, stored_at] = x[rows, :, columns].transpose(0, 1)

        return store

    def before(self, batch: Sequence[Segment]) -> CachedTokens | None:
        """Return the tokens of the segments before those of a batch."""
        columns = [
            [
                self._first[ancestor] + column
                for ancestor in segment.ancestors()
                for column in range(len(ancestor.positions))
            ]
            for segment in batch
        ]
        return select_tokens(self._tokens, columns)
