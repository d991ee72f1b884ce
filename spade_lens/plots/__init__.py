"""Floor 5: figures of results, to be read at the size of a page.

This room knows tables and their columns, not what made them. ``plot`` finds the figure of a
table; ``kinds`` lists all figures; ``figure`` adds one of your own. Nothing is shown, and pyplot's
global state is not touched. Notebooks draw a figure that is a cell's value.
"""

# Each registers its figures.
import spade_lens.plots.attention  # noqa: F401
import spade_lens.plots.demonstrations  # noqa: F401
import spade_lens.plots.exit_layers  # noqa: F401
import spade_lens.plots.front  # noqa: F401
import spade_lens.plots.generated  # noqa: F401
import spade_lens.plots.in_context  # noqa: F401
import spade_lens.plots.maps  # noqa: F401
import spade_lens.plots.means  # noqa: F401
import spade_lens.plots.reliability  # noqa: F401
import spade_lens.plots.speculation  # noqa: F401
import spade_lens.plots.stream  # noqa: F401
import spade_lens.plots.sufficiency  # noqa: F401
import spade_lens.plots.vectors  # noqa: F401
from spade_lens.plots.grid import plot_grid
from spade_lens.plots.lenses import plot_by_layer
from spade_lens.plots.registry import figure, kinds, plot
from spade_lens.plots.style import Page, save_figure

__all__ = ["Page", "figure", "kinds", "plot", "plot_by_layer", "plot_grid", "save_figure"]
