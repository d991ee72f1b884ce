"""Floor 2: from residuals at a layer to what the model would say there.

Nothing here knows of tasks or exits.
"""

from spade_lens.lenses.keep import Keep
from spade_lens.lenses.lens import Lens, LogitLens, Reading
from spade_lens.lenses.reading import read, read_grid
from spade_lens.lenses.readout import Readout
from spade_lens.lenses.spade import Spade

__all__ = ["Keep", "Lens", "LogitLens", "Reading", "Readout", "Spade", "read", "read_grid"]
