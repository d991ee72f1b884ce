"""What would the model say if it stopped at this layer, and where does a prompt's rule live?

Layers are counted as in TransformerLens: "layer l" is the residual stream after l blocks.
"""

from typing import TYPE_CHECKING

from spade_lens.lazy import attach

if TYPE_CHECKING:
    from spade_lens import exits as exits
    from spade_lens import generation as generation
    from spade_lens import icl as icl
    from spade_lens import lenses as lenses
    from spade_lens import models as models
    from spade_lens import plots as plots
    from spade_lens import prompts as prompts
    from spade_lens import replay as replay
    from spade_lens import report as report
    from spade_lens import stats as stats
    from spade_lens import storage as storage
    from spade_lens import studies as studies
    from spade_lens import tasks as tasks
    from spade_lens import tensors as tensors
    from spade_lens import training as training
    from spade_lens import view as view
    from spade_lens.exits.calibration import calibrate as calibrate
    from spade_lens.generation.loop import generate as generate
    from spade_lens.lenses.fitting.fit import fit as fit
    from spade_lens.lenses.keep import Keep as Keep
    from spade_lens.lenses.lens import Lens as Lens
    from spade_lens.lenses.lens import LogitLens as LogitLens
    from spade_lens.lenses.patched import patch as patch
    from spade_lens.lenses.reading import read as read
    from spade_lens.lenses.readout import Readout as Readout
    from spade_lens.lenses.spade import Spade as Spade
    from spade_lens.models.catalogue import catalog as catalog
    from spade_lens.models.errors import UnsupportedModelError as UnsupportedModelError
    from spade_lens.models.loading import load as load
    from spade_lens.models.model import Model as Model
    from spade_lens.models.patches import Patch as Patch
    from spade_lens.models.residuals import Residuals as Residuals
    from spade_lens.models.residuals import capture as capture
    from spade_lens.plots.registry import plot as plot
    from spade_lens.prompts.prompt import Prompt as Prompt
    from spade_lens.settings import Settings as Settings
    from spade_lens.studies.base import study as study
    from spade_lens.tasks.resolve import task as task

    __version__: str

__getattr__, __dir__, __all__ = attach(__name__, __file__)
