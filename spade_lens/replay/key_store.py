"""Pasts of many rows: each sees other tokens, and many see the same ones.

Tokens are held once, as a past of one row, and every row of a batch picks its own.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from spade_lens.models.backbone import KeepKeys, KeysValues, Past
from spade_lens.models.past import pick
from spade_lens.replay.prefix_tree import Stretch


class KeyStore:
    """Keys and values of the shared stretches of one group, for those that go on from them."""

    def __init__(self, stretches: Sequence[Stretch], device: torch.device) -> None:
        self._first: dict[Stretch, int] = {}
        positions: list[int] = []
        for stretch in stretches:
            if stretch.is_shared:
                self._first[stretch] = len(positions)
                positions += stretch.positions
        self._kept: dict[int, KeysValues] = {}
        stand = torch.tensor([positions], dtype=torch.long, device=device)
        self._past = Past(stand, self._kept.__getitem__)

    def keep(self, batch: Sequence[Stretch]) -> KeepKeys | None:
        """Keeps keys and values of a batch's shared stretches; None where it has none."""
        places = [
            (row, column, self._first[stretch] + column)
            for row, stretch in enumerate(batch)
            if stretch.is_shared
            for column in range(len(stretch.positions))
        ]
        if not places:
            return None
        rows, columns, to = (list(some) for some in zip(*places, strict=True))

        def keep(block: int, *made: Tensor) -> None:
            if block not in self._kept:
                n = self._past.positions.shape[1]
                keys, values = (x.new_empty(1, x.shape[1], n, x.shape[3]) for x in made)
                self._kept[block] = keys, values
            for store, x in zip(self._kept[block], made, strict=True):
                store[0, :, to] = x[rows, :, columns].transpose(0, 1)

        return keep

    def past(self, batch: Sequence[Stretch]) -> Past | None:
        """The stretches before those of a batch."""
        wanted = [
            [
                self._first[before] + column
                for before in stretch.ancestors()
                for column in range(len(before.positions))
            ]
            for stretch in batch
        ]
        return pick(self._past, wanted)
