"""The front of early_exit.py: every confidence with every keep set, chosen and then held out.

CALM's softmax response is the margin of the logit lens, its patience stands beside it; LayerSkip's
exits read the model's own head, which is the logit lens too. No model is run here.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pandas as pd
from early_exit_rules import Split, Subject
from figures import finish

from spade_lens.exits import ExitTable, Policy
from spade_lens.exits.choice import best_of, tried_policies
from spade_lens.exits.families import calibrated_thresholds, fixed_layers, patiences
from spade_lens.plots.style import line_styles, panel_grid, style

OUT = Path(__file__).parent.parent / "docs" / "_static" / "early-exit-front.png"

LOSSES = (0.0, 0.01, 0.02, 0.05, 0.1)
MEASURES = {"top-1": 0, "margin": 2}
"""Columns of the features of a check; the table's own confidence is the entropy."""

DRAWN = {
    "fixed layer": "one fixed layer, no check",
    "logit lens, entropy": "entropy of the logit lens",
    "L-SPADE, entropy": "... of L-SPADE",
    "fitted to the task, entropy": "... of L-SPADE fitted to the task",
    "SPADE's own, entropy": "... of SPADE's own",
    "patience": "patience",
}
"""What the figure shows, entropies where there are several measures; all is in the table."""


def front(subject: Subject, seed: int) -> pd.DataFrame:
    """A row for every check, keep set and loss wanted, measured on the split of a seed."""
    split = Split.of(len(subject.tables[0]), seed)
    rows = []
    for table in subject.tables:
        if table.screen is not None:
            continue
        sides = table.of((*split.fit, *split.choose)), table.of(split.measure)
        for check, policies, known, test in _ways(_lens(table, subject), *sides):
            rows += _points(check, policies, known, test)
    return pd.DataFrame(rows).assign(task=subject.task, seed=seed)


def _lens(table: ExitTable, subject: Subject) -> str:
    if table.check in subject.setup.owner:
        return "SPADE's own"
    name = table.check.removesuffix(", entropy")
    return "fitted to the task" if name.startswith("task L-SPADE") else name


def _ways(
    lens: str, known: ExitTable, test: ExitTable
) -> Iterator[tuple[str, Sequence[Policy], ExitTable, ExitTable]]:
    yield f"{lens}, entropy", calibrated_thresholds(known), known, test
    if lens != "logit lens":
        return
    yield "fixed layer", fixed_layers(known), known, test
    yield "patience", patiences(known), known, test
    for measure, column in MEASURES.items():
        a, b = (replace(t, confidence=t.features[..., column]) for t in (known, test))
        yield f"{lens}, {measure}", calibrated_thresholds(a), a, b


def _points(
    check: str, policies: Sequence[Policy], known: ExitTable, test: ExitTable
) -> Iterator[dict[str, Any]]:
    choices = tried_policies(policies, known)
    for wanted in LOSSES:
        trace = test.simulate(best_of(choices, loss=wanted).policy)
        yield {
            "check": check,
            "keep": test.keep,
            "wanted": wanted,
            "speedup": float(trace.speedup),
            "loss": test.accuracy - float(trace.accuracy),
            "n": len(test),
        }


def draw(rows: pd.DataFrame) -> None:
    """One panel for each keep set: accuracy lost over speed-up, means over tasks and splits."""
    keeps = list(dict.fromkeys(rows["keep"]))
    means = rows.groupby(["keep", "check", "wanted"])[["speedup", "loss"]].mean().reset_index()
    looks = line_styles([*DRAWN.values()])
    with mpl.rc_context(style()):
        figure, panels = panel_grid(len(keeps), across=2, height=2.1)
        for panel, keep in zip(panels, keeps, strict=True):
            for check, label in DRAWN.items():
                of = means[(means["keep"] == keep) & (means["check"] == check)]
                of = of.sort_values("wanted")
                at = of["speedup"], 100 * of["loss"]
                panel.plot(*at, label=label, marker="o", markersize=2.5, **looks[label])
            panel.axhline(0, color="0.6", linewidth=0.6)
            panel.set_title(f"{keep} kept")
        finish(figure, "speed-up in FLOPs", "points of accuracy lost", OUT)


if __name__ == "__main__":
    draw(pd.read_csv(Path(__file__).parent / "early_exit-front.csv"))
