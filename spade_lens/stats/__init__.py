"""Floor 1: summaries over prompts with intervals, and the choice of a layer.

This room knows tables with named columns, not what made them.
"""

from spade_lens.stats.choose_layer import choose_layer
from spade_lens.stats.intervals import paired_interval, proportion_interval
from spade_lens.stats.summary import summarise

__all__ = ["choose_layer", "paired_interval", "proportion_interval", "summarise"]
