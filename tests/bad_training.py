"""Valid calls of what trains modules, and wrong values of their arguments; see bad_input.py."""

import tempfile
from collections.abc import Callable
from typing import Any

import torch
from bad_results import NONSENSE

import spade_lens as sl
from spade_lens.training import (
    AlternatePlan,
    InContextTask,
    TrainPlan,
    train_alternating,
    train_in_context,
)
from spade_lens.training.in_context.network import NetworkSize

COUNT = [NONSENSE, 0, -1, "3", 1.5]
NO_ANSWERS: list[Any] = [
    [sl.Prompt((1, 2))],
    [sl.Prompt((1, 2), 0, target=3)],
    [sl.Prompt((1, 2), target=4000)],
    [sl.Prompt((1,) * 128, target=3, target_tokens=(3, 4))],
]
"""Without a target, read elsewhere, outside the vocabulary, too long."""
NO_PAIRS: list[Any] = [
    *NO_ANSWERS,
    [sl.Prompt((1, 2), target=3)],
    [sl.Prompt((1, 2), target=3, candidates=(3, 4, 5))],
    [sl.Prompt((1, 2), target=3, candidates=(4, 5))],
    [sl.Prompt((1, 2), target=3, candidates=(3, 4000))],
]


def training(model: sl.Model) -> dict[str, tuple[Callable[..., Any], dict[str, Any]]]:
    """A valid call of each, by its public name."""
    linear, plan = torch.nn.Linear(2, 2), TrainPlan(1, warmup=0)
    task = InContextTask(examples=3)
    plain = [model.prompt("a>", target="b")]
    pairs = [model.prompt("a>", target="B", candidates=("B", "b"))]
    alternate = AlternatePlan(rounds=1, steps=1, batch=1, layer=3)
    return {
        "training.TrainPlan": (
            TrainPlan,
            dict(steps=5, warmup=1, row_every=1, patience=None, learning_rate=0.1, seed=0),
        ),
        "training.train": (
            sl.training.train,
            dict(module=linear, loss=lambda _: linear.weight.sum(), plan=plan),
        ),
        "training.LayerSkip": (sl.training.LayerSkip, dict(steps=5, period=2, p_max=0.1)),
        "training.InContextTask": (
            InContextTask,
            dict(d_x=2, d_phi=2, examples=3, depth=1, noise=0.1, representations=1, recent=1)
            | dict(form="supervised", seed=0),
        ),
        "training.InContextTask.draw": (task.draw, dict(n=2, seed=0)),
        "training.NetworkSize": (NetworkSize, dict(n_layers=1, d_model=8, n_heads=2, seed=0)),
        "training.InContextNetwork": (
            lambda in_context, size: sl.training.InContextNetwork(in_context, size),
            dict(in_context=task, size=NetworkSize(1, 8, 2)),
        ),
        "training.train_in_context": (
            lambda in_context, size, trained_by, batch: train_in_context(
                in_context, size=size, plan=trained_by, batch=batch
            ),
            dict(in_context=task, size=NetworkSize(1, 8, 2), trained_by=plan, batch=2),
        ),
        "training.AlternatePlan": (
            _alternate_plan,
            dict(schedule="alternating", guard="ewc", penalty_rate=1.0, softness=None)
            | dict(frozen=0.2, rounds=1, steps=1, batch=1, learned_at=None, low_rank=1, beta=0.1)
            | dict(preference_rate=1.0, rate_of_all=0.1, seed=0),
        ),
        "training.train_alternating": (
            lambda sft, preferences, held_out, by: train_alternating(
                model, sft, preferences, held_out=held_out, plan=by
            ),
            dict(sft=plain, preferences=pairs, held_out=(plain, pairs), by=alternate),
        ),
        "training.train_alternating, checkpoint": (
            lambda place: train_alternating(
                model, plain, pairs, held_out=(plain, pairs), plan=alternate, checkpoint=place
            ),
            dict(place=None),
        ),
        "studies.InContextPlan": (
            lambda in_context, prompts_drawn, some_parts, **rest: sl.studies.InContextPlan(
                in_context,
                prompts=prompts_drawn,
                parts=some_parts,
                out=tempfile.mkdtemp(),
                **rest,
            ),
            dict(in_context=task, size=NetworkSize(), training=plan, seeds=[0], batch=2)
            | dict(prompts_drawn=20, paste_steps=1, some_parts=["risk"], seed=0),
        ),
    }


