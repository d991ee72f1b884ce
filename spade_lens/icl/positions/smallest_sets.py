"""The smallest sufficient set of a prompt: a greedy search over what SPADE keeps.

Forward, the unit is added that raises most the log-probability of the full model's own answer,
until SPADE answers the same; backward, units that are not needed after all are dropped. The set
found is sufficient and no unit of it can be dropped, but a smaller one may exist: trying all sets
is out of reach. All of this is ours.
"""

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
import torch

from spade_lens.lenses.answers import own_answers, read_answers
from spade_lens.lenses.lens import Reading
from spade_lens.lenses.spade import Spade
from spade_lens.models.model import Model
from spade_lens.models.residuals import Residuals, capture, check_layers
from spade_lens.prompts.prompt import Prompt
from spade_lens.settings import Settings, progress_bar, scoped

_STEPS = 16

Unit = tuple[int, ...]
Units = Callable[[Prompt], Sequence[Unit]]
"""From a prompt to the groups of positions that a search adds or drops as a whole."""


def token_units(prompt: Prompt) -> list[Unit]:
    """Every token between the start token and the answer token, by itself.

    Example:
        >>> icl.token_units(Prompt(tokens=(1, 5, 6, 7)))
        [(1,), (2,)]
    """
    return [(p,) for p in range(1, prompt.answer)]


def piece_units(prompt: Prompt) -> list[Unit]:
    """The pieces of a few-shot prompt: query, arrow, and each piece of each demonstration.

    Raises:
        ValueError: If the prompt has no such spans.
    """
    names = ["query", "arrow", *(name for name in prompt.spans if "/" in name)]
    if not {"query", "arrow"} <= set(prompt.spans):
        raise ValueError(
            "This prompt has no pieces to choose from. Expected the spans of few_shot_prompt "
            f"('query', 'arrow', 'demo0/input', ...); got {sorted(prompt.spans)}."
        )
    pieces = [tuple(p for p in prompt.spans[n] if 0 < p < prompt.answer) for n in names]
    return sorted({piece for piece in pieces if piece})


@scoped
@torch.no_grad()
def smallest_sets(
    model: Model,
    prompts: Sequence[Prompt],
    *,
    layers: Sequence[int],
    units: Units = token_units,
    share: float = 0.0,
    most: int = _STEPS,
    draws: int = 8,
    seed: int = 0,
    settings: Settings | None = None,
) -> pd.DataFrame:
    """For every prompt and layer, a smallest sufficient set by greedy search.

    Example:
        >>> frame = icl.smallest_sets(model, prompts, layers=[2])
        >>> frame["sufficient"].tolist()
        [True, True]

    Args:
        model: The model.
        prompts: The prompts. The answer asked for is the full model's own: its likeliest
            candidate, where a prompt has candidates, else its likeliest token.
        layers: The layers.
        units: What is added or dropped as a whole: :func:`token_units`, :func:`piece_units` or
            a function of your own. Start and answer token are always kept.
        share: How sure the answer must be: by at least this share of the full model's own lead,
            in logits, over the next answer. At 0 it only has to come first, which of two
            candidates it does half the time by chance; 0.5 asks for more than luck.
        most: How many units to add at most.
        draws: As the control, so many random sets of as many units are tried at each place; 0
            tries none.
        seed: Seed of their drawing.
        settings: Memory limit, batch size and progress; see :class:`spade_lens.Settings`.

    Returns:
        One row for every layer and prompt: ``model, layer, prompt``; ``sufficient``; ``units``
        and ``tokens``, how many were added to start and answer token; ``kept``, all positions;
        ``spans``, the names of the prompt's finest spans that they are from; ``random``, the
        share of the random sets that suffice. Where no set was found, the row tells of the last
        one tried.

    Raises:
        ValueError: If layers or prompts do not fit the model, ``share`` is not between 0 and 1,
            ``most`` or ``draws`` is negative, or a unit lies outside the prompt up to its answer
            token.
    """
    model.check_prompts(prompts)
    layers = check_layers(model, layers)
    if most < 0 or draws < 0:
        raise ValueError(f"most={most} and draws={draws} were given; expected 0 or more of each.")
    if not 0 <= share <= 1:
        raise ValueError(f"share={share} was given; expected a number from 0 to 1.")
    choices = [_checked(units(p), p, i) for i, p in enumerate(prompts)]
    residuals = capture(
        model,
        prompts,
        layers=[*layers, model.n_layers],
        positions=[range(p.answer + 1) for p in prompts],
    )
    rows = []
    total = len(layers) * len(prompts)
    with progress_bar(total=total, desc="search", unit="set") as bar:
        search = _Search(model, residuals, choices, share)
        for layer in layers:
            found = search.forward(layer, most)
            search.backward(layer, found)
            for i, (added, sufficient) in enumerate(found):
                luck = search.random_share(layer, i, len(added), draws, seed)
                rows.append(_row(model, layer, i, prompts[i], added, sufficient, luck))
            bar.update(len(prompts))
    return pd.DataFrame(rows)


