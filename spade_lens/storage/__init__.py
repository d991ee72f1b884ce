"""Storage."""

from spade_lens.storage.download import DownloadError
from spade_lens.storage.files import output_folder, write_atomically, write_csv, write_json
from spade_lens.storage.provenance import provenance, versions

__all__ = [
    "DownloadError",
    "output_folder",
    "provenance",
    "versions",
    "write_atomically",
    "write_csv",
    "write_json",
]
