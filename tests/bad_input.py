"""Call every public function with bad input, in a plain process, and print what it says as JSON.

The test suite checks annotations over the whole package, so there a wrong type never reaches the
library's own checks. Users have no such net: this script runs without it.
"""

import inspect
import json
import linecache
import sys
import tempfile
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from bad_generation import TAKEN as STOPS
from bad_generation import WRONG as GENERATION_WRONG
from bad_generation import generation, of_their_own
from bad_results import NONSENSE, results
from bad_results import WRONG as RESULTS_WRONG
from bad_tables import NOWHERE, TAKEN
from bad_tables import tables as on_tables
from bad_training import WRONG as TRAINING_WRONG
from bad_training import training
from tiny import tiny, tiny_tokenizer

import spade_lens as sl
from spade_lens.generation.rows import Rows

TIGHT = sl.prompts.Template(pair="{input}>{output}", query="{input}>", separator=";")
SETUP = sl.icl.PromptSetup(template=TIGHT, dummy_inputs=("z",), dummy_outputs=("?",))
LETTERS = [[c, c.upper()] for c in "abcdefghijklmnop"]


def calls(model: sl.Model) -> dict[str, tuple[Callable[..., Any], dict[str, Any]]]:
    """A valid call of public functions, by their public names."""
    icl, tasks = sl.icl, sl.tasks
    pairs = tasks.task(LETTERS, name="upper")
    rule = tasks.RuleTask("x/y", {"x": tuple("abcdefghi"), "y": tuple("nopqrstuv")})
    episodes = rule.episodes(4, shots=4)
    prompts = [episode.prompt(model.tokenizer, template=TIGHT) for episode in episodes]
    vectors = icl.rule_vectors(model, rule.episodes(32, shots=4), layers=[1, 2], setup=SETUP)
    readout = sl.read(prompts, model=model, layers=[1, 4])
    folder = Path(tempfile.mkdtemp())
    sl.fit("l-spade", model, n_pieces=20, n_tokens=16, layers=2).save(folder / "lens")
    decided = [
        sl.Prompt(prompt.tokens, target=prompt.target, candidates=prompt.candidates)
        for prompt in prompts * 4
    ]
    tables = sl.exits.exit_tables(model, decided, "logit", layers=[1, 2])
    rule_found = sl.calibrate(model, decided, keep="start+answer", checks="logit", layers=[1, 2])
    shown = dict(model=model, prompts=prompts)
    of_episodes = dict(model=model, episodes=episodes, setup=SETUP)
    more = results(model, prompts, tables[0], vectors, tiny("llama"))
    more |= on_tables(model, rule.episodes(8, shots=4), SETUP, prompts)
    return (
        _exits(model)
        | more
        | generation(model)
        | training(model)
        | {
            "read": (
                sl.read,
                dict(prompts="ab", lens="logit", model=model, layers=1, positions="last", top_k=2),
            ),
            "capture": (sl.capture, dict(model=model, prompts="ab", layers=1, positions="last")),
            "Spade": (sl.Spade, dict(model=model, keep=sl.Keep(), positions="keep")),
            "Keep": (sl.Keep, dict(last=1, spans="query", places=(("query", 0),))),
            "fit": (
                sl.fit,
                dict(kind="l-spade", model=model, text=None, n_pieces=20, n_tokens=16, layers=2)
                | dict(
                    per_piece="all", passes=1, rate=0.1, held_out=0.1, seed=0, rank=2, ridges=[0.1]
                )
                | dict(keep=sl.Keep(), checkpoint=folder / "fit"),
            ),
            "lenses.load_lens": (sl.lenses.load_lens, dict(place=folder / "lens", model=model)),
            "Readout.load": (sl.Readout.load, dict(folder=readout.save(folder / "readout"))),
            "LogitLens": (sl.LogitLens, dict(model=model)),
            "task": (sl.task, dict(given="antonym")),
            "tasks.task_names": (tasks.task_names, dict(kind="rule")),
            "tasks.WordPairTask.prompts": (
                pairs.prompts,
                dict(tokenizer=model.tokenizer, n=2, shots=2, seed=0, template=TIGHT),
            ),
            "tasks.RuleTask.prompts": (
                rule.prompts,
                dict(tokenizer=model.tokenizer, n=2, shots=2, seed=0, template=TIGHT),
            ),
            "tasks.RuleTask.episodes": (rule.episodes, dict(n=2, shots=2, seed=0)),
            "patch": (
                sl.patch,
                dict(prompts="ab", patches=sl.Patch(1, values=torch.zeros(32)), model=model),
            ),
            "plot": (sl.plot, dict(table=readout)),
            "calibrate": (
                sl.calibrate,
                dict(
                    model=model, prompts=decided, keep="start+answer", checks="logit", layers=[1, 2]
                ),
            ),
            "exits.exit_tables": (
                sl.exits.exit_tables,
                dict(model=model, prompts=decided, checks="logit", layers=[1, 2]),
            ),
            "exits.sweep": (
                sl.exits.sweep,
                dict(table=tables[0], policies=sl.exits.Threshold(0.5)),
            ),
            "exits.reliability": (sl.exits.reliability, dict(table=tables[0], event="agrees")),
            "exits.check_auroc": (sl.exits.check_auroc, dict(tables=tables[0], event="agrees")),
            "exits.compare_wall_clock": (
                sl.exits.compare_wall_clock,
                dict(engines=rule_found.best(1.0).engine(), prompts=decided[:2], rounds=1),
            ),
            "exits.SpadeExit.run": (rule_found.best(1.0).engine().run, dict(prompts=decided[:2])),
            "study": (sl.study, dict(model=model, plan=None)),
            "prompts.Prompt": (
                sl.Prompt,
                dict(tokens=(1, 2), answer=-1, text="ab", candidates=(1,), spans={"query": (1,)}),
            ),
            "prompts.Prompt, whole": (
                partial(sl.Prompt, (1, 2), target=3, candidates=(3, 4)),
                dict(target_tokens=(3, 5), candidate_tokens=((3, 5), (4,))),
            ),
            "Model.prompt": (model.prompt, dict(text="ab")),
            "Settings": (sl.Settings, dict(memory_limit=2, batch_size=1, progress=False)),
            "Patch": (partial(sl.Patch, 1), dict(values=torch.zeros(32), mode="add")),
            "stats.summarise": (sl.stats.summarise, dict(table=readout)),
            "icl.rule_vectors": (icl.rule_vectors, shown | dict(layers=1)),
            "icl.final_position_vectors": (icl.final_position_vectors, shown | dict(layers=1)),
            "icl.patch_sweep": (icl.patch_sweep, of_episodes | dict(layers=1)),
            "icl.measure_contributions": (icl.measure_contributions, of_episodes | dict(layers=2)),
            "icl.function_vector_sweep": (
                icl.function_vector_sweep,
                of_episodes | dict(heads=[(1, 0)], layers=1),
            ),
            "icl.head_effects": (icl.head_effects, of_episodes | dict(n=2, blocks=1)),
            "icl.accuracy_by_shots": (
                icl.accuracy_by_shots,
                dict(model=model, tasks=[rule], n=2, shots=2, setup=SETUP),
            ),
            "icl.convergence": (icl.convergence, dict(vectors=vectors)),
            "icl.factor_variance": (icl.factor_variance, dict(vectors=vectors)),
            "icl.decoded_tokens": (icl.decoded_tokens, dict(model=model, vectors=vectors)),
            "icl.knockout": (icl.knockout, shown | dict(draws=1, seed=0)),
            "icl.saliency_flows": (icl.saliency_flows, shown | dict(heads="sum", draws=1)),
            "icl.smallest_sets": (icl.smallest_sets, shown | dict(layers=2, draws=1)),
            "icl.sufficiency_map": (icl.sufficiency_map, shown | dict(layers=2, draws=1)),
        }
    )


