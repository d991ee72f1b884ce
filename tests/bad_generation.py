"""Valid calls of what writes text, and what users give instead and write themselves.

A part of the table in ``bad_input``, which runs it in a plain process.
"""

import tempfile
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from bad_results import NONSENSE

import spade_lens as sl
from spade_lens.exits import FixedLayer, Threshold
from spade_lens.generation import (
    Deal,
    ExitPrefill,
    Kangaroo,
    LayerExit,
    PromptLookup,
    Sampling,
    Speculate,
    TokenExit,
    compare,
    load_kangaroo,
    score_answers,
    score_text,
)
from spade_lens.generation.heuristics import (
    BannedWords,
    KeywordCoverage,
    Repetition,
    TextLength,
    WeightedSum,
)
from spade_lens.generation.kangaroo import Adapter
from spade_lens.training import AdapterPlan, TrainPlan, own_text, train_kangaroo

NAN = float("nan")
COUNT = [NONSENSE, 0, -1, 1.5, "3", True, None]
STRATEGIES = [NONSENSE, "plain", 3, [], ExitPrefill, PromptLookup(), ExitPrefill(9)]
STRATEGIES += [Speculate(LayerExit(4)), [ExitPrefill(1)], TokenExit(4), TokenExit([2, 9])]

WRONG: dict[str, list[Any]] = {
    "max_new_tokens": [*COUNT, 9999, NAN],
    "strategy": STRATEGIES,
    "beside": [*STRATEGIES, None],
    "prefills": [*STRATEGIES, Speculate()],
    "sampling": [NONSENSE, 0.7, "greedy", {"temperature": 1.0}, Sampling],
    "stop": [NONSENSE, 1.5, True, b"a", "", ["a", ""], [None], [1.5], [True], [["a"]]]
    + [97, -1, [97], {"a": 1}, torch.tensor([1.5]), np.array([True]), "\udcff"],
    "on_token": [NONSENSE, 3, "print", [print]],
    "captured": [NONSENSE, 99, -1, "3", 1.5, True, [1, 99], [None], [1, 1], {1: 2}],
    "writes": [NONSENSE, [NONSENSE], "ab", 3, {1: 2}, [sl.Patch(99, values=torch.zeros(32))]]
    + [sl.Patch(1, values=torch.zeros(7)), sl.Patch(1, 5, values=torch.zeros(32))]
    + [sl.Patch(1, positions=99, values=torch.zeros(32))]
    + [sl.Patch(1, positions="all", values=torch.zeros(2, 32))],
    "continuations": [NONSENSE, 3, None, [], "", [""], ["a", "b"], [3.5], [None], [[]], [[97]]]
    + [[[-1]], [[1.5]], [[True]], {"a": 1}, b"ab", [b"ab"], ["a" * 500], "\udcff", [["a"]]],
    "asked": [NONSENSE, "ab", [], 3, ["ab"], sl.Prompt((1, 2)), [sl.Prompt((1,), target=3), "ab"]]
    + [sl.Prompt((1,), target=3, candidates=(5, 7)), sl.Prompt((1,), target=4000)]
    + [sl.Prompt((1, 2), 0, target=3), sl.Prompt((1,) * 128, target=5, target_tokens=(5, 6))],
    "more_tokens": COUNT,
    "answered": [NONSENSE, "", 1.5, [], [1.5], True, [9999], -1, b"a", ["a"], [[1]], {"a": 1}],
    "options": [NONSENSE, "ab", 3, None, ["", "a"], [3, 3], [[3, 4], [3, 4]], [None], {"a": 1}]
    + [[[]], [[3, 9999]], [1.5]],
    "temperature": [NONSENSE, 0, 0.0, -1.0, NAN, float("inf"), "1", True, None],
    "top_k": [NONSENSE, 0, -1, 1.5, "3", True],
    "top_p": [NONSENSE, 0, 0.0, 1.5, -0.1, NAN, "1", True],
    "drafters": [NONSENSE, None, 3, "lookup", [], [NONSENSE], PromptLookup, LayerExit]
    + [[LayerExit(1), PromptLookup()], [LayerExit(1), LayerExit(2)]],
    "draft_tokens": COUNT,
    "eta": [NONSENSE, -0.1, 1.5, NAN, "0", True, None],
    "adaptive": [NONSENSE, 1, "yes", None],
    "length": COUNT,
    "exit_layer": COUNT,
    "exit_layers": [NONSENSE, 0, -1, "3", 1.5, True, None, [], [2, 1], [1, 1], ["1"], {1: 2}],
    "rule": [NONSENSE, None, "surer", True, NAN, Threshold, [0.5], FixedLayer(3)],
    "sure_by": [NONSENSE, "entrpy", 3, None, []],
    "read_by": [NONSENSE, "logit", sl.LogitLens, 3],
    "kept": [NONSENSE, "last 16", 3, []],
    "rounds": [NONSENSE, 0, "3", True],
    "draft_layer": [NONSENSE, 0, 4, -1, 1.5, "2", True, None],
    "adapter": [NONSENSE, None, Adapter, Adapter(16, 1), torch.nn.Linear(32, 32)],
    "ids": [NONSENSE, torch.tensor([97]), torch.tensor([-1]), torch.tensor([0.5]), torch.zeros(0)],
    "adapter_plan": [NONSENSE, "linear", AdapterPlan],
    "train_plan": [NONSENSE, 3],
    "few_texts": [NONSENSE, [], ["abc"], [3]],
    "residual": [NONSENSE, "linear", None],
    "hidden": [NONSENSE, -1, 1.5, "3", True, None],
    "vocabulary": [NONSENSE, 0, -1, 1.5, "3", True],
    "batch_tokens": COUNT,
    "n_new": [*COUNT, 9999],
    "temperatures": [NONSENSE, (), 1.0, (-1.0,), ("1",), (NAN,), (None,)],
    "at_once": COUNT,
    "adapter_folder": [NONSENSE, "nowhere"],
    "wish": [NONSENSE, None, "ab", 3, [], [NONSENSE], [None], Deal, {"a": 1}],
    "n_candidates": COUNT,
    "lookahead": [NONSENSE, -1, 1.5, "3", True, None],
    "wish_weight": [NONSENSE, -1, -0.1, NAN, float("inf"), "1", True, None],
    "commit": [*COUNT, 9],
    "early_layer": [NONSENSE, 0, -1, 1.5, "2", True],
    "concepts": [NONSENSE, None, 3, [], "", [""], ["a b"], [None], [3], ["!"], {"a": 1}, b"ab"],
    "fewest": [NONSENSE, -1, 1.5, "3", True, None, 9],
    "most_words": [NONSENSE, 0, -1, 1.5, "3", True],
    "unit": [NONSENSE, "letters", None, 3],
    "wishes": [NONSENSE, None, [], ["ab"], 3, {"a": 1}],
    "wish_weights": [NONSENSE, None, 3, [1.0, 1.0], ["1"], [-1.0], [NAN], [True], (1.0, 2.0)],
}

