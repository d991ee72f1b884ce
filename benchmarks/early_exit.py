"""SPADE-EXIT on real tasks: accuracy kept, compute saved and seconds saved, task by task.

Prints a table for every task, and then all of them with their mean; writes
``benchmarks/early_exit.csv`` and ``.json`` (other models and --quick: names of their own). What
takes long is kept in ``benchmarks/.early-exit``, and the same call goes on there after an
interruption. An hour and more on two cores. ``--survey`` asks the full model alone, on all tasks.

    python benchmarks/early_exit.py [--task sst2 ...] [--model tinyllama-1.1b-chat] [--quick]
"""

import argparse
import hashlib
import json
import os
import warnings
from collections.abc import Sequence
from pathlib import Path

# As in speed.py: threads that spin while they wait slow down everybody else.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import pandas as pd
import torch
from records import named

import spade_lens as sl
from spade_lens import stats
from spade_lens.exits import ExitWarning, exit_tables
from spade_lens.exits.choice import prompts_needed
from spade_lens.lenses.saving import load_lens
from spade_lens.stats.intervals import mean_interval
from spade_lens.storage.files import write_csv, write_json
from spade_lens.storage.origin import provenance
from spade_lens.studies import ExitPlan
from spade_lens.studies.fit import default_lens, fit_lens
from spade_lens.tasks import DecisionTask, SkippedExamplesWarning, task_names
from spade_lens.tasks.resolve import as_decisions

HERE = Path(__file__).parent
PAIRS = HERE.parent.parent / "shared" / "data" / "icl_pairs"
"""Longer lists of word pairs than the library's own, where they are present."""

SHOTS = {
    "sst2": 4,
    "arc-easy-words": 4,
    "sciq-words": 4,
    "commonsenseqa-words": 4,
    "present-past": 16,
    "singular-plural": 16,
    "capitalize": 16,
    "antonym": 16,
}
MODEL = "smollm2-135m-instruct"
KEEPS = ("start+answer", "last 8", "last 16", "last 32", "query", "query+labels", "attention 8")
LOSSES = (None, 0.01)
RULES = ("ours", "the paper's", "fixed layer", "random exits", "fewer demonstrations")
"""Rows whose means over tasks are printed."""
SEED = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--task", choices=tuple(SHOTS), action="append", help="repeatable")
    parser.add_argument("--pairs", type=Path, default=PAIRS, help="a folder of word pairs")
    parser.add_argument("--calibration", type=int, default=150)
    parser.add_argument("--samples", type=int, default=150)
    parser.add_argument("--keep", action="append", help="a keep set; repeatable")
    parser.add_argument("--layers", type=int, nargs="+", help="candidate layers")
    parser.add_argument("--guarantee", type=float, default=0.1, help="0 for none")
    parser.add_argument(
        "--timed", type=int, default=16, help="prompts of the wall-clock comparison"
    )
    parser.add_argument("--rounds", type=int, default=6, help="of the wall-clock comparison")
    parser.add_argument("--checks", choices=("all", "untrained"), default="all")
    parser.add_argument("--out", type=Path, help="of the CSV and the JSON, without an ending")
    parser.add_argument("--quick", action="store_true", help="few prompts, to see that it runs")
    parser.add_argument("--again", action="store_true", help="print the CSV's tables, run nothing")
    parser.add_argument("--survey", action="store_true", help="accuracy of the full model only")
    args = parser.parse_args()
    if args.quick:
        args.calibration, args.samples, args.timed, args.rounds = 60, 20, 8, 2
    if args.out is None:
        own = "" if args.model == MODEL else f"-{args.model}"
        args.out = HERE / f"early_exit{own}{'-quick' if args.quick else ''}"

    if args.again:
        points = pd.read_csv(named(args.out, ".csv"))
        table = f"{by_task(points)}\n\n{means(points)}"
        record = json.loads(named(args.out, ".json").read_text())
        write_json(named(args.out, ".json"), record | {"table": table.splitlines()})
        print(table)
        return
    torch.set_num_threads(2)
    warnings.simplefilter("ignore", SkippedExamplesWarning)
    warnings.simplefilter("always", ExitWarning)
    tasks = {name: task_of(name, args.pairs) for name in args.task or SHOTS}
    for name, (task, about) in tasks.items():
        print(f"{name}: {about}")
        # Refuses what cannot be, before anything is run.
        plan(name, task, args, task.split_sizes()["calibration"])
    model = sl.load(args.model)
    if args.survey:
        rows = survey(model, args.samples)
        write_csv(named(args.out, "-survey.csv"), rows)
        print(rows.to_string(index=False))
        return
    folder = HERE / ".early-exit" / model.name
    checks = lenses(model, folder) if args.checks == "all" else [sl.LogitLens(model)]
    found = []
    for name, (task, about) in tasks.items():
        held_out = len(prompts_of(model, task, args.calibration, "calibration"))
        chosen = plan(name, task, args, held_out, out=folder / name, checks=checks)
        points = sl.study(model, chosen).tables["points"]
        chance, majority = task.rates("test")
        points = points.assign(chance=chance, majority=majority, data=about)
        found.append(points)
        # After every task, so that a look is possible before the end.
        write_csv(named(args.out, ".csv"), pd.concat(found, ignore_index=True))
    points = pd.concat(found, ignore_index=True)
    table = f"{by_task(points)}\n\n{means(points)}"
    print(f"\n{table}")
    arguments = {k: str(v) for k, v in vars(args).items()}
    about = provenance(model, arguments=arguments, seed=SEED)
    write_json(named(args.out, ".json"), about | {"table": table.splitlines()})


