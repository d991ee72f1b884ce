"""Patches, looked up by row, position and layer."""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

import torch
from jaxtyping import Float
from torch import Tensor

from spade_lens.models.residuals import Patch

Place = tuple[int, Sequence[int]]
"""One row of a batch: which row of the patches it is, and the positions of its tokens."""


Content = tuple[tuple[int, str, bytes], ...]
"""What is written to one position of one row, by layer; of the values a hash."""


@dataclass
class _Write:
    """One patch in one batch: its values ``chosen`` go to ``rows`` and ``columns``."""

    patch: int
    rows: list[int]
    columns: list[int]
    chosen: list[int]


Plan = dict[int, list[_Write]]
"""The writes to a batch by layer, in the order of the patches."""


class Writes:
    """Some patches, whose ``prompts`` are the numbers of rows."""

    def __init__(self, patches: Sequence[Patch], device: torch.device, dtype: torch.dtype) -> None:
        self._patches = patches
        self._values = [
            patch.values.to(device, dtype).expand(len(patch.prompts), -1) for patch in patches
        ]
        self._digests: dict[int, list[bytes]] = {}
        self._contents: dict[tuple[int, int], Content] = {}
        # By row and position: (patch, which of its values).
        self._at: dict[int, dict[int, list[tuple[int, int]]]] = {}
        for p, patch in enumerate(patches):
            for n, (row, position) in enumerate(zip(patch.prompts, patch.positions, strict=True)):
                self._at.setdefault(row, {}).setdefault(position, []).append((p, n))

    def positions(self, row: int) -> list[int]:
        """Where a row is written to, ascending."""
        return sorted(self._at.get(row, ()))

    def replaced(self, row: int, position: int) -> set[int]:
        """The layers at which what was there before does not matter."""
        found = self._at.get(row, {}).get(position, ())
        return {self._patches[p].layer for p, _ in found if self._patches[p].mode == "replace"}

    def content(self, row: int, position: int) -> Content:
        """What is written, so that it can be compared: two copies of a value are equal."""
        found = self._at.get(row, {}).get(position)
        if found is None:
            return ()
        if (row, position) not in self._contents:
            by_layer = sorted(found, key=lambda write: self._patches[write[0]].layer)
            self._contents[row, position] = tuple(
                (self._patches[p].layer, self._patches[p].mode, self._digest(p, n))
                for p, n in by_layer
            )
        return self._contents[row, position]

    def plan(self, places: Sequence[Place]) -> Plan:
        """What is to be written where in a batch."""
        found: dict[int, _Write] = {}
        for row, (number, positions) in enumerate(places):
            at = self._at.get(number)
            if at is None:
                continue
            for column, position in enumerate(positions):
                for p, n in at.get(position, ()):
                    write = found.setdefault(p, _Write(p, [], [], []))
                    write.rows.append(row)
                    write.columns.append(column)
                    write.chosen.append(n)
        by_layer: Plan = {}
        for p in sorted(found):
            by_layer.setdefault(self._patches[p].layer, []).append(found[p])
        return by_layer

    def write(
        self, resid: Float[Tensor, "batch pos d_model"], plan: Plan, layer: int
    ) -> Float[Tensor, "batch pos d_model"] | None:
        """The residuals with a layer's writes in them; None if there are none."""
        if layer not in plan:
            return None
        resid = resid.clone()
        for write in plan[layer]:
            at = write.rows, write.columns
            new = self._values[write.patch][write.chosen]
            add = self._patches[write.patch].mode == "add"
            resid[at] = new + resid[at] if add else new
        return resid

    def _digest(self, p: int, n: int) -> bytes:
        if p not in self._digests:
            values = self._patches[p].values.detach()
            each = values.reshape(-1, values.shape[-1]).contiguous().cpu()
            self._digests[p] = [
                blake2b(value, digest_size=16).digest() for value in each.view(torch.uint8).numpy()
            ]
        digests = self._digests[p]
        return digests[n if len(digests) > 1 else 0]
