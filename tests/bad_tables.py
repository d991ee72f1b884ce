"""Valid calls of functions on tables, tensors, tasks and plans, and what no function takes.

A part of the table in ``bad_input``, which runs it in a plain process.
"""

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

import spade_lens as sl

NOWHERE = [
    *(1j, ..., pd.NA, bytearray(b"ab"), {1, "a"}, pd.DataFrame(), pd.Series([1, None])),
    *(torch.zeros(2, 0), torch.zeros(2, device="meta"), torch.eye(3).to_sparse()),
    np.array(["2020-01-01"], dtype="datetime64[D]"),
]
"""What no argument may be: each made a library underneath raise an error of its own."""

TAKEN = {("values", repr(torch.zeros(2, 0)))}
"""Vectors of no length: only a model can say that they are too short."""


def tables(
    model: sl.Model, episodes: list[Any], setup: Any, prompts: list[Any]
) -> dict[str, tuple[Callable[..., Any], dict[str, Any]]]:
    """Valid calls, by their public names."""
    icl, tasks, tensors = sl.icl, sl.tasks, sl.tensors
    folder = Path(tempfile.mkdtemp())
    readout = sl.read(prompts, model=model, layers=[1, 4])
    sweep = icl.patch_sweep(model, episodes, layers=[1, 2], setup=setup)
    condition = sweep.to_frame()["condition"].iloc[-1]
    rule_vectors = torch.randn(2, 10, 4, 8)
    label = (rule_vectors[1, ..., 0] > 0).long()
    words = [(c, c.upper()) for c in "abcdefghijklmnopqrstuvwx"]
    pairs = tasks.WordPairTask("upper", tuple(words))
    rule = tasks.RuleTask("t", {"x": ["a"], "y": ["b"]})
    residuals = sl.capture(model, prompts)
    lines = ["a", "bb", "c"]
    few: dict[str, Any] = dict(samples=8, shots=2, seed=0)
    effects = pd.DataFrame({"block": [0, 1], "head": [1, 0], "effect": [0.1, 0.2]})
    return {
        "stats.choose_layer": (
            lambda fraction, **given: sl.stats.choose_layer(**given, held_out=fraction),
            dict(table=sweep, condition=condition, measures=["correct"], fraction=0.5),
        ),
        "stats.proportion_interval": (
            sl.stats.proportion_interval,
            dict(successes=3, n=5, confidence=0.9),
        ),
        "stats.paired_interval": (
            sl.stats.paired_interval,
            dict(lost=3, gained=1, n=5, confidence=0.9),
        ),
        "view.html": (
            lambda table, labels: sl.view.html(table, labels=labels),
            dict(table=readout, labels=[f"{i}" for i in range(len(prompts))]),
        ),
        "Readout.save_html": (readout.save_html, dict(path=folder / "page.html")),
        "report.first_layers": (sl.report.first_layers, dict(table=readout, agreement=0.5)),
        "report.layer_table": (sl.report.layer_table, dict(table=readout, layers=[1, 4])),
        "icl.probe": (
            icl.probe,
            dict(vectors=rule_vectors, classes=label, folds=2, shuffles=1, strength=1.0, seed=0),
        ),
        "icl.top_heads": (icl.top_heads, dict(effects=effects, n=1)),
        "icl.default_conditions": (icl.default_conditions, dict(episodes=episodes, other=None)),
        "icl.Condition": (
            partial(icl.Condition, "a"),
            dict(source="own", site="labels", demos=None, mean="none", scale=1.0, window=1),
        ),
        "icl.Coalitions": (
            icl.Coalitions,
            dict(base="few-shot", upward=True, exact_up_to=8, orders=16, seed=0),
        ),
        "icl.PromptSetup": (
            icl.PromptSetup,
            dict(dummy_inputs=("z",), dummy_outputs=("?",), seed=0),
        ),
        "tensors.stack_by_demonstration": (
            tensors.stack_by_demonstration,
            dict(slots=torch.zeros(5, 6, 3), n_demos=3),
        ),
        "tensors.mean_by_label": (
            tensors.mean_by_label,
            dict(vectors=rule_vectors, labels=label),
        ),
        "tensors.mean_of_others": (
            tensors.mean_of_others,
            dict(vectors=rule_vectors, groups=["a"] * 10, answers=["x"] * 10),
        ),
        "tensors.label_mean_of_others": (
            tensors.label_mean_of_others,
            dict(vectors=rule_vectors, labels=label, groups=["a"] * 10),
        ),
        "plots.save_figure": (
            sl.plots.save_figure,
            dict(figure=sl.plot(readout), path=folder / "figure"),
        ),
        "plots.plot_by_layer": (
            partial(sl.plots.plot_by_layer, readout),
            dict(value="agreement", lenses=["logit lens"]),
        ),
        "replay.replay": (
            partial(sl.replay.replay, model, residuals),
            dict(rows=[0], patches=[sl.Patch(1, [0], [3], values=torch.zeros(32))]),
        ),
        "Readout.join": (sl.Readout.join, dict(parts=[readout])),
        "tasks.Episode": (
            partial(tasks.Episode, "t", query="c", answer="A"),
            dict(demonstrations=(("a", "A"),), labels=("A", "B"), contrast=()),
        ),
        "tasks.Episode.dummy": (episodes[0].dummy, dict(inputs=("z",), outputs=("?",))),
        "tasks.WordPairTask": (tasks.WordPairTask, dict(name="t", pairs=words, description="")),
        "tasks.WordPairTask.decisions": (
            pairs.decisions,
            dict(n_options=3, with_input=True, shots=2, fractions=(0.2, 0.3, 0.5), seed=0),
        ),
        "tasks.RuleTask, all": (
            partial(tasks.RuleTask, "t", rule.classes),
            dict(description="", labels=("A", "B"), mapping="fixed", balance=True),
        ),
        "tasks.RuleTask.from_rule": (
            tasks.RuleTask.from_rule,
            dict(inputs=lines, rule=len, name="t", description=""),
        ),
        "studies.IclPlan": (
            sl.studies.IclPlan,
            dict(task=pairs, experiments="patching", lead=0.5, out=folder / "icl", **few),
        ),
        "studies.ExitPlan": (
            sl.studies.ExitPlan,
            dict(task=pairs, checks=["logit"], losses=(None,), keep="auto", risk=0.1)
            | dict(out=folder / "exit", **few),
        ),
    }
