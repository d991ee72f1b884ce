"""Capture and patch the residual stream: chosen layers, chosen positions, any prompts.

Prompts of different lengths run side by side, padded after their ends (where causal attention
never looks), and the padding is gone from what is returned. Nothing above the last layer asked
for is computed.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from numbers import Integral
from typing import Any, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from spade_lens.models.model import Model
from spade_lens.prompts.inputs import PromptsLike
from spade_lens.prompts.prompt import Prompt
from spade_lens.settings import Settings, limits, progress_bar, scoped

LayersLike: TypeAlias = int | Iterable[int] | None
"""A layer, several, or None for all."""

PositionsLike: TypeAlias = str | int | Iterable[int] | Iterable[Iterable[int]] | None
"""Positions as :func:`as_positions` takes them."""


@dataclass(frozen=True)
class Residuals:
    """Residuals of several prompts at several layers; a *slot* is one position of one prompt.

    Args:
        stack: The residuals.
        layers: The layer of every entry of the first axis.
        prompt: The prompt of every slot, as an index into ``prompts``.
        position: The position of every slot in its prompt.
        prompts: The prompts.
        start_is_pure: Whether nothing was written to the start tokens (no patch, no hook), so
            that they are what the start token alone gives.
    """

    stack: Float[Tensor, "layer slot d_model"]
    layers: tuple[int, ...]
    prompt: Int[Tensor, " slot"]
    position: Int[Tensor, " slot"]
    prompts: tuple[Prompt, ...]
    start_is_pure: bool = True

    @cached_property
    def _slots(self) -> dict[tuple[int, int], int]:
        places = zip(self.prompt.tolist(), self.position.tolist(), strict=True)
        return {place: slot for slot, place in enumerate(places)}

    def slots(self, prompt: int, positions: Iterable[int]) -> list[int]:
        """Slots of one prompt's positions.

        Raises:
            ValueError: If one of them was not captured.
        """
        try:
            return [self._slots[prompt, position] for position in positions]
        except KeyError as error:
            raise ValueError(
                f"The residual of prompt {prompt} at position {error.args[0][1]} was not captured. "
                "Add the position when calling capture()."
            ) from None

    def layer(self, layer: int) -> Float[Tensor, "slot d_model"]:
        """All slots at one layer.

        Raises:
            ValueError: If the layer was not captured.
        """
        if layer not in self.layers:
            raise ValueError(
                f"Layer {layer} was not captured, only {list(self.layers)}. Add it when calling "
                "capture()."
            )
        return self.stack[self.layers.index(layer)]

    def at(self, prompt: int) -> Float[Tensor, "layer pos d_model"]:
        """One prompt's residuals at its captured positions, in their order."""
        return self.stack[:, (self.prompt == prompt).to(self.stack.device)]


@dataclass(frozen=True)
class Patch:
    """Write to the residual stream at one layer: at ``positions[i]`` of prompt ``prompts[i]``.

    Example:
        Add one vector at the last token of two prompts::

            Patch(12, prompts=(0, 1), positions=(8, 5), values=vector, mode="add")

    Args:
        layer: The layer; 0 is the embedding.
        prompts: Which prompt each write goes to.
        positions: Which position of it.
        values: One vector for all writes or one for each.
        mode: Whether a value replaces the residual or is added to it.
    """

    layer: int
    prompts: tuple[int, ...]
    positions: tuple[int, ...]
    values: Float[Tensor, "*n d_model"]
    mode: str = "replace"

    def __post_init__(self) -> None:
        if self.mode not in ("replace", "add"):
            raise ValueError(f"mode={self.mode!r} was given; expected 'replace' or 'add'.")
        places = list(zip(self.prompts, self.positions, strict=False))
        if len(set(places)) < len(places):
            raise ValueError(
                "A patch writes twice to one position of one prompt. Add the values up first, or "
                "give two patches."
            )