TAKEN = {("stop", repr({1, "a"})), ("options", repr({1, "a"}))}
"""A token id and a string."""


def generation(model: sl.Model) -> dict[str, tuple[Callable[..., Any], dict[str, Any]]]:
    """Valid calls, by their public names."""
    shared: dict[str, Any] = {"prompts": "ab", "model": model}
    texts, one_step = ["abcdefgh" * 3, "ijklmnop" * 3], TrainPlan(1, warmup=0)
    folder = Kangaroo(model, 2, Adapter(32, 1)).save(tempfile.mkdtemp())
    one: dict[str, Any] = dict(max_new_tokens=2, strategy=None, sampling=None, stop=None)
    return {
        "generate": (sl.generate, shared | one | {"on_token": None}),
        "generate, layers": (
            lambda captured: sl.generate("ab", 2, model=model, layers=captured),
            {"captured": [1]},
        ),
        "generate, patches": (
            lambda writes: sl.generate("ab", 2, model=model, patches=writes),
            {"writes": ()},
        ),
        "Model.generate": (model.generate, {"prompts": "ab", "max_new_tokens": 2}),
        "generation.score_text": (score_text, shared | {"continuations": "cd"}),
        "generation.score_text, strategy": (
            lambda prefills: score_text("ab", "cd", model=model, strategy=prefills),
            {"prefills": None},
        ),
        "generation.score_answers": (
            lambda asked, more_tokens: score_answers(asked, model=model, more_tokens=more_tokens),
            {"asked": sl.Prompt((1, 2), target=3), "more_tokens": 1},
        ),
        "generation.score_answers, strategy": (
            lambda prefills, stop: score_answers(
                sl.Prompt((1, 2), target=3), model=model, strategy=prefills, stop=stop
            ),
            {"prefills": None, "stop": "b"},
        ),
        "Model.prompt, answers": (
            lambda answered, options: model.prompt("q>", target=answered, candidates=options),
            {"answered": "bc", "options": ("bc", "d")},
        ),
        "generation.compare": (
            lambda beside, rounds: compare("ab", beside, 2, model=model, rounds=rounds),
            {"beside": Speculate(), "rounds": 1},
        ),
        "generation.Sampling": (Sampling, dict(temperature=1.0, top_k=2, top_p=0.5, seed=0)),
        "generation.Speculate": (
            Speculate,
            dict(drafters=PromptLookup(), draft_tokens=3, eta=0.0, adaptive=True),
        ),
        "studies.SpeculationPlan": (_swept, SWEPT),
        "generation.PromptLookup": (PromptLookup, dict(length=2)),
        "generation.LayerExit": (lambda exit_layer: LayerExit(exit_layer), dict(exit_layer=1)),
        "generation.TokenExit": (
            lambda exit_layers, rule, sure_by, read_by: TokenExit(
                exit_layers, rule, sure_by, read_by
            ),
            dict(exit_layers=[1, 2], rule=0.5, sure_by="margin", read_by=None),
        ),
        "generation.ExitPrefill": (
            lambda exit_layer, kept: ExitPrefill(exit_layer, kept),
            dict(exit_layer=1, kept=sl.Keep()),
        ),
        "generation.Deal": (
            lambda wish, n_candidates, lookahead, wish_weight, commit, early_layer, read_by: Deal(
                wish, n_candidates, lookahead, wish_weight, commit, early_layer, read_by
            ),
            dict(wish=TextLength(1), n_candidates=2, lookahead=2, wish_weight=1.0)
            | dict(commit=1, early_layer=None, read_by=None),
        ),
        "generation.heuristics": (
            lambda concepts: KeywordCoverage(concepts),
            {"concepts": ["sun"]},
        ),
        "generation.heuristics, banned": (
            lambda concepts: BannedWords(concepts),
            {"concepts": ["sun"]},
        ),
        "generation.heuristics, length": (
            lambda fewest, most_words, unit: TextLength(fewest, most_words, unit),
            dict(fewest=1, most_words=2, unit="words"),
        ),
        "generation.heuristics, repetition": (lambda length: Repetition(length), dict(length=1)),
        "generation.heuristics, sum": (
            lambda wishes, wish_weights: WeightedSum(wishes, wish_weights),
            dict(wishes=[TextLength(1)], wish_weights=[1.0]),
        ),
        "generation.Kangaroo": (
            lambda draft_layer, adapter, ids: Kangaroo(model, draft_layer, adapter, ids),
            dict(draft_layer=2, adapter=Adapter(32, 1), ids=None),
        ),
        "generation.load_kangaroo": (
            lambda adapter_folder: load_kangaroo(adapter_folder, model),
            dict(adapter_folder=folder),
        ),
        "training.AdapterPlan": (
            AdapterPlan,
            dict(residual="affine", hidden=0, vocabulary=None, batch_tokens=64),
        ),
        "training.own_text": (
            own_text,
            dict(model=model, prompts="ab", n_new=2, temperatures=(1.0,), at_once=2),
        ),
        "training.train_kangaroo": (
            lambda draft_layer, few_texts, adapter_plan, train_plan: train_kangaroo(
                model, draft_layer, few_texts, adapter=adapter_plan, plan=train_plan
            ),
            dict(draft_layer=2, few_texts=texts, adapter_plan=AdapterPlan(), train_plan=one_step),
        ),
    }