COUNT = [NONSENSE, 0, -1, "3"]
WRONG: dict[str, list[Any]] = {
    "prompts": [
        *(NONSENSE, 3, [], "", [3], [["ab"]], {"role": "user"}, [1, 2], [None], "\udcff"),
        *([{"role": "user"}], [{"role": 3, "content": "ab"}], pd.DataFrame({"ab": [1]})),
    ],
    "lens": [NONSENSE, "lgit", [], [3], ["logit", "logit"]],
    "model": [NONSENSE, "smollm2"],
    "layers": [
        *(NONSENSE, 99, -1, "3", 1.5, True, [], [1, 99], [None], {1: 2}, b"1"),
        *(np.array([1.5]), np.array(99), torch.tensor(1.5), torch.tensor([True])),
        *([1, 1], float("nan"), [float("nan")], [[1]], pd.Series([1.0]), pd.DataFrame({"a": [1]})),
    ],
    "blocks": [NONSENSE, 99, -1, "3", []],
    "positions": [
        *(NONSENSE, 99, -99, "frist", 1.5, [[0], [0]], [99], [None], True, b"last", {0: 1}),
        *(np.array([0.5, 1.5]), np.array([[0], [0]]), torch.tensor([0, 99]), torch.tensor(0.5)),
    ],
    "candidates": [NONSENSE, (3, 3), "ab", ["a"], [1.5], [None]],
    "target_tokens": [NONSENSE, (5, 3), "ab", ["a"], [1.5], (3, None), ((3, 5),)],
    "candidate_tokens": [NONSENSE, 3, "ab", ((3,), ()), ((4, 1), (3,)), ((3, "a"),)]
    + [((3, 5), (3, 5), (4,))],
    "spans": [NONSENSE, 3, {"query": 3}, {"query": "ab"}, {"query": (0.5,)}, {"query": (9,)}],
    "memory_limit": [NONSENSE, "2", 0, float("nan"), float("inf"), True],
    "batch_size": [NONSENSE, "2", 0, 1.5, True],
    "progress": [NONSENSE, "no", 1],
    "values": [NONSENSE, [0.0], torch.zeros(2, dtype=torch.long), torch.zeros(1, 1, 1)],
    "mode": [NONSENSE, "set", None],
    "kind": ["rules", NONSENSE],
    "checks": [NONSENSE, "lgit", [], [3]],
    "policies": [NONSENSE, []],
    "tables": [NONSENSE, [], [3]],
    "costs": [NONSENSE, [], [0.0], [-1.0], ["a"], [1.0, 1.0], [float("inf")], 3],
    "event": [NONSENSE, "agree"],
    "engines": [NONSENSE, []],
    "rounds": [NONSENSE, 0, "3"],
    "plan": [NONSENSE, "icl", None],
    "patches": [NONSENSE, [NONSENSE], [sl.Patch(99, 0, 0, values=torch.zeros(32))]],
    "top_k": [0, -1, NONSENSE, 1.5],
    "settings": [NONSENSE, 4],
    "episodes": [NONSENSE, [], [NONSENSE], "animal/country"],
    "setup": [NONSENSE],
    "given": [NONSENSE, "antonim", [], ["one"], {}, "nowhere.csv", "x" * 5000],
    "n": COUNT,
    "shots": [NONSENSE, -1, "3"],
    "draws": [NONSENSE, -1, "3"],
    "seed": [NONSENSE, -1, "3"],
    "template": [NONSENSE],
    "tokenizer": [NONSENSE, "smollm2"],
    "tasks": [NONSENSE, [], [NONSENSE]],
    "vectors": [NONSENSE, torch.zeros(2), []],
    "heads": [NONSENSE, [], [(99, 0)], "sums"],
    "tokens": [NONSENSE, (), "ab", (None,), (1.5,)],
    "answer": [NONSENSE, 5, -9],
    "table": [NONSENSE, [], 3],
    "keep": [NONSENSE, "everything", []],
    "last": [NONSENSE, -1, "3"],
    "places": [NONSENSE, ("query", 0), (("query",),), (("query", 0.5),), ((3, 0),)],
    "text": [NONSENSE, [3], []],
    "n_pieces": COUNT,
    "n_tokens": [*COUNT, 1, 99999],
    "per_piece": [NONSENSE, 0, "some"],
    "passes": [NONSENSE, -1, "3"],
    "rate": [NONSENSE, 0, -1.0, "3"],
    "held_out": [NONSENSE, 0, 0.5],
    "rank": [NONSENSE, 0, 99],
    "ridges": [NONSENSE, [], [-1], ["3"]],
    "folder": [NONSENSE, "nowhere"],
    "place": [NONSENSE, "nowhere"],
}


