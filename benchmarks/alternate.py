"""Fine-tuning and preference training by turns: every arm, at goals that conflict and that agree.

SmolLM2-135M-Instruct, low-rank updates of the last four blocks, words from the library's own tasks.
Fine-tuning teaches ``cat plural ->`` the answer ``cats``. Goals of preference training:

- *conflict*: ``Cats`` over ``cats``, on other words of the same tasks;
- *elsewhere*: the same, with fine-tuning on opposites alone and preferences on the other tasks;
- *compatible*: ``cats`` over ``Cats``.

At conflict every arm has settings that trade one goal for the other: strengths of a penalty,
learning rates of preference phases, weights of the joint loss. At the other goals it has one. *At
matched margin* means: for every seed, the lowest held-out SFT loss with which an arm has at least
the margin, on the lower convex front of all its phases' ends. Differences are paired by seed, with
Student's intervals.

    python benchmarks/alternate.py [--seeds 0 1 2] [--goals conflict ...] [--quick] [--tables]

Every finished run is kept in the work folder, so that a run which is stopped goes on. Writes
``benchmarks/alternate.csv`` (arms over seeds), ``alternate-matched.csv``, ``alternate-phases.csv``
(every phase's end), ``alternate-drift.csv``, ``alternate-depth.csv`` and ``alternate.json``.
"""

import argparse
import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import pandas as pd
import records
import torch

import spade_lens as sl
from spade_lens.stats.intervals import mean_interval
from spade_lens.storage import provenance, write_csv
from spade_lens.storage.download import cache_dir
from spade_lens.storage.files import write_json
from spade_lens.tasks import WordPairTask, task
from spade_lens.training import AlternatePlan
from spade_lens.training.alternate.data import prepare
from spade_lens.training.alternate.importance import RELEASED_TEMPERATURE
from spade_lens.training.alternate.run import Alternated, run_plan

HERE = Path(__file__).parent
QUESTIONS = {
    "antonym": "{} opposite ->",
    "present-past": "{} past ->",
    "singular-plural": "{} plural ->",
}
GOALS = ("conflict", "elsewhere", "compatible")
MARGINS = (-3.0, -2.5, -2.0, 0.0)
LAYERS = range(20, 31)
STEPS, RATE = 6, 3e-3
READ_IN_DEPTH = ("sequential", "alternating", "alternating, EWC")