@scoped
@torch.no_grad()
def capture(
    model: Model,
    prompts: PromptsLike,
    *,
    layers: LayersLike = None,
    positions: PositionsLike = None,
    patches: Sequence[Patch] = (),
    settings: Settings | None = None,
) -> Residuals:
    """The residual stream at chosen layers and positions only.

    Args:
        model: The model.
        prompts: A string, the messages of a chat, a prompt, or a list of these; of any lengths.
        layers: The layer or layers wanted, 0 to ``n_layers``; all by default.
        positions: The positions wanted, as :func:`as_positions` takes them; all by default.
        patches: Writes to the residual stream, made before their layer is captured.
        settings: Memory limit, batch size and progress; see :class:`spade_lens.Settings`.

    Returns:
        The residuals; slots come prompt by prompt, in the order of ``positions``.

    Raises:
        ValueError: If layers, positions or patches are out of range, what is asked for does not
            fit ``memory_limit``, or the model gives NaN or infinite residuals.
    """
    prompts = model.prompts(prompts)
    layers = check_layers(model, layers)
    positions = as_positions(prompts, positions)
    check_patches(model, prompts, patches)
    n_slots = sum(len(p) for p in positions)
    element = torch.finfo(model.dtype).bits // 8
    result = len(layers) * n_slots * model.d_model * element
    memory_limit = limits(model).memory_limit
    budget = memory_limit * 2**30 - result
    if budget < 0.1 * memory_limit * 2**30:
        raise ValueError(
            f"{len(layers)} layers of {n_slots} positions take {result / 2**30:.2f} GiB, more than "
            f"fits memory_limit={memory_limit} GiB. Ask for fewer layers or positions, give fewer "
            "prompts at a time, or raise memory_limit."
        )
    stack = torch.empty(len(layers), n_slots, model.d_model, dtype=model.dtype, device=model.device)
    first_slot = [0]
    for wanted in positions:
        first_slot.append(first_slot[-1] + len(wanted))
    chunks = list(_chunks(model, prompts, budget))
    with progress_bar(total=len(prompts), desc="capture", unit="prompt") as bar:
        for chunk in chunks:
            slots = [range(first_slot[i], first_slot[i + 1]) for i in chunk]
            _capture_chunk(model, prompts, chunk, layers, positions, patches, stack, slots)
            bar.update(len(chunk))
    counts = torch.tensor([len(p) for p in positions])
    return Residuals(
        stack=stack,
        layers=tuple(layers),
        prompt=torch.repeat_interleave(torch.arange(len(prompts)), counts),
        position=torch.tensor([p for wanted in positions for p in wanted], dtype=torch.long),
        prompts=tuple(prompts),
        start_is_pure=not model.hooked and not any(0 in patch.positions for patch in patches),
    )


def _capture_chunk(
    model: Model,
    prompts: Sequence[Prompt],
    chunk: Sequence[int],
    layers: Sequence[int],
    positions: Sequence[Sequence[int]],
    patches: Sequence[Patch],
    stack: Float[Tensor, "layer slot d_model"],
    slots: Sequence[range],
) -> None:
    tokens = pad_after([prompts[i].tokens for i in chunk], model.device)
    at = torch.arange(tokens.shape[1], device=model.device).expand_as(tokens)
    row = [r for r, i in enumerate(chunk) for _ in positions[i]]
    column = [p for i in chunk for p in positions[i]]
    slot = torch.tensor([s for some in slots for s in some], device=model.device)
    index = {layer: n for n, layer in enumerate(layers)}
    writes = _writes_by_layer(patches, chunk, model)

    def after_block(layer: int, resid: Tensor) -> Tensor | None:
        patched = layer in writes
        if patched:
            resid = resid.clone()
            for rows, columns, values, mode in writes[layer]:
                old = resid[rows, columns] if mode == "add" else 0
                resid[rows, columns] = values + old
        if layer in index:
            kept = resid[row, column]
            if not torch.isfinite(kept).all():
                raise ValueError(_not_finite(kept, layer, [chunk[r] for r in row], column))
            stack[index[layer], slot] = kept
        return resid if patched else None

    resid = model.embed(tokens, at)
    replaced = after_block(0, resid)
    resid = resid if replaced is None else replaced
    model.run_blocks(resid, at, 0, max(layers), after_block=after_block)


