"""Learning in context, turned: a mixture of three Phi, trajectories, and theory's dial.

The dial changes one thing of the task or the network at a time: examples, noise, depth of Phi,
width. Every setting trains its networks anew, so its trainings are a third as long as the page's.

    python benchmarks/in_context_forms.py [--part mixture dynamical dial] [--seeds 0 1 2]

Checkpoints and finished parts stay in the work folder, so that a run that was killed goes on.
Writes ``benchmarks/in_context_PART-TABLE.csv``, ``in_context_dial.csv`` with a row for every
setting and seed, and ``in_context_PART.json``. One thread.
"""

import argparse
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pandas as pd
import records
import torch

import spade_lens as sl
from spade_lens.storage import write_csv
from spade_lens.storage.download import cache_dir
from spade_lens.studies.in_context.findings import probe_summary
from spade_lens.training import InContextTask
from spade_lens.training.in_context.fitted import RECIPE
from spade_lens.training.in_context.network import NetworkSize

HERE = Path(__file__).parent
FORMS = {
    "mixture": InContextTask(representations=3),
    "dynamical": InContextTask(form="dynamical", recent=2, examples=24),
}
STEPS = {"mixture": 3 * RECIPE.steps, "dynamical": RECIPE.steps}
PARTS = (*FORMS, "dial")
DIAL: dict[str, tuple[float, ...]] = {
    "examples": (6, 12, 24),
    "noise": (0.03, 0.1, 0.3),
    "depth": (1, 2, 3),
    "d_model": (16, 32, 64),
}
DIAL_STEPS, DIAL_SEEDS = RECIPE.steps // 3, 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--part", nargs="*", default=list(PARTS), choices=PARTS)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, help="of mixture and dynamical")
    parser.add_argument("--dial-steps", type=int, default=DIAL_STEPS)
    parser.add_argument("--prompts", type=int, default=500)
    parser.add_argument("--work", type=Path, default=cache_dir() / "benchmark-in-context-forms")
    parser.add_argument("--out", type=Path, default=HERE / "in_context")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for part in args.part:
        if part == "dial":
            frame = dial(args)
            write_csv(records.named(args.out, "_dial.csv"), frame)
            print(frame.round(3).to_string(index=False))
        else:
            for name, table in of_form(part, args).items():
                write_csv(records.named(args.out, f"_{part}-{name}.csv"), table)
        run = records.circumstances(seed=args.seeds[0], threads=1, model="in-context, 5 blocks")
        steps = args.dial_steps if part == "dial" else args.steps or STEPS[part]
        seeds = args.seeds[:DIAL_SEEDS] if part == "dial" else args.seeds
        about = {"run": run, "steps": steps, "seeds": seeds, "prompts": args.prompts}
        records.named(args.out, f"_{part}.json").write_text(json.dumps(about, indent=2) + "\n")


def of_form(part: str, args: argparse.Namespace) -> dict[str, pd.DataFrame]:
    """Return the tables of a mixture, or of trajectories."""
    plan = sl.studies.InContextPlan(
        task=FORMS[part],
        training=replace(RECIPE, steps=args.steps or STEPS[part]),
        seeds=args.seeds,
        parts=["risk", "probes", "selection"] if part == "mixture" else ["risk", "probes"],
        prompts=args.prompts,
        out=args.work / part,
    )
    return sl.study(plan).tables


def dial(args: argparse.Namespace) -> pd.DataFrame:
    """Return a row for every setting and seed."""
    rows: list[dict[str, Any]] = []
    done: dict[tuple[InContextTask, NetworkSize], dict[str, pd.DataFrame]] = {}
    for knob, values in DIAL.items():
        for value in values:
            task, size = InContextTask(), NetworkSize()
            if knob == "d_model":
                size = replace(size, d_model=int(value))
            else:
                task = replace(task, **{knob: value})
            if (task, size) not in done:  # the middle of every knob is the same setting
                plan = sl.studies.InContextPlan(
                    task=task,
                    size=size,
                    training=replace(RECIPE, steps=args.dial_steps),
                    seeds=args.seeds[:DIAL_SEEDS],
                    parts=["risk", "probes"],
                    prompts=args.prompts,
                    out=args.work / f"dial-{knob}-{value:g}",
                )
                done[task, size] = sl.study(plan).tables
            rows += rows_of(knob, value, done[task, size])
    return pd.DataFrame(rows)


def rows_of(knob: str, value: float, tables: dict[str, pd.DataFrame]) -> list[dict[str, Any]]:
    """Return a row for every seed: errors over those that are known, and what probes read."""
    ratios, probes = tables["ratios"], probe_summary(tables["probes"])
    rows = []
    for seed in ratios["seed"].unique():
        own = ratios[ratios["seed"] == seed]
        row: dict[str, Any] = {"knob": knob, "value": value, "seed": seed}
        for last, name in ((own["last"].max(), "all"), (own["last"].min(), "last 5")):
            some = own[own["last"] == last].set_index("baseline")
            for baseline, short in (
                ("Bayes ridge on Phi", "over_bayes"),
                ("ridge on [1, x], oracle", "over_linear"),
            ):
                found = some.loc[baseline]
                row |= {f"{short}, {name}": found["ratio"]}
                row |= {f"{short}, {name}, {end}": found[f"ratio_{end}"] for end in ("low", "high")}
        at = probes[(probes["seed"] == seed) & (probes["place"] == "x")]
        for network in ("trained", "untrained"):
            of_phi = at[(at["network"] == network) & (at["quantity"] == "Phi(x)")].iloc[0]
            row |= {f"phi, {network}": of_phi["probe_error"]}
            row |= {f"phi, {network}, layer": of_phi["layer"]}
        trained = at[at["network"] == "trained"].set_index("quantity")["first_layer"]
        rows.append(row | {"phi below half": trained["Phi(x)"], "y below half": trained["y"]})
    return rows


if __name__ == "__main__":
    main()
