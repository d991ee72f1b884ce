"""Floor 5: summaries as text, for a terminal or a file.

This room knows tables and their columns, not what made them.
"""

from spade_lens.report.tables import first_layers, layer_table

__all__ = ["first_layers", "layer_table"]
