"""Floor 4: early exit that really stops, its policies, its costs, and the simulation of it.

Nothing here knows of tasks or plots: prompts come in, tidy tables go out. The verb that chooses
among keep sets, checks and policies is :func:`spade_lens.calibrate`.
"""

from spade_lens.exits.calibration import Calibration
from spade_lens.exits.confidence import Confidence, Own
from spade_lens.exits.engine import SpadeExit
from spade_lens.exits.gates.features import gate_features
from spade_lens.exits.gates.fit import Gates, fit_gates, load_gates
from spade_lens.exits.policies import (
    Checks,
    FixedLayer,
    Oracle,
    Patience,
    Policy,
    Threshold,
)
from spade_lens.exits.reliability_curves import check_auroc, reliability
from spade_lens.exits.screened import Screened
from spade_lens.exits.setup import ExitWarning
from spade_lens.exits.sweeps import sweep
from spade_lens.exits.table import ExitTable
from spade_lens.exits.table_pass import exit_tables
from spade_lens.exits.trace import ExitTrace
from spade_lens.exits.uncertainty import conformal_sets, gated_reliability
from spade_lens.exits.wall_clock import compare_wall_clock

__all__ = [
    "Calibration",
    "Checks",
    "Confidence",
    "ExitTable",
    "ExitTrace",
    "ExitWarning",
    "FixedLayer",
    "Gates",
    "Oracle",
    "Own",
    "Patience",
    "Policy",
    "Screened",
    "SpadeExit",
    "Threshold",
    "check_auroc",
    "compare_wall_clock",
    "conformal_sets",
    "exit_tables",
    "fit_gates",
    "gate_features",
    "gated_reliability",
    "load_gates",
    "reliability",
    "sweep",
]