def task_of(name: str, pairs: Path) -> tuple[DecisionTask, str]:
    """A task and where its data are from; word pairs are the longer list where there is one."""
    file = pairs / f"{name}.json"
    if not file.exists():
        task = as_decisions(name, shots=SHOTS[name])
        return task, task.source
    digest = hashlib.sha256(file.read_bytes()).hexdigest()[:16]
    task = as_decisions(file, shots=SHOTS[name])
    return task, f"{task.source} of {file.name}, sha256 {digest}"


def prompts_of(model: sl.Model, task: DecisionTask, n: int, split: str) -> list[sl.Prompt]:
    n = min(n, task.split_sizes()[split])
    return task.prompts(model.tokenizer, n, seed=SEED, split=split, max_tokens=1024, fewer=True)


def plan(
    name: str,
    task: DecisionTask,
    args: argparse.Namespace,
    held_out: int,
    *,
    out: Path = HERE,
    checks: Sequence[str | sl.Lens] = ("logit",),
) -> ExitPlan:
    # Some lists of pairs are too short to certify anything.
    held_out = min(args.calibration, held_out)
    enough = args.guarantee and held_out >= 2 * prompts_needed(loss=args.guarantee, risk=0.05)
    return ExitPlan(
        task,
        checks=checks,
        shots=SHOTS[name],
        calibration=args.calibration,
        samples=args.samples,
        losses=LOSSES,
        keep=args.keep or KEEPS,
        layers=args.layers,
        guarantee=args.guarantee if enough else None,
        timed=args.timed,
        rounds=args.rounds,
        seed=SEED,
        out=out,
    )


def survey(model: sl.Model, n: int) -> pd.DataFrame:
    """The full model's accuracy on every task, beside what can be had without the question."""
    rows = []
    for name in [*task_names("decision"), *task_names("pairs")]:
        try:
            task = as_decisions(name)
        except sl.DownloadError:
            rows.append({"task": name, "n": "no registry has its data"})
            continue
        prompts = prompts_of(model, task, n, "test")
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