ARMS: dict[str, list[dict[str, Any]]] = {
    "sequential": [
        {"schedule": "sequential", "preference_weight": weight} for weight in (0.5, 1.0)
    ],
    "joint": [{"schedule": "joint", "preference_weight": weight} for weight in (10.0, 40.0)],
    "alternating": [{"preference_weight": weight} for weight in (0.5, 1.0)],
    "alternating, EWC": [{"guard": "ewc", "strength": strength} for strength in (3.0, 10.0)],
    "alternating, L2": [{"guard": "l2", "strength": strength} for strength in (3.0, 10.0)],
    "alternating, freezing": [
        {"guard": "freeze", "preference_weight": weight} for weight in (0.5, 1.0)
    ],
    "alternating, EWC saturated": [
        {"guard": "ewc", "strength": 10.0, "temperature": RELEASED_TEMPERATURE}
    ],
}
"""By arm, the settings that its front is made of. Goals but *conflict* run the last one alone."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--goals", nargs="*", default=list(GOALS), choices=GOALS)
    parser.add_argument("--quick", action="store_true", help="one seed, few words, two rounds")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no more after")
    parser.add_argument("--work", type=Path, default=None, help="where finished runs are kept")
    parser.add_argument("--out", type=Path, default=HERE / "alternate")
    parser.add_argument("--tables", action="store_true", help="only write the tables again")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.quick:
        args.seeds = args.seeds[:1]
        args.out = cache_dir() / "alternate-quick" if args.out == HERE / "alternate" else args.out
    name = "benchmark-alternate" + ("-quick" if args.quick else "")
    work = args.work or cache_dir() / name
    work.mkdir(parents=True, exist_ok=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    if args.tables:
        write_tables(work, args.out)
        return

    model = sl.load()
    size = {"train": 12, "held_out": 6} if args.quick else {"train": 48, "held_out": 20}
    shared = AlternatePlan(
        rounds=2 if args.quick else 3, steps=2 if args.quick else STEPS, learning_rate=RATE
    )
    end = time.monotonic() + 60 * args.minutes
    started = time.process_time()
    cells = [(goal, seed) for goal in args.goals for seed in args.seeds]
    for goal, seed in cells:
        with sl.Settings(progress=False):
            of_cell(model, goal, seed, size, shared, work, end)
        print(f"{goal}, seed {seed}: {time.process_time() - started:.0f} CPU s so far", flush=True)
        write_tables(work, args.out)
    about = provenance(model, seeds=args.seeds, goals=args.goals, **size, questions=QUESTIONS)
    whole = {"run": records.circumstances(seed=args.seeds[0], threads=1, model=model.name)}
    whole |= {"provenance": about, "plan": asdict(shared), "arms": ARMS, "margins": MARGINS}
    kept = [json.loads(path.read_text()) for path in work.glob("*.json")]
    whole |= {"cpu_seconds": round(sum(run["cpu_seconds"] for run in kept), 1)}
    write_json(records.named(args.out, ".json"), whole)
    for ending in (".csv", "-matched.csv", "-depth.csv"):
        print(pd.read_csv(records.named(args.out, ending)).round(2).to_string(index=False))


def of_cell(
    model: sl.Model,
    goal: str,
    seed: int,
    size: dict[str, int],
    shared: AlternatePlan,
    work: Path,
    end: float,
) -> None:
    """Run all arms of a goal and a seed that are not there yet."""
    todo = list(runs(goal, seed, shared))
    paths = {name: work / f"{goal}-{seed}-{name}.json".replace(" ", "_") for name, _ in todo}
    about = {name: {"plan": asdict(plan), "size": size} for name, plan in todo}
    todo = [(n, plan) for n, plan in todo if not is_done(paths[n], about[n])]
    if not todo:
        return
    data = words(model, goal, seed, **size)
    prepared = prepare(model, *data)
    _, held_out = data[-1]
    for name, plan in todo:
        if time.monotonic() > end:
            return
        before = time.process_time()
        trained = run_plan(prepared, plan)
        arm, setting = name.rsplit(" ", 1)
        found = about[name] | {"goal": goal, "seed": seed, "arm": arm, "setting": int(setting)}
        found |= {"rows": json.loads(trained.history.to_json(orient="records"))}
        found |= {"drift": json.loads(trained.drift.to_json(orient="records"))}
        found |= {"importances": trained.importances, "depth": []}
        if is_last(arm, setting) and arm in READ_IN_DEPTH:
            found["depth"] = depths(model, trained, held_out, first=arm == next(iter(ARMS)))
        found["cpu_seconds"] = time.process_time() - before
        write_json(paths[name], found)
        print(goal, seed, name, f"{found['cpu_seconds']:.1f} CPU s", flush=True)


def is_last(arm: str, setting: str) -> bool:
    """Whether a setting is the one with the most of its arm's trait."""
    return int(setting) == len(ARMS[arm]) - 1


def is_done(path: Path, about: dict[str, Any]) -> bool:
    """Whether a run is there; one of another plan is refused."""
    if not path.exists():
        return False
    kept = json.loads(path.read_text())
    here = json.loads(json.dumps(about))
    if any(kept[key] != here[key] for key in here):
        raise ValueError(f"{path} is of another plan. Give another --work, or delete it.")
    return True


def runs(goal: str, seed: int, shared: AlternatePlan) -> Iterator[tuple[str, AlternatePlan]]:
    """The runs of a goal: name and plan."""
    plain = asdict(shared) | {"seed": seed}
    for arm, settings in ARMS.items():
        for number, setting in enumerate(settings):
            if goal == "conflict" or is_last(arm, str(number)):
                yield f"{arm} {number}", AlternatePlan(**plain | setting)


