"""The figures and the text of a sweep of self-speculation, made from its tables."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from spade_lens import plots
from spade_lens.stats.auroc import auroc
from spade_lens.studies.base import Findings
from spade_lens.studies.speculation.plan import SpeculationPlan

_LEGEND = """\
bound: what the layers run would allow if nothing else took time; no speed-up.
acceptance: the mean over texts; pooled: of all texts together.
needed: the pooled acceptance at which the measured costs break even.
predicted, measured: how many times as fast as plain greedy text, after the prompt.
Of every drafter and layer, the fastest by prediction on these same prompts, which flatters it."""


def speculation_findings(
    frames: Mapping[str, pd.DataFrame], plan: SpeculationPlan, *, clock: str
) -> Findings:
    """Put together what a sweep reports.

    Args:
        frames: ``points``, ``by-prompt``, ``drafts``, ``costs``, and ``times`` if any.
        plan: The plan.
        clock: What decides whether a setting is faster.
    """
    points, drafts = frames["points"], frames["drafts"]
    tables = {name: frame for name, frame in frames.items() if len(frame)}
    figures = {"acceptance": plots.plot(points, "speculation")}
    if len(drafts):
        tables["confidence"] = _separation(drafts)
        figures["confidence"] = plots.plot(drafts, "draft_confidence")
    if "verdict" in points.columns and points["kind"].nunique() > 1:
        figures["speed"] = plots.plot(points, "drafted_speed")
    return Findings(tables, figures, _text(points, clock))


def _separation(drafts: pd.DataFrame) -> pd.DataFrame:
    rows = []
    for (drafter, layer), some in drafts.groupby(["drafter", "layer"], sort=False):
        accepted = some["accepted"].to_numpy(dtype=bool)
        area, low, high = auroc(
            some["confidence"].to_numpy(dtype=float),
            accepted,
            some["prompt"].to_numpy(dtype=np.int64),
        )
        row = {"drafter": drafter, "layer": layer, "auroc": area, "auroc_low": low}
        row |= {"auroc_high": high, "n": some["prompt"].nunique(), "n_drafted": len(some)}
        rows.append(row | {"agreement": accepted.mean()})
    return pd.DataFrame(rows)


def _text(points: pd.DataFrame, clock: str) -> str:
    """Return the best setting of every drafter and layer, and all that were timed."""
    everything = points[points["kind"] == "all"]
    timed = everything.get("verdict", pd.Series("", index=everything.index)) != ""
    order = everything["predicted_speedup"].fillna(0)
    best = order.groupby([everything["drafter"], everything["layer"]]).idxmax()
    rows = everything[everything.index.isin(best) | timed]
    measured = "cpu_speedup" if clock == "CPU time" else "wall_speedup"
    lines = [
        {
            "drafts": _name(row),
            "acceptance": _interval(row, "acceptance"),
            "pooled": _number(row["pooled_acceptance"]),
            "needed": _number(row["break_even"]),
            "per round": _number(row["tokens_per_round"]),
            "bound": _number(row["layer_bound"]),
            "predicted": _number(row["predicted_speedup"]),
            "measured": _interval(row, measured) if row.get("verdict") else "",
            "": row.get("verdict") or "",
        }
        for row in rows.to_dict("records")
    ]
    table = pd.DataFrame(lines).to_string(index=False)
    n = int(everything["n"].max())
    parts = [f"{n} prompts; measured in {clock}", "", table, "", _LEGEND]
    if timed.any():
        same = everything.loc[timed, "same_tokens"]
        lowest = float(same.min())
        said = "all texts" if lowest == 1 else f"at least {lowest:.0%} of the texts of a setting"
        parts.append(f"tokens: {said} that were timed are those of plain text.")
    return "\n".join(parts)


def _name(row: Mapping[Any, Any]) -> str:
    at = f" {row['layer']}" if row["layer"] else ""
    eta = f", eta {row['eta']:g}" if row["eta"] else ""
    upto = "up to " if row["adaptive"] else ""
    return f"{row['drafter']}{at}, {upto}{row['draft_tokens']}{eta}"


def _interval(row: Mapping[Any, Any], name: str) -> str:
    value, low, high = (row[column] for column in (name, f"{name}_low", f"{name}_high"))
    return _number(value) if pd.isna(low) else f"{value:.2f} [{low:.2f}, {high:.2f}]"


def _number(value: Any) -> str:
    return "-" if pd.isna(value) else f"{value:.2f}"