def pad_after(rows: Sequence[Sequence[int]], device: torch.device) -> Int[Tensor, "batch pos"]:
    """Rows of different lengths as one tensor; a row's last value repeats after its end."""
    longest = max(len(row) for row in rows)
    padded = [[*row, *[row[-1]] * (longest - len(row))] for row in rows]
    return torch.tensor(padded, device=device)


def check_layers(model: Model, layers: LayersLike) -> list[int]:
    """Return the layers asked for, ascending, each once; all of them for None.

    Raises:
        TypeError: If a layer is no whole number.
        ValueError: If there are none or one is out of range.
    """
    if layers is None:
        return list(range(model.n_layers + 1))
    asked: Any = [layers] if isinstance(layers, Integral) else layers
    if isinstance(asked, str) or not isinstance(asked, Iterable):
        raise TypeError(_not_layers(model, layers))
    asked = list(asked)
    if any(isinstance(layer, bool) or not isinstance(layer, Integral) for layer in asked):
        raise TypeError(_not_layers(model, layers))
    outside = [int(layer) for layer in asked if not 0 <= layer <= model.n_layers]
    if outside or not asked:
        raise ValueError(
            f"Layers {[int(layer) for layer in asked]} were asked for; {model.name} has layers 0 "
            f"(the embedding) to {model.n_layers} (its output)"
            + (f", and {outside} lie outside." if outside else ".")
        )
    return sorted({int(layer) for layer in asked})


def _not_layers(model: Model, layers: Any) -> str:
    return (
        f"layers={layers!r} was given; expected a whole number from 0 to {model.n_layers} or "
        "several, such as layers=12 or layers=range(6, 13)."
    )


def as_positions(prompts: Sequence[Prompt], positions: PositionsLike) -> list[list[int]]:
    """Return the positions asked for, prompt by prompt, none of them negative.

    Example:
        >>> as_positions([Prompt((1, 2, 3)), Prompt((1, 2))], "last")
        [[2], [1]]
        >>> as_positions([Prompt((1, 2, 3)), Prompt((1, 2))], [0, -1])
        [[0, 2], [0, 1]]

    Args:
        prompts: The prompts.
        positions: ``"all"`` or None for all; ``"last"``; the name of a span of the prompts; a
            position or several, the same in every prompt, where negative ones count from the
            end; or one list of positions for each prompt.

    Raises:
        TypeError: If something else is given.
        ValueError: If a position lies outside its prompt, a prompt has no such span, or the
            lists are not as many as the prompts.
    """
    if positions is None or positions == "all":
        return [list(range(len(prompt))) for prompt in prompts]
    if isinstance(positions, str):
        return [_named_positions(i, prompt, positions) for i, prompt in enumerate(prompts)]
    if isinstance(positions, Integral):
        return as_positions(prompts, [int(positions)])
    if not isinstance(positions, Iterable):
        raise TypeError(_not_positions(positions))
    asked: list[Any] = list(positions)
    if asked and all(isinstance(one, Integral) for one in asked):
        asked = [asked] * len(prompts)
    elif len(asked) != len(prompts):
        raise ValueError(
            f"{len(asked)} lists of positions were given for {len(prompts)} prompts; give one "
            "list for each."
        )
    found = []
    for i, (prompt, some) in enumerate(zip(prompts, asked, strict=True)):
        if isinstance(some, str) or not isinstance(some, Iterable):
            raise TypeError(_not_positions(some))
        some = list(some)
        if any(isinstance(p, bool) or not isinstance(p, Integral) for p in some):
            raise TypeError(_not_positions(some))
        n = len(prompt)
        outside = [int(p) for p in some if not -n <= p < n]
        if outside:
            raise ValueError(
                f"Positions {outside} lie outside prompt {i}, which has {n} tokens "
                f"(positions 0 to {n - 1}, or -{n} to -1 from the end)."
            )
        found.append([int(p) % n for p in some])
    return found


