"""Valid calls of what trains modules, and wrong values of their arguments; see bad_input.py."""

import tempfile
from collections.abc import Callable
from typing import Any

import torch
from bad_results import NONSENSE

import spade_lens as sl
from spade_lens.training import InContextTask, TrainPlan, train_in_context
from spade_lens.training.in_context.network import NetworkSize

COUNT = [NONSENSE, 0, -1, "3", 1.5]


def training() -> dict[str, tuple[Callable[..., Any], dict[str, Any]]]:
    """A valid call of each, by its public name."""
    linear, plan = torch.nn.Linear(2, 2), TrainPlan(1, warmup=0)
    task = InContextTask(examples=3)
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
            lambda in_context, **rest: train_in_context(in_context, **rest),
            dict(in_context=task, size=NetworkSize(1, 8, 2), plan=plan, batch=2),
        ),
        "studies.InContextPlan": (
            lambda in_context, prompts_drawn, **rest: sl.studies.InContextPlan(
                in_context, prompts=prompts_drawn, out=tempfile.mkdtemp(), **rest
            ),
            dict(in_context=task, size=NetworkSize(), training=plan, seeds=[0], batch=2)
            | dict(prompts_drawn=20, paste_steps=1, parts=["risk"], seed=0),
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
    "batch": COUNT,
    "seeds": [NONSENSE, [], [0, 0], [-1], ["0"]],
    "prompts_drawn": [*COUNT, 19],
    "paste_steps": [NONSENSE, -1, "3", 1.5],
    "parts": [NONSENSE, [], ["risks"], "risk"],
}