def words(
    model: sl.Model, goal: str, seed: int, *, train: int, held_out: int
) -> tuple[Any, Any, tuple[Any, Any]]:
    """Prompts for both kinds of training, and the held-out ones. No word is in two of these."""
    of_task = {}
    for name, question in QUESTIONS.items():
        pairs = task(name)
        assert isinstance(pairs, WordPairTask)
        some = [(question.format(given), answer) for given, answer in pairs.pairs]
        some = [item for item in some if all(len(ids) < 3 for ids in answers(model, item[1]))]
        order = np.random.default_rng([seed, len(of_task)]).permutation(len(some))
        of_task[name] = [some[i] for i in order]
    for_sft = ["antonym"] if goal == "elsewhere" else list(QUESTIONS)
    for_pairs = [name for name in QUESTIONS if goal != "elsewhere" or name not in for_sft]
    # In turns from all tasks. Where both kinds have the same tasks, one takes from the end.
    learned = in_turns([of_task[name] for name in for_sft])
    preferred = in_turns([of_task[name] for name in for_pairs])
    if goal != "elsewhere":
        tested = [learned[:held_out]] * 2
        learned, preferred = learned[held_out:], learned[held_out:][::-1]
    else:
        tested = [learned[:held_out], preferred[:held_out]]
        learned, preferred = learned[held_out:], preferred[held_out:]
    learned, preferred = learned[:train], preferred[:train]
    assert not set(learned) & set(preferred) and len(learned) > train * 0.9

    def plain(item: tuple[str, str]) -> sl.Prompt:
        return model.prompt(item[0], target=f" {item[1]}")

    def pair(item: tuple[str, str]) -> sl.Prompt:
        both = f" {item[1]}", f" {item[1].capitalize()}"
        return model.prompt(item[0], target=both[goal != "compatible"], candidates=both)

    held = [plain(item) for item in tested[0]], [pair(item) for item in tested[1]]
    return [plain(item) for item in learned], [pair(item) for item in preferred], held


def answers(model: sl.Model, word: str) -> list[list[int]]:
    return [
        model.tokenizer(f" {w}", add_special_tokens=False)["input_ids"]
        for w in (word, word.capitalize())
    ]


def in_turns(lists: list[list[Any]]) -> list[Any]:
    """One of each list, then the second of each, and so on."""
    most = max(map(len, lists))
    return [one[n] for n in range(most) for one in lists if n < len(one)]


def depths(
    model: sl.Model, trained: Alternated, prompts: list[sl.Prompt], *, first: bool
) -> list[dict[str, Any]]:
    """From which layer on lenses read the preferred answer's first token above the rejected one's.

    That no layer reads it counts as one above the last. Of the first arm also before training.
    """
    found = []
    for when in ["before", "after"] if first else ["after"]:
        if when == "after":
            with trained.applied():
                frame = sl.read(prompts, ["logit", "spade"], model=model, layers=LAYERS).to_frame()
        else:
            frame = sl.read(prompts, ["logit", "spade"], model=model, layers=LAYERS).to_frame()
        for (lens, _), rows in frame.groupby(["lens", "prompt"]):
            right = rows.sort_values("layer")["prefers"].to_numpy(dtype=bool)
            holds = np.logical_and.accumulate(right[::-1])[::-1]
            layer = LAYERS[int(holds.argmax())] if holds.any() else LAYERS[-1] + 1
            found.append({"when": when, "lens": lens, "layer": layer, "read": bool(holds.any())})
    return found


