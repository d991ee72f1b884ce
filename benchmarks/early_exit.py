"""SPADE-EXIT on real tasks: accuracy kept, compute saved and seconds saved, task by task.

Prints a table for every task, and then all of them with their mean; writes
``benchmarks/early_exit.csv`` and ``.json``. What takes long is kept in ``benchmarks/.early-exit``,
and the same call goes on there after an interruption. An hour and more on two cores.

    python benchmarks/early_exit.py [--task sst2 ...] [--model tinyllama-1.1b-chat] [--quick]
"""

import argparse
import os
import warnings
from pathlib import Path

# As in speed.py: threads that spin while they wait slow down everybody else.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import pandas as pd
import torch

import spade_lens as sl
from spade_lens import report
from spade_lens.data import SkippedExamplesWarning
from spade_lens.exit_study import exit_task, plan_exit, run_exit
from spade_lens.exits import ExitWarning
from spade_lens.icl import WordPairTask, pair_decisions
from spade_lens.lens_fit import default_lens, fit_lens
from spade_lens.lenses.saving import load_lens

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
KEEPS = ("start+answer", "last 8", "last 16", "last 32", "query", "query+labels", "attention 8")
LOSSES = (None, 0.01)
SEED = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--task", choices=sorted(SHOTS), action="append", help="repeatable")
    parser.add_argument("--pairs", type=Path, default=PAIRS, help="a folder of word pairs")
    parser.add_argument("--calibration", type=int, default=150)
    parser.add_argument("--samples", type=int, default=150)
    parser.add_argument("--race", type=int, default=16, help="prompts of the race")
    parser.add_argument("--rounds", type=int, default=6, help="of the race")
    parser.add_argument("--checks", choices=("all", "untrained"), default="all")
    parser.add_argument("--out", type=Path, default=HERE / "early_exit")
    parser.add_argument("--quick", action="store_true", help="few prompts, to see that it runs")
    args = parser.parse_args()
    if args.quick:
        args.calibration, args.samples, args.race, args.rounds = 60, 20, 8, 2

    torch.set_num_threads(2)
    warnings.simplefilter("ignore", SkippedExamplesWarning)
    warnings.simplefilter("always", ExitWarning)
    model = sl.load(args.model)
    folder = HERE / ".early-exit" / model.name
    checks = lenses(model, folder) if args.checks == "all" else [sl.LogitLens(model)]
    found = []
    for name in args.task or SHOTS:
        task = exit_task(name)
        file = args.pairs / f"{name}.json"
        if file.exists():
            task = pair_decisions(WordPairTask.from_file(file))
        plan = plan_exit(
            task,
            shots=SHOTS[name],
            calibration=args.calibration,
            samples=args.samples,
            losses=LOSSES,
            keep=KEEPS,
            guarantee=0.1,
            race=args.race,
            rounds=args.rounds,
            seed=SEED,
            out=folder / name,
        )
        points = run_exit(model, plan, checks).points
        points.insert(1, "chance", max(task.rates("test")))
        found.append(points)
        # After every task, so that a look is possible before the end.
        report.write_csv(args.out.with_suffix(".csv"), pd.concat(found, ignore_index=True))
    points = pd.concat(found, ignore_index=True)
    table = f"{by_task(points)}\n\n{means(points)}"
    print(f"\n{table}\n\nMeans are over tasks, with bootstrap intervals over tasks (seed {SEED}).")
    about = report.provenance(model, **{k: str(v) for k, v in vars(args).items()}, seed=SEED)
    report.write_json(args.out.with_suffix(".json"), about | {"table": table.splitlines()})


def lenses(model: sl.Model, folder: Path) -> list[sl.Lens]:
    """L-SPADE as it comes by default, a tuned lens of the same text, and the logit lens."""
    step = max(1, model.n_layers // 10)
    place = folder / "tuned"
    if not (place / "lens.json").exists():
        fit_lens(model, "tuned", layers=range(2 * step, model.n_layers, step), out=place)
    return [default_lens(model), load_lens(place, model), sl.LogitLens(model)]


def by_task(points: pd.DataFrame) -> str:
    """A row for every task and way to exit."""
    rows = points[points["rule"].isin(["ours", "the paper's", "certified", "shorter prompt"])]
    shown = pd.DataFrame(
        {
            "task": rows["task"],
            "full": rows["full_accuracy"].map("{:.2f}".format),
            "chance": rows["chance"].map("{:.2f}".format),
            "way": rows["rule"],
            "wanted": rows["wanted"].map(lambda w: "best" if pd.isna(w) else f"{w:g}"),
            "keep": rows["keep"],
            "check": rows["check"],
            "loss": _with_interval(rows, "loss", "{:+.3f}"),
            "FLOPs": _with_interval(rows, "speedup", "{:.2f}"),
            "clock": _with_interval(rows, "wall", "{:.2f}", value="wall_speedup"),
        }
    )
    shown.loc[rows["rule"] == "shorter prompt", "wanted"] = ""
    return shown.to_string(index=False)


def means(points: pd.DataFrame) -> str:
    """Means over the tasks on which the model is clearly above chance."""
    ours = points[points["rule"].isin(["ours", "the paper's"])].copy()
    n = ours["n"]
    right = (ours["full_accuracy"] * n).round().astype(int)
    low = [report.proportion_interval(int(r), int(m))[0] for r, m in zip(right, n, strict=True)]
    above = ours[np.array(low) > ours["chance"]]
    lines = [f"Clearly above chance: {', '.join(above['task'].unique())}."]
    for (rule, wanted), rows in above.groupby(["rule", "wanted"], dropna=False):
        label = "best accuracy" if pd.isna(wanted) else f"loss <= {wanted:g}"
        parts = []
        for name, column in {
            "loss": "loss",
            "speed-up in FLOPs": "speedup",
            "by the clock": "wall_speedup",
        }.items():
            values = rows[column].dropna().to_numpy()
            if len(values):
                low_end, high_end = _bootstrap(values)
                parts.append(f"{name} {values.mean():.3f} [{low_end:.3f}, {high_end:.3f}]")
        lines.append(f"{rule}, {label} ({len(rows)} tasks): {', '.join(parts)}")
    return "\n".join(lines)


def _bootstrap(values: np.ndarray) -> tuple[float, float]:
    draws = np.random.default_rng(SEED).choice(values, size=(2000, len(values)))
    low, high = np.percentile(draws.mean(axis=1), [2.5, 97.5])
    return float(low), float(high)


def _with_interval(
    rows: pd.DataFrame, name: str, form: str, *, value: str | None = None
) -> list[str]:
    columns = zip(rows[value or name], rows[f"{name}_low"], rows[f"{name}_high"], strict=True)
    return [
        "" if pd.isna(v) else f"{form.format(v)} [{form.format(low)}, {form.format(high)}]"
        for v, low, high in columns
    ]


if __name__ == "__main__":
    main()
