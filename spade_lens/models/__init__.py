"""Floor 1: load a model, and do five things with it: embed, run blocks, norm, unembed, hook.

Nothing here knows of lenses, tasks or exits.
"""

from spade_lens.models.catalogue import catalog
from spade_lens.models.errors import UnsupportedModelError
from spade_lens.models.hooks import HookRun
from spade_lens.models.loading import load
from spade_lens.models.model import Model
from spade_lens.models.patches import Patch
from spade_lens.models.residuals import Residuals, capture

__all__ = [
    "HookRun",
    "Model",
    "Patch",
    "Residuals",
    "UnsupportedModelError",
    "capture",
    "catalog",
    "load",
]
