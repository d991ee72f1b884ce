"""The smallest sufficient set of a prompt: a greedy search over what SPADE keeps.

Forward, the search adds the unit that most raises the log-probability of the full model's own
answer, until SPADE answers the same. Backward, it drops units that are not needed. The set is
sufficient and no unit of it can be dropped, but a smaller one may exist: trying all sets is out of
reach. All of this is ours.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import pandas as pd
import torch

from spade_lens.lenses.answers import own_answers, read_answers
from spade_lens.lenses.lens import Reading
from spade_lens.lenses.spade import Spade
from spade_lens.models.model import Model
from spade_lens.models.places import LayersLike, check_layers
from spade_lens.models.residuals import Residuals, capture
from spade_lens.prompts.inputs import PromptsLike
from spade_lens.prompts.prompt import Prompt
from spade_lens.settings import Settings, progress_bar, scoped

_STEPS = 16

Unit = tuple[int, ...]
Units = Callable[[Prompt], Sequence[Unit]]
"""From a prompt to the groups of positions that a search adds or drops as a whole."""


def token_units(prompt: Prompt) -> list[Unit]:
    """Return every token between the start token and the answer token, by itself.

    Example:
        >>> token_units(Prompt(tokens=(1, 5, 6, 7)))
        [(1,), (2,)]
    """
    return [(p,) for p in range(1, prompt.answer)]


def piece_units(prompt: Prompt) -> list[Unit]:
    """Return the pieces of a few-shot prompt: query, arrow, and those of each demonstration."""
    names = ["query", "arrow", *(name for name in prompt.spans if "/" in name)]
    if not {"query", "arrow"} <= set(prompt.spans):
        raise ValueError(
            "This prompt has no pieces to choose from. Expected the spans of few_shot_prompt "
            f"('query', 'arrow', 'demo0/input', ...); got {sorted(prompt.spans)}."
        )
    pieces = [tuple(p for p in prompt.spans[n] if 0 < p < prompt.answer) for n in names]
    return sorted({piece for piece in pieces if piece})


_UNITS: dict[str, Units] = {"tokens": token_units, "pieces": piece_units}


@scoped
@torch.no_grad()
def smallest_sets(
    model: Model,
    prompts: PromptsLike,
    *,
    layers: LayersLike,
    units: Literal["tokens", "pieces"] | Units = "tokens",
    fraction: float = 0.0,
    most: int = _STEPS,
    draws: int = 8,
    seed: int = 0,
    settings: Settings | None = None,
) -> pd.DataFrame:
    """Search a smallest sufficient set for every prompt and layer.

    Example:
        >>> frame = icl.smallest_sets(model, prompts, layers=[2])
        >>> frame["sufficient"].tolist()
        [True, True]

    Args:
        model: The model.
        prompts: The prompts. The answer that must be kept is the full model's own: its likeliest
            candidate, where a prompt has candidates, else its likeliest token.
        layers: The layers.
        units: What is added or dropped as a whole: ``"tokens"``; ``"pieces"``, the query, its
            arrow, and input, arrow and output of each demonstration; or a function of your own,
            from a prompt to tuples of positions. Start and answer token are always kept.
        fraction: How much of the full model's lead over the next answer, in logits, must be kept.
            At 0 the answer only has to come first, as one of two candidates does half the time by
            chance; 0.5 asks for more than luck.
        most: How many units to add at most.
        draws: How many random sets of as many units to try for each set, as the control.
        seed: Seed of their drawing.
        settings: Memory limit, batch size and progress; see :class:`spade_lens.Settings`.

    Returns:
        One row for every layer and prompt: ``model, layer, prompt``; ``sufficient``; ``units``
        and ``tokens``, how many were added to start and answer token; ``kept``, all positions;
        ``spans``, the names of the prompt's finest spans that they are from; ``random``, the
        fraction of the random sets that suffice. If no set suffices, the row is that of the last
        one tried.

    Raises:
        ValueError: If layers or prompts do not fit the model, ``fraction`` is not from 0 to 1,
            ``most`` or ``draws`` is negative, or a unit lies outside the prompt up to its answer
            token.
    """
    checked = model.prompts(prompts)
    layers = check_layers(model, layers)
    if isinstance(units, str):
        if units not in _UNITS:
            raise ValueError(
                f"units={units!r} was given; expected one of {list(_UNITS)} or a function from a "
                "prompt to tuples of positions."
            )
        units = _UNITS[units]
    if most < 0 or draws < 0:
        raise ValueError(f"most={most} and draws={draws} were given; expected 0 or more of each.")
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction={fraction} was given; expected a number from 0 to 1.")
    choices = [_checked(units(p), p, i) for i, p in enumerate(checked)]
    residuals = capture(
        model,
        checked,
        layers=list(dict.fromkeys((*layers, model.n_layers))),
        positions=[range(p.answer + 1) for p in checked],
    )
    rows = []
    total = len(layers) * len(checked)
    with progress_bar(total=total, desc="search", unit="set", model=model) as bar:
        search = _Search(model, residuals, choices, fraction)
        for layer in layers:
            sets = search.forward(layer, most)
            search.backward(layer, sets)
            for i, (added, sufficient) in enumerate(sets):
                about = {"model": model.name, "layer": layer, "prompt": i, "sufficient": sufficient}
                random = search.random_fraction(layer, i, len(added), draws, seed)
                rows.append({**about, **_described(checked[i], added), "random": random})
            bar.update(len(checked))
    return pd.DataFrame(rows)


class _Search:
    """Asks SPADE about sets of units, for all prompts side by side."""

    def __init__(
        self, model: Model, residuals: Residuals, units: Sequence[Sequence[Unit]], fraction: float
    ) -> None:
        self.model, self.residuals, self.units = model, residuals, units
        self.prompts = residuals.prompts
        self.spade = Spade(model)
        own = own_answers(model, residuals.at_answers(model.n_layers), self.prompts)
        self.own = own.choice
        # Slightly less: the same run in another batch need not give the same last digit.
        self.wanted = fraction * own.logit_diff.clamp(max=1e9) - 1e-4

    def forward(self, layer: int, most: int) -> list[tuple[list[Unit], bool]]:
        """Return the units added to each prompt, in order, and whether they suffice."""
        everyone = range(len(self.prompts))
        _, enough = self._ask(layer, [(i, ()) for i in everyone])
        sets: list[tuple[list[Unit], bool]] = [([], enough[i]) for i in everyone]
        for _ in range(most):
            asked = [
                (i, (*added, unit))
                for i, (added, sufficient) in enumerate(sets)
                if not sufficient
                for unit in self.units[i]
                if unit not in added
            ]
            if not asked:
                break
            scores, enough = self._ask(layer, asked)
            best: dict[int, int] = {}
            for n, (i, _) in enumerate(asked):
                # A unit that suffices is preferred to one that only raises the score.
                if i not in best or (enough[n], scores[n]) > (enough[best[i]], scores[best[i]]):
                    best[i] = n
            for i, n in best.items():
                sets[i] = (list(asked[n][1]), enough[n])
        return sets

    def backward(self, layer: int, sets: Sequence[tuple[list[Unit], bool]]) -> None:
        """Drop units, the first added first, as long as the rest suffices."""
        place = {i: 0 for i, (added, sufficient) in enumerate(sets) if sufficient and added}
        while place:
            asked = [
                (i, tuple(u for n, u in enumerate(sets[i][0]) if n != at))
                for i, at in place.items()
            ]
            _, enough = self._ask(layer, asked)
            for (i, rest), dropped in zip(asked, enough, strict=True):
                if dropped:
                    # What was needed beside the dropped unit may not be needed now.
                    sets[i][0][:] = rest
                    place[i] = 0
                else:
                    place[i] += 1
                if place[i] == len(sets[i][0]):
                    del place[i]

    def random_fraction(self, layer: int, prompt: int, size: int, draws: int, seed: int) -> float:
        """Return the fraction of random sets of ``size`` units that suffice; NaN for no draws."""
        if not draws:
            return float("nan")
        rng = np.random.default_rng([seed, layer, *self.prompts[prompt].tokens])
        units = self.units[prompt]
        numbers = [rng.choice(len(units), size=size, replace=False) for _ in range(draws)]
        asked = [(prompt, tuple(units[int(n)] for n in of_set)) for of_set in numbers]
        return float(np.mean(self._ask(layer, asked)[1]))

    def _ask(
        self, layer: int, asked: Sequence[tuple[int, tuple[Unit, ...]]]
    ) -> tuple[list[float], list[bool]]:
        """Return the own answer's log-probability and whether it leads, for (prompt, units)."""
        readings = [
            Reading(i, self.prompts[i].answer, _kept(self.prompts[i], kept)) for i, kept in asked
        ]
        self.spade.model.expect_rows(len(readings))
        finals = self.spade.final_residuals(self.residuals, readings, [layer])[0]
        rows = [i for i, _ in asked]
        own = self.own[rows]
        answers = read_answers(self.model, finals, [self.prompts[i] for i in rows], tokens=own)
        enough = (answers.choice == own) & (answers.logit_diff >= self.wanted[rows])
        return answers.option_logprob.tolist(), enough.tolist()


def _kept(prompt: Prompt, units: Sequence[Unit]) -> tuple[int, ...]:
    return tuple(sorted({0, prompt.answer, *(p for unit in units for p in unit)}))


def _checked(units: Sequence[Unit], prompt: Prompt, index: int) -> list[Unit]:
    outside = [u for u in units if not u or not 0 <= min(u) or not max(u) <= prompt.answer]
    if outside:
        raise ValueError(
            f"Units {outside[:3]} are not positions of prompt {index} up to its answer token at "
            f"{prompt.answer}."
        )
    return [tuple(unit) for unit in dict.fromkeys(units)]


def _described(prompt: Prompt, added: Sequence[Unit]) -> dict[str, object]:
    kept = _kept(prompt, added)
    # A whole such as "inputs" says less than "demo0/input".
    fine = [n for n in prompt.spans if "/" in n or n in ("query", "arrow")] or list(prompt.spans)
    new = [p for p in kept if p not in (0, prompt.answer)]
    spans = tuple(n for n in fine if set(prompt.spans[n]) & set(new))
    return {"units": len(added), "tokens": len(new), "kept": kept, "spans": spans}