def write_tables(work: Path, out: Path) -> None:
    """Write all tables of the runs that are there."""
    kept = [json.loads(path.read_text()) for path in sorted(work.glob("*.json"))]
    keys = ("goal", "arm", "setting", "seed")
    phases, drift, depth = (
        pd.DataFrame([{k: run[k] for k in keys} | row for run in kept for row in run[table]])
        for table in ("rows", "drift", "depth")
    )
    phases["effective_tensors"] = np.nan
    for run in kept:
        weights = np.array(list(run["importances"].values()))
        own = (phases[list(keys)] == [run[k] for k in keys]).all(axis=1)
        phases.loc[own, "effective_tensors"] = 1 / np.square(weights).sum()
    order = {arm: number for number, arm in enumerate(ARMS)}
    goal_order = {goal: number for number, goal in enumerate(GOALS)}
    phases = phases.sort_values(
        ["goal", "arm", "setting", "seed", "phase"],
        key=lambda values: values.map(order | goal_order).fillna(values),
        kind="stable",
    )
    write_csv(records.named(out, "-phases.csv"), phases.round(4))
    write_csv(records.named(out, "-drift.csv"), drift.round(4))
    last = phases.groupby(list(keys), sort=False).tail(1)
    best = phases[phases["objective"] != "preference"].groupby(list(keys))["sft_loss"].min()
    last = last.join(best.rename("lowest_sft_loss"), on=list(keys))
    measures = ["sft_loss", "preference_margin", "preferred", "drift", "lowest_sft_loss"]
    write_csv(out.with_name(f"{out.name}.csv"), over_seeds(last, keys[:3], measures))
    write_csv(records.named(out, "-matched.csv"), matched(phases))
    if len(depth):
        means = depth.groupby([*keys, "when", "lens"])[["layer", "read"]].mean().reset_index()
        columns = ["goal", "arm", "when", "lens"]
        write_csv(records.named(out, "-depth.csv"), over_seeds(means, columns, ["layer", "read"]))


def over_seeds(frame: pd.DataFrame, by: Any, measures: list[str]) -> pd.DataFrame:
    """Return means over seeds, with Student's intervals."""
    rows = []
    for names, part in frame.groupby(list(by), sort=False):
        row = dict(zip(by, names, strict=True)) | {"seeds": len(part)}
        for measure in measures:
            row[measure] = part[measure].mean()
            row[f"{measure}_low"], row[f"{measure}_high"] = mean_interval(part[measure].to_numpy())
        rows.append(row)
    return pd.DataFrame(rows).round(4)


def matched(phases: pd.DataFrame) -> pd.DataFrame:
    """Return the SFT loss of every arm at some margins, and its difference from EWC's.

    An arm's front on a seed is the lower convex one of all its phases' ends, at all its settings.
    """
    values = []
    for (goal, arm, seed), runs_of in phases.groupby(["goal", "arm", "seed"], sort=False):
        points = runs_of.loc[runs_of["phase"] > 0, ["preference_margin", "sft_loss"]].to_numpy()
        for margin in MARGINS:
            loss = lowest_at(points, margin)
            values.append({"goal": goal, "arm": arm, "seed": seed, "margin": margin, "loss": loss})
    frame = pd.DataFrame(values)
    rows = []
    for (goal, margin), part in frame.groupby(["goal", "margin"], sort=False):
        table = part.pivot(index="seed", columns="arm", values="loss")
        for arm in table:
            row = {"goal": goal, "margin": margin, "arm": arm}
            reached = table[arm].dropna().to_numpy()
            row |= {"seeds": len(reached), "sft_loss": reached.mean() if len(reached) else np.nan}
            row["sft_loss_low"], row["sft_loss_high"] = mean_interval(reached)
            if "alternating, EWC" in table and arm != "alternating, EWC":
                more = (table[arm] - table["alternating, EWC"]).dropna().to_numpy()
                row |= {"paired": len(more), "more": more.mean() if len(more) else np.nan}
                row["more_low"], row["more_high"] = mean_interval(more)
            rows.append(row)
    return pd.DataFrame(rows).round(4)


def lowest_at(points: np.ndarray, margin: float) -> float:
    """Return the lowest loss with at least a margin, of points (margin, loss); NaN beyond them."""
    lines = [
        loss0 + (loss1 - loss0) * (margin - m0) / (m1 - m0)
        for m0, loss0 in points
        for m1, loss1 in points
        if m0 <= margin <= m1 and m0 < m1
    ]
    # A point with a larger margin and a lower loss does at least as well.
    better = [loss for m, loss in points if m >= margin]
    return float(min([*lines, *better], default=np.nan))


if __name__ == "__main__":
    main()