def _exits(model: sl.Model) -> dict[str, tuple[Callable[..., Any], dict[str, Any]]]:
    exits = sl.exits
    policy, keep = exits.FixedLayer(1), sl.Keep()
    checked: dict[str, Any] = dict(model=model, checks="logit", layers=1)
    [table] = exits.exit_tables(prompts="ab", **checked)
    engine = exits.SpadeExit(model, "logit", policy, layers=1)
    calibration = sl.calibrate(prompts="ab", keep=keep, **checked)
    chosen: dict[str, Any] = dict(loss=1.0, measure="agreement", margin=1.0)
    named: dict[str, Any] = dict(keep="start+answer", check="logit lens, entropy")
    texts = ["abcdefghijklmnopqrstuvwxyz"[i : i + 3] for i in range(22)]
    [training] = exits.exit_tables(prompts=texts, **checked)
    of_gates: dict[str, Any] = dict(loss="disagrees", costs=[1.0], folds=2, seed=0)
    gates = exits.fit_gates(training, **of_gates)
    return {
        "exits.fit_gates": (
            exits.fit_gates,
            dict(tables=[training], kind="stopping", **of_gates),
        ),
        "exits.load_gates": (
            exits.load_gates,
            dict(folder=gates.save(tempfile.mkdtemp(), model), model=model),
        ),
        "exits.Gates": (gates, dict(table=table)),
        "exits.exit_tables": (exits.exit_tables, dict(prompts="ab", answerers="spade", **checked)),
        "calibrate": (
            sl.calibrate,
            dict(prompts="ab", keep=keep, families="threshold", **checked),
        ),
        "exits.Calibration.best": (calibration.best, chosen | dict(family="threshold", **named)),
        "exits.Calibration.tried": (calibration.tried, chosen),
        "exits.SpadeExit": (
            exits.SpadeExit,
            dict(model=model, check="logit", policy=policy, answerer="spade", layers=1),
        ),
        "exits.SpadeExit.run": (engine.run, dict(prompts="ab")),
        "exits.ExitTable.simulate": (table.simulate, dict(policy=policy)),
        "exits.sweep": (exits.sweep, dict(table=table, policies=[policy], front="agreement")),
        "exits.reliability": (
            exits.reliability,
            dict(table=table, event="agrees", bins="equal-mass", n_bins=2),
        ),
        "exits.compare_wall_clock": (
            exits.compare_wall_clock,
            dict(engines=engine, prompts="ab", rounds=1, baseline="answer logits"),
        ),
        "exits.Confidence": (
            exits.Confidence,
            dict(lens=sl.LogitLens(model), measure="entropy", over="vocabulary"),
        ),
        "exits.Own": (
            exits.Own,
            dict(measure="entropy", over="vocabulary", after=exits.Confidence(sl.LogitLens(model))),
        ),
        "exits.Screened": (partial(exits.Screened, policy), dict(least=0.5)),
        "exits.check_auroc": (exits.check_auroc, dict(tables=table, event="agrees")),
        "exits.FixedLayer": (exits.FixedLayer, dict(layer=1)),
        "exits.Threshold": (exits.Threshold, dict(value=0.5)),
        "exits.Patience": (exits.Patience, dict(value=0.5)),
    }


