"""Read prompts: from whatever a user has at hand to what each lens reads, at every layer."""

from collections.abc import Sequence
from itertools import accumulate

import torch
from jaxtyping import Float, Int
from torch import Tensor

from spade_lens.lenses.lens import Lens, Reading
from spade_lens.lenses.named import LensLike, as_lenses
from spade_lens.lenses.readout import Readout, read_off
from spade_lens.models.model import Model
from spade_lens.models.residuals import (
    LayersLike,
    Patch,
    PositionsLike,
    Residuals,
    as_positions,
    capture,
    check_layers,
    check_patches,
)
from spade_lens.prompts.inputs import PromptsLike
from spade_lens.prompts.prompt import Prompt
from spade_lens.settings import Settings, limits, progress_bar, scoped


@scoped
def read(
    prompts: PromptsLike,
    lens: LensLike | Sequence[LensLike] = ("logit", "spade"),
    *,
    model: Model | None = None,
    layers: LayersLike = None,
    positions: PositionsLike = None,
    top_k: int = 5,
    patches: Sequence[Patch] = (),
    settings: Settings | None = None,
) -> Readout:
    """Read prompts by one lens or several, at every layer.

    The prompts run through the model once, whatever the number of lenses.

    Example:
        >>> frame = read("ab->AB,cd->", model=model).to_frame()
        >>> len(frame) == 2 * (model.n_layers + 1)
        True

    Args:
        prompts: A string, the messages of a chat, a prompt, or a list of these. A prompt's
            ``target`` and ``candidates`` are read where it has such.
        lens: A lens, its name (``"logit"``, ``"spade"``), or several.
        model: The model to read; by default that of the lenses.
        layers: A layer or several, 0 to ``n_layers``; by default all that every lens reads.
        positions: Where to read: ``"last"``, ``"all"``, a position or several (negative ones count
            from the end), or such for every prompt; by default each prompt's answer position. The
            target at another position is the token that follows there.
        top_k: How many top tokens to keep.
        patches: Writes to the residual stream, made before anything is read.
        settings: Memory limit, batch size and progress; see :class:`spade_lens.Settings`.

    Returns:
        The readout, with one reading for every prompt and position.

    Raises:
        TypeError: If a prompt, a lens, a layer or a position is of a wrong type.
        ValueError: If layers, positions or prompts do not fit the model, the lenses are not of
            one model, or no model is named.
    """
    lenses, model = as_lenses(lens, model)
    prompts = model.prompts(prompts)
    check_patches(model, prompts, patches)
    layers = _layers_of(lenses, model, layers)
    if isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1:
        raise ValueError(f"top_k={top_k!r} was given; expected at least 1.")
    if positions is None:
        wanted = [[prompt.answer] for prompt in prompts]
    else:
        wanted = as_positions(prompts, positions)
    places = [(i, p) for i, at in enumerate(wanted) for p in at]
    keeps = [[tuple(lens.keep(prompts[i], p)) for i, p in places] for lens in lenses]
    needed: list[set[int]] = [set(at) for at in wanted]
    for keep in keeps:
        for (i, _), kept in zip(places, keep, strict=True):
            needed[i].update(kept)
    width = max(len(prompt.candidates) for prompt in prompts)
    row_bytes = len(lenses) * len(layers) * model.d_model * 4
    at_once = limits(model).rows(row_bytes, fraction=1 / 128)
    first_place = [0, *accumulate(len(at) for at in wanted)]
    parts = []
    with progress_bar(total=len(places), desc="read", unit="reading", model=model) as bar:
        for chunk in _chunks([len(n) for n in needed], len(layers) + 1, model):
            residuals = capture(
                model,
                [prompts[i] for i in chunk],
                layers=[*layers, model.n_layers],
                positions=[sorted(needed[i]) for i in chunk],
                patches=_of_chunk(patches, chunk),
            )
            within = range(first_place[chunk[0]], first_place[chunk[-1] + 1])
            for first in within[::at_once]:
                some = range(first, min(within.stop, first + at_once))
                here = [places[n] for n in some]
                readings = [
                    [
                        Reading(i - chunk[0], p, keep[n])
                        for n, (i, p) in zip(some, here, strict=True)
                    ]
                    for keep in keeps
                ]
                part = _read(
                    lenses,
                    residuals,
                    readings,
                    layers,
                    top_k,
                    target=[_target(prompts[i], p, positions is None) for i, p in here],
                    candidates=_padded([_candidates(prompts[i], p) for i, p in here], width),
                )
                part.prompt[:] = torch.tensor([i for i, _ in here])
                parts.append(part)
                bar.update(len(some))
    return Readout.join(parts)


