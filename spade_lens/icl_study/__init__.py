"""Experiments on in-context learning, by name: where does the rule of a prompt live?

Joins all floors, as :mod:`spade_lens.demo` does.
"""

from spade_lens.icl_study.plan import EXPERIMENTS, IclPlan, icl_task, plan_icl
from spade_lens.icl_study.result import IclResult, icl_study, run_icl

__all__ = [
    "EXPERIMENTS",
    "IclPlan",
    "IclResult",
    "icl_study",
    "icl_task",
    "plan_icl",
    "run_icl",
]
