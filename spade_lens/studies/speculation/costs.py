"""What a round of drafts costs, measured: passes over a few tokens, and drafting one.

All parts take turns, in an order drawn anew for every turn, so that neither a machine whose speed
drifts nor what ran just before decides between them. A round
of k drafts is one pass of all blocks over k + 1 tokens, where a drafter reads tokens alone. A
drafter at layer E runs the blocks below E once for every one of these tokens, and the
verification the blocks above over all of them at once.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pandas as pd
import torch

from spade_lens.generation.drafters import Drafter
from spade_lens.generation.rows import Rows
from spade_lens.generation.sampling import Draws
from spade_lens.generation.steering import Steering
from spade_lens.models.clock import seconds_of
from spade_lens.models.model import Model
from spade_lens.prompts.prompt import Prompt
from spade_lens.settings import progress_bar

_WARM, _ROUNDS = 8, 11
"""Turns that are not counted, in which weights are packed, and turns that are."""
PLAIN, PASS, HEAD, LOOKUP = "plain step", "pass", "head", "lookup"
DRAFT, FEED = "draft", "feed"


@torch.no_grad()
def measure_costs(
    model: Model,
    several: Mapping[tuple[str, int], Sequence[Drafter]],
    prompt: Prompt,
    draft_tokens: int,
    *,
    seed: int = 0,
) -> pd.DataFrame:
    """Return what each part of a round costs after a prompt, in milliseconds.

    Args:
        model: The model.
        several: What drafts, by name and layer.
        prompt: The prompt.
        draft_tokens: The longest draft.
        seed: Of the order of the parts in every turn.

    Returns:
        The columns ``part``, ``drafter``, ``layer``, ``n_tokens``, ``milliseconds`` (the median of
        the turns) and their quartiles ``milliseconds_low`` and ``milliseconds_high``. The parts
        are a ``plain step``, a ``pass`` of all blocks and the head over some tokens, the ``head``
        alone, the ``draft`` of one token at a layer, its ``feed`` without a draft, and a
        ``lookup``.
    """
    parts: dict[tuple[str, str, int, int], Callable[[], object]] = {}
    plain, whole = _rows(model, prompt, 0), _rows(model, prompt, draft_tokens)
    parts[PLAIN, "", 0, 1] = lambda: _pass(plain, 1)
    resid = torch.randn(draft_tokens + 1, model.d_model, dtype=model.dtype, device=model.device)
    for n in range(1, draft_tokens + 2):
        parts[PASS, "", 0, n] = partial(_pass, whole, n)
        parts[HEAD, "", 0, n] = partial(whole.logits, resid[:n])
    for (name, layer), drafters in several.items():
        if layer:
            for part in (FEED, DRAFT):
                rows = _rows(model, prompt, draft_tokens, layer)
                parts[part, name, layer, 1] = _drafting(rows, drafters[-1], part == DRAFT)
        if not drafters[0].layer:
            parts[LOOKUP, name, layer, 1] = _looking_up(drafters, prompt, draft_tokens)
    taken: dict[tuple[str, str, int, int], list[float]] = {key: [] for key in parts}
    draws, keys = random.Random(seed), list(parts)
    for turn in progress_bar(range(_WARM + _ROUNDS), desc="costs", unit="turn", model=model):
        for key in draws.sample(keys, len(keys)):
            seconds = seconds_of(parts[key], model.device, of_process=True)
            if turn >= _WARM:
                taken[key].append(1000 * seconds)
    frame = pd.DataFrame(list(taken), columns=["part", "drafter", "layer", "n_tokens"])
    quartiles = {"milliseconds": 0.5, "milliseconds_low": 0.25, "milliseconds_high": 0.75}
    for column, quantile in quartiles.items():
        frame[column] = [float(pd.Series(times).quantile(quantile)) for times in taken.values()]
    return frame


@dataclass(frozen=True)
class CostModel:
    """What one drafter's rounds cost, in milliseconds, and what that predicts.

    Args:
        plain: A token without drafts: a plain step or a pass over one token, whichever is faster.
        rounds: A round of 0, 1, ... drafts.
    """

    plain: float
    rounds: tuple[float, ...]

    @classmethod
    def of(cls, costs: pd.DataFrame, drafter: str, layer: int, n_layers: int) -> "CostModel":
        """Put the measured parts together.

        Args:
            costs: From :func:`measure_costs`.
            drafter: The drafter's name.
            layer: Its layer; 0 for one that reads tokens alone.
            n_layers: How many blocks the model has.
        """
        keys = ["part", "drafter", "layer", "n_tokens"]
        medians: dict[Any, float] = costs.set_index(keys)["milliseconds"].to_dict()
        lookup = medians.get((LOOKUP, drafter, layer, 1), 0.0)
        most = max(n for part, _, _, n in medians if part == PASS)
        rounds = []
        for drafted in range(most):
            whole, head = (medians[part, "", 0, drafted + 1] for part in (PASS, HEAD))
            cost = whole + lookup
            if layer:
                # The last draft runs as well, and nothing is drafted from it.
                draft, feed = (medians[part, drafter, layer, 1] for part in (DRAFT, FEED))
                lower = drafted * draft + feed
                cost = lower + (whole - head) * (1 - layer / n_layers) + head + lookup
            rounds.append(cost)
        # Both do the same work. The slower would flatter every draft.
        plain = min(medians[PLAIN, "", 0, 1], medians[PASS, "", 0, 1])
        return cls(plain, tuple(rounds))

    def speedup(self, drafted: Sequence[int], written: int) -> float:
        """Return how many times as fast as plain text rounds of these drafts are predicted to be.

        The prompt and the token after it take equally long in both, and are left out.
        """
        spent = sum(self.rounds[n] for n in drafted) - self.plain
        return (written - 1) * self.plain / spent if written > 1 else float("nan")

    def break_even(self, drafted: Sequence[int]) -> float:
        """Return the acceptance at which rounds of these drafts cost what plain text costs.

        A round of k drafts of which a fraction A is accepted writes A * k + 1 tokens. This is 0
        where the rounds are measured to cost no more than as many plain tokens.
        """
        cost, n = sum(self.rounds[k] for k in drafted), sum(drafted)
        return max(0.0, (cost / self.plain - len(drafted)) / n) if n else float("nan")


def _rows(model: Model, prompt: Prompt, drafts: int, layer: int = 0) -> Rows:
    """Return one row that has run the prompt."""
    steering, draws = Steering(model, [prompt], (), ()), Draws(None, [prompt])
    borders = (layer,) if layer else ()
    return Rows(model, [0], steering, draws, 1, borders=borders, drafts=drafts)


def _pass(rows: Rows, n: int) -> None:
    """Run all blocks and the head over some tokens after the prompt."""
    length = len(rows.steering.prompts[0])
    if not rows.done[0]:
        rows.run_pending()
    run = rows.climb(rows.enter([rows.tokens[0][:1] * n], [length]), 0)
    rows.logits(run.resid[0]).argmax(dim=-1).tolist()
    rows.crop([length])


def _drafting(rows: Rows, drafter: Any, drafts: bool) -> Callable[[], None]:
    state = drafter.begin(rows)
    length = len(rows.steering.prompts[0])

    def run() -> None:
        if not rows.done[0]:
            state.feed(rows.climb(rows.enter(rows.tokens, [0]), 0))
            rows.done = [length]
        hidden = state.feed(rows.climb(rows.enter([rows.tokens[0][:1]], [length]), 0))
        if drafts:
            logits = state.logits(hidden)[0]
            float(logits.softmax(dim=-1)[int(logits.argmax())])
        rows.crop([length])
        state.crop([length])

    return run


def _looking_up(drafters: Sequence[Any], prompt: Prompt, most: int) -> Callable[[], None]:
    def run() -> None:
        for drafter in drafters:
            if not drafter.layer:
                drafter.draft(prompt.tokens, most)

    return run
