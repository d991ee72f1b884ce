"""The choosing part of early_exit.py: rules chosen on some prompts of a table, measured on others.

No model is run here. Every split deals the same prompts anew into those that gates are fitted on,
those that choose, and those that measure. What is no gate chooses on the first two together.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, get_args

import numpy as np
import pandas as pd

from spade_lens.exits import (
    Calibration,
    ExitTable,
    ExitWarning,
    Oracle,
    check_auroc,
    fit_gates,
    gated_reliability,
)
from spade_lens.exits.calibration import ExitRule
from spade_lens.exits.choice import NEVER
from spade_lens.exits.controls import (
    Outcomes,
    beyond_fixed,
    match_fixed,
    mixed,
    outcomes,
    random_exits,
)
from spade_lens.exits.families import few_checks
from spade_lens.exits.gates.fit import GateKind
from spade_lens.exits.setup import Setup
from spade_lens.prompts import Prompt
from spade_lens.stats.intervals import mean_interval

LOSSES = (None, 0.01)
PAPER = "start+answer"
SIMPLE = ("threshold", "thresholds by layer")
FEW = "few checks of SPADE's own"
CASCADE = "SPADE's own after a cheaper check"
COSTS = (0.03, 0.1, 0.2, 0.4, 0.8, 1.6)
"""What the full model's FLOPs are worth in nats: the points of a gate's family."""

MEASURE = 3 / 8  # of the prompts
FIT = 1 / 4


@dataclass(frozen=True)
class Split:
    """Which prompts fit gates, choose and measure."""

    fit: tuple[int, ...]
    choose: tuple[int, ...]
    measure: tuple[int, ...]

    @classmethod
    def of(cls, n: int, seed: int) -> "Split":
        """Deal ``n`` prompts."""
        order = np.random.default_rng(seed).permutation(n).tolist()
        first, second = round(n * MEASURE), round(n * (1 - FIT))
        return cls(tuple(order[second:]), tuple(order[first:second]), tuple(order[:first]))


@dataclass(frozen=True)
class Subject:
    """A task's tables, and what made them.

    Args:
        task: Its name.
        tables: Of every keep set and check.
        setup: The keep sets and checks themselves.
        demonstrations: The full model's table on half of the demonstrations; None without.
        about: More columns.
        prompts: The tables' prompts.
    """

    task: str
    tables: Sequence[ExitTable]
    setup: Setup
    demonstrations: ExitTable | None = None
    about: Mapping[str, Any] = field(default_factory=dict)
    prompts: Sequence[Prompt] = ()


def points(subject: Subject, seed: int) -> pd.DataFrame:
    """A row for every rule at every loss wanted, measured on the split of a seed."""
    split = Split.of(len(subject.tables[0]), seed)
    test = [table.of(split.measure) for table in subject.tables]
    known = [table.of((*split.fit, *split.choose)) for table in subject.tables]
    chosen = [*rules_of(subject, split), *_by_gates(subject, split)]
    rows = []
    for who, wanted, rule in chosen:
        table = rule.table(test)
        measured = outcomes(table, rule.policy)
        row = _row(who, wanted, table, measured, rule.policy.name)
        row |= {"check": rule.check, "family": rule.family}
        # Fixed layers as accurate as the rule, on the very prompts that chose it.
        on = [t.of(split.choose) for t in subject.tables] if "gates" in who else known
        match = match_fixed(on, outcomes(rule.table(on), rule.policy).accuracy)
        row |= beyond_fixed(measured, match.outcomes(test), match)
        curve = gated_reliability(table, rule.policy)
        row |= curve.iloc[0][[f"{n}{e}" for n in ("ece", "brier") for e in ("", "_low", "_high")]]
        rows.append(row)
        if who == "ours":
            rows.append(_row("random exits", wanted, table, random_exits(table, rule.policy), ""))
            fewer = _fewer(subject, split, float(measured.flops.mean()))
            if fewer is not None:
                rows.append(_row("fewer demonstrations", wanted, table, fewer, ""))
    for table in {t.keep: t for t in test}.values():
        rows.append(_row("oracle", np.nan, table, outcomes(table, Oracle()), "oracle"))
    frame = pd.DataFrame(rows)
    frame.insert(0, "task", subject.task)
    return frame.assign(seed=seed, calibration_n=len(known[0]), **subject.about)


def rules_of(subject: Subject, split: Split) -> Iterator[tuple[str, float | None, ExitRule]]:
    """Yield every rule but the gates, with the loss that is allowed; "ours" is the best of all."""
    every = [table.of((*split.fit, *split.choose)) for table in subject.tables]
    known = [table for table in every if table.screen is None]
    own = {t.check for t in known} & set(subject.setup.owner)
    checks = sorted({t.check for t in known} - own)
    paper = next((name for name in checks if name.startswith("L-SPADE")), None)
    plain = Calibration(known, subject.setup, families=(*SIMPLE, "fixed layer", "patience"))
    few = Calibration(_of(known, own), subject.setup, families={FEW: lambda t: few_checks(t, 2)})
    behind = [table for table in every if table.screen is not None]
    cascade = Calibration(behind, subject.setup, families=("cascade",)) if behind else None
    by_check = {f"thresholds on {name}": {name} for name in checks}
    by_check["thresholds on SPADE's own"] = own
    for wanted in LOSSES:
        rules = {
            "fixed layer": _best(plain, wanted, family="fixed layer"),
            "patience": _best(plain, wanted, family="patience"),
            FEW: _best(few, wanted),
        }
        if paper is not None:
            only = {"keep": PAPER, "check": paper, "family": "threshold"}
            rules["the paper's"] = _best(plain, wanted, **only)
        if cascade is not None:
            rules[CASCADE] = _best(cascade, wanted)
        for name, some in by_check.items():
            ways = [_best(plain, wanted, check=c, family=f) for c in some for f in SIMPLE]
            rules[name] = _cheapest(ways, wanted)
        rules["ours"] = _cheapest(list(rules.values()), wanted)
        yield from ((who, wanted, rule) for who, rule in rules.items())


def _by_gates(subject: Subject, split: Split) -> Iterator[tuple[str, float | None, ExitRule]]:
    for kind, calibration in _gates(subject, split):
        for wanted in LOSSES:
            yield f"gates: {kind}", wanted, _best(calibration, wanted)


def _gates(subject: Subject, split: Split) -> Iterator[tuple[str, Calibration]]:
    """Every kind of gate, fitted on some prompts and calibrated on others, on SPADE's own check."""
    own = _of([t for t in subject.tables if t.screen is None], set(subject.setup.owner))
    fit = [table.of(split.fit) for table in own]
    choose = [table.of(split.choose) for table in own]
    for kind in get_args(GateKind):
        yield (
            kind,
            Calibration(choose, subject.setup, families={kind: fit_gates(fit, kind, costs=COSTS)}),
        )