def lenses(model: sl.Model, folder: Path) -> list[sl.Lens]:
    """L-SPADE as it comes by default, a tuned lens of the same text, and the logit lens."""
    step = max(1, model.n_layers // 10)
    place = folder / "tuned"
    if not (place / "lens.json").exists():
        # Not today's rate: the table was measured with this lens, of a rate that is too small.
        layers = range(2 * step, model.n_layers, step)
        fit_lens(model, "tuned", layers=layers, rate=0.03, out=place)
    return [default_lens(model), load_lens(place, model), sl.LogitLens(model)]


def by_task(points: pd.DataFrame) -> str:
    """A row for every task and configuration."""
    rows = points
    shown = pd.DataFrame(
        {
            "task": rows["task"],
            "full": rows["full_accuracy"].map("{:.2f}".format),
            "chance": rows["chance"].map("{:.2f}".format),
            "configuration": rows["rule"],
            "wanted": rows["wanted"].map(lambda w: "best" if pd.isna(w) else f"{w:g}"),
            "keep": rows["keep"],
            "check": rows["check"],
            "loss": _with_interval(rows, "loss", "{:+.3f}"),
            "lost": _plain(rows, "lost", "{:.3f}"),
            "gained": _plain(rows, "gained", "{:.3f}"),
            "FLOPs": _with_interval(rows, "speedup", "{:.2f}"),
            "beyond fixed layers": _with_interval(rows, "beyond_fixed", "{:+.1%}"),
            "adaptive": _plain(rows, "beats_fixed", "{}"),
            "timed: FLOPs": _plain(rows, "simulated_speedup", "{:.2f}"),
            "timed: clock": _with_interval(rows, "wall", "{:.2f}", value="wall_speedup"),
        }
    )
    shown.loc[rows["rule"].isin(["shorter prompt", "oracle"]), "wanted"] = ""
    return shown.to_string(index=False)


def means(points: pd.DataFrame) -> str:
    """Means over the tasks on which the model is clearly above chance, and over the harder half."""
    right = (points["full_accuracy"] * points["n"]).round().astype(int)
    low = [stats.proportion_interval(r, n)[0] for r, n in zip(right, points["n"], strict=True)]
    above = points[np.array(low) > points[["chance", "majority"]].max(axis=1)]
    # Where the kept tokens alone do as well, early exit is not what saves.
    control = above[above["rule"] == "shorter prompt"].groupby("task")["loss"].min()
    easy = control.index[control <= LOSSES[-1]]
    lines = [
        f"Clearly above chance: {', '.join(above['task'].unique())}.",
        f"Of these the kept tokens alone, as a shorter prompt, lose at most {LOSSES[-1]:g} on: "
        f"{', '.join(easy) or 'none'}.",
    ]
    for title, rows in {"all": above, "the others": above[~above["task"].isin(easy)]}.items():
        lines.append(f"Means over {title} ({rows['task'].nunique()} tasks):")
        for (rule, wanted), some in rows.groupby(["rule", "wanted"], dropna=False, sort=False):
            if rule in RULES:
                lines.append(f"  {rule}, {_mean_line(some, wanted)}")
    lines.append(
        "Intervals of means: Student's over tasks, which are what is random, with their prompts."
    )
    return "\n".join(lines)


def _mean_line(rows: pd.DataFrame, wanted: float) -> str:
    allowed = 0.0 if pd.isna(wanted) else wanted
    parts = ["best accuracy" if pd.isna(wanted) else f"loss <= {wanted:g}"]
    for name, column in {
        "loss": "loss",
        "lost": "lost",
        "gained": "gained",
        "speed-up in FLOPs": "speedup",
        "by the clock": "wall_speedup",
        "FLOPs beyond fixed layers": "beyond_fixed",
        "accuracy beyond them": "more_right",
    }.items():
        values = rows.get(column, pd.Series(dtype=float)).dropna().to_numpy(dtype=float)
        if len(values):
            low, high = mean_interval(values)
            parts.append(f"{name} {values.mean():.3f} [{low:.3f}, {high:.3f}]")
    over = rows["loss"] > allowed + 1e-9
    parts.append(f"loss above the wanted on {over.sum()}, at most {rows['loss'].max():.3f}")
    return "; ".join(parts)


def _plain(rows: pd.DataFrame, name: str, form: str) -> list[str]:
    """A column as text; nothing where it is missing, as in tables of older runs."""
    values = rows.get(name, pd.Series(np.nan, index=rows.index))
    return ["" if pd.isna(v) else form.format(v) for v in values]


def _with_interval(
    rows: pd.DataFrame, name: str, form: str, *, value: str | None = None
) -> list[str]:
    missing = pd.Series(np.nan, index=rows.index)
    columns = zip(
        *(rows.get(n, missing) for n in (value or name, f"{name}_low", f"{name}_high")), strict=True
    )
    return [
        "" if pd.isna(v) else f"{form.format(v)} [{form.format(low)}, {form.format(high)}]"
        for v, low, high in columns
    ]


if __name__ == "__main__":
    main()
