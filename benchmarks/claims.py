"""The claims about rule vectors, one by one, on a real model: what holds, and by how much.

Runs every experiment of ``spade-lens icl`` on categorization and knowledge tasks and takes from
their tables what speaks for or against each claim, with intervals and controls. Writes
``benchmarks/claims.csv`` and ``.json`` (other models and --quick: names of their own); tables and
figures of the experiments go to ``benchmarks/.claims``, where the same call goes on after an
interruption. Hours on two cores. Several processes may do different tasks or experiments at once,
each with an ``--out`` of its own; a call with all of them then takes what they did.

    python benchmarks/claims.py [--task animal/country ...] [--model tinyllama-1.1b-chat] [--quick]
"""

import argparse
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

# As in speed.py: threads that spin while they wait slow down everybody else.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import likeness  # noqa: F401  # registers an experiment
import pandas as pd
import torch
from records import named

import spade_lens as sl
from spade_lens import stats
from spade_lens.stats import choose_layer
from spade_lens.storage.files import write_csv, write_json
from spade_lens.storage.origin import provenance
from spade_lens.studies import IclPlan

HERE = Path(__file__).parent
MODEL = "smollm2-135m-instruct"
EXPERIMENTS = (
    *("shots", "patching", "contributions", "heads", "knockout", "saliency", "geometry"),
    *("sufficiency", "reading"),
)
TASKS = ("animal/country", "string-length", "country-capital", "present-past")
"""Categorization first, then knowledge: what all experiments are run on."""
CURVES = (
    "country/vehicle",
    "number/fruit",
    "number-size",
    "first-letter",
    "number-parity",
    "vowel-count",
    "singular-plural",
    "antonym",
    "english-french",
)
"""Tasks of which the accuracy by demonstrations alone is asked."""
STEP = {"patching": 3, "sufficiency": 4}
"""Every so many layers, counted from the last one down; else the experiment's own."""
SHARED = ("knockout", "sufficiency")
"""Of these, one prompt in so many (``--share``) is enough."""

