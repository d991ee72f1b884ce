"""Floor 2: from residuals at a layer to what the model would say there.

Nothing here knows of tasks or exits.
"""

from spade_lens.lenses.answers import Answers, full_answers, read_answers
from spade_lens.lenses.keep import Keep, RandomSet
from spade_lens.lenses.lens import Lens, LogitLens, Reading
from spade_lens.lenses.reading import read
from spade_lens.lenses.readout import Readout
from spade_lens.lenses.spade import Spade

__all__ = [
    "Answers",
    "Keep",
    "Lens",
    "LogitLens",
    "RandomSet",
    "Reading",
    "Readout",
    "Spade",
    "full_answers",
    "read",
    "read_answers",
]
