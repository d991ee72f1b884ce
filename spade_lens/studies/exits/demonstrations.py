"""A control of early exit: the full model, with as few demonstrations as cost the same."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from spade_lens.exits.choice import NEVER
from spade_lens.exits.controls import Outcomes, mixed, outcomes
from spade_lens.exits.costs import Costs
from spade_lens.exits.table import ExitTable
from spade_lens.models.model import Model
from spade_lens.prompts.prompt import Prompt
from spade_lens.studies.exits.plan import ExitPlan
from spade_lens.tasks.decisions.decision_task import SkippedExamplesWarning

Tables = Callable[[str, Sequence[Prompt]], ExitTable]
"""Runs prompts under a name, or finds what is kept under it."""


def fewer_demonstrations(
    plan: ExitPlan,
    model: Model,
    prompts: Sequence[Prompt],
    *,
    flops: float,
    costs: Costs,
    tables: Tables,
) -> tuple[str, float, Outcomes] | None:
    """Measure the full model with as few demonstrations as cost so many FLOPs a prompt (mean).

    Two numbers of demonstrations are mixed at random to meet the cost. If even none at all cost
    more, that is what is measured.

    Returns:
        The mixture's name, its mean tokens and its outcomes; None where prompts have no
        demonstrations.
    """
    shots = plan.shots
    if not shots:
        return None
    by_shots = [*(with_shots(plan, model, len(prompts), k) for k in range(shots)), list(prompts)]
    price = [
        np.mean([costs.blocks(0, model.n_layers, len(p)) + costs.answer(p) for p in some])
        for some in by_shots
    ]
    below = next((k for k in range(shots - 1) if price[k + 1] > flops), shots - 1)
    step = price[below + 1] - price[below]
    weight = float(np.clip((flops - price[below]) / step, 0, 1))
    full = tables(f"shots-{shots}", prompts)
    whole = outcomes(full, NEVER)
    parts, tokens, names = [], 0.0, []
    for k, part in ((below, 1 - weight), (below + 1, weight)):
        table = tables(f"shots-{k}", by_shots[k])
        same = (table.final_answer == full.final_answer).double().numpy()
        known = {"full_right": whole.full_right, "full_flops": whole.full_flops}
        parts.append(replace(outcomes(table, NEVER), agrees=same, **known))
        tokens += part * float(table.prices.length.double().mean())
        names.append(f"{part:.0%} {k}")
    name = f"{' and '.join(names)} of {shots} demonstrations"
    return name, tokens, mixed(parts, [1 - weight, weight])


def with_shots(plan: ExitPlan, model: Model, n: int, shots: int) -> list[Prompt]:
    """Return the test prompts with fewer demonstrations, their first ones."""
    task, most = plan.decisions, plan.max_tokens

    def drawn(count: int, shots: int | None) -> list[Prompt]:
        return task.prompts(model.tokenizer, count, shots=shots, seed=plan.seed, fewer=True)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SkippedExamplesWarning)
        if most is None:
            return drawn(n, shots)
        # Too long prompts were left out; with fewer demonstrations the same ones have to be.
        every = task.split_sizes()["test"]
        pairs = zip(drawn(every, plan.shots), drawn(every, shots), strict=True)
        return [few for whole, few in pairs if len(whole) <= most][:n]
