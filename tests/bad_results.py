"""What results, prompts and templates are asked for and given: valid calls, and wrong ones.

A part of the table in ``bad_input``, which runs it in a plain process.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch

import spade_lens as sl

NAN = float("nan")


class Nonsense:
    """What no function expects."""

    def __repr__(self) -> str:
        return "Nonsense()"


NONSENSE = Nonsense()
NO_NUMBER = [NONSENSE, True, 0.0, NAN, "0", None, torch.tensor(0.5), np.array([[0]])]

WRONG: dict[str, list[Any]] = {
    "number": [*NO_NUMBER, 7, -1, [0, 1]],
    "numbers": [*NO_NUMBER, 99, -1, [], [0, 99], [True] * 16, np.array([True] * 16)],
    "at_layer": [*NO_NUMBER, 7, -1, 0, [1]],
    "at": [*NO_NUMBER, 99, -1],
    "bos": [None, NONSENSE, 1.5, 999, -1, "nope", b"<s>"],
    "any_bos": [None, NONSENSE, 1.5, b"<s>"],
    "demonstrations": [NONSENSE, 3, "ab", ["ab"], [("a",)], [("a", 3)]],
    "query": [NONSENSE, None, 3, "", " "],
    "reply": [NONSENSE, 3, "", " "],
    "named": [NONSENSE, "A", ("A",), ("A", "A"), ("A", 3), ("A", " "), {"A": 1}],
    "classes": [NONSENSE, 3, {"x": "ab", "y": "c"}, {"x": [], "y": ["c"]}, {"": ["a"], "y": ["c"]}]
    + [{1: ["a"], "1": ["b"]}, {"x": [3], "y": ["c"]}],
    "pattern": [NONSENSE, None, 3, "", "{output}"],
    "of_model": [NONSENSE, 4, None, {"progress": False}],
    "tokens_of": [
        [[1, 2]],
        torch.ones(1, 3),
        np.ones((1, 3), dtype=int),
        torch.tensor([[1]]),
        "ab",
    ],
    "frame": [pd.DataFrame({"word": ["a"]}), pd.DataFrame({"input": ["a"], "output": [NAN]})],
    "device": ["foo", "mps", "meta", 3.5, NONSENSE],
    "tokenizer_of": ["gpt2", NONSENSE, 3],
}


def results(
    model: sl.Model, prompts: list[Any], table: Any, vectors: Any, original: Any
) -> dict[str, tuple[Callable[..., Any], dict[str, Any]]]:
    """Valid calls of what results give, and of what prompts and templates are made of."""
    residuals = sl.capture(model, prompts, layers=[1, 2])
    episode = sl.tasks.Episode("t", (("a", "A"), ("b", "B")), "c", "A", labels=("A", "B"))
    shown = dict(demonstrations=[("a", "A")], query="b")
    tight = sl.prompts.Template(pair="{input}>{output}", query="{input}>", separator=";")
    few_shot = partial(sl.prompts.few_shot_prompt, model.tokenizer, template=tight)
    return {
        "Residuals.at": (lambda number: residuals.at(number), dict(number=0)),
        "Residuals.slots": (lambda number, at: residuals.slots(number, [at]), dict(number=0, at=1)),
        "Residuals.layer": (lambda at_layer: residuals.layer(at_layer), dict(at_layer=1)),
        "Residuals.at_answers": (lambda at_layer: residuals.at_answers(at_layer), dict(at_layer=2)),
        "icl.RuleVectors.at": (vectors.at, dict(layers=1)),
        "exits.ExitTable.of": (lambda numbers: table.of(numbers), dict(numbers=[0, 2, 2])),
        "tasks.Episode.first": (lambda number: episode.first(number), dict(number=1)),
        "prompts.few_shot_prompt": (few_shot, shown),
        "prompts.few_shot_prompt, answer": (
            lambda reply: few_shot([("a", "A")], "b", answer=reply),
            dict(reply="B"),
        ),
        "prompts.Template": (
            lambda any_bos, pattern: sl.prompts.Template(pattern, bos=any_bos),
            dict(any_bos=1, pattern="{input} -> {output}"),
        ),
        "tasks.DecisionTemplate": (
            lambda any_bos, named: sl.tasks.DecisionTemplate(bos=any_bos, labels=named),
            dict(any_bos="<s>", named=["A", "B"]),
        ),
        "tasks.RuleTask": (
            lambda classes, named: sl.tasks.RuleTask("t", classes, labels=named),
            dict(classes={"x": ["a"], "y": ["b"]}, named=("A", "B")),
        ),
        "Model.prompt, start token": (lambda bos: model.prompt("ab", bos=bos), dict(bos="</s>")),
        "Model.settings": (
            lambda of_model: setattr(model, "settings", of_model),
            dict(of_model=model.settings),
        ),
        "Prompt": (lambda tokens_of: sl.Prompt(tokens_of), dict(tokens_of=range(1, 4))),
        "task of a data frame": (
            lambda frame: sl.task(frame, name="t"),
            dict(frame=pd.DataFrame({"input": ["a", "b"], "output": ["A", "B"]})),
        ),
        "load, tokenizer": (
            lambda tokenizer_of: sl.load(original, tokenizer=tokenizer_of),
            dict(tokenizer_of=model.tokenizer),
        ),
        "load, device": (lambda device: sl.load("smollm2-135m-instruct", device=device), {}),
    }
