"""Summaries with intervals."""

from spade_lens.stats.choose_layer import choose_layer
from spade_lens.stats.effective_number import concentration
from spade_lens.stats.intervals import full_model_accuracy, proportion_interval, summarise
from spade_lens.stats.means import prompt_means
from spade_lens.stats.patching_summary import summarise_patching

__all__ = [
    "choose_layer",
    "concentration",
    "full_model_accuracy",
    "prompt_means",
    "proportion_interval",
    "summarise",
    "summarise_patching",
]
