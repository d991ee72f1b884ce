"""Floor 4: figures of results, to be read at the size of a page.

Knows tables and readouts only. Every function returns a figure that is its own: nothing is
shown, and pyplot's global state is never touched. Notebooks draw a figure that is a cell's value.
"""

from spade_lens.plots.attention import plot_knockout, plot_saliency
from spade_lens.plots.by_layer import plot_by_layer
from spade_lens.plots.contributions import (
    plot_by_demonstration,
    plot_contributions,
    plot_effective_number,
)
from spade_lens.plots.exit_layers import plot_exit_layers
from spade_lens.plots.front import plot_front
from spade_lens.plots.grid import plot_grid
from spade_lens.plots.heads import plot_heads
from spade_lens.plots.held_out import plot_held_out
from spade_lens.plots.patching import plot_patching
from spade_lens.plots.reliability import plot_reliability
from spade_lens.plots.shots import plot_by_shots
from spade_lens.plots.smallest import plot_smallest
from spade_lens.plots.style import save_figure
from spade_lens.plots.sufficiency import plot_sufficiency
from spade_lens.plots.vectors import (
    plot_convergence,
    plot_convergence_beside,
    plot_factors,
    plot_probes,
    plot_projections,
)

__all__ = [
    "plot_by_demonstration",
    "plot_by_layer",
    "plot_by_shots",
    "plot_effective_number",
    "plot_contributions",
    "plot_convergence",
    "plot_convergence_beside",
    "plot_exit_layers",
    "plot_factors",
    "plot_front",
    "plot_grid",
    "plot_heads",
    "plot_held_out",
    "plot_knockout",
    "plot_patching",
    "plot_probes",
    "plot_projections",
    "plot_reliability",
    "plot_saliency",
    "plot_smallest",
    "plot_sufficiency",
    "save_figure",
]