def _cheapest(rules: Sequence[ExitRule], wanted: float | None) -> ExitRule:
    """The rule that the calibration prompts would choose, as one calibration of all would."""
    if wanted is None:
        return min(rules, key=lambda rule: (rule.choice.loss, -rule.choice.speedup))
    return max(rules, key=lambda rule: rule.choice.speedup)


def _of(tables: Sequence[ExitTable], checks: set[str]) -> list[ExitTable]:
    return [table for table in tables if table.check in checks]


def _best(calibration: Calibration, wanted: float | None, **only: str) -> ExitRule:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExitWarning)
        return calibration.best(wanted, **only)  # type: ignore[arg-type]


def _row(
    who: str, wanted: float | None, table: ExitTable, measured: Outcomes, policy: str
) -> dict[str, Any]:
    return {
        "rule": who,
        "wanted": np.nan if wanted is None else wanted,
        "keep": table.keep,
        "kept": float(table.kept.double().mean()),
        "policy": policy,
        **measured.figures(),
        "full_accuracy": table.accuracy,
    }


def _fewer(subject: Subject, split: Split, flops: float) -> Outcomes | None:
    """The full model on half of the demonstrations, mixed with all of them to cost as much."""
    if subject.demonstrations is None:
        return None
    full, part = (t.of(split.measure) for t in (subject.tables[0], subject.demonstrations))
    whole = outcomes(full, NEVER)
    same = (part.final_answer == full.final_answer).double().numpy()
    known = {"full_right": whole.full_right, "full_flops": whole.full_flops, "agrees": same}
    few = replace(outcomes(part, NEVER), **known)
    low, high = (float(way.flops.mean()) for way in (few, whole))
    weight = float(np.clip((flops - low) / (high - low), 0, 1))
    return mixed([few, whole], [1 - weight, weight])


