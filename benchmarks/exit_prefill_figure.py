"""The figure of ``exit_prefill.py``: agreement with the full model over compute."""

from pathlib import Path

import matplotlib as mpl
import pandas as pd
from figures import finish

from spade_lens.plots.style import line_styles, panel_grid, style

OUT = Path(__file__).parent.parent / "docs" / "_static" / "exit_prefill.png"


def draw(table: pd.DataFrame) -> None:
    """Draw agreement over compute, for every kind of text."""
    parts = [name for name in ("wikitext 256", "wikitext 450", "summarization", "rag")]
    shown = [name for name in parts if (table["data"] == name).any()]
    kinds = {"mapped": "others mapped", "dropped": "others dropped", "shorter": "shorter prompt"}
    colours = line_styles([*kinds.values()])
    with mpl.rc_context(style()):
        figure, panels = panel_grid(len(shown), across=2, height=2.1)
        for panel, name in zip(panels, shown, strict=True):
            for kind, label in kinds.items():
                rows = table[(table["data"] == name) & (table["strategy"] == kind)]
                rows = rows[rows["keep"].str.startswith("last")].sort_values("compute")
                below, above = (
                    (rows["agreement"] - rows[f"agreement_{end}"]).abs() for end in ("low", "high")
                )
                colour = colours[label]["color"]
                panel.errorbar(
                    rows["compute"],
                    rows["agreement"],
                    yerr=(below, above),
                    label=label,
                    color=colour,
                    fmt="o",
                    markersize=3,
                    elinewidth=0.8,
                )
            panel.axhline(0.95, color="0.6", linewidth=0.6)
            tokens = table.loc[table["data"] == name, "tokens"].max()
            panel.set_title(f"{name.split()[0]}, {tokens:.0f} tokens")
            panel.set_xlim(0.6, 0.97)
            panel.set_ylim(0.73, 1.01)
        finish(
            figure,
            "blocks run in the prefill, over those of the full model",
            "same next token as the full model",
            OUT,
        )


if __name__ == "__main__":
    draw(pd.read_csv(Path(__file__).parent / "exit_prefill.csv"))
