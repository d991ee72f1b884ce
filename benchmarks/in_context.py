"""Small transformers that learn in context, on three seeds: the targets, and what was reached.

Every seed has a Phi, first weights and prompts of its own. The study trains, measures and holds
methods against what is known in closed form; this puts its tables together over seeds.

    python benchmarks/in_context.py [--seeds 0 1 2] [--steps N] [--without pasting validation]

Checkpoints and finished parts stay in the work folder, so that a run that was killed goes on.
Writes ``benchmarks/in_context.csv`` (targets), ``in_context-TABLE.csv`` (the study's tables),
``in_context-seeds.csv`` (means over seeds, with Student's intervals, and the lowest and highest
seed) and ``in_context.json``. CPU seconds are those of the process that trained.
"""

import argparse
import json
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pandas as pd
import records
import torch

import spade_lens as sl
from spade_lens.stats.intervals import mean_interval
from spade_lens.storage import write_csv
from spade_lens.storage.download import cache_dir
from spade_lens.studies.in_context.findings import probe_summary
from spade_lens.studies.in_context.plan import PARTS
from spade_lens.training import InContextTask, train_in_context
from spade_lens.training.in_context.fitted import RECIPE
from spade_lens.training.in_context.network import NetworkSize

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=RECIPE.steps)
    parser.add_argument("--prompts", type=int, default=500)
    parser.add_argument("--paste-steps", type=int, default=150)
    parser.add_argument("--without", nargs="*", default=[], choices=("pasting", "validation"))
    parser.add_argument("--work", type=Path, default=cache_dir() / "benchmark-in-context")
    parser.add_argument("--out", type=Path, default=HERE / "in_context")
    args = parser.parse_args()
    torch.set_num_threads(1)

    training = replace(RECIPE, steps=args.steps)
    seconds = {}
    for seed in args.seeds:
        seconds[seed] = trained(seed, training, args.work / f"seed-{seed}")
    plan = sl.studies.InContextPlan(
        training=training,
        seeds=args.seeds,
        parts=[part for part in PARTS if part not in args.without],
        prompts=args.prompts,
        paste_steps=args.paste_steps,
        checkpoints=args.work,
        out=args.work / "study",
    )
    tables = sl.study(plan).tables
    frame = targets(tables)
    write_csv(records.named(args.out, ".csv"), frame)
    for name, table in tables.items():
        write_csv(records.named(args.out, f"-{name}.csv"), table)
    means = over_seeds(frame, tables)
    write_csv(records.named(args.out, "-seeds.csv"), means)
    whole = {
        "run": records.circumstances(seed=args.seeds[0], threads=1, model="in-context, 5 blocks"),
        "cpu_seconds_of_training": seconds,
        "plan": plan.config,
    }
    records.named(args.out, ".json").write_text(json.dumps(whole, indent=2) + "\n")
    print(frame.round(3).to_string(index=False))
    print(means.round(3).to_string(index=False))
    print(json.dumps(seconds))


def trained(seed: int, training: Any, folder: Path) -> float:
    """Train a seed, or find it again; return the CPU seconds that it took."""
    path = folder / "cpu.json"
    started, before = time.process_time(), 0.0
    if path.is_file():
        before = json.loads(path.read_text())["cpu_seconds"]
    train_in_context(
        InContextTask(seed=seed),
        size=NetworkSize(seed=seed),
        plan=replace(training, seed=seed),
        checkpoint=folder,
    )
    taken = before or time.process_time() - started
    path.write_text(json.dumps({"cpu_seconds": taken}))
    return round(taken, 1)


def targets(tables: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """Return what was to be shown, the bound, and what every seed reached."""
    ratios, probes = tables["ratios"], probe_summary(tables["probes"])
    most = int(ratios["last"].max())
    rows: list[dict[str, Any]] = []

    def add(
        seed: int,
        what: str,
        reached: float,
        must: float | None,
        *,
        above: bool = False,
        **ends: Any,
    ) -> None:
        met = None if must is None else bool(reached >= must if above else reached <= must)
        rows.append(
            {"seed": seed, "what": what, "must": must, "reached": reached, **ends, "met": met}
        )

    for seed in ratios["seed"].unique():
        own = ratios[(ratios["seed"] == seed) & (ratios["last"] == most)].set_index("baseline")
        for name, must in (("Bayes ridge on Phi", 1.15), ("ridge on [1, x], oracle", 0.6)):
            row = own.loc[name]
            add(
                seed,
                f"mean risk over {name}",
                row["ratio"],
                must,
                low=row["ratio_low"],
                high=row["ratio_high"],
            )
        at = probes[probes["seed"] == seed].set_index(["network", "place", "quantity"])
        add(
            seed,
            "probe of Phi at x-tokens, best layer",
            at.loc[("trained", "x", "Phi(x)"), "probe_error"],
            0.03,
        )
        add(
            seed,
            "the same, untrained",
            at.loc[("untrained", "x", "Phi(x)"), "probe_error"],
            0.1,
            above=True,
        )
        below = {q: at.loc[("trained", "x", q), "first_layer"] for q in ("Phi(x)", "y")}
        add(seed, "layers from Phi to y (below half)", below["y"] - below["Phi(x)"], 1, above=True)
        for quantity in ("x", "Phi(x)"):
            add(
                seed,
                f"copying of {quantity} to y-tokens",
                at.loc[("trained", "y", quantity), "probe_error"],
                None,
            )
        if "pasting-differences" not in tables:
            continue
        difference = tables["pasting-differences"]
        difference = difference[
            (difference["seed"] == seed) & (difference["read_in"] == "linear, x copied")
        ]
        for _, row in difference.iterrows():
            add(
                seed,
                f"pasted: error lower than behind {row['upper']}",
                row["difference"],
                0.0 if row["upper"] == "random" else None,
                above=True,
                low=row["difference_low"],
                high=row["difference_high"],
            )
    return pd.DataFrame(rows)


def over_seeds(frame: pd.DataFrame, tables: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """Return the mean over seeds of every number of the page, with an interval over seeds."""
    ratios, probes = tables["ratios"], probe_summary(tables["probes"])
    groups = {
        "targets": (frame["what"], frame["reached"]),
        "ratios": (ratios["baseline"] + ", last " + ratios["last"].astype(str), ratios["ratio"]),
        "probes": (
            probes["network"] + ", " + probes["quantity"] + " at " + probes["place"] + "-tokens",
            probes["probe_error"],
        ),
    }
    if "pasting" in tables:
        pasting = tables["pasting"]
        groups["pasting"] = (pasting["upper"] + ", " + pasting["read_in"], pasting["mean"])
    if "validation" in tables:
        rows_of = tables["validation"]
        layers = rows_of["layer"].map(lambda at: "" if pd.isna(at) else f", layer {at:.0f}")
        against = rows_of["method"] + ": " + rows_of["truth"] + ", " + rows_of["measure"]
        groups["validation"] = (against + layers, rows_of["score"])
    rows = []
    for table, (names, values) in groups.items():
        for name, some in values.groupby(names, sort=False):
            low, high = mean_interval(some.to_numpy(dtype=float))
            ends = {"lowest": some.min(), "highest": some.max(), "seeds": len(some)}
            means = {"mean": some.mean(), "low": low, "high": high}
            rows.append({"table": table, "what": name, **means, **ends})
    return pd.DataFrame(rows)


if __name__ == "__main__":
    main()
