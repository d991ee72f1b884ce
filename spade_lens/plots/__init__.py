"""Floor 5: figures of results, to be read at the size of a page.

This room knows tables and their columns, not what made them. ``plot`` finds the figure of a
table; ``kinds`` lists all figures; ``figure`` adds one of your own. Nothing is shown, and pyplot's
global state is not touched. Notebooks draw a figure that is a cell's value.
"""

from spade_lens.plots import (  # noqa: F401  (each registers its figures)
    attention,
    contributions,
    exit_layers,
    front,
    heads,
    held_out,
    patching,
    reliability,
    sufficiency,
    vectors,
)
from spade_lens.plots.by_layer import plot_by_layer
from spade_lens.plots.grid import plot_grid
from spade_lens.plots.page import Page
from spade_lens.plots.registry import figure, kinds, plot
from spade_lens.plots.style import save_figure

__all__ = ["Page", "figure", "kinds", "plot", "plot_by_layer", "plot_grid", "save_figure"]
