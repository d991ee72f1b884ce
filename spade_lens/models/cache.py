"""The key/value cache: what the blocks of a Hugging Face model see of it, and cached tokens.

A block makes its keys and values first and hands them to its cache. It attends to what the cache
returns. So a cache can put cached tokens before them, store them, or end the block there.
"""

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from einops import rearrange
from torch import Tensor

from spade_lens.models.backbone import CachedTokens, KeysValues, KeyValueCache


class BlockCache:
    """The object that a block takes for its cache. It reads and writes a :class:`KeyValueCache`.

    Args:
        cache: What is read and written.
        block: The block's place, which need not be the ``layer_idx`` that it gives: blocks may have
            been taken out or put elsewhere.
    """

    def __init__(self, cache: KeyValueCache, block: int) -> None:
        self._cache, self._block = cache, block

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> KeysValues:
        """Return the keys and values to attend to; called by a block."""
        if self._cache.store is not None:
            self._cache.store(self._block, keys, values)
        if self._cache.tokens is None:
            return keys, values
        rows = (keys.shape[0], -1, -1, -1)
        cached_keys, cached_values = self._cache.tokens.keys_values(self._block)
        # [batch kv_head cached + pos d_head]
        return (
            torch.cat([cached_keys.expand(rows), keys], dim=2),
            torch.cat([cached_values.expand(rows), values], dim=2),
        )


class KeysOnly:
    """A cache that ends the block as soon as its keys and values are made."""

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> NoReturn:
        """Raise the keys and values; called by a block."""
        raise KeysMade(keys, values)


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
