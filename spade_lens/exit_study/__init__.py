"""A study of early exit on one task, from the choice on calibration prompts to the stopwatch.

Joins all floors, as :mod:`spade_lens.demo` does.
"""

from spade_lens.exit_study.line import exit_line
from spade_lens.exit_study.plan import ExitPlan, exit_task, plan_exit
from spade_lens.exit_study.result import ExitResult, exit_study, run_exit
from spade_lens.exit_study.run import Study

__all__ = [
    "ExitPlan",
    "ExitResult",
    "Study",
    "exit_line",
    "exit_study",
    "exit_task",
    "plan_exit",
    "run_exit",
]
