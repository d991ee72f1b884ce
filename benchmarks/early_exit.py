"""Does confidence pay? Early exit on eight tasks, with every control.

Measures once what every check and keep set says of every prompt (early_exit_tables.py). On these
tables rules are chosen on some prompts and measured on others, three times (early_exit_rules.py).
Then the chosen rules are timed. Writes ``early_exit.csv`` (every rule, task and split),
``early_exit-confidence.csv`` (AUROC), ``early_exit-clock.csv`` and ``early_exit.json`` with the
table; other models: names of their own. What takes long is kept in ``benchmarks/.early-exit``, and
the same call goes on there. Several processes may do different tasks, each with an ``--out`` of its
own; ``--join`` puts their files together. Two hours on two cores.

    python benchmarks/early_exit.py [--task sst2 ...] [--part rules ...] [--quick] [--survey]
"""

import argparse
import os
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

# As in speed.py: threads that spin while they wait slow down everybody else.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pandas as pd
import torch
from early_exit_front import draw, front
from early_exit_rules import (
    Split,
    Subject,
    confidences,
    differences,
    means,
    points,
    rules_of,
)
from early_exit_tables import (
    FITTED_TO,
    HERE,
    KEEPS,
    OWN,
    PAIRS,
    SHOTS,
    answerers,
    fitted,
    layers_of,
    measured,
    of_demonstrations,
    pool,
    screened,
    task_of,
    with_check,
)
from records import named

import spade_lens as sl
from spade_lens import stats
from spade_lens.exits import (
    Confidence,
    compare_wall_clock,
    exit_tables,
    gate_features,
)
from spade_lens.exits.setup import Setup
from spade_lens.storage.files import write_csv, write_json
from spade_lens.storage.origin import provenance
from spade_lens.studies.fit import default_lens
from spade_lens.tasks import SkippedExamplesWarning, task_names
from spade_lens.tasks.resolve import as_decisions

MODEL = "smollm2-135m-instruct"
PARTS = ("tables", "demonstrations", "lenses", "rules", "front", "clock")
TIMED = 4  # prompts
ROUNDS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--task", choices=tuple(SHOTS), action="append", help="repeatable")
    parser.add_argument("--part", choices=PARTS, action="append", help="repeatable; default: all")
    parser.add_argument("--pairs", type=Path, default=PAIRS, help="a folder of word pairs")
    parser.add_argument("--prompts", type=int, default=400, help="of a task, all splits together")
    parser.add_argument("--splits", type=int, default=3)
    parser.add_argument("--out", type=Path, help="of the files, without an ending")
    parser.add_argument(
        "--join", type=Path, nargs="+", help="such files of other calls: put together, run nothing"
    )
    parser.add_argument("--quick", action="store_true", help="few prompts, to see that it runs")
    parser.add_argument("--survey", action="store_true", help="accuracy of the full model only")
    args = parser.parse_args()
    own = "" if args.model == MODEL else f"-{Path(args.model).name.removesuffix('.gguf')}"
    out = args.out or HERE / f"early_exit{own}{'-quick' if args.quick else ''}"
    if args.quick:
        args.prompts, args.splits = 100, 1  # gates take 20 to fit on
    warnings.simplefilter("ignore", SkippedExamplesWarning)
    model = sl.load(args.model)
    if args.survey:
        rows = survey(model)
        write_csv(named(out, "-survey.csv"), rows)
        print(rows.to_string(index=False))
        return
    parts, found, told, fronts = args.part or PARTS, [], [], []

    def keep() -> None:
        for frames, ending in ((found, ""), (told, "-confidence"), (fronts, "-front")):
            if frames:
                write_csv(named(out, f"{ending}.csv"), pd.concat(frames, ignore_index=True))

    if args.join:
        found = [pd.read_csv(named(place, ".csv")) for place in args.join]
        told = [pd.read_csv(named(place, "-confidence.csv")) for place in args.join]
        files = [named(place, "-front.csv") for place in args.join]
        fronts = [pd.read_csv(file) for file in files if file.exists()]
        keep()
    for subject in () if args.join else subjects(model, args, parts):
        if "rules" in parts:
            found += [points(subject, seed) for seed in range(args.splits)]
            told.append(confidences(subject))
        if "front" in parts:
            fronts += [front(subject, seed) for seed in range(args.splits)]
        if {"rules", "front"} & {*parts}:
            keep()  # after every task, so that a look is possible before the end
        if "clock" in parts:
            times = clock(model, subject, args)
            file = named(out, "-clock.csv")
            if file.exists():
                old = pd.read_csv(file)
                times = pd.concat([old[old["task"] != subject.task], times], ignore_index=True)
            write_csv(file, times)
    if fronts and not (args.quick or own):
        draw(pd.concat(fronts, ignore_index=True))
    if found:
        rows = pd.concat(found, ignore_index=True)
        tables = means(rows), differences(rows), _confidence_means(pd.concat(told))
        table = "\n\n".join(tables)
        print(table)
        arguments = {k: str(v) for k, v in vars(args).items()}
        about = provenance(model, arguments=arguments, seed=list(range(args.splits)))
        write_json(named(out, ".json"), about | {"table": table.splitlines()})


