"""What a study found: a table, figures, tidy CSVs, and a JSON that says how they came about."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from spade_lens import plots, storage
from spade_lens.exits.calibrate import ExitRule
from spade_lens.exits.confidence import Confidence
from spade_lens.exits.reliability import calibration_error, reliability
from spade_lens.exits.simulate import pareto
from spade_lens.exits.table import ExitTable
from spade_lens.lenses.keep import KeepRule
from spade_lens.lenses.lens import Lens
from spade_lens.models.model import Model
from spade_lens.settings import Settings, scoped
from spade_lens.studies.exits.plan import LOSSES, ExitPlan, plan_exit
from spade_lens.studies.exits.run import PAIR, Study
from spade_lens.studies.exits.text import exit_text
from spade_lens.studies.fit import default_lens
from spade_lens.tasks.resolve import TaskLike


@dataclass(frozen=True)
class ExitResult:
    """What a study found, and where it was written.

    Args:
        points: One row for every way to exit and loss wanted, on the test prompts: ours, the
            paper's, the certified one, and for comparison the shorter prompt and the oracle; with
            the wall-clock speed-ups (``wall_``) where time was measured.
        sweeps: One row for every check, keep set and policy, on the test prompts.
        tried: One row for every keep set, check and family on the calibration prompts, at the
            last of the losses wanted.
        table: The points as text.
        files: Every file written, by what it holds.
    """

    points: pd.DataFrame
    sweeps: pd.DataFrame
    tried: pd.DataFrame
    table: str
    files: dict[str, Path]


@scoped
def exit_study(
    model: Model,
    task: TaskLike,
    *,
    checks: Sequence[Confidence | Lens] | None = None,
    shots: int | None = None,
    calibration: int = 150,
    samples: int = 200,
    losses: Sequence[float | None] = LOSSES,
    keep: str | Sequence[str] | Mapping[str, KeepRule] = "auto",
    layers: Sequence[int] | None = None,
    guarantee: float | None = None,
    risk: float = 0.05,
    race: int = 32,
    rounds: int = 9,
    max_tokens: int | None = None,
    seed: int = 0,
    out: str | PathLike[str] = "spade-lens-exit",
    settings: Settings | None = None,
) -> ExitResult:
    """Choose how to exit on calibration prompts, measure it on others, and race it.

    Prints what it does and a table, and writes into ``out``: ``points.csv``, ``sweeps.csv``,
    ``tried.csv``, ``iso-compute.csv``, ``reliability.csv``, ``exits.csv``, ``table.txt``, the
    figures ``front``, ``exit-layers`` and ``reliability`` (PNG and PDF) and ``exit.json``
    (versions, seed, model hash, configuration). What takes long is kept in ``out/parts``, and the
    same call after an interruption goes on there.

    Example:
        >>> lens = load_lens("lenses/l-spade", model)  # doctest: +SKIP
        >>> found = exit_study(model, "sst2", checks=[lens])  # doctest: +SKIP
        >>> found.points[["rule", "wanted", "accuracy", "speedup"]]  # doctest: +SKIP

    Args:
        model: The model.
        task: A decision task or word pairs, or the name of either.
        checks: What is checked; the first stands for the paper's, which is the entropy of
            L-SPADE. By default that, of :func:`~spade_lens.studies.fit.default_lens`.
        shots: Demonstrations in every prompt; by default the task's own.
        calibration: How many prompts everything is chosen on; fewer where the split has fewer.
        samples: How many other prompts it is measured on; likewise.
        losses: The losses of accuracy wanted; None for best accuracy.
        keep: Names of keep sets (``"attention N"`` and ``"learned N"`` among them), or keep sets
            by name; ``"auto"`` for all of :func:`~spade_lens.exits.keep_family`.
        layers: The candidate layers; by default eight, evenly.
        guarantee: A loss to be guaranteed; None by default.
        risk: The chance that the guarantee fails.
        race: How many of the prompts are run against the clock.
        rounds: How many times; 0 measures no time.
        max_tokens: Prompts of more tokens are passed over.
        seed: Of the sampling and the bootstrap.
        out: The folder for results, made where it is not there.
        settings: Memory limit, batch size and progress; see :class:`spade_lens.Settings`.

    Raises:
        ValueError: If an argument is not possible; before compute is spent.
        DownloadError: If the task's data could not be had.
    """
    plan = plan_exit(
        task,
        shots=shots,
        calibration=calibration,
        samples=samples,
        losses=losses,
        keep=keep,
        layers=layers,
        guarantee=guarantee,
        risk=risk,
        race=race,
        rounds=rounds,
        max_tokens=max_tokens,
        seed=seed,
        out=out,
    )
    checks = [default_lens(model)] if checks is None else checks
    return run_exit(model, plan, checks)


@scoped
def run_exit(
    model: Model,
    plan: ExitPlan,
    checks: Sequence[Confidence | Lens],
    *,
    settings: Settings | None = None,
) -> ExitResult:
    """Do what :func:`plan_exit` checked; see :func:`exit_study`.

    Args:
        model: The model.
        plan: What to do.
        checks: What is checked.
        settings: Memory limit, batch size and progress; see :class:`spade_lens.Settings`.

    Raises:
        ValueError: If the plan does not fit the model; before compute is spent.
    """
    study = Study(model, plan, checks)
    rules = study.rules()
    certified = study.certified()
    if certified is not None:
        rules["certified", plan.guarantee] = certified
    tables = study.test_tables(list(rules.values()))
    points = study.points(rules, tables)
    if plan.rounds:
        raced = study.race(rules, tables)
        points = points.merge(raced, on=["task", "rule", "wanted"], how="left")
    sweeps = study.sweeps(tables)
    result = _write(
        study, points, sweeps, study.exits(rules, tables), tables, rules["ours", plan.losses[-1]]
    )
    print(f"\n{result.table}\n")
    for what, path in result.files.items():
        print(f"{what:<22}{path}")
    return result


def _write(
    study: Study,
    points: pd.DataFrame,
    sweeps: pd.DataFrame,
    exits: pd.DataFrame,
    tables: Sequence[ExitTable],
    best: ExitRule,
) -> ExitResult:
    plan, model = study.plan, study.model
    out, keep = plan.out, best.spade.name
    tried = study.found.tried(plan.losses[-1])
    sure = [t for t in tables if t.check.endswith(", top-1") and t.keep in (PAIR, keep)]
    n_bins = max(4, min(15, len(tables[0]) // 20))  # so that a bin is more than a few prompts
    curve = pd.concat([reliability(t, n_bins=n_bins) for t in sure], ignore_index=True)
    error = pd.concat([calibration_error(t, n_bins=n_bins) for t in sure], ignore_index=True)
    by_check = study.iso_compute(tables)
    text = exit_text(study, points, tables[0])

    files = {
        "table": storage.write_atomically(
            out / "table.txt", lambda p: p.write_text(text + "\n", encoding="utf-8")
        )
    }
    frames = {
        "points": points,
        "sweeps": sweeps,
        "tried": tried,
        "exits": exits,
        "iso-compute": by_check,
        "reliability": curve.merge(error[["check", "keep", "layer", "ece"]]),
    }
    for name, frame in frames.items():
        files[name] = storage.write_csv(out / f"{name}.csv", frame)
    figures = {
        "front": _front(study, points, sweeps, tables[0].accuracy),
        "exit-layers": plots.plot(exits, "exit_layers", n_layers=model.n_layers),
        "reliability": plots.plot(
            curve[curve["keep"] == keep], "reliability", error=error[error["keep"] == keep]
        ),
    }
    for name, figure in figures.items():
        png, pdf = plots.save_figure(figure, out / name)
        files[f"{name} (PNG)"], files[f"{name} (PDF)"] = png, pdf
    used = {
        "candidate_layers": list(study.layers),
        "calibration_prompts": len(study.calibration_prompts),
        "test_prompts": len(study.test_prompts),
    }
    about = storage.provenance(model, **plan.config, **used)
    about["checks"] = [{"name": c.name, "lens": getattr(c.lens, "about", {})} for c in study.checks]
    about["files"] = [path.name for path in files.values()]
    files["how it was made"] = storage.write_json(out / "exit.json", about)
    return ExitResult(points, sweeps, tried, text, files)


def _front(study: Study, points: pd.DataFrame, sweeps: pd.DataFrame, full: float) -> Figure:
    """The fronts of the paper's keep set and of ours, all families of policies together."""
    chosen = points[points["rule"].isin(["ours", "the paper's"])]
    # A policy that reads no lens is swept with the first check.
    check = chosen["check"].replace("", study.checks[0].name)
    chosen = chosen.assign(series=_series(chosen["keep"], check))
    every = _series(sweeps["keep"], sweeps["check"])
    paper = (sweeps["keep"] == PAIR) & sweeps["check"].isin([c.name for c in study.checks])
    some = sweeps[paper | every.isin(chosen["series"])]
    fronts = [pareto(rows).assign(series=name) for name, rows in some.groupby(every, sort=False)]
    return plots.plot(
        pd.concat(fronts, ignore_index=True), "front", by="series", full=full, points=chosen
    )


def _series(keep: "pd.Series[Any]", check: "pd.Series[Any]") -> "pd.Series[Any]":
    """What a line of the figure is called: what is kept, and what is checked."""
    return (
        keep
        + "; "
        + check.mask(check == keep + ", entropy", "SPADE itself").str.removesuffix(", entropy")
    )