Tables = dict[str, dict[str, pd.DataFrame]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--task", action="append", help="repeatable; all of ours by default")
    parser.add_argument("--experiment", choices=EXPERIMENTS, action="append", help="repeatable")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--shots", type=int, default=16)
    parser.add_argument("--few", type=int, default=16, help="prompts of what takes longest")
    parser.add_argument("--share", type=int, default=2, help="cuts and sets: one prompt in so many")
    parser.add_argument("--coalitions", type=int, default=8, help="demonstrations of Shapley's")
    parser.add_argument("--layers", type=int, nargs="+", help="of every experiment by layer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="of the CSV and the JSON, without an ending")
    parser.add_argument("--quick", action="store_true", help="few prompts, to see that it runs")
    args = parser.parse_args()
    if args.quick:
        args.samples, args.shots, args.few, args.layers = 24, 4, 2, [10, 20]
    if args.out is None:
        own = "" if args.model == MODEL else f"-{args.model}"
        args.out = HERE / f"claims{own}{'-quick' if args.quick else ''}"
    torch.set_num_threads(args.threads)
    # At chance: the JSON of every experiment says so, and the curves show it.
    warnings.filterwarnings("ignore", message="[\\s\\S]*nothing to explain")
    model = sl.load(args.model)
    found = []
    for name in args.task or (*TASKS, *CURVES):
        wanted = args.experiment or EXPERIMENTS
        if name in CURVES and not args.task:
            wanted = [e for e in wanted if e == "shots"]
        if wanted:
            found.append(claims(experiments(model, name, wanted, args)).assign(task=name))
        # After every task, so that a look is possible before the end.
        write_csv(named(args.out, ".csv"), _ordered(found))
    table = as_text(_ordered(found))
    print(table)
    arguments = {k: str(v) for k, v in vars(args).items()}
    about = provenance(model, arguments=arguments, seed=args.seed)
    write_json(named(args.out, ".json"), about | {"table": table.splitlines()})


def experiments(
    model: sl.Model, name: str, wanted: Sequence[str], args: argparse.Namespace
) -> Tables:
    """The tables of the experiments on one task; contributions with fewer demonstrations."""
    tables: Tables = {}
    for experiment in wanted:
        plan = IclPlan(
            name,
            experiment,
            samples=args.samples // (args.share if experiment in SHARED else 1),
            shots=args.coalitions if experiment == "contributions" else args.shots,
            few=args.few,
            layers=args.layers or layers_of(experiment, model.n_layers),
            seed=args.seed,
            out=HERE / ".claims" / model.name / name.replace("/", "-"),
        )
        if experiment == "geometry" and not plan.episodes[0].labels and plan.shots > 1:
            # Mappings are each other's control; word pairs have none but other prompts.
            plan = replace(plan, experiments=("geometry", "likeness"))
        found = sl.study(model, plan).tables
        tables[experiment] = {
            part.removeprefix(experiment).removeprefix("-"): frame for part, frame in found.items()
        }
    return tables


def layers_of(experiment: str, n_layers: int) -> list[int] | None:
    step = STEP.get(experiment)
    return None if step is None else list(range(n_layers % step, n_layers + 1, step))


def claims(tables: Tables) -> pd.DataFrame:
    """What speaks for or against each claim: a row for a quantity and one for each control."""
    makers = {
        "shots": demonstrations_needed,
        "patching": vectors_patched,
        "heads": heads_as_vectors,
        "contributions": distributed,
        "knockout": edges_cut,
        "saliency": flows_felt,
        "geometry": abstraction,
        "sufficiency": positions_kept,
        "reading": read,
    }
    rows = [
        {"experiment": name, **row}
        for name, make in makers.items()
        if name in tables
        for row in make(tables[name])
    ]
    if "patching" in tables:
        compared = vectors_compared(tables["patching"])
        rows += [{"experiment": "patching, paired", **row} for row in compared]
    return pd.DataFrame(rows)


def demonstrations_needed(tables: dict[str, pd.DataFrame]) -> Iterator[dict[str, object]]:
    for _, row in tables["summary"].iterrows():
        if row["measure"] in ("accuracy", "preference"):
            yield _row(row, "after demonstrations", row["measure"], at=row["shots"])


def vectors_patched(tables: dict[str, pd.DataFrame]) -> Iterator[dict[str, object]]:
    for _, row in tables["chosen"].iterrows():
        yield _row(row, row["condition"], row["measure"], at=row["layer"])


PAIRS = (
    ("labels to the top", "labels to the top, shuffled"),
    ("labels to the top", "labels"),
    ("labels to the top", "dummy"),
    ("last label to the top", "dummy"),
    ("final position, mean of rule", "final position, shuffled"),
    ("final position, mean of rule", "dummy"),
)


def vectors_compared(tables: dict[str, pd.DataFrame]) -> Iterator[dict[str, object]]:
    """Two conditions on the same held-out prompts, both at the layer of the first."""
    frame = tables[""]
    for first, second in PAIRS:
        layer, rest = choose_layer(frame, first)
        some = rest[rest["layer"].isin([-1, layer])].set_index(["condition", "prompt"])
        for measure in ("correct", "logit_diff"):
            values = some[measure].astype(float)
            less = (values[first] - values[second]).rename("less").reset_index().assign(at=layer)
            name = "accuracy" if measure == "correct" else "logit difference"
            for _, row in stats.summarise(less, "less", by=["at"]).iterrows():
                yield _row(row, f"{first}, less {second}", name, at=layer)


def heads_as_vectors(tables: dict[str, pd.DataFrame]) -> Iterator[dict[str, object]]:
    yield from vectors_patched(tables)
    for _, row in tables["summary"][tables["summary"]["chosen"]].iterrows():
        what = f"head {row['head']} of block {row['block']}"
        yield _row(row, what, "indirect effect on the logit difference", at=row["block"])


def distributed(tables: dict[str, pd.DataFrame]) -> Iterator[dict[str, object]]:
    frame = tables[""]
    for _, row in tables["effective-number"].iterrows():
        yield _row(row, "effective number of demonstrations", "number", at=row["layer"])
    once = frame.drop_duplicates(["layer", "prompt"])
    for column, what in {"all": "all rule vectors", "none": "no rule vector"}.items():
        for _, row in stats.summarise(once, column, by=["layer"]).iterrows():
            yield _row(row, what, "logit difference", at=row["layer"])
    for value in ("shapley", "leave_one_out", "add_one_in"):
        for _, row in stats.summarise(frame, value, by=["layer"]).iterrows():
            yield _row(row, value.replace("_", " "), "logit difference", at=row["layer"])
    positive = frame.assign(positive=frame["shapley"] > 0)
    for _, row in stats.summarise(positive, "positive", by=["layer"]).iterrows():
        yield _row(row, "Shapley value above 0", "share", at=row["layer"])
    ends = {"first demonstration": frame["demo"].min(), "last demonstration": frame["demo"].max()}
    for what, demo in ends.items():
        some = frame[frame["demo"] == demo]
        for _, row in stats.summarise(some, "shapley", by=["layer"]).iterrows():
            yield _row(row, f"shapley, {what}", "logit difference", at=row["layer"])


def edges_cut(tables: dict[str, pd.DataFrame]) -> Iterator[dict[str, object]]:
    for _, row in tables["summary"].iterrows():
        if row["measure"] in ("change", "accuracy"):
            what = f"{row['edges']}{', random edges' if row['control'] else ''}"
            measure = {"change": "change of logit difference", "accuracy": "accuracy"}
            at = f"{row['start']}-{row['stop'] - 1}"
            yield _row(row, what, measure[row["measure"]], at=at)


def flows_felt(tables: dict[str, pd.DataFrame]) -> Iterator[dict[str, object]]:
    frame = tables[""]
    thirds = {
        block: f"third {1 + 3 * block // (1 + frame['block'].max())}"
        for block in frame["block"].unique()
    }
    whole = frame.loc[~frame["control"] & (frame["flow"] == "rest"), "saliency"].mean()
    frame = frame.assign(value=frame["saliency"] / whole, blocks=frame["block"].map(thirds))
    for _, row in stats.summarise(frame, "value", by=["flow", "control", "blocks"]).iterrows():
        what = f"{row['flow']}{', random positions' if row['control'] else ''}"
        yield _row(row, what, "saliency, mean of 'rest' = 1", at=row["blocks"])


def abstraction(tables: dict[str, pd.DataFrame]) -> Iterator[dict[str, object]]:
    for _, row in tables[""].iterrows():
        control = ", rules shuffled" if row["control"] else ""
        what = f"{row['comparison']}, labels {row['labels']}{control}"
        yield _row(row, what, "cosine", at=row["layer"])
    for _, row in tables.get("likeness", pd.DataFrame()).iterrows():
        what = f"{row['prompts']}, {row['comparison']}"
        yield _row(row, what, f"cosine, taken off: {row['center']}", at=row["layer"])
    for _, row in tables.get("probes", pd.DataFrame()).iterrows():
        control = ", classes shuffled" if row["control"] else ""
        yield _row(row, f"probe of {row['probed']}{control}", "accuracy", at=row["layer"])
    for _, row in tables.get("factors", pd.DataFrame()).iterrows():
        shown = {"at": row["layer"], "what": row["factor"]}
        if pd.notna(row["held_out"]):
            yield shown | {"measure": "share of variance, held out", "value": row["held_out"]}
        yield shown | {
            "measure": "share of variance, its control as interval",
            "value": row["fraction"],
            "low": row["control_low"],
            "high": row["control_high"],
        }


def positions_kept(tables: dict[str, pd.DataFrame]) -> Iterator[dict[str, object]]:
    for _, row in tables["summary"].iterrows():
        yield _row(row, row["lens"], "agreement with the full model", at=row["layer"])
    for _, row in stats.summarise(tables[""], "correct", by=["lens", "layer"]).iterrows():
        yield _row(row, row["lens"], "accuracy", at=row["layer"])
    frame = tables[""]
    named = frame["top_1"].eq(frame["candidate_1"]) | frame["top_1"].eq(frame["candidate_2"])
    wrong = frame.assign(wrong=named & ~frame["correct"])
    for _, row in stats.summarise(wrong, "wrong", by=["lens", "layer"]).iterrows():
        yield _row(row, row["lens"], "the wrong candidate on top", at=row["layer"])
    smallest = tables["smallest"]
    for value in ("sufficient", "units", "tokens", "random"):
        if smallest[value].notna().any():
            for _, row in stats.summarise(smallest, value, by=["layer"]).iterrows():
                yield _row(row, "smallest set", value, at=row["layer"])


def read(tables: dict[str, pd.DataFrame]) -> Iterator[dict[str, object]]:
    for _, row in tables["summary"].iterrows():
        control = ", random vectors" if row["control"] else ""
        measure = row["measure"].replace("_", " ")
        yield _row(row, f"{row['method']}{control}", measure, at=row["layer"])


def _row(
    row: "pd.Series[object]", what: object, measure: object, *, at: object
) -> dict[str, object]:
    return {
        "what": what,
        "measure": measure,
        "at": at,
        "value": row["mean"],
        "low": row["low"],
        "high": row["high"],
        "n": row.get("n"),
    }


def _ordered(found: list[pd.DataFrame]) -> pd.DataFrame:
    frame = pd.concat(found, ignore_index=True)
    return frame[["task", *(column for column in frame.columns if column != "task")]]


def as_text(frame: pd.DataFrame) -> str:
    """A table for each experiment and measure: quantities downwards, tasks across."""
    parts = []
    cells = frame.assign(
        cell=[
            f"{v:.2f}" if pd.isna(low) else f"{v:.2f} [{low:.2f}, {high:.2f}]"
            for v, low, high in zip(frame["value"], frame["low"], frame["high"], strict=True)
        ],
        at=frame["at"].astype(str),
    )
    for (experiment, measure), some in cells.groupby(["experiment", "measure"], sort=False):
        rows = ["what"] if experiment in ("patching", "heads") else ["what", "at"]
        wide = some.pivot_table(
            index=rows, columns="task", values="cell", aggfunc="first", sort=False
        )
        parts.append(f"{experiment}: {measure}\n\n{wide.fillna('-').to_string()}")
    return "\n\n".join(parts)


if __name__ == "__main__":
    main()
