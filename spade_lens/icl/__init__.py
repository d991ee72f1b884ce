"""In-context learning: tasks and prompts, rule vectors, what they do and what they say."""

from spade_lens.few_shot import Template, few_shot_prompt
from spade_lens.icl.answers import Answers, full_answers, read_answers
from spade_lens.icl.categories import category, category_names, rule_task, rule_task_names
from spade_lens.icl.concentrating import concentration
from spade_lens.icl.conditions import Condition, default_conditions
from spade_lens.icl.contributions import measure_contributions
from spade_lens.icl.curve import accuracy_by_shots
from spade_lens.icl.decisions import pair_decisions
from spade_lens.icl.dpca import Demixed, demixed_pca, factor_variance, marginalise
from spade_lens.icl.edges import EDGES, edges_between, random_edges
from spade_lens.icl.episodes import Episode
from spade_lens.icl.geometry import convergence, likeness_within
from spade_lens.icl.head_patching import head_effects, top_heads
from spade_lens.icl.head_vectors import function_vector_sweep, function_vectors
from spade_lens.icl.heads import head_contributions, head_outputs
from spade_lens.icl.knockout import knockout, layer_windows
from spade_lens.icl.knowledge import KnowledgeTask
from spade_lens.icl.meaning import identity_prompt, meanings
from spade_lens.icl.patching import patch_sweep
from spade_lens.icl.patching_summary import choose_layer, summarise_patching
from spade_lens.icl.probes import probe
from spade_lens.icl.projecting import factor_projections
from spade_lens.icl.replaying import capture_for_replay, replay
from spade_lens.icl.saliency import attention_saliency, flows, saliency_flows
from spade_lens.icl.shapley import effective_number, shapley_exact, shapley_sampled
from spade_lens.icl.smallest import piece_units, smallest_sets, token_units
from spade_lens.icl.sufficiency import (
    ClassLabels,
    LastLabels,
    RandomSet,
    name_of,
    position_sets,
    sufficiency_map,
)
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
    "EDGES",
    "Answers",
    "ClassLabels",
    "Condition",
    "Demixed",
    "Episode",
    "KnowledgeTask",
    "LastLabels",
    "RandomSet",
    "RuleTask",
    "Task",
    "Template",
    "WordPairTask",
    "accuracy_by_shots",
    "arrow_vectors",
    "attention_saliency",
    "capture_for_replay",
    "category",
    "category_names",
    "choose_layer",
    "concentration",
    "convergence",
    "default_conditions",
    "demixed_pca",
    "demonstration_labels",
    "edges_between",
    "effective_number",
    "factor_projections",
    "factor_variance",
    "few_shot_prompt",
    "flows",
    "full_answers",
    "function_vector_sweep",
    "function_vectors",
    "head_contributions",
    "head_effects",
    "head_outputs",
    "identity_prompt",
    "knockout",
    "likeness_within",
    "label_mean_of_others",
    "layer_windows",
    "load_vectors",
    "marginalise",
    "mean_by_label",
    "mean_of_others",
    "meanings",
    "measure_contributions",
    "name_of",
    "pair_decisions",
    "patch_sweep",
    "piece_units",
    "position_sets",
    "probe",
    "random_edges",
    "random_like",
    "read_answers",
    "replay",
    "rule_task",
    "rule_task_names",
    "rule_vectors",
    "saliency_flows",
    "save_vectors",
    "shapley_exact",
    "shapley_sampled",
    "smallest_sets",
    "sufficiency_map",
    "summarise_patching",
    "task",
    "task_names",
    "task_vector",
    "token_units",
    "top_heads",
]
