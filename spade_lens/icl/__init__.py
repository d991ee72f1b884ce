"""In-context learning: tasks and k-shot prompts that know where every piece stands."""

from spade_lens.few_shot import Template, few_shot_prompt
from spade_lens.icl.decisions import pair_decisions
from spade_lens.icl.dpca import Demixed, demixed_pca, factor_variance, marginalise
from spade_lens.icl.edges import EDGES, edges_between, random_edges
from spade_lens.icl.geometry import convergence
from spade_lens.icl.knockout import knockout, layer_windows
from spade_lens.icl.meaning import identity_prompt, meanings
from spade_lens.icl.probes import probe
from spade_lens.icl.saliency import attention_saliency, flows, saliency_flows
from spade_lens.icl.smallest import piece_units, smallest_sets, token_units
from spade_lens.icl.sufficiency import (
    LastLabels,
    RandomSet,
    name_of,
    position_sets,
    sufficiency_map,
)
from spade_lens.icl.word_pairs import WordPairTask, task, task_names

__all__ = [
    "EDGES",
    "Demixed",
    "LastLabels",
    "RandomSet",
    "Template",
    "WordPairTask",
    "attention_saliency",
    "convergence",
    "demixed_pca",
    "edges_between",
    "factor_variance",
    "few_shot_prompt",
    "flows",
    "identity_prompt",
    "knockout",
    "layer_windows",
    "marginalise",
    "meanings",
    "name_of",
    "pair_decisions",
    "piece_units",
    "position_sets",
    "probe",
    "random_edges",
    "saliency_flows",
    "smallest_sets",
    "sufficiency_map",
    "task",
    "task_names",
    "token_units",
]
