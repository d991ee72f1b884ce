"""The tables, figures and text of a study of early exit, made from its measurements."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from spade_lens import plots, stats
from spade_lens.exits.calibration import ExitRule
from spade_lens.exits.controls import Outcomes
from spade_lens.exits.reliability_curves import reliability
from spade_lens.exits.sweeps import pareto
from spade_lens.exits.table import ExitTable
from spade_lens.exits.trace import among
from spade_lens.models.model import Model
from spade_lens.studies.base import Findings
from spade_lens.studies.exits.plan import ExitPlan

PAPER_KEEP = "start+answer"
"""The name of the paper's keep set."""


_NOTE = """Everything was chosen on other prompts, but for the oracle. Beyond fixed layers: FLOPs
that leaving at fixed layers would take more at the same accuracy, with any of the keep sets. With
a * the interval excludes 0, and only then does it pay to look at each prompt."""


def exit_findings(
    plan: ExitPlan,
    model: Model,
    *,
    frames: Mapping[str, pd.DataFrame],
    tables: Sequence[ExitTable],
    checks: Sequence[str],
    best: ExitRule,
) -> Findings:
    """Put together what a study of early exit reports.

    ``frames`` are ``points``, ``sweeps``, ``tried``, ``exits`` and ``iso-compute``, ``tables``
    those of the test prompts, and ``best`` is our rule at the last of the losses wanted.
    """
    keep = best.spade.name
    top_1 = [t for t in tables if t.check.endswith(", top-1") and t.keep in (PAPER_KEEP, keep)]
    curve = pd.concat([reliability(t) for t in top_1], ignore_index=True)
    figures = {
        "front": _front(frames["points"], frames["sweeps"], checks, tables[0].accuracy),
        "exit-layers": plots.plot(frames["exits"], "exit_layers", n_layers=model.n_layers),
        "reliability": plots.plot(curve[curve["keep"] == keep], "reliability"),
    }
    parts = [_head(plan, model, tables[0], best.choice.n), _text(frames["points"])]
    parts += [_calibration(frames["gated-reliability"]), _conformal(frames.get("conformal"))]
    text = "\n\n".join(part for part in parts if part)
    return Findings({**frames, "reliability": curve}, figures, text)


def point(who: str, table: ExitTable, measured: Outcomes, policy: str) -> dict[str, Any]:
    """Return a row of the points: who chose, what is kept, and how it went."""
    return {
        "rule": who,
        "wanted": math.nan,
        "keep": table.keep,
        "kept": float(table.kept.double().mean()),
        "check": "",
        "family": "",
        "among": ", ".join(sorted({*among(table.n_candidates)})),
        "policy": policy,
        **measured.figures(),
        "full_accuracy": table.accuracy,
    }


def _front(
    points: pd.DataFrame, sweeps: pd.DataFrame, checks: Sequence[str], full: float
) -> Figure:
    """Draw the fronts of the paper's keep set and of ours, all families of policies together."""
    chosen = points[points["rule"].isin(["ours", "the paper's"])]
    # A policy that reads no lens is swept with the first check.
    chosen = chosen.assign(series=_series(chosen["keep"], chosen["check"].replace("", checks[0])))
    series = _series(sweeps["keep"], sweeps["check"])
    paper = (sweeps["keep"] == PAPER_KEEP) & sweeps["check"].isin(checks)
    drawn = sweeps[paper | series.isin(chosen["series"])]
    fronts = [pareto(rows).assign(series=name) for name, rows in drawn.groupby(series, sort=False)]
    return plots.plot(
        pd.concat(fronts, ignore_index=True), "front", by="series", full=full, points=chosen
    )


def _series(keep: "pd.Series[Any]", check: "pd.Series[Any]") -> "pd.Series[Any]":
    """Name a line of the figure: what is kept, and what is checked."""
    return (
        keep
        + "; "
        + check.mask(check == keep + ", entropy", "SPADE itself").str.removesuffix(", entropy")
    )


