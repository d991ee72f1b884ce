"""What would the model say if it stopped at this layer, and where does a prompt's rule live?

Layers are counted as in TransformerLens: "layer l" is the residual stream after l blocks.
"""

from typing import TYPE_CHECKING

from spade_lens.lazy import attach

if TYPE_CHECKING:
    from spade_lens import (
        exits,
        generation,
        icl,
        lenses,
        models,
        plots,
        prompts,
        replay,
        report,
        stats,
        storage,
        studies,
        tasks,
        tensors,
        training,
    )
    from spade_lens.exits.calibration import calibrate
    from spade_lens.generation.loop import generate
    from spade_lens.lenses.fitting.fit import fit
    from spade_lens.lenses.keep import Keep
    from spade_lens.lenses.lens import Lens, LogitLens
    from spade_lens.lenses.patched import patch
    from spade_lens.lenses.reading import read
    from spade_lens.lenses.readout import Readout
    from spade_lens.lenses.spade import Spade
    from spade_lens.models.catalogue import catalog
    from spade_lens.models.errors import UnsupportedModelError
    from spade_lens.models.loading import load
    from spade_lens.models.model import Model
    from spade_lens.models.patches import Patch
    from spade_lens.models.residuals import Residuals, capture
    from spade_lens.plots.registry import plot
    from spade_lens.prompts.prompt import Prompt
    from spade_lens.settings import Settings
    from spade_lens.studies.base import study
    from spade_lens.tasks.resolve import task

    __version__: str

__getattr__, __dir__, __all__ = attach(__name__, __file__)
