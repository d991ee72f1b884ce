"""In-context learning: tasks and k-shot prompts that know where every piece stands."""

from spade_lens.few_shot import Template, few_shot_prompt
from spade_lens.icl.categories import category, category_names, rule_task, rule_task_names
from spade_lens.icl.episodes import Episode
from spade_lens.icl.knowledge import KnowledgeTask
from spade_lens.icl.tasks import RuleTask, Task
from spade_lens.icl.word_pairs import WordPairTask, task, task_names

__all__ = [
    "Episode",
    "KnowledgeTask",
    "RuleTask",
    "Task",
    "Template",
    "WordPairTask",
    "category",
    "category_names",
    "few_shot_prompt",
    "rule_task",
    "rule_task_names",
    "task",
    "task_names",
]
