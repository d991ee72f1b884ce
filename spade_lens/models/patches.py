"""Patches: writes to the residual stream, checked and looked up by row, position and layer.

This module knows where to write, not who runs the blocks: capture and replay do.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from reprlib import repr as shortened
from typing import Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from spade_lens.checks import as_several, check_fields, is_whole, whole_numbers
from spade_lens.models.model import Model
from spade_lens.models.places import PositionsLike, as_positions, check_layers
from spade_lens.prompts.prompt import Prompt


@dataclass(frozen=True, eq=False)
class Patch:
    """A write to the residual stream at one layer, at some positions of some prompts.

    Example:
        Add a vector at the last token of every prompt, and replace two residuals::

            Patch(12, values=vector, mode="add")
            Patch(12, prompts=[0, 1], positions=[[8], [5]], values=two_vectors)

    Args:
        layer: The layer; 0 is the embedding.
        prompts: The number of a prompt, or several; all by default.
        positions: Where to write in these prompts, as :func:`spade_lens.capture` takes positions:
            ``"last"``, ``"all"``, the name of a span, a position or several for all of them
            (negative ones count from the end), or one list of positions for each of them.
        values: One vector for all writes, or one for each, prompt by prompt.
        mode: Whether a value replaces the residual (``"replace"``) or is added to it (``"add"``).

    Raises:
        TypeError: If layer or values are of another type.
        ValueError: If the mode is unknown, or the values are not vectors.
    """

    layer: int
    prompts: int | Sequence[int] | None = None
    positions: PositionsLike = "last"
    values: Float[Tensor, "*n d_model"] = field(kw_only=True)
    mode: str = field(default="replace", kw_only=True)

    def __post_init__(self) -> None:
        check_fields(self)
        if not is_whole(self.layer):
            raise TypeError(f"layer={self.layer!r} was given; expected a whole number.")
        for name in ("prompts", "positions"):  # which are looked at more than once
            given = getattr(self, name)
            if isinstance(given, Iterator):
                object.__setattr__(self, name, list(given))
        if not isinstance(self.values, Tensor):
            raise TypeError(
                f"values of type {type(self.values).__name__} were given; expected a tensor "
                "[d_model], or [n d_model] with one row for each write."
            )
        if (
            self.values.is_meta
            or self.values.layout != torch.strided
            or not torch.isfinite(self.values).all()
        ):
            raise ValueError(
                "values of a patch are sparse, without values, NaN or infinite; expected finite "
                "numbers."
            )
        if self.values.ndim not in (1, 2) or not self.values.is_floating_point():
            raise ValueError(
                f"values of shape {tuple(self.values.shape)} and {self.values.dtype} were given; "
                "expected floating-point numbers [d_model], or [n d_model] with one row for each "
                "write."
            )
        if self.mode not in ("replace", "add"):
            raise ValueError(f"mode={self.mode!r} was given; expected 'replace' or 'add'.")

    def __repr__(self) -> str:
        return (
            f"Patch({self.layer}, prompts={shortened(self.prompts)}, "
            f"positions={shortened(self.positions)}, "
            f"values={list(self.values.shape)}, mode={self.mode!r})"
        )

    def places(self, prompts: Sequence[Prompt]) -> list[tuple[int, int]]:
        """Return the (prompt, position) of every write."""
        chosen: Any = range(len(prompts))
        if self.prompts is not None:
            expected = f"the number of a prompt, or several, from 0 to {len(prompts) - 1}"
            # One prompt may come again with other positions.
            chosen = whole_numbers(
                self.prompts,
                "prompts=",
                f"{expected}, in a patch",
                below=len(prompts),
                distinct=False,
            )
        positions = as_positions([prompts[i] for i in chosen], self.positions, numbers=chosen)
        places = [(int(i), p) for i, at in zip(chosen, positions, strict=True) for p in at]
        if len(set(places)) < len(places):
            raise ValueError(
                "A patch writes twice to one position of one prompt. Add the values up first, or "
                "give two patches."
            )
        return places

    def among(self, prompts: Sequence[Prompt], chosen: Sequence[int]) -> "Patch | None":
        """Return what the patch writes to some of the prompts, numbered by their place there."""
        number = {prompt: n for n, prompt in enumerate(chosen)}
        places = self.places(prompts)
        here = [n for n, (prompt, _) in enumerate(places) if prompt in number]
        if not here:
            return None
        return replace(
            self,
            prompts=[number[places[n][0]] for n in here],
            positions=[[places[n][1]] for n in here],
            values=self.values[here] if self.values.ndim == 2 else self.values,
        )


PatchesLike: TypeAlias = Patch | Iterable[Patch]
"""A patch or several."""

Place = tuple[int, Sequence[int]]
"""A row of a batch: its number among the patched prompts, and the positions of its tokens."""

Content = tuple[tuple[int, str, bytes], ...]
"""What is written to one position of one row: (layer, mode, hash of the value)."""


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
    """Patches, checked against the prompts (of every row) that they write to; looked up by row."""

    def __init__(self, model: Model, prompts: Sequence[Prompt], patches: PatchesLike) -> None:
        self.patches = as_patches(patches)
        self._values: list[Float[Tensor, "write d_model"]] = []
        self._digests: dict[int, list[bytes]] = {}
        self._contents: dict[tuple[int, int], Content] = {}
        # By row and position: (patch, which of its values).
        self._at: dict[int, dict[int, list[tuple[int, int]]]] = {}
        for p, patch in enumerate(self.patches):
            check_layers(model, [patch.layer])
            places = patch.places(prompts)
            expected = [(model.d_model,), (len(places), model.d_model)]
            if tuple(patch.values.shape) not in expected:
                raise ValueError(
                    f"A patch's values have shape {tuple(patch.values.shape)}; expected one of "
                    f"{expected}."
                )
            values = patch.values.to(model.device, model.dtype).expand(len(places), -1)
            self._values.append(values)
            for n, (row, position) in enumerate(places):
                self._at.setdefault(row, {}).setdefault(position, []).append((p, n))

    @property
    def to_starts(self) -> bool:
        """Whether something is written to a start token."""
        return any(0 in at for at in self._at.values())

    def positions(self, row: int) -> list[int]:
        """Return the positions of a row that are written to, ascending."""
        return sorted(self._at.get(row, ()))

    def lowest_layer(self, row: int) -> int | None:
        """Return the lowest layer at which a row is written to; None if it is not."""
        layers = [self.patches[p].layer for at in self._at.get(row, {}).values() for p, _ in at]
        return min(layers, default=None)

    def replaced(self, row: int, position: int) -> set[int]:
        """Return the layers at which a position is overwritten (``mode="replace"``)."""
        patches = [self.patches[p] for p, _ in self._at.get(row, {}).get(position, ())]
        return {patch.layer for patch in patches if patch.mode == "replace"}

    def content(self, row: int, position: int) -> Content:
        """Describe what is written so that it can be compared: copies of a value are equal."""
        writes = self._at.get(row, {}).get(position)
        if writes is None:
            return ()
        if (row, position) not in self._contents:
            by_layer = sorted(writes, key=lambda write: self.patches[write[0]].layer)
            self._contents[row, position] = tuple(
                (self.patches[p].layer, self.patches[p].mode, self._digest(p, n))
                for p, n in by_layer
            )
        return self._contents[row, position]

    def plan(self, places: Sequence[Place]) -> Plan:
        """Plan what to write where in a batch."""
        by_patch: dict[int, _Write] = {}
        for row, (number, positions) in enumerate(places):
            at = self._at.get(number)
            if at is None:
                continue
            for column, position in enumerate(positions):
                for p, n in at.get(position, ()):
                    write = by_patch.setdefault(p, _Write(p, [], [], []))
                    write.rows.append(row)
                    write.columns.append(column)
                    write.chosen.append(n)
        by_layer: Plan = {}
        for p in sorted(by_patch):
            by_layer.setdefault(self.patches[p].layer, []).append(by_patch[p])
        return by_layer

    def write(
        self, resid: Float[Tensor, "batch pos d_model"], plan: Plan, layer: int
    ) -> Float[Tensor, "batch pos d_model"] | None:
        """Return the residuals with a layer's writes in them; None if there are none."""
        if layer not in plan:
            return None
        resid = resid.clone()
        for write in plan[layer]:
            at = write.rows, write.columns
            values = self._values[write.patch][write.chosen]  # [write d_model]
            add = self.patches[write.patch].mode == "add"
            resid[at] = values + resid[at] if add else values
        return resid

    def _digest(self, p: int, n: int) -> bytes:
        if p not in self._digests:
            values = self.patches[p].values.detach().cpu()
            rows = torch.atleast_2d(values).contiguous().view(torch.uint8).numpy()
            self._digests[p] = [blake2b(row, digest_size=16).digest() for row in rows]
        digests = self._digests[p]
        return digests[n if len(digests) > 1 else 0]


def check_patches(model: Model, prompts: Sequence[Prompt], patches: PatchesLike) -> list[Patch]:
    """Return the patches as a list, if they fit the model and the prompts."""
    return Writes(model, prompts, patches).patches


def as_patches(patches: Any) -> list[Patch]:
    """Return a patch or several as a list."""
    given = [patches] if isinstance(patches, Patch) else as_several(patches)
    if given is None or not all(isinstance(patch, Patch) for patch in given):
        raise TypeError(
            f"patches={patches!r} was given; expected a Patch or several, for example "
            "patches=[Patch(12, values=vector)]."
        )
    return given