EXITS_WRONG: dict[str, list[Any]] = {
    "checks": [NONSENSE, "lgit", [], [3], ["logit", "logit"], 0],
    "check": [NONSENSE, "lgit", 3],
    "answerers": [NONSENSE, "spad", [], [3], ["spade", "spade"]],
    "answerer": [NONSENSE, "spad", 3],
    "families": [NONSENSE, "thresh", [], [3], {}, {"mine": 3}],
    "family": [NONSENSE, "thresh"],
    "policy": [NONSENSE, "threshold", sl.exits.FixedLayer(3)],
    "policies": [NONSENSE, [], [3], "threshold"],
    "after": [NONSENSE, "logit", 3],
    "least": [NONSENSE, float("nan"), "3"],
    "tables": [NONSENSE, [], [3]],
    "keep": [NONSENSE, "al", [], ["lst 8"], {"a": 3}, {}],
    "loss": [NONSENSE, -0.1],
    "margin": [NONSENSE, -1],
    "measure": [NONSENSE, "acuracy"],
    "front": [NONSENSE, "acuracy"],
    "table": [NONSENSE, 3],
    "event": [NONSENSE, "agree"],
    "bins": [NONSENSE, "equal"],
    "n_bins": [NONSENSE, 0],
    "engines": [NONSENSE, [], [3]],
    "rounds": [NONSENSE, 0],
    "baseline": [NONSENSE, "logits"],
    "over": [NONSENSE, "words"],
    "layer": [NONSENSE, -1, "1"],
    "value": [NONSENSE, "0.5"],
}
WRONG = EXITS_WRONG | GENERATION_WRONG | WRONG | RESULTS_WRONG | TRAINING_WRONG