def _target(prompt: Prompt, position: int, own: bool) -> int:
    """Return the right token at a position; -1 if there is none.

    Args:
        prompt: The prompt.
        position: The position.
        own: Whether only the prompt's own target counts, not the token that follows.
    """
    if position == prompt.answer and (own or prompt.target is not None):
        return -1 if prompt.target is None else prompt.target
    return prompt.tokens[position + 1] if position + 1 < len(prompt) else -1


def _candidates(prompt: Prompt, position: int) -> tuple[int, ...]:
    return prompt.candidates if position == prompt.answer else ()


def _layers_of(lenses: Sequence[Lens], model: Model, layers: LayersLike) -> list[int]:
    """The layers asked for; by default all that every lens has."""
    if layers is not None:
        return check_layers(model, layers)
    common = set(range(model.n_layers + 1))
    for lens in lenses:
        common &= set(getattr(lens, "layers", common))
    return check_layers(model, sorted(common))


def _read(
    lenses: Sequence[Lens],
    residuals: Residuals,
    readings: Sequence[Sequence[Reading]],
    layers: Sequence[int],
    top_k: int,
    target: Sequence[int],
    candidates: Int[Tensor, "reading candidate"],
) -> Readout:
    """Read one chunk: ``readings[lens]`` lists the same places for every lens."""
    model = lenses[0].model
    finals = torch.stack(
        [
            lens.final_residuals(residuals, some, layers)
            for lens, some in zip(lenses, readings, strict=True)
        ]
    )
    places = readings[0]
    own = _own(model, residuals, places)
    targets = torch.tensor(target, dtype=torch.long)
    values = read_off(model, finals, own, top_k=top_k, target=targets, candidates=candidates)
    tokens = torch.cat([values["top_tokens"].flatten(), targets, candidates.flatten()])
    return Readout(
        lenses=tuple(lens.name for lens in lenses),
        layers=tuple(layers),
        prompt=torch.tensor([r.prompt for r in places]),
        position=torch.tensor([r.answer for r in places]),
        target=targets,
        candidates=candidates,
        words=_words(model, tokens),
        model=model.name,
        **values,
    )


def _own(
    model: Model, residuals: Residuals, places: Sequence[Reading]
) -> Float[Tensor, "reading d_model"]:
    slots = [residuals.slots(r.prompt, [r.answer])[0] for r in places]
    return residuals.layer(model.n_layers)[slots]


def _words(model: Model, tokens: Int[Tensor, " token"]) -> dict[int, str]:
    ids = sorted(set(tokens.tolist()) - {-1})
    if model.tokenizer is None:
        return {token: str(token) for token in ids}
    return {token: model.tokenizer.decode([token]) for token in ids}


def _padded(rows: Sequence[Sequence[int]], width: int) -> Int[Tensor, "row column"]:
    padded = [[*row, *[-1] * (width - len(row))] for row in rows]
    return torch.tensor(padded, dtype=torch.long).reshape(len(rows), width)


def _chunks(held: Sequence[int], n_layers: int, model: Model) -> list[range]:
    """Prompts in order, as many at a time as half the memory holds residuals of."""
    element = torch.finfo(model.dtype).bits // 8
    at_once = limits(model).rows(n_layers * model.d_model * element, fraction=1 / 2)
    chunks: list[range] = []
    first, slots = 0, 0
    for i, n in enumerate(held):
        if i > first and slots + n > at_once:
            chunks.append(range(first, i))
            first, slots = i, 0
        slots += n
    return [*chunks, range(first, len(held))]


def _of_chunk(patches: Sequence[Patch], chunk: Sequence[int]) -> list[Patch]:
    """The patches of a chunk's prompts, with the prompts counted within the chunk."""
    within = {prompt: n for n, prompt in enumerate(chunk)}
    some = []
    for patch in patches:
        here = [n for n, prompt in enumerate(patch.prompts) if prompt in within]
        if here:
            some.append(
                Patch(
                    patch.layer,
                    prompts=tuple(within[patch.prompts[n]] for n in here),
                    positions=tuple(patch.positions[n] for n in here),
                    values=patch.values[here] if patch.values.ndim == 2 else patch.values,
                    mode=patch.mode,
                )
            )
    return some
