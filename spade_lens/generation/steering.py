"""Patches and captures while text is written: to the prompt's tokens, and to the new ones.

A patch at ``"prompt"`` writes to the tokens of the prompt, one at ``"last"`` to its last token and
to every new one, since each was the last when it ran, and one at ``"all"`` to all of them.
Positions of other kinds lie in the prompt.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from spade_lens.models.model import Model
from spade_lens.models.patches import Patch, PatchesLike, Writes, as_patches
from spade_lens.models.residuals import Residuals
from spade_lens.prompts.prompt import Prompt

_TO_NEW = ("last", "all")


class Steering:
    """What is written to the residual stream while text is written, and what is kept of it.

    Args:
        model: The model.
        prompts: All prompts of the call.
        patches: The patches.
        layers: The layers to capture, where next tokens are read.

    Raises:
        TypeError: If patches are of another type.
        ValueError: If they do not fit, or one that also writes to new tokens has several values
            for one prompt.
    """

    def __init__(
        self,
        model: Model,
        prompts: Sequence[Prompt],
        patches: PatchesLike,
        layers: Sequence[int],
    ) -> None:
        self.prompts, self.layers = prompts, list(layers)
        given = as_patches(patches)
        in_prompts = [replace(p, positions="all") if _named(p) == "prompt" else p for p in given]
        self._writes = Writes(model, prompts, in_prompts)
        self._to_new = [_ToNew.of(model, prompts, p) for p in given if _named(p) in _TO_NEW]
        self._kept: dict[tuple[int, int], dict[int, Tensor]] = {}

    @property
    def acts(self) -> bool:
        """Whether anything is written or kept."""
        return bool(self._writes.patches or self.layers)

    @property
    def touched(self) -> set[int]:
        """The layers at which anything is written or kept."""
        return {*self.layers, *(patch.layer for patch in self._writes.patches)}

    def after_block(
        self,
        layer: int,
        resid: Float[Tensor, "row pos d_model"],
        numbers: Sequence[int],
        positions: Sequence[Sequence[int]],
    ) -> Float[Tensor, "row pos d_model"] | None:
        """Write and keep at a layer.

        Args:
            layer: The layer.
            resid: The residuals there.
            numbers: The prompt of every row.
            positions: The positions of every row's real tokens.
        """
        before = resid
        inside = [
            (i, [p for p in at if p < len(self.prompts[i])])
            for i, at in zip(numbers, positions, strict=True)
        ]
        patched = self._writes.write(resid, self._writes.plan(inside), layer)
        resid = resid if patched is None else patched
        for write in self._to_new:
            if write.layer == layer:
                resid = write.write(resid, numbers, positions, self.prompts)
        if layer in self.layers:
            for row, (i, at) in enumerate(zip(numbers, positions, strict=True)):
                for column, position in enumerate(at):
                    if position >= len(self.prompts[i]) - 1:
                        kept = self._kept.setdefault((i, position), {})
                        kept[layer] = resid[row, column].clone()
        return None if resid is before else resid

    def residuals(self, model: Model, texts: Sequence[Sequence[int]]) -> Residuals | None:
        """Return what was kept, at the positions at which new tokens were read.

        Args:
            model: The model.
            texts: The tokens of every prompt, new ones included.
        """
        if not self.layers:
            return None
        places = [
            (i, position)
            for i, tokens in enumerate(texts)
            for position in range(len(self.prompts[i]) - 1, len(tokens) - 1)
        ]
        shape = (len(self.layers), len(places), model.d_model)
        stack = torch.empty(shape, dtype=model.dtype, device=model.device)
        for slot, place in enumerate(places):
            for n, layer in enumerate(self.layers):
                stack[n, slot] = self._kept[place][layer]
        return Residuals(
            stack=stack,
            layers=tuple(self.layers),
            prompt=torch.tensor([i for i, _ in places], dtype=torch.long),
            position=torch.tensor([p for _, p in places], dtype=torch.long),
            prompts=tuple(Prompt(tokens=tuple(tokens)) for tokens in texts),
            start_is_pure=not model.hooked and not self._writes.to_starts,
            word=model.word,
        )


@dataclass(frozen=True)
class _ToNew:
    """One patch, as it is written to new tokens: a value for every prompt that it names."""

    layer: int
    adds: bool
    values: dict[int, Tensor] = field(repr=False)

    @classmethod
    def of(cls, model: Model, prompts: Sequence[Prompt], patch: Patch) -> "_ToNew":
        """Make it of a patch at ``"last"`` or ``"all"``."""
        chosen = [i for i, _ in replace(patch, positions="last").places(prompts)]
        values = patch.values.to(model.device, model.dtype)
        if values.ndim == 2 and (len(values) != len(chosen) or _named(patch) != "last"):
            raise ValueError(
                f"A patch at positions={patch.positions!r} also writes to new tokens, and "
                f"{len(values)} values were given; expected one vector, or at 'last' one for each "
                f"of its {len(chosen)} prompts."
            )
        each = values.expand(len(chosen), -1)
        return cls(patch.layer, patch.mode == "add", dict(zip(chosen, each, strict=True)))

    def write(
        self,
        resid: Float[Tensor, "row pos d_model"],
        numbers: Sequence[int],
        positions: Sequence[Sequence[int]],
        prompts: Sequence[Prompt],
    ) -> Float[Tensor, "row pos d_model"]:
        """Return the residuals with the value at all new tokens."""
        resid = resid.clone()
        for row, (i, at) in enumerate(zip(numbers, positions, strict=True)):
            new = [column for column, p in enumerate(at) if p >= len(prompts[i])]
            if i in self.values and new:
                value = self.values[i]
                resid[row, new] = resid[row, new] + value if self.adds else value
        return resid


def _named(patch: Patch) -> str | None:
    return patch.positions if isinstance(patch.positions, str) else None


def columns_of(positions: Int[Tensor, "row pos"], counts: Sequence[int]) -> list[list[int]]:
    """Return the positions of every row's real tokens."""
    return [row[:count] for row, count in zip(positions.tolist(), counts, strict=True)]
