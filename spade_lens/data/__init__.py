"""Floor 1: data sets, and where they come from. Knows tokenizers, and nothing of models."""

from spade_lens.data.decisions import DecisionTask, Rates, SkippedExamplesWarning
from spade_lens.data.named import decision_task, decision_task_names
from spade_lens.data.template import DecisionTemplate, Example

__all__ = [
    "DecisionTask",
    "DecisionTemplate",
    "Example",
    "Rates",
    "SkippedExamplesWarning",
    "decision_task",
    "decision_task_names",
]
