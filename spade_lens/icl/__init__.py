"""In-context learning: rule vectors, what they do in other prompts, and what they say."""

from spade_lens.icl.attention.head_effects import head_effects, top_heads
from spade_lens.icl.attention.knockout import knockout
from spade_lens.icl.attention.saliency import saliency_flows
from spade_lens.icl.decoded_tokens import decoded_tokens
from spade_lens.icl.geometry.convergence import convergence
from spade_lens.icl.geometry.dpca import factor_variance
from spade_lens.icl.geometry.probes import probe
from spade_lens.icl.patching.conditions import Condition, default_conditions
from spade_lens.icl.patching.contributions import Coalitions, measure_contributions
from spade_lens.icl.patching.function_vectors import function_vector_sweep
from spade_lens.icl.patching.result import PatchSweep
from spade_lens.icl.patching.sweep import patch_sweep
from spade_lens.icl.positions.smallest_sets import smallest_sets
from spade_lens.icl.positions.sufficiency import sufficiency_map
from spade_lens.icl.setup import PromptSetup
from spade_lens.icl.shots import accuracy_by_shots
from spade_lens.icl.vectors import RuleVectors, final_position_vectors, rule_vectors

__all__ = [
    "Coalitions",
    "Condition",
    "PatchSweep",
    "PromptSetup",
    "RuleVectors",
    "accuracy_by_shots",
    "convergence",
    "decoded_tokens",
    "default_conditions",
    "factor_variance",
    "final_position_vectors",
    "function_vector_sweep",
    "head_effects",
    "knockout",
    "measure_contributions",
    "patch_sweep",
    "probe",
    "rule_vectors",
    "saliency_flows",
    "smallest_sets",
    "sufficiency_map",
    "top_heads",
]