def subjects(model: sl.Model, args: argparse.Namespace, parts: list[str]) -> Iterator[Subject]:
    """Every task with its tables; only those parts of them that are measured, without "tables"."""
    lenses: list[sl.lenses.Lens] = [sl.lenses.LogitLens(model)]
    if model.name == MODEL:  # elsewhere L-SPADE takes an hour to fit
        lenses.append(default_lens(model))
    given = [Confidence(lens, features=gate_features) for lens in lenses]
    layers = layers_of(model)
    for name in args.task or SHOTS:
        task, source = task_of(name, args.pairs)
        folder = HERE / ".early-exit" / model.name / f"{name}{'-quick' if args.quick else ''}"
        prompts = pool(model, task, args.prompts)
        spades = answerers(model, prompts[:2], KEEPS, layers)
        tables = measured(model, prompts, spades, folder, layers=layers, run="tables" in parts)
        prompts = prompts[: len(tables[0])]
        shorter = of_demonstrations(
            model, task, prompts, args.prompts, folder, run="demonstrations" in parts
        )
        chance, majority = task.rates("test")
        residuals, own = tables[: len(spades)], tables[len(spades) :]
        to_task = fitted(model, task, spades[KEEPS.index(FITTED_TO)], folder, run="lenses" in parts)
        checks = [*given, *to_task]
        every = [
            with_check(table, model, prompts, spade, check)
            for check in checks
            for table, spade in zip(residuals, spades, strict=True)
        ]
        cascade = [replace(OWN, after=check) for check in to_task[:1]]
        setup = Setup.of(model, [*checks, OWN, *cascade], spades, layers)
        behind = [
            screened(table, cheap, model, prompts, spade, after.of(spade))
            for after in cascade
            for table, cheap, spade in zip(
                own, every[len(given) * len(spades) :], spades, strict=False
            )
        ]
        yield Subject(
            task=name,
            tables=[*every, *own, *behind],
            setup=setup,
            demonstrations=shorter,
            about={"chance": chance, "majority": majority, "data": source},
            prompts=prompts,
        )


def clock(model: sl.Model, subject: Subject, args: argparse.Namespace) -> pd.DataFrame:
    """Time our rules of the first split in batches and one by one, beside the plain model."""
    torch.set_num_threads(1)
    split = Split.of(len(subject.tables[0]), 0)
    rules = {
        who: rule
        for who, wanted, rule in rules_of(subject, split)
        if wanted == 0.01 and who in ("ours", "fixed layer")
    }
    prompts = [subject.prompts[i] for i in split.measure[:TIMED]]
    rows = []
    for batch, size in (("all", None), ("one", 1)):
        for baseline in ("answer logits", "left-padded")[: 2 if size is None else 1]:
            with sl.Settings(batch_size=size):
                engines = [rule.engine() for rule in rules.values()]
                timed = compare_wall_clock(engines, prompts, rounds=ROUNDS, baseline=baseline)
            for (who, rule), wall in zip(rules.items(), timed, strict=True):
                simulated = rule.table(subject.tables).of(split.measure[:TIMED])
                speedup = simulated.simulate(rule.policy).speedup
                row = {"task": subject.task, "rule": who, "wanted": 0.01, "batch": batch}
                row |= {"simulated_speedup": speedup, "wall_prompts": len(prompts)}
                rows.append(row | {f"wall_{k}": v for k, v in wall.to_dict().items()})
                print(rows[-1], flush=True)
    return pd.DataFrame(rows)


def survey(model: sl.Model, n: int = 100) -> pd.DataFrame:
    """The full model's accuracy on every task, beside what can be had without the question."""
    rows = []
    for name in [*task_names("decision"), *task_names("pairs")]:
        try:
            task = as_decisions(name)
        except sl.DownloadError:
            rows.append({"task": name, "n": "no registry has its data"})
            continue
        few = min(n, task.split_sizes()["test"])
        prompts = task.prompts(
            model.tokenizer, few, seed=0, split="test", max_tokens=1024, fewer=True
        )
        [table] = exit_tables(model, prompts, "logit", answerers="logit", layers=[0])
        right = int((table.final_answer == table.target).sum())
        low, high = stats.proportion_interval(right, len(prompts))
        chance, majority = task.rates("test")
        rows.append(
            {
                "task": name,
                "n": len(prompts),
                "shots": task.shots,
                "accuracy": f"{right / len(prompts):.2f} [{low:.2f}, {high:.2f}]",
                "chance": f"{chance:.2f}",
                "majority": f"{majority:.2f}",
                "clearly above": "yes" if low > max(chance, majority) else "NO",
            }
        )
        print(rows[-1], flush=True)
    return pd.DataFrame(rows).fillna("")


def _confidence_means(told: pd.DataFrame) -> str:
    """Mean AUROC over tasks and layers up to 24, by check, keep set and event."""
    some = told[told["layer"] <= 24]
    by_task = some.groupby(["check", "keep", "event", "task"])["auroc"].mean()
    table = by_task.groupby(["check", "keep", "event"]).mean().unstack(["event"])
    return f"AUROC, means over candidate layers up to 24 and tasks\n{table.round(3).to_string()}"


if __name__ == "__main__":
    main()
