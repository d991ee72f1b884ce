"""In-context learning: tasks and prompts, rule vectors, patching, contributions."""

from spade_lens.few_shot import Template, few_shot_prompt
from spade_lens.icl.answers import Answers, full_answers, read_answers
from spade_lens.icl.categories import category, category_names, rule_task, rule_task_names
from spade_lens.icl.concentrating import concentration
from spade_lens.icl.conditions import Condition, default_conditions
from spade_lens.icl.contributions import measure_contributions
from spade_lens.icl.curve import accuracy_by_shots
from spade_lens.icl.episodes import Episode
from spade_lens.icl.knowledge import KnowledgeTask
from spade_lens.icl.patching import patch_sweep
from spade_lens.icl.patching_summary import choose_layer, summarise_patching
from spade_lens.icl.replaying import capture_for_replay, replay
from spade_lens.icl.shapley import effective_number, shapley_exact, shapley_sampled
from spade_lens.icl.tasks import RuleTask, Task
from spade_lens.icl.vector_files import load_vectors, save_vectors
from spade_lens.icl.vectors import (
    arrow_vectors,
    demonstration_labels,
    label_mean_of_others,
    mean_by_label,
    mean_of_others,
    random_like,
    rule_vectors,
    task_vector,
)
from spade_lens.icl.word_pairs import WordPairTask, task, task_names

__all__ = [
    "Answers",
    "Condition",
    "Episode",
    "KnowledgeTask",
    "RuleTask",
    "Task",
    "Template",
    "WordPairTask",
    "accuracy_by_shots",
    "arrow_vectors",
    "capture_for_replay",
    "category",
    "category_names",
    "choose_layer",
    "concentration",
    "default_conditions",
    "demonstration_labels",
    "effective_number",
    "few_shot_prompt",
    "full_answers",
    "label_mean_of_others",
    "load_vectors",
    "mean_by_label",
    "mean_of_others",
    "measure_contributions",
    "patch_sweep",
    "random_like",
    "read_answers",
    "replay",
    "rule_task",
    "rule_task_names",
    "rule_vectors",
    "save_vectors",
    "shapley_exact",
    "shapley_sampled",
    "summarise_patching",
    "task",
    "task_names",
    "task_vector",
]
