"""Floor 3: early exit that really stops, its policies, its costs, and the simulation of it.

Nothing here knows of tasks or plots: prompts come in, tidy tables go out.
"""

from spade_lens.exits.calibrate import Calibration, ExitRule, calibrate
from spade_lens.exits.candidates import ExitWarning
from spade_lens.exits.choose import (
    Choice,
    calibrated_thresholds,
    certify,
    choose,
    families,
    global_thresholds,
    prompts_needed,
)
from spade_lens.exits.compare import iso_compute, operating_points
from spade_lens.exits.confidence import AnswerHead, Confidence, confidence_of
from spade_lens.exits.costs import Costs, Prices, flop_counter
from spade_lens.exits.engine import SpadeExit
from spade_lens.exits.keep_search import attention_keep, greedy_keep, keep_family
from spade_lens.exits.policies import Checks, FixedLayer, Oracle, Patience, Policy, Threshold
from spade_lens.exits.reliability import calibration_error, reliability
from spade_lens.exits.simulate import pareto, simulate, sweep
from spade_lens.exits.table import ExitTable, exit_tables, load_table
from spade_lens.exits.trace import ExitTrace
from spade_lens.exits.wallclock import WallClock, race

__all__ = [
    "AnswerHead",
    "Calibration",
    "Checks",
    "Choice",
    "Confidence",
    "Costs",
    "ExitRule",
    "ExitTable",
    "ExitTrace",
    "ExitWarning",
    "FixedLayer",
    "Oracle",
    "Patience",
    "Policy",
    "Prices",
    "SpadeExit",
    "Threshold",
    "WallClock",
    "attention_keep",
    "calibrate",
    "calibrated_thresholds",
    "calibration_error",
    "certify",
    "choose",
    "confidence_of",
    "exit_tables",
    "families",
    "flop_counter",
    "global_thresholds",
    "greedy_keep",
    "iso_compute",
    "keep_family",
    "load_table",
    "operating_points",
    "pareto",
    "prompts_needed",
    "race",
    "reliability",
    "simulate",
    "sweep",
]
