"""Floor 4: train modules, and models whose lower layers answer well.

Nothing here knows of tasks, plots or studies.
"""

from spade_lens.training.alternate.plan import AlternatePlan
from spade_lens.training.alternate.run import train_alternating
from spade_lens.training.in_context.fitted import train_in_context
from spade_lens.training.in_context.network import InContextNetwork
from spade_lens.training.in_context.task import InContextTask
from spade_lens.training.kangaroo import AdapterPlan, train_kangaroo
from spade_lens.training.layerskip import LayerSkip
from spade_lens.training.loop import train
from spade_lens.training.own_text import own_text
from spade_lens.training.plan import TrainPlan

__all__ = [
    "AdapterPlan",
    "AlternatePlan",
    "InContextNetwork",
    "InContextTask",
    "LayerSkip",
    "TrainPlan",
    "own_text",
    "train",
    "train_alternating",
    "train_in_context",
    "train_kangaroo",
]
