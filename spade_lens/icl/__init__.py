"""In-context learning: tasks and prompts, rule vectors, what they do and what they say."""

from spade_lens.icl.attention.edges import EDGES, edges_between, random_edges
from spade_lens.icl.attention.head_effects import head_effects, top_heads
from spade_lens.icl.attention.heads import head_contributions, head_outputs
from spade_lens.icl.attention.knockout import knockout, layer_windows
from spade_lens.icl.attention.saliency import attention_saliency, flows, saliency_flows
from spade_lens.icl.decoded_tokens import identity_prompt, meanings
from spade_lens.icl.geometry.convergence import convergence, likeness_within
from spade_lens.icl.geometry.dpca import Demixed, demixed_pca, factor_variance, marginalise
from spade_lens.icl.geometry.dpca_projections import factor_projections
from spade_lens.icl.geometry.probes import probe
from spade_lens.icl.patching.conditions import Condition, default_conditions
from spade_lens.icl.patching.contributions import measure_contributions
from spade_lens.icl.patching.function_vectors import function_vector_sweep, function_vectors
from spade_lens.icl.patching.shapley import effective_number, shapley_exact, shapley_sampled
from spade_lens.icl.patching.sweep import patch_sweep
from spade_lens.icl.positions.smallest_sets import piece_units, smallest_sets, token_units
from spade_lens.icl.positions.sufficiency import position_sets, sufficiency_map
from spade_lens.icl.shots import accuracy_by_shots
from spade_lens.icl.vector_files import load_vectors, save_vectors
from spade_lens.icl.vectors import (
    arrow_vectors,
    demonstration_labels,
    rule_vectors,
    task_vector,
)

__all__ = [
    "Condition",
    "Demixed",
    "EDGES",
    "accuracy_by_shots",
    "arrow_vectors",
    "attention_saliency",
    "convergence",
    "default_conditions",
    "demixed_pca",
    "demonstration_labels",
    "edges_between",
    "effective_number",
    "factor_projections",
    "factor_variance",
    "flows",
    "function_vector_sweep",
    "function_vectors",
    "head_contributions",
    "head_effects",
    "head_outputs",
    "identity_prompt",
    "knockout",
    "layer_windows",
    "likeness_within",
    "load_vectors",
    "marginalise",
    "meanings",
    "measure_contributions",
    "patch_sweep",
    "piece_units",
    "position_sets",
    "probe",
    "random_edges",
    "rule_vectors",
    "saliency_flows",
    "save_vectors",
    "shapley_exact",
    "shapley_sampled",
    "smallest_sets",
    "sufficiency_map",
    "task_vector",
    "token_units",
    "top_heads",
]