SWEPT: dict[str, Any] = dict(lengths=1, etas=0.0, at_layers=1, swept=None, lookups=True) | dict(
    more_drafters=(), timed=1, rounds=1
)


def _swept(
    lengths: Any, etas: Any, at_layers: Any, swept: Any, more_drafters: Any, **rest: Any
) -> Any:
    return sl.studies.SpeculationPlan(
        swept,
        lengths,
        etas,
        layers=at_layers,
        drafters=more_drafters,
        out=tempfile.mkdtemp(),
        **rest,
    )


def of_their_own(model: sl.Model) -> dict[str, tuple[Callable[..., Any], dict[str, Any]]]:
    """Drafters, strategies and keep rules that a user wrote and got wrong."""
    write = partial(sl.generate, "abab", 4, model=model)
    drafts: dict[str, Any] = {
        "none": None,
        "text": "ab",
        "fraction": [0.5],
        "outside": [4000],
        "negative": [-1],
        "nested": [[1]],
    }
    cases: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
        f"drafter gives {name}": (write, {"strategy": Speculate(_drafter(given))})
        for name, given in drafts.items()
    }
    cases |= {
        f"exit keeps {name}": (write, {"strategy": ExitPrefill(1, lambda p, at, g=given: g)})
        for name, given in {"none": None, "outside": [99], "fraction": [0.5]}.items()
    }
    policies = {"numbers": torch.ones(1), "too few": torch.ones(0) > 0, "none": None}
    cases |= {
        f"policy gives {name}": (write, {"strategy": TokenExit(1, _policy(given))})
        for name, given in policies.items()
    }
    measures = {"none": None, "text": "sure", "NaN": torch.tensor([NAN]), "wide": torch.ones(1, 2)}
    cases |= {
        f"measure gives {name}": (write, {"strategy": TokenExit(1, 0.5, lambda x, g=given: g)})
        for name, given in measures.items()
    }
    judged = {"none": None, "text": "good", "NaN": NAN, "several": [1.0, 2.0]}
    cases |= {
        f"heuristic gives {name}": (write, {"strategy": Deal(lambda p, t, g=given: g, 2, 1)})
        for name, given in judged.items()
    }
    strategies: dict[str, dict[str, Any]] = {
        "borders of text": {"borders": "ab"},
        "borders outside": {"borders": (9,)},
        "borders that fall": {"borders": (3, 1)},
        "borders of a number": {"borders": 1},
        "drafts of text": {"drafts": "3"},
        "drafts below 0": {"drafts": -1},
        "name of a number": {"name": 3},
        "writer of nothing": {"writer": lambda self, rows: None},
    }
    for given in (None, [], [None], [([], [])], [([1.5], [0.0])], [([4000], [0.0])], [([5], [])]):
        strategies[f"round of {given}"] = {"writer": lambda self, rows, g=given: _writer(g)}
    cases |= {
        f"strategy: {name}": (write, {"strategy": _strategy(**parts)})
        for name, parts in strategies.items()
    }
    return cases


def _drafter(given: Any) -> Any:
    parts = {"name": "mine", "layer": 0, "draft": lambda self, tokens, most: given}
    return type("Mine", (), parts)()


def _policy(given: Any) -> Any:
    parts = {"name": "mine", "reads": True, "stops": lambda self, layers: layers}
    return type("Mine", (), parts | {"leaves": lambda self, checks: given})()


def _strategy(**parts: Any) -> Any:
    plain: dict[str, Any] = {"name": "mine", "borders": (), "drafts": 0}
    plain["writer"] = lambda self, rows: _writer([([5], [0.0])])
    return type("Mine", (), plain | parts)()


def _writer(given: Any) -> Any:
    """Return a writer whose rounds are pairs of tokens and log-probabilities."""
    from spade_lens.generation.strategy import Round

    def make(self: Any) -> Any:
        several = isinstance(given, list)
        return [g if g is None else Round(*g) for g in given] if several else given

    return type("Writer", (), {"round": make, "select": lambda self, rows: None})()
