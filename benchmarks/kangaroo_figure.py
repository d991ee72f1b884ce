"""The figure of ``kangaroo.py``: how often drafts are right, over tokens of training.

Usage: ``python benchmarks/kangaroo_figure.py [TABLE.csv] [FIGURE.png]``.
"""

from pathlib import Path

import matplotlib as mpl
import pandas as pd
from figures import finish, places

from spade_lens.plots import Page
from spade_lens.plots.style import line_styles, panel_grid, style

HERE = Path(__file__).parent
TABLE = HERE / "kangaroo.csv"
OUT = HERE.parent / "docs" / "_static" / "kangaroo.png"
CONTROLS = ("logit lens", "map alone")


def draw(table: pd.DataFrame, out: Path) -> None:
    """Draw agreement over training tokens for every layer; controls are level lines."""
    table = table[(table["measure"] == "agreement") & (table["kind"] == "all")]
    trained = table[table["tokens"].notna()]
    trained = trained[~trained["variant"].str.endswith("8k tokens")]  # of one size alone
    variants = [*dict.fromkeys(trained["variant"])]
    colours = line_styles([*variants, *CONTROLS])
    layers = sorted(table["layer"].unique())
    across = min(2, len(layers))
    with Page(width=4.9 if across == 1 else 6.9), mpl.rc_context(style()):
        figure, panels = panel_grid(len(layers), across=across, height=2.0)
        for panel, layer in zip(panels, layers, strict=True):
            for number, variant in enumerate(variants):
                rows = trained[(trained["layer"] == layer) & (trained["variant"] == variant)]
                rows = rows.sort_values("tokens")
                ends = [(rows["value"] - rows[end]).abs() for end in ("low", "high")]
                panel.errorbar(
                    rows["tokens"] * 1.03**number,  # intervals side by side
                    rows["value"],
                    yerr=ends,
                    label=variant,
                    color=colours[variant]["color"],
                    marker="o",
                    markersize=3,
                    elinewidth=0.8,
                    linewidth=1.0,
                )
            for control in CONTROLS:
                rows = table[(table["layer"] == layer) & (table["variant"] == control)]
                for value in rows["value"]:
                    colour = colours[control]["color"]
                    panel.axhline(value, color=colour, linestyle=":", linewidth=1.0, label=control)
            panel.set_xscale("log")
            panel.set_ylim(0, 0.6)
            panel.set_title(f"layer {layer}")
        finish(figure, "tokens of training", "same next token as the model", out)


if __name__ == "__main__":
    table, out = places(TABLE, OUT)
    draw(pd.read_csv(table), out)
