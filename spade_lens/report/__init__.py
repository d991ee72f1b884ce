"""Floor 4: from tidy tables to what is reported: intervals, provenance, files.

Knows results only; what made them is none of its business.
"""

from spade_lens.report.tables import first_layers, layer_table

__all__ = [
    "first_layers",
    "layer_table",
]