def _head(plan: ExitPlan, model: Model, table: ExitTable, n_calibration: int) -> str:
    """Describe the task and the full model."""
    n, right = len(table), int((table.final_answer == table.target).sum())
    low, high = stats.proportion_interval(right, n)
    rates = plan.decisions.rates("test")
    tokens = float(table.prices.length.double().mean())
    lines = [
        f"{plan.decisions.name}: {n} test prompts of {tokens:.0f} tokens (mean), {plan.shots} "
        f"demonstrations; chosen on {n_calibration} other prompts; seed {plan.seed}.",
        f"{model.name}, all {model.n_layers} layers: accuracy {right / n:.3f} "
        f"[{low:.2f}, {high:.2f}]; chance {rates.chance:.3f}, majority {rates.majority:.3f}.",
    ]
    if low <= max(rates):
        lines.append(
            "The model is NOT clearly above chance here: early exit has little to lose on it."
        )
    return "\n".join(lines)


def _text(points: pd.DataFrame) -> str:
    """Return the points as a table: a row for every configuration."""
    rows = []
    for row in points.to_dict("records"):
        wanted = "best accuracy" if pd.isna(row["wanted"]) else f"loss <= {row['wanted']:g}"
        compared = row["rule"] in ("shorter prompt", "oracle")
        rows.append(
            {
                "configuration": row["rule"],
                "wanted": "" if compared else wanted,
                "keep": f"{row['keep'] or 'all'} ({row['kept']:.0f})",
                "check": row["check"] or "-",
                "policy": row["policy"],
                "accuracy": _interval(row, "accuracy", ".2f"),
                "loss": _interval(row, "loss", "+.3f"),
                "lost": f"{row['lost']:.2f}",
                "gained": f"{row['gained']:.2f}",
                "speed-up (FLOPs)": _interval(row, "speedup", ".2f"),
                "early": f"{row['early']:.2f}",
                "beyond fixed layers": _beyond(row),
                "speed-up (clock)": _clock(row),
            }
        )
    frame = pd.DataFrame(rows)
    if "wall_speedup" not in points.columns:
        frame = frame.drop(columns="speed-up (clock)")
    return f"{frame.to_string(index=False)}\n\n{_NOTE}"


def _interval(row: Mapping[Any, Any], name: str, form: str) -> str:
    return f"{row[name]:{form}} [{row[f'{name}_low']:{form}}, {row[f'{name}_high']:{form}}]"


def _calibration(curve: pd.DataFrame) -> str:
    """Return the calibration errors of the mixtures of exits, a row for each rule."""
    equal_mass = curve[curve["bins"] == "equal-mass"].drop_duplicates(["rule", "wanted"])
    rows = [
        {
            "configuration": row["rule"],
            "wanted": "best accuracy" if pd.isna(row["wanted"]) else f"loss <= {row['wanted']:g}",
            "ECE": _interval(row, "ece", ".3f"),
            "Brier score": _interval(row, "brier", ".3f"),
        }
        for row in equal_mass.to_dict("records")
    ]
    title = "Probabilities of the answers, all exits together (bins of equal numbers of prompts)"
    return f"{title}\n{pd.DataFrame(rows).to_string(index=False)}"


def _conformal(sets: pd.DataFrame | None) -> str:
    """Return size and coverage of conformal sets, a row for each rule and kind of quantile."""
    if sets is None:
        return ""
    rows = [
        {
            "configuration": row["rule"],
            "wanted": "best accuracy" if pd.isna(row["wanted"]) else f"loss <= {row['wanted']:g}",
            "quantile": row["quantile"],
            "coverage": _interval(row, "coverage", ".2f"),
            "size": _interval(row, "size", ".2f"),
        }
        for row in sets[sets["layer"].isna()].to_dict("records")
    ]
    n, wanted = int(sets["n"].max()), sets["confidence_wanted"].iloc[0]
    title = (
        f"Sets of candidates that should hold the right one in {wanted:.0%} of prompts, on the "
        f"last {n} test prompts (quantiles of the others)"
    )
    return f"{title}\n{pd.DataFrame(rows).to_string(index=False)}"


def _beyond(row: Mapping[Any, Any]) -> str:
    """Return the FLOPs that fixed layers would take more; a star where that is sure."""
    if pd.isna(row.get("beyond_fixed")):
        return "-"
    return _interval(row, "beyond_fixed", "+.0%") + ("*" if row["beats_fixed"] else "")


def _clock(row: Mapping[Any, Any]) -> str:
    if pd.isna(row.get("wall_speedup")):
        return "-"
    return f"{row['wall_speedup']:.2f} [{row['wall_low']:.2f}, {row['wall_high']:.2f}]"
