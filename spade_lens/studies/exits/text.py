"""The table of a study, for a terminal."""

from collections.abc import Mapping
from typing import Any

import pandas as pd

from spade_lens import stats
from spade_lens.exits.table import ExitTable
from spade_lens.studies.exits.run import Study


def exit_text(study: Study, points: pd.DataFrame, table: ExitTable) -> str:
    """The task and its full model, and then a row for every way to exit.

    Args:
        study: The study.
        points: From :meth:`Study.points`, with or without the race's columns.
        table: A table of the test prompts.
    """
    plan, n = study.plan, len(table)
    right = int((table.final_answer == table.target).sum())
    low, high = stats.proportion_interval(right, n)
    rates = plan.task.rates("test")
    tokens = float(table.prices.length.double().mean())
    lines = [
        f"{plan.task.name}: {n} test prompts of {tokens:.0f} tokens (mean), {plan.shots} "
        f"demonstrations; chosen on {len(study.found)} other prompts; seed {plan.seed}.",
        f"{study.model.name}, all {study.model.n_layers} layers: accuracy {right / n:.3f} "
        f"[{low:.2f}, {high:.2f}]; chance {rates.chance:.3f}, majority {rates.majority:.3f}.",
    ]
    if low <= max(rates):
        lines.append(
            "The model is NOT clearly above chance here: there is little to lose by exits."
        )
    rows = []
    for row in points.to_dict("records"):
        wanted = "best accuracy" if pd.isna(row["wanted"]) else f"loss <= {row['wanted']:g}"
        compared = row["rule"] in ("shorter prompt", "oracle")
        rows.append(
            {
                "way": row["rule"],
                "wanted": "" if compared else wanted,
                "keep": f"{row['keep']} ({row['kept']:.0f})",
                "check": row["check"] or "-",
                "policy": row["policy"],
                "accuracy": _interval(row, "accuracy", ".2f"),
                "loss": _interval(row, "loss", "+.3f"),
                "speed-up (FLOPs)": _interval(row, "speedup", ".2f"),
                "early": f"{row['early']:.2f}",
                "speed-up (clock)": _clock(row),
            }
        )
    frame = pd.DataFrame(rows)
    if "wall_speedup" not in points.columns:
        frame = frame.drop(columns="speed-up (clock)")
    return "\n".join([*lines, "", frame.to_string(index=False)])


def _interval(row: Mapping[Any, Any], name: str, form: str) -> str:
    return f"{row[name]:{form}} [{row[f'{name}_low']:{form}}, {row[f'{name}_high']:{form}}]"


def _clock(row: Mapping[Any, Any]) -> str:
    if pd.isna(row.get("wall_speedup")):
        return "-"
    return f"{row['wall_speedup']:.2f} [{row['wall_low']:.2f}, {row['wall_high']:.2f}]"