def confidences(subject: Subject) -> pd.DataFrame:
    """How well every check tells good exits from bad ones, by keep set and layer."""
    tables = [table for table in subject.tables if table.screen is None]
    frames = [check_auroc(tables, event=event) for event in ("agrees", "correct")]
    frame = pd.concat(frames, ignore_index=True)
    own = frame["check"].isin(list(subject.setup.owner))
    return frame.assign(task=subject.task, check=frame["check"].mask(own, "SPADE's own"))


SHOWN = {
    "loss": "loss",
    "lost": "lost",
    "gained": "gained",
    "speed-up in FLOPs": "speedup",
    "beyond fixed layers": "beyond_fixed",
    "accuracy beyond them": "more_right",
    "ECE": "ece",
}


def means(frame: pd.DataFrame) -> str:
    """Means over tasks, of each task's mean over splits, with Student's intervals over tasks.

    The oracle's are of the best keep set of each task and split: it knows that too.
    """
    best = frame[frame["rule"] == "oracle"].groupby(["task", "seed"])["speedup"].idxmax()
    frame = frame[(frame["rule"] != "oracle") | frame.index.isin(best)]
    rows = []
    for (rule, wanted), some in frame.groupby(["rule", "wanted"], dropna=False, sort=False):
        by_task = some.groupby("task")
        row: dict[str, Any] = {
            "rule": rule,
            "wanted": "best" if pd.isna(wanted) else f"{wanted:g}",
            "tasks": len(by_task),
        }
        row |= {title: _mean(by_task[column].mean()) for title, column in SHOWN.items()}
        row["adaptive"] = f"{int(some['beats_fixed'].eq(True).sum())} of {len(some)}"
        reached = some["reached_by_fixed"].dropna()
        row["reached by fixed"] = f"{int(reached.sum())} of {len(reached)}" if len(reached) else ""
        row["over the loss"] = _over(some, wanted)
        rows.append(row)
    return pd.DataFrame(rows).fillna("").to_string(index=False)


PAIRS = (
    ("ours", "random exits"),
    ("ours", "fixed layer"),
    ("ours", "fewer demonstrations"),
    ("gates: stopping", "fixed layer"),
    ("gates: stopping", "thresholds on SPADE's own"),
)
"""Rules that are compared task by task."""


def differences(frame: pd.DataFrame) -> str:
    """Differences of two rules' means over splits, with Student's intervals over tasks."""
    rows = []
    for wanted, some in frame[frame["rule"] != "oracle"].groupby("wanted", dropna=False):
        by_rule = some.groupby(["rule", "task"])[list(SHOWN.values())].mean()
        there = set(some["rule"])
        for one, other in (pair for pair in PAIRS if there.issuperset(pair)):
            less = by_rule.loc[one] - by_rule.loc[other]
            row = {
                "rule": one,
                "less": other,
                "wanted": "best" if pd.isna(wanted) else f"{wanted:g}",
            }
            shown = {t: _mean(less[SHOWN[t]]) for t in ("loss", "speed-up in FLOPs", "ECE")}
            rows.append(row | shown)
    return f"Differences, task by task\n{pd.DataFrame(rows).to_string(index=False)}"


def _mean(values: "pd.Series[float]") -> str:
    known = values.dropna().to_numpy(dtype=float)
    if len(known) < 2:
        return ""
    low, high = mean_interval(known)
    return f"{known.mean():.3f} [{low:.3f}, {high:.3f}]"


def _over(some: pd.DataFrame, wanted: float) -> str:
    if some["rule"].iloc[0] == "oracle":
        return ""
    allowed = 0.0 if pd.isna(wanted) else wanted
    return f"{int((some['loss'] > allowed + 1e-9).sum())} of {len(some)}"