class _Search:
    """Asks SPADE about sets of units, for all prompts side by side."""

    def __init__(
        self,
        model: Model,
        residuals: Residuals,
        units: Sequence[Sequence[Unit]],
        share: float,
    ) -> None:
        self.model, self.residuals, self.units = model, residuals, units
        self.prompts = residuals.prompts
        self.spade = Spade(model)
        last = [residuals.slots(i, [p.answer])[0] for i, p in enumerate(self.prompts)]
        finals = residuals.layer(model.n_layers)[last]
        own = own_answers(model, finals, self.prompts)
        self.own = own.choice
        # Slightly less: the same run in another batch need not give the same last digit.
        self.wanted = share * own.logit_diff.clamp(max=1e9) - 1e-4

    def forward(self, layer: int, most: int) -> list[tuple[list[Unit], bool]]:
        """The units added to each prompt, in order, and whether they suffice."""
        everyone = range(len(self.prompts))
        _, enough = self._ask(layer, [(i, ()) for i in everyone])
        found: list[tuple[list[Unit], bool]] = [([], enough[i]) for i in everyone]
        for _ in range(most):
            asked = [
                (i, (*added, unit))
                for i, (added, sufficient) in enumerate(found)
                if not sufficient
                for unit in self.units[i]
                if unit not in added
            ]
            if not asked:
                break
            scores, enough = self._ask(layer, asked)
            best: dict[int, int] = {}
            for n, (i, _) in enumerate(asked):
                # What suffices goes before what only helps.
                if i not in best or (enough[n], scores[n]) > (enough[best[i]], scores[best[i]]):
                    best[i] = n
            for i, n in best.items():
                found[i] = (list(asked[n][1]), enough[n])
        return found

    def backward(self, layer: int, found: Sequence[tuple[list[Unit], bool]]) -> None:
        """Drop units, the first added first, as long as the rest suffices."""
        place = {i: 0 for i, (added, sufficient) in enumerate(found) if sufficient and added}
        while place:
            asked = [
                (i, tuple(u for n, u in enumerate(found[i][0]) if n != at))
                for i, at in place.items()
            ]
            _, enough = self._ask(layer, asked)
            for (i, rest), dropped in zip(asked, enough, strict=True):
                if dropped:
                    # What was needed beside the dropped unit may not be needed now.
                    found[i][0][:] = rest
                    place[i] = 0
                else:
                    place[i] += 1
                if place[i] == len(found[i][0]):
                    del place[i]

    def random_share(self, layer: int, prompt: int, size: int, draws: int, seed: int) -> float:
        """The share of random sets of ``size`` units that suffice; NaN of none drawn."""
        if not draws:
            return float("nan")
        rng = np.random.default_rng([seed, layer, *self.prompts[prompt].tokens])
        units = self.units[prompt]
        drawn = [rng.choice(len(units), size=size, replace=False) for _ in range(draws)]
        asked = [(prompt, tuple(units[int(n)] for n in some)) for some in drawn]
        return float(np.mean(self._ask(layer, asked)[1]))

    def _ask(
        self, layer: int, asked: Sequence[tuple[int, tuple[Unit, ...]]]
    ) -> tuple[list[float], list[bool]]:
        """For (prompt, units): the own answer's log-probability, and whether it comes first."""
        readings = [
            Reading(i, self.prompts[i].answer, _kept(self.prompts[i], some)) for i, some in asked
        ]
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


def _row(
    model: Model,
    layer: int,
    index: int,
    prompt: Prompt,
    added: Sequence[Unit],
    sufficient: bool,
    luck: float,
) -> dict[str, object]:
    kept = _kept(prompt, added)
    # A whole such as "inputs" says less than "demo0/input".
    fine = [n for n in prompt.spans if "/" in n or n in ("query", "arrow")] or list(prompt.spans)
    new = [p for p in kept if p not in (0, prompt.answer)]
    spans = [n for n in fine if set(prompt.spans[n]) & set(new)]
    return {
        "model": model.name,
        "layer": layer,
        "prompt": index,
        "sufficient": sufficient,
        "units": len(added),
        "tokens": len(new),
        "kept": kept,
        "spans": tuple(spans),
        "random": luck,
    }
