"""Studies: a plan and a model in, tables, figures, text and their provenance out.

``sl.study(model, plan)`` does what a :class:`LensPlan`, :class:`ExitPlan`, :class:`IclPlan` or
:class:`SpeculationPlan` says. An experiment of your own joins the study of in-context learning by
:func:`experiment`. ``sl.study(plan)`` does what an :class:`InContextPlan` says, which trains models
of its own.
"""

# Experiments and studies register themselves when their modules are imported.
import spade_lens.studies.exits.study
import spade_lens.studies.icl.attention
import spade_lens.studies.icl.demonstrations
import spade_lens.studies.icl.positions
import spade_lens.studies.icl.vectors
import spade_lens.studies.in_context.study
import spade_lens.studies.speculation.study
from spade_lens.studies.base import Findings, study
from spade_lens.studies.exits.plan import ExitPlan
from spade_lens.studies.icl.plan import IclPlan
from spade_lens.studies.icl.registry import experiment
from spade_lens.studies.in_context.plan import InContextPlan
from spade_lens.studies.lenses import LensPlan
from spade_lens.studies.speculation.plan import SpeculationPlan

__all__ = [
    "ExitPlan",
    "Findings",
    "IclPlan",
    "InContextPlan",
    "LensPlan",
    "SpeculationPlan",
    "experiment",
    "study",
]
