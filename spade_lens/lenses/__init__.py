"""From residuals at a layer to what the model would say there: lenses, reading and fitting.

Nothing here knows of tasks or exits.
"""

from spade_lens.lenses.fitting.fit import fit
from spade_lens.lenses.keep import Keep, RandomSet
from spade_lens.lenses.lens import Lens, LogitLens, Reading
from spade_lens.lenses.linear import LinearSpade, TunedLens
from spade_lens.lenses.reading import read
from spade_lens.lenses.readout import Readout
from spade_lens.lenses.saving import load_lens
from spade_lens.lenses.spade import Spade

__all__ = [
    "Keep",
    "Lens",
    "LinearSpade",
    "LogitLens",
    "RandomSet",
    "Reading",
    "Readout",
    "Spade",
    "TunedLens",
    "fit",
    "load_lens",
    "read",
]