WRONG: dict[str, list[Any]] = {
    "steps": COUNT,
    "warmup": [NONSENSE, -1, 99, "3"],
    "row_every": COUNT,
    "patience": COUNT,
    "learning_rate": [NONSENSE, -1.0, float("nan"), float("inf"), "3"],
    "period": COUNT,
    "p_max": [NONSENSE, -0.1, 1.5, float("nan"), "3"],
    "module": [NONSENSE, None, torch.nn.ReLU()],
    "d_x": COUNT,
    "d_phi": COUNT,
    "examples": COUNT,
    "depth": [NONSENSE, -1, "3", 1.5],
    "noise": [NONSENSE, -0.1, 1e-9, 1e9, float("nan"), "3"],
    "representations": COUNT,
    "recent": [*COUNT, 2],
    "form": [NONSENSE, "supervise"],
    "n_layers": COUNT,
    "d_model": [*COUNT, 7],
    "n_heads": [*COUNT, 3],
    "in_context": [NONSENSE, None, "supervised"],
    "size": [NONSENSE, 5, "small"],
    "training": [NONSENSE, 5, None],
    "trained_by": [NONSENSE, "icl"],
    "batch": COUNT,
    "seeds": [NONSENSE, [], [0, 0], [-1], ["0"]],
    "prompts_drawn": [*COUNT, 19],
    "paste_steps": [NONSENSE, -1, "3", 1.5],
    "some_parts": [NONSENSE, [], ["risks"], "risk"],
    "schedule": [NONSENSE, "alternate", None],
    "guard": [NONSENSE, "ewcs", None],
    "penalty_rate": [NONSENSE, -1.0, float("nan"), float("inf"), "3", None],
    "preference_rate": [NONSENSE, -1.0, float("nan"), float("inf"), "3", None],
    "rate_of_all": [NONSENSE, 0, -1.0, float("nan"), float("inf"), "3", None],
    "softness": [NONSENSE, 0, 0.0, -1.0, float("nan"), float("inf"), "3"],
    "beta": [NONSENSE, 0, 0.0, -0.1, float("nan"), float("inf"), "3", None],
    "frozen": [NONSENSE, -0.1, 1, 1.5, float("nan"), "3", None],
    "learned_at": [NONSENSE, 1.5, True, "3"],
    "low_rank": COUNT,
    "sft": [NONSENSE, None, [], "ab", [NONSENSE], *NO_ANSWERS],
    "preferences": [NONSENSE, None, [], "ab", [NONSENSE], *NO_PAIRS],
    "held_out": [NONSENSE, None, [], (), ([], []), (NO_ANSWERS[0], NO_PAIRS[0]), "ab"],
    "by": [NONSENSE, "ewc", TrainPlan(1, warmup=0), AlternatePlan(layer=4)]
    + [AlternatePlan(layer=-1), AlternatePlan(rounds=2), AlternatePlan],
    "place": [NONSENSE],
}


def _alternate_plan(**given: Any) -> AlternatePlan:
    """Make a plan; some arguments have names of their own here, for their own wrong values."""
    named = {"penalty_rate": "strength", "preference_rate": "preference_weight"}
    named |= {"rate_of_all": "learning_rate", "learned_at": "layer"}
    named |= {"low_rank": "rank", "softness": "temperature"}
    return AlternatePlan(**{named.get(name, name): value for name, value in given.items()})
