"""Patched runs that start at the patched layer, from residuals that were captured once.

A *row* is one run of one prompt under some patches; thousands of rows share the prompts' captured
residuals. A row costs the blocks above its lowest patch and nothing else, so a sweep over all
layers takes about half of what whole forwards would, and reads only the answer position.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from spade_lens.models import Model, Patch, Residuals, capture
from spade_lens.models.residuals import check_patches, pad_after
from spade_lens.prompts import Prompt

_TOKENS_AT_ONCE = 8192
"""No batch holds more tokens than this: larger ones are not faster, and the bar would stand."""


@torch.no_grad()
def replay(
    model: Model,
    residuals: Residuals,
    rows: Sequence[int],
    patches: Sequence[Patch],
    *,
    memory_limit: float = 4.0,
    progress: bool = True,
) -> Float[Tensor, "row d_model"]:
    """The residual at layer ``n_layers`` and the answer position of every row.

    The result is that of ``capture(model, [prompts[i] for i in rows], patches=patches)``.

    Example:
        >>> residuals = capture_for_replay(model, prompts)
        >>> write = Patch(2, prompts=(1,), positions=(0,), values=residuals.at(0)[2, 3])
        >>> replay(model, residuals, [0, 0, 1], [write]).shape
        torch.Size([3, 32])

    Args:
        model: The model.
        residuals: Of the prompts, from :func:`capture_for_replay`.
        rows: The prompt of every row, as an index into ``residuals.prompts``.
        patches: Writes to the residual stream. A patch's ``prompts`` are *rows* here. Of several
            at one layer the later ones see what the earlier ones wrote.
        memory_limit: About the most memory that a batch may take, in GiB; residuals and
            patches are yours already.
        progress: Show a progress bar when it takes longer than two seconds.

    Raises:
        ValueError: If there are no rows, one names a prompt that is not there, a patch does not
            fit, or no layer at or below a row's lowest patch was captured.
    """
    wrong = [row for row in rows if not 0 <= row < len(residuals.prompts)]
    if wrong or not len(rows):
        raise ValueError(
            f"Rows of prompts {wrong or list(rows)} were given; expected at least one, from 0 to "
            f"{len(residuals.prompts) - 1}."
        )
    run = [residuals.prompts[i] for i in rows]
    check_patches(model, run, patches)
    starts = _starts(model, residuals, rows, patches)
    slots = {i: residuals.slots(i, range(residuals.prompts[i].answer + 1)) for i in set(rows)}
    out = torch.empty(len(rows), model.d_model, dtype=model.dtype, device=model.device)
    batches = _batches(model, starts, [len(slots[i]) for i in rows], memory_limit)
    by_row = _Writes(patches, model)
    with tqdm(total=len(rows), desc="replay", unit="row", delay=2, disable=not progress) as bar:
        for batch in batches:
            out[batch] = _run(
                model, residuals, starts[batch[0]], [slots[rows[r]] for r in batch], by_row, batch
            )
            bar.update(len(batch))
    return out


def capture_for_replay(
    model: Model,
    prompts: Sequence[Prompt],
    *,
    layers: Sequence[int] | None = None,
    memory_limit: float = 4.0,
    progress: bool = True,
) -> Residuals:
    """Residuals from which patched runs of these prompts can start, up to the answer positions.

    Args:
        model: The model.
        prompts: The prompts.
        layers: The layers that patches will be made at; all by default. With fewer, a run starts
            at the next one below its lowest patch.
        memory_limit: About the most memory to take beside the model's weights, in GiB.
        progress: Show a progress bar when it takes longer than two seconds.

    Raises:
        ValueError: As :func:`spade_lens.capture` does.
    """
    return capture(
        model,
        prompts,
        layers=layers,
        positions=[range(prompt.answer + 1) for prompt in prompts],
        memory_limit=memory_limit,
        progress=progress,
    )


class _Writes:
    """Patches, to be looked up by row and layer."""

    def __init__(self, patches: Sequence[Patch], model: Model) -> None:
        self._patches = [
            (patch, patch.values.to(model.device, model.dtype).expand(len(patch.prompts), -1))
            for patch in patches
        ]
        self._of_row: dict[int, list[tuple[int, int]]] = {}
        for p, patch in enumerate(patches):
            for n, row in enumerate(patch.prompts):
                self._of_row.setdefault(row, []).append((p, n))

    def layers(self, batch: Sequence[int]) -> dict[int, list[tuple[int, list[int], list[int]]]]:
        """By layer, for every patch in order: which rows of the batch, and which of its values."""
        found: dict[int, tuple[list[int], list[int]]] = {}
        for place, row in enumerate(batch):
            for p, n in self._of_row.get(row, ()):
                places, values = found.setdefault(p, ([], []))
                places.append(place)
                values.append(n)
        by_layer: dict[int, list[tuple[int, list[int], list[int]]]] = {}
        for p in sorted(found):
            by_layer.setdefault(self._patches[p][0].layer, []).append((p, *found[p]))
        return by_layer

    def write(self, resid: Tensor, which: Sequence[tuple[int, list[int], list[int]]]) -> Tensor:
        resid = resid.clone()
        for p, places, chosen in which:
            patch, values = self._patches[p]
            columns = [patch.positions[n] for n in chosen]
            # What lies after the answer is not run, and nothing there could reach it.
            inside = [k for k, column in enumerate(columns) if column < resid.shape[1]]
            rows, at = [places[k] for k in inside], [columns[k] for k in inside]
            new = values[[chosen[k] for k in inside]]
            resid[rows, at] = new + resid[rows, at] if patch.mode == "add" else new
        return resid


def _run(
    model: Model,
    residuals: Residuals,
    start: int,
    slots: Sequence[Sequence[int]],
    writes: _Writes,
    batch: Sequence[int],
) -> Float[Tensor, "row d_model"]:
    # Padding repeats a row's answer token after its end, where causal attention never looks.
    padded = pad_after(slots, residuals.stack.device)
    resid = residuals.layer(start)[padded].to(model.device)
    at = torch.arange(padded.shape[1], device=model.device).expand_as(padded)
    todo = writes.layers(batch)

    def after_block(layer: int, resid: Tensor) -> Tensor | None:
        return writes.write(resid, todo[layer]) if layer in todo else None

    patched = after_block(start, resid)
    resid = resid if patched is None else patched
    resid = model.run_blocks(resid, at, start, model.n_layers, after_block=after_block)
    answers = torch.tensor([len(row) - 1 for row in slots], device=model.device)
    return resid[torch.arange(len(slots), device=model.device), answers]


def _starts(
    model: Model, residuals: Residuals, rows: Sequence[int], patches: Sequence[Patch]
) -> list[int]:
    """For every row, the highest captured layer at or below its lowest patch."""
    lowest = [model.n_layers] * len(rows)
    for patch in patches:
        for row in patch.prompts:
            lowest[row] = min(lowest[row], patch.layer)
    start = {
        layer: max((have for have in residuals.layers if have <= layer), default=-1)
        for layer in set(lowest)
    }
    impossible = sorted(layer for layer, have in start.items() if have < 0)
    if impossible:
        raise ValueError(
            f"A run patched at layer {impossible[0]} needs residuals of that layer or one below; "
            f"only {list(residuals.layers)} were captured. Add it to layers= of "
            "capture_for_replay()."
        )
    return [start[layer] for layer in lowest]


def _batches(
    model: Model, starts: Sequence[int], lengths: Sequence[int], memory_limit: float
) -> list[list[int]]:
    """Rows that start at one layer, of like lengths, as many as fit."""
    # The allowance is that of capture(): some residuals and an MLP for every token, in the
    # model's dtype, and scores for every pair of tokens.
    per_token = 32 * model.d_model * (torch.finfo(model.dtype).bits // 8)
    budget = memory_limit * 2**30
    batches: list[list[int]] = []
    for row in sorted(range(len(starts)), key=lambda r: (starts[r], lengths[r])):
        if batches and starts[batches[-1][0]] == starts[row]:
            padded = lengths[row] * (len(batches[-1]) + 1)
            if padded <= _TOKENS_AT_ONCE and padded * (per_token + 32 * lengths[row]) <= budget:
                batches[-1].append(row)
                continue
        batches.append([row])
    return batches
