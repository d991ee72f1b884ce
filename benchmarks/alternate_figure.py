"""The figure of ``alternate.py``: held-out SFT loss against preference margin, phase by phase.

Usage: ``python benchmarks/alternate_figure.py [TABLE.csv] [FIGURE.png]``.
"""

from pathlib import Path

import matplotlib as mpl
import pandas as pd
from figures import finish, places

from spade_lens.plots import Page
from spade_lens.plots.style import line_styles, panel_grid, style

HERE = Path(__file__).parent
TABLE = HERE / "alternate-phases.csv"
OUT = HERE.parent / "docs" / "_static" / "alternate.png"
ARMS = ("sequential", "joint", "alternating", "alternating, EWC", "alternating, L2")
HIGHEST = 12.0
"""The SFT loss at which the figure ends."""


def draw(table: pd.DataFrame, out: Path) -> None:
    """Draw the mean over seeds of every arm's last setting; a line goes from phase to phase."""
    table = table[table["arm"].isin(ARMS)]
    table = table[table["setting"] == table.groupby("arm")["setting"].transform("max")]
    looks = line_styles(ARMS)
    goals = [*dict.fromkeys(table["goal"])]
    with Page(), mpl.rc_context(style()):
        figure, panels = panel_grid(len(goals), height=2.2, sharex=False, sharey=False)
        for panel, goal in zip(panels, goals, strict=True):
            of_goal = table[table["goal"] == goal]
            for arm in ARMS:
                means = of_goal[of_goal["arm"] == arm].groupby("phase")[
                    ["preference_margin", "sft_loss"]
                ]
                ends = means.mean()
                panel.plot(
                    ends["preference_margin"],
                    ends["sft_loss"].where(ends["sft_loss"] <= HIGHEST),
                    label=arm,
                    marker="o",
                    markersize=3,
                    linewidth=0.9,
                    **looks[arm],
                )
            panel.set_title(goal)
        finish(figure, "held-out preference margin (nats)", "held-out SFT loss (nats a token)", out)


if __name__ == "__main__":
    table, out = places(TABLE, OUT)
    draw(pd.read_csv(table), out)
