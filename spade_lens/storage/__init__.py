"""Files that are whole or absent, downloads that are verified, runs that resume, and provenance.

Nothing here knows of models.
"""

from spade_lens.storage.download import DownloadError
from spade_lens.storage.files import write_csv
from spade_lens.storage.origin import provenance

__all__ = ["DownloadError", "provenance", "write_csv"]
