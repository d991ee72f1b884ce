"""What the figures of the benchmarks share: how they end, and where they read and write."""

import sys
from pathlib import Path

from matplotlib.figure import Figure

from spade_lens.plots.style import legend_above, save_figure


def finish(figure: Figure, across: str, up: str, out: Path) -> None:
    """Name both axes, draw the legend above and save the PNG alone."""
    figure.supxlabel(across)
    figure.supylabel(up)
    legend_above(figure)
    png, pdf = save_figure(figure, out)
    pdf.unlink()
    print(png)


def places(table: Path, out: Path) -> tuple[Path, Path]:
    """Return the table and the figure: those of the command line, or these."""
    given = [Path(one) for one in sys.argv[1:]]
    one, other = [*given, *(table, out)[len(given) :]]
    return one, other
