"""Read prompts: from whatever a user has at hand to what each lens reads, at every layer.

This module does not know how a lens works, nor what is read off its residuals.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from spade_lens.lenses.lens import (
    Lens,
    Reading,
    finals_of,
    keep_of,
    layers_of,
    refuse_other_layers,
)
from spade_lens.lenses.measures import Asked, readout_of
from spade_lens.lenses.named import LensLike, as_lenses
from spade_lens.lenses.readout import Readout
from spade_lens.models.hooks import numbered
from spade_lens.models.model import Model
from spade_lens.models.patches import PatchesLike, check_patches
from spade_lens.models.places import LayersLike, PositionsLike, as_positions, check_layers
from spade_lens.models.residuals import Residuals, capture
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
    patches: PatchesLike = (),
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
        layers: A layer or several, 0 to ``n_layers``, each once. The readout has them in this
            order. By default all that every lens reads.
        positions: Where to read: ``"last"``, ``"all"``, a position or several (negative ones count
            from the end), or such for every prompt; by default each prompt's answer position. The
            target at another position is the token that follows there.
        top_k: How many top tokens to keep.
        patches: Writes to the residual stream, made before anything is read. The model that
            lenses are compared with (``agrees``, ``kl``) is then the patched one;
            :func:`spade_lens.patch` compares with the unpatched model.
        settings: Memory limit, batch size and progress; see :class:`spade_lens.Settings`.

    Returns:
        The readout, with one reading for every prompt and position.

    Raises:
        TypeError: If a prompt, a lens, a layer or a position is of a wrong type.
        ValueError: If layers, positions or prompts do not fit the model, the lenses are not of
            one model, or no model is named.
    """
    if isinstance(prompts, Lens | Model):
        raise TypeError(
            f"The prompts were given as {prompts!r}; prompts come first and lenses second: "
            "read(prompts, lens, model=model)."
        )
    lenses, model = as_lenses(lens, model)
    prompts = model.prompts(prompts)
    patches = check_patches(model, prompts, patches)
    layers = _layers_of(lenses, model, layers)
    if top_k < 1:
        raise ValueError(f"top_k={top_k!r} was given; expected a whole number of at least 1.")
    places = _places(prompts, lenses, positions)
    if not places:
        raise ValueError(f"positions={positions!r} names no position to read at; give one or more.")
    model.expect_rows(len(places) * len(layers))
    by_prompt: list[list[_Place]] = [[] for _ in prompts]
    for place in places:
        by_prompt[place.prompt].append(place)
    needed = [{p for place in group for p in place.needed} for group in by_prompt]
    reader = _Reader(lenses, layers, top_k, max(len(place.candidates) for place in places))
    finals_bytes = len(lenses) * len(layers) * model.d_model * 4
    at_once = limits(model).rows(finals_bytes, fraction=1 / 128)
    parts = []
    with progress_bar(total=len(places), desc="read", unit="reading", model=model) as bar:
        for chunk in _chunks([len(n) for n in needed], len(layers) + 1, model):
            within = [place for i in chunk for place in by_prompt[i]]
            if not within:
                continue
            with numbered(chunk):
                residuals = capture(
                    model,
                    [prompts[i] for i in chunk],
                    layers=list(dict.fromkeys((*layers, model.n_layers))),
                    positions=[sorted(needed[i]) for i in chunk],
                    patches=[part for p in patches if (part := p.among(prompts, chunk))],
                )
            for first in range(0, len(within), at_once):
                batch = within[first : first + at_once]
                parts.append(reader.read(residuals, batch, chunk))
                bar.update(len(batch))
    return Readout.join(parts)


@dataclass(frozen=True)
class _Place:
    """One reading: a position of a prompt, what is right there, and what each lens keeps for it."""

    prompt: int
    position: int
    target: int
    ambiguous: bool
    candidates: tuple[int, ...]
    keeps: tuple[tuple[int, ...], ...]

    @property
    def needed(self) -> set[int]:
        """The positions whose residuals are needed."""
        return {self.position, *(p for keep in self.keeps for p in keep)}


def _places(
    prompts: Sequence[Prompt], lenses: Sequence[Lens], positions: PositionsLike
) -> list[_Place]:
    if positions is None:
        wanted = [[prompt.answer] for prompt in prompts]
    else:
        wanted = as_positions(prompts, positions)
    places = []
    for i, (prompt, at) in enumerate(zip(prompts, wanted, strict=True)):
        for position in at:
            at_answer = position == prompt.answer
            # The token that follows is right at a position that was asked for, unless the prompt
            # says otherwise.
            follows = positions is not None and position + 1 < len(prompt)
            target = prompt.tokens[position + 1] if follows else -1
            if at_answer and prompt.target is not None:
                target = prompt.target
            candidates = prompt.candidates if at_answer else ()
            keeps = tuple(keep_of(lens, prompt, position) for lens in lenses)
            ambiguous = at_answer and prompt.shares_first_token
            places.append(_Place(i, position, target, ambiguous, candidates, keeps))
    return places


def _layers_of(lenses: Sequence[Lens], model: Model, layers: LayersLike) -> list[int]:
    """Return the layers asked for; by default all that every lens reads."""
    if layers is None:
        by_lens = {lens.name: layers_of(lens) for lens in lenses}
        common = sorted(set.intersection(*map(set, by_lens.values())))
        if not common:
            raise ValueError(f"There is no layer that all of these lenses read: {by_lens}.")
        return common
    asked = check_layers(model, layers)
    refuse_other_layers(lenses, asked)
    return asked


@dataclass(frozen=True)
class _Reader:
    """Reads places of captured residuals with all lenses."""

    lenses: Sequence[Lens]
    layers: Sequence[int]
    top_k: int
    n_candidates: int

    def read(self, residuals: Residuals, places: Sequence[_Place], captured: range) -> Readout:
        """Return the readout of places in prompts that were captured."""
        model = self.lenses[0].model
        readings = [
            [Reading(p.prompt - captured.start, p.position, p.keeps[n]) for p in places]
            for n in range(len(self.lenses))
        ]
        with numbered(captured):
            finals = torch.stack(  # [lens layer reading d_model]
                [
                    finals_of(lens, residuals, of_lens, self.layers)
                    for lens, of_lens in zip(self.lenses, readings, strict=True)
                ]
            )
        slots = [residuals.slots(r.prompt, [r.answer])[0] for r in readings[0]]
        rows = [(p.prompt, p.position, p.target, p.ambiguous, p.candidates) for p in places]
        return readout_of(
            model,
            finals,
            residuals.layer(model.n_layers)[slots],
            Asked.of(rows, self.n_candidates),
            lenses=[lens.name for lens in self.lenses],
            layers=self.layers,
            top_k=self.top_k,
        )


def _chunks(n_slots: Sequence[int], n_layers: int, model: Model) -> list[range]:
    """Return prompts in order, as many at a time as half the memory holds residuals of."""
    element = torch.finfo(model.dtype).bits // 8
    at_once = limits(model).rows(n_layers * model.d_model * element, fraction=1 / 2)
    chunks: list[range] = []
    first, slots = 0, 0
    for i, n in enumerate(n_slots):
        if i > first and slots + n > at_once:
            chunks.append(range(first, i))
            first, slots = i, 0
        slots += n
    return [*chunks, range(first, len(n_slots))]