def _named_positions(i: int, prompt: Prompt, name: str) -> list[int]:
    if name == "last":
        return [len(prompt) - 1]
    if name not in prompt.spans:
        raise ValueError(
            f"positions={name!r} was given; expected 'last', 'all' or a span of prompt {i}, which "
            f"has {sorted(prompt.spans)}."
        )
    return list(prompt.spans[name])


def _not_positions(given: Any) -> str:
    return (
        f"positions={given!r} was given; expected 'last', 'all', the name of a span, a whole "
        "number or several (negative ones count from the end), or one such list for each prompt."
    )


def check_patches(model: Model, prompts: Sequence[Prompt], patches: Sequence[Patch]) -> None:
    """Raise if a patch does not fit the prompts.

    Raises:
        ValueError: If layers, prompts, positions or the shape of the values are wrong.
    """
    for patch in patches:
        check_layers(model, [patch.layer])
        if len(patch.prompts) != len(patch.positions):
            raise ValueError(
                f"A patch names {len(patch.prompts)} prompts and {len(patch.positions)} positions; "
                "there must be one position for each."
            )
        wrong = [i for i in patch.prompts if not 0 <= i < len(prompts)]
        if wrong:
            raise ValueError(f"A patch names prompts {wrong}; there are {len(prompts)}.")
        for i, position in zip(patch.prompts, patch.positions, strict=True):
            as_positions([prompts[i]], [[position]])
        expected = [(model.d_model,), (len(patch.prompts), model.d_model)]
        if tuple(patch.values.shape) not in expected:
            raise ValueError(
                f"A patch's values have shape {tuple(patch.values.shape)}; expected one of "
                f"{expected}."
            )


_Write = tuple[list[int], list[int], Tensor, str]


def _writes_by_layer(
    patches: Sequence[Patch], chunk: Sequence[int], model: Model
) -> dict[int, list[_Write]]:
    row_of = {prompt: row for row, prompt in enumerate(chunk)}
    writes: dict[int, list[_Write]] = {}
    for patch in patches:
        here = [n for n, prompt in enumerate(patch.prompts) if prompt in row_of]
        if not here:
            continue
        values = patch.values.to(model.device, model.dtype)
        if values.ndim == 2:
            values = values[here]
        rows = [row_of[patch.prompts[n]] for n in here]
        columns = [patch.positions[n] for n in here]
        writes.setdefault(patch.layer, []).append((rows, columns, values, patch.mode))
    return writes


def _chunks(model: Model, prompts: Sequence[Prompt], budget: float) -> Iterable[list[int]]:
    """Groups of prompts of like lengths whose run fits the budget in bytes."""
    # An allowance, not a count: a block keeps a few residuals and an MLP of some four times
    # their width for every token, in the model's dtype, and scores for every pair of tokens.
    per_token = 32 * model.d_model * (torch.finfo(model.dtype).bits // 8)
    most = limits(model)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    chunk: list[int] = []
    for i in order:
        padded = len(prompts[i]) * (len(chunk) + 1)
        cost = padded * (per_token + 32 * len(prompts[i]))
        if chunk and (cost > budget or padded > most.batch_tokens or len(chunk) == most.batch_size):
            yield chunk
            chunk = []
        chunk.append(i)
    yield chunk


def _not_finite(
    kept: Float[Tensor, "slot d_model"], layer: int, prompts: list[int], positions: list[int]
) -> str:
    first = int((~torch.isfinite(kept)).any(dim=-1).nonzero()[0])
    return (
        f"The residual stream is NaN or infinite at layer {layer}, first in prompt "
        f"{prompts[first]} at position {positions[first]}. Check the model's weights and your "
        "patches or hooks; in half precision, try dtype=torch.bfloat16 or torch.float32."
    )
