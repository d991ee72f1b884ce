"""Floor 4: from tidy tables to what is reported: intervals, provenance, files.

Knows results only; what made them is none of its business.
"""

from spade_lens.report.files import output_folder, write_atomically, write_csv, write_json
from spade_lens.report.intervals import full_model_accuracy, proportion_interval, summarise
from spade_lens.report.means import prompt_means
from spade_lens.report.provenance import provenance, versions
from spade_lens.report.tables import first_layers, layer_table

__all__ = [
    "first_layers",
    "full_model_accuracy",
    "layer_table",
    "output_folder",
    "prompt_means",
    "proportion_interval",
    "provenance",
    "summarise",
    "versions",
    "write_atomically",
    "write_csv",
    "write_json",
]
