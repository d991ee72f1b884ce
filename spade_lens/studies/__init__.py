"""Studies."""

from spade_lens.studies.exits.line import exit_line
from spade_lens.studies.exits.plan import ExitPlan, plan_exit
from spade_lens.studies.exits.result import ExitResult, exit_study, run_exit
from spade_lens.studies.exits.run import Study
from spade_lens.studies.icl.plan import EXPERIMENTS, IclPlan, plan_icl
from spade_lens.studies.icl.result import IclResult, icl_study, run_icl

__all__ = [
    "EXPERIMENTS",
    "ExitPlan",
    "ExitResult",
    "IclPlan",
    "IclResult",
    "Study",
    "exit_line",
    "exit_study",
    "icl_study",
    "plan_exit",
    "plan_icl",
    "run_exit",
    "run_icl",
]
