"""``read`` and ``read_grid``: from prompts to what each lens reads, at every layer."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from spade_lens.lenses.lens import Lens, Reading
from spade_lens.lenses.readout import Readout, read_off
from spade_lens.models.model import Model
from spade_lens.models.residuals import Patch, Residuals, capture, check_layers, check_patches
from spade_lens.prompts.prompt import Prompt

_READINGS_AT_ONCE = 256


def read(
    lenses: Lens | Sequence[Lens],
    prompts: Sequence[Prompt],
    *,
    layers: Sequence[int] | None = None,
    top_k: int = 5,
    patches: Sequence[Patch] = (),
    memory_limit: float = 4.0,
    progress: bool = True,
) -> Readout:
    """What every lens reads at every prompt's answer position, at every layer.

    The prompts run through the model once, whatever the number of lenses.

    Example:
        >>> frame = read([LogitLens(model), Spade(model)], prompts).to_frame()
        >>> len(frame) == 2 * (model.n_layers + 1) * len(prompts)
        True

    Args:
        lenses: One lens or several of one model.
        prompts: The prompts; their ``target`` and ``candidates`` are read where they have such.
        layers: The layers to read, 0 to ``n_layers``; all by default.
        top_k: How many top tokens to keep.
        patches: Writes to the residual stream, made before anything is read.
        memory_limit: About the most memory to take beside the model's weights, in GiB.
        progress: Show a progress bar when it takes longer than two seconds.

    Returns:
        The readout, with one reading for every prompt.

    Raises:
        ValueError: If layers or prompts do not fit the model, or the lenses are not of one model.
    """
    lenses, model = _of_one_model(lenses)
    model.check_prompts(prompts)
    check_patches(model, prompts, patches)
    layers = check_layers(model, layers)
    if top_k < 1:
        raise ValueError(f"top_k={top_k} was given; expected at least 1.")
    keeps = [[tuple(lens.keep(p, p.answer)) for p in prompts] for lens in lenses]
    needed = [
        sorted({prompt.answer, *(p for keep in keeps for p in keep[i])})
        for i, prompt in enumerate(prompts)
    ]
    width = max(len(prompt.candidates) for prompt in prompts)
    parts = []
    with tqdm(total=len(prompts), desc="read", unit="prompt", delay=2, disable=not progress) as bar:
        for chunk in _chunks(needed, len(layers) + 1, model, memory_limit):
            some = [prompts[i] for i in chunk]
            residuals = capture(
                model,
                some,
                layers=[*layers, model.n_layers],
                positions=[needed[i] for i in chunk],
                patches=_of_chunk(patches, chunk),
                memory_limit=memory_limit,
                progress=False,
            )
            readings = [
                [Reading(n, prompts[i].answer, keep[i]) for n, i in enumerate(chunk)]
                for keep in keeps
            ]
            target = [-1 if p.target is None else p.target for p in some]
            candidates = _padded([p.candidates for p in some], width)
            part = _read(lenses, residuals, readings, layers, top_k, target, candidates)
            part.prompt[:] = torch.tensor(chunk)
            parts.append(part)
            bar.update(len(chunk))
    return Readout.join(parts)


def read_grid(
    lenses: Lens | Sequence[Lens],
    prompt: Prompt,
    *,
    layers: Sequence[int] | None = None,
    top_k: int = 1,
    memory_limit: float = 4.0,
    progress: bool = True,
) -> Readout:
    """What every lens reads at every position of a text, at every layer.

    The target at each position is the token that really follows.

    Example:
        >>> text = model.prompt("one-two-three")
        >>> grid = read_grid(Spade(model), text)
        >>> grid.entropy.shape == (1, model.n_layers + 1, len(text))
        True

    Args:
        lenses: One lens or several of one model.
        prompt: The text; its answer position, target and candidates play no part.
        layers: The layers to read, 0 to ``n_layers``; all by default.
        top_k: How many top tokens to keep.
        memory_limit: About the most memory to take beside the model's weights, in GiB.
        progress: Show a progress bar when it takes longer than two seconds.

    Returns:
        The readout, with one reading for every position.

    Raises:
        ValueError: If layers or the prompt do not fit the model, or the lenses are not of one
            model.
    """
    lenses, model = _of_one_model(lenses)
    layers = check_layers(model, layers)
    residuals = capture(
        model,
        [prompt],
        layers=[*layers, model.n_layers],
        memory_limit=memory_limit,
        progress=False,
    )
    n = len(prompt)
    following = [*prompt.tokens[1:], -1]
    parts = []
    with tqdm(total=n, desc="read", unit="position", delay=2, disable=not progress) as bar:
        for first in range(0, n, _READINGS_AT_ONCE):
            some = range(first, min(n, first + _READINGS_AT_ONCE))
            readings = [
                [Reading(0, p, tuple(lens.keep(prompt, p))) for p in some] for lens in lenses
            ]
            target = following[some.start : some.stop]
            none = _padded([()] * len(some), 0)
            parts.append(_read(lenses, residuals, readings, layers, top_k, target, none))
            bar.update(len(some))
    return Readout.join(parts)


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


def _of_one_model(lenses: Lens | Sequence[Lens]) -> tuple[list[Lens], Model]:
    several = list(lenses) if isinstance(lenses, Sequence) else [lenses]
    if not several:
        raise ValueError("No lens was given. Give at least one, for example Spade(model).")
    model = several[0].model
    if any(lens.model is not model for lens in several):
        names = sorted({lens.model.name for lens in several})
        raise ValueError(
            f"The lenses belong to different models ({', '.join(names)}); read with those of one "
            "model at a time."
        )
    names = [lens.name for lens in several]
    if len(set(names)) < len(names):
        raise ValueError(
            f"Two lenses have one name: {names}. Tables could not tell them apart; give name=."
        )
    return several, model


def _chunks(
    needed: Sequence[Sequence[int]], n_layers: int, model: Model, memory_limit: float
) -> list[list[int]]:
    """Prompts in order, as many at a time as half the memory holds residuals of."""
    element = torch.finfo(model.dtype).bits // 8
    most = 0.5 * memory_limit * 2**30 / (n_layers * model.d_model * element)
    chunks: list[list[int]] = [[]]
    held = 0
    for i, positions in enumerate(needed):
        if chunks[-1] and (held + len(positions) > most or len(chunks[-1]) == _READINGS_AT_ONCE):
            chunks.append([])
            held = 0
        chunks[-1].append(i)
        held += len(positions)
    return chunks


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