def equal_ways(model: sl.Model) -> dict[str, tuple[Any, Any]]:
    """What is given as lists, and the same as arrays, tensors and columns: two equal results."""
    expected = sl.capture(model, ["abc", "de"], layers=[0, 2], positions=[1, -1]).stack.tolist()
    ways = {}
    for make in (np.array, torch.tensor, pd.Series):
        layers, positions = make([0, 2]), make([1, -1])
        for at in (positions, [positions, positions]):
            captured = sl.capture(model, ["abc", "de"], layers=layers, positions=at)
            ways[f"{make.__name__} {type(at).__name__}"] = expected, captured.stack.tolist()
        patch = sl.Patch(1, make([1]), positions, values=torch.ones(32))
        places = patch.places(model.prompts(["abc", "de"]))
        ways[f"{make.__name__} patch"] = [[1, 1], [1, 2]], [list(place) for place in places]
    numbers = dict(tokens=np.array([1, 5, 6]), answer=np.int64(1), target=np.int64(4))
    sets = dict(candidates=np.array([3, 4]), spans={"query": np.array([2])})
    residuals = sl.capture(model, sl.Prompt(**numbers, **sets), layers=np.int64(1))
    again = sl.Residuals.load(residuals.save(tempfile.mkdtemp()))
    ways["prompt saved"] = repr(residuals.prompts), repr(again.prompts)
    keeps = [sl.Keep(last=2, positions=1), sl.Keep(last=np.int64(2), positions=np.int64(1))]
    kept = [keep(residuals.prompts[0], 2) for keep in keeps]
    ways["keep"] = list(kept[0]), [int(p) for p in kept[1]]
    return ways


def own_lens(**parts: Any) -> Callable[..., Any]:
    """Read by a user's own lens whose parts are wrong."""

    class Own(sl.LogitLens):
        pass

    def read(model: sl.Model) -> Any:
        for name, part in parts.items():
            setattr(Own, name, part)
        return sl.read("ab", [Own(model)])

    return read


def filled(value: float) -> Callable[..., Any]:
    """Return a lens's final_residuals that are all one number."""
    return lambda lens, residuals, readings, layers: torch.full(
        (len(layers), len(readings), 32), value
    )


def stopping(given: Any) -> Any:
    """Return a policy whose stops() gives something wrong."""
    parts = {"name": "mine", "reads": True, "leaves": None}
    return type("Own", (), parts | {"stops": lambda policy, layers: given})()


