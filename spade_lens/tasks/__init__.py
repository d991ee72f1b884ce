"""Floor 1: data sets, and where they come from. Knows tokenizers, and nothing of models."""

from spade_lens.tasks.by_name import exit_task, icl_task
from spade_lens.tasks.categories import category, category_names, rule_task, rule_task_names
from spade_lens.tasks.decision_template import DecisionTemplate, Example
from spade_lens.tasks.decisions import DecisionTask, Rates, SkippedExamplesWarning
from spade_lens.tasks.episodes import Episode
from spade_lens.tasks.knowledge import KnowledgeTask
from spade_lens.tasks.named import decision_task, decision_task_names
from spade_lens.tasks.pair_decisions import pair_decisions
from spade_lens.tasks.rules import RuleTask, Task
from spade_lens.tasks.word_pairs import WordPairTask, task, task_names

__all__ = [
    "DecisionTask",
    "DecisionTemplate",
    "Episode",
    "Example",
    "KnowledgeTask",
    "Rates",
    "RuleTask",
    "SkippedExamplesWarning",
    "Task",
    "WordPairTask",
    "category",
    "category_names",
    "decision_task",
    "decision_task_names",
    "exit_task",
    "icl_task",
    "pair_decisions",
    "rule_task",
    "rule_task_names",
    "task",
    "task_names",
]
