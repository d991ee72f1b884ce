"""Tasks: word pairs, rules and decisions, and the prompts made of them.

This room knows tokenizers and nothing of models.
"""

from spade_lens.tasks.decisions.decision_task import DecisionTask, SkippedExamplesWarning
from spade_lens.tasks.decisions.template import DecisionTemplate, Example
from spade_lens.tasks.episodes import Episode, Task
from spade_lens.tasks.resolve import task, task_names
from spade_lens.tasks.rules import RuleTask
from spade_lens.tasks.word_pairs import WordPairTask

__all__ = [
    "DecisionTask",
    "DecisionTemplate",
    "Episode",
    "Example",
    "RuleTask",
    "SkippedExamplesWarning",
    "Task",
    "WordPairTask",
    "task",
    "task_names",
]
