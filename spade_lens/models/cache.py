"""What the blocks of a Hugging Face model are given for their cache of keys and values.

A block makes its keys and values first and hands them to its cache; it attends to what the cache
gives back. So a cache can put a past before them, keep them, or end the block there.
"""

from typing import Any, NoReturn

import torch
from torch import Tensor

from spade_lens.models.backbone import KeepKeys, KeysValues, Past


class BlockCache:
    """Puts a past before a sequence, and shows the sequence's own keys and values."""

    def __init__(self, past: Past | None, keep: KeepKeys | None) -> None:
        self._past, self._keep = past, keep

    def update(
        self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> KeysValues:
        """Called by a block."""
        if self._keep is not None:
            self._keep(layer_idx, keys, values)
        if self._past is None:
            return keys, values
        rows = (keys.shape[0], -1, -1, -1)
        before_keys, before_values = self._past.keys_values(layer_idx)
        return (
            torch.cat([before_keys.expand(rows), keys], dim=2),
            torch.cat([before_values.expand(rows), values], dim=2),
        )


class KeysOnly:
    """Ends a block as soon as its keys and values are made: nothing else of it is wanted."""

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> NoReturn:
        """Called by a block."""
        raise KeysMade(keys, values)


class KeysMade(Exception):
    """Carries keys and values out of a block that need not go on."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.keys, self.values = keys, values
