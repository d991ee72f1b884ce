"""What would the model say if it stopped at this layer, and where does a prompt's rule live?

Layers are counted as in TransformerLens: "layer l" is the residual stream after l blocks.
"""

from spade_lens import icl
from spade_lens.lenses import Keep, Lens, LogitLens, Readout, Spade, read, read_grid
from spade_lens.models import (
    DownloadError,
    Model,
    Patch,
    Residuals,
    UnsupportedModelError,
    capture,
    catalog,
    load,
)
from spade_lens.prompts import Prompt

__version__ = "0.1.0"

__all__ = [
    "DownloadError",
    "Keep",
    "Lens",
    "LogitLens",
    "Model",
    "Patch",
    "Prompt",
    "Readout",
    "Residuals",
    "Spade",
    "UnsupportedModelError",
    "capture",
    "catalog",
    "icl",
    "load",
    "read",
    "read_grid",
]