def of_users(model: sl.Model) -> dict[str, tuple[Callable[..., Any], dict[str, Any]]]:
    """Calls with what a user wrote and got wrong."""
    keeps = {
        "none": lambda prompt, answer: None,
        "number": lambda prompt, answer: answer + 0.5,
        "text": lambda prompt, answer: "a",
        "class": sl.Keep,
    }
    lenses: dict[str, dict[str, Any]] = {
        "layers": {"layers": 2.5},
        "layer text": {"layers": "ab"},
        "NaN": {"final_residuals": filled(torch.nan)},
        "infinite": {"final_residuals": filled(torch.inf)},
        "keep": {"keep": lambda lens, prompt, answer: 1.5},
    }
    few = sl.LogitLens(model)
    few.layers = (1, 3)  # type: ignore[attr-defined]
    exits = dict(model=model, prompts="ab", checks=few, layers=2)
    [table] = sl.exits.exit_tables(model, "ab", "logit", layers=2)
    return (
        {
            f"keep rule {name}": (lambda keep=keep: sl.read("ab", sl.Spade(model, keep=keep)), {})
            for name, keep in keeps.items()
        }
        | {f"lens {name}": (own_lens(**parts), {"model": model}) for name, parts in lenses.items()}
        | {f"hooks {name}": (hooking(hooks), {"model": model}) for name, hooks in HOOKS.items()}
        | {"lens of few layers": (sl.exits.exit_tables, exits)}
        | {f"stops {given}": (table.simulate, {"policy": stopping(given)}) for given in (None, "a")}
    )


def hooking(hooks: Any) -> Callable[..., Any]:
    """Open hooks that are none, or that give what does not fit."""

    def run(model: sl.Model) -> Any:
        with model.hooks(hooks):
            return sl.capture(model, "ab")

    return run


HOOKS: dict[str, Any] = {
    "text": "blocks.0.hook_out",
    "name alone": [("blocks.0.hook_out",)],
    "number for a function": [("blocks.0.hook_out", 3)],
    "number for a name": [(3, print)],
    "unknown name": [("blocks.0.hook_ouch", print)],
    "gives a number": [("blocks.0.hook_out", lambda x, hook: 1)],
    "gives another shape": [("blocks.0.hook_out", lambda x, hook: x[:, -1:])],
}


def attempt(function: Callable[..., Any], arguments: dict[str, Any]) -> dict[str, Any]:
    """Call a function; say what it raised, and whether one of our own ``raise`` lines did."""
    try:
        function(**arguments)
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        line = linecache.getline(frames[-1].filename, frames[-1].lineno or 0).strip()
        ours = "spade_lens" in frames[-1].filename and line.startswith("raise")
        return {
            "kind": type(error).__name__,
            "message": str(error),
            "ours": ours,
            "where": f"{frames[-1].filename}:{frames[-1].lineno}: {line}",
        }
    return {"kind": None, "message": "nothing was raised", "ours": False, "where": ""}


def main() -> None:
    """Print one JSON object: case -> what was said, and whether the model ran."""
    sl.Settings(progress=False).__enter__()
    model = sl.load(tiny("llama"), tokenizer=tiny_tokenizer(), name="tiny-llama")
    report: dict[str, Any] = {}
    runs = 0

    def counting(function: Callable[..., Any]) -> Any:
        def counted(*args: Any, **kwargs: Any) -> Any:
            nonlocal runs
            runs += 1
            return function(*args, **kwargs)

        return counted

    sl.Model.run_blocks = counting(sl.Model.run_blocks)  # type: ignore[method-assign]
    Rows.enter = counting(Rows.enter)  # type: ignore[method-assign]
    table = calls(model)
    for name, (function, valid) in table.items():
        # These take long; every other call is shown to be valid first.
        if name not in ("study", "load, device"):
            function(**valid)
        takes_settings = "settings" in inspect.signature(function).parameters
        if name == "load, device":
            valid = {"device": None}
        for parameter in [*valid, *(["settings"] if takes_settings else [])]:
            for wrong in [*WRONG.get(parameter, [NONSENSE]), *NOWHERE]:
                if (parameter, repr(wrong)) in TAKEN | STOPS:
                    continue
                runs = 0
                said = attempt(function, valid | {parameter: wrong})
                report[f"{name}({parameter}={wrong!r})"] = said | {"runs": runs}
    of_all = of_users(model) | of_their_own(model)
    users = {name: attempt(*call) for name, call in of_all.items()}
    ways = equal_ways(model)
    told = {"functions": sorted(table), "cases": report, "users": users, "ways": ways}
    json.dump(told, sys.stdout)


if __name__ == "__main__":
    main()
