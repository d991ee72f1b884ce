"""Files are whole or absent, and say what they were made with."""

import json
import platform
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import spade_lens
from spade_lens.storage.files import (
    output_folder,
    sealed,
    write_atomically,
    write_csv,
    write_json,
)
from spade_lens.storage.origin import provenance


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = write_atomically(tmp_path / "a.txt", lambda p: p.write_text("old"))

    def half(part: Path) -> None:
        part.write_text("ne")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, half)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_csv_and_json(tmp_path: Path) -> None:
    frame = pd.DataFrame({"token": ["a,b", "\n", "NA"], "x": [0.1, 1e-30, 3.0]})
    back = pd.read_csv(write_csv(tmp_path / "f.csv", frame), keep_default_na=False)
    pd.testing.assert_frame_equal(back, frame)
    path = write_json(tmp_path / "f.json", {"é": [1, None], "path": Path("x")})
    assert json.loads(path.read_text(encoding="utf-8")) == {"é": [1, None], "path": "x"}


def test_output_folder_is_made(tmp_path: Path) -> None:
    assert output_folder(tmp_path / "a" / "b").is_dir()
    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    # Below a file, since root may write in any folder.
    with pytest.raises(ValueError, match=r"output folder '.*file.out' cannot be written \(Not a"):
        output_folder(tmp_path / "file" / "out")


def test_provenance(tiny_llama: spade_lens.Model) -> None:
    about = provenance(tiny_llama, seed=3, shots=8)
    assert about["python"] == platform.python_version()
    assert about["packages"]["torch"] == torch.__version__
    assert about["packages"]["spade-lens"] == spade_lens.__version__
    assert about["model"] == {
        "name": "tiny-llama",
        "sha256": tiny_llama.sha256,
        "dtype": "torch.float32",
        "device": "cpu",
        "precision": "float32, 32 bits a weight",
    }
    assert about["config"] == {"seed": 3, "shots": 8}
    json.dumps(about)


def test_numbers_of_numpy_come_back_as_numbers(tmp_path: Path) -> None:
    written = write_json(tmp_path / "a.json", {"layer": np.int64(2), "x": np.float32(0.5)})
    assert json.loads(written.read_text()) == {"layer": 2, "x": 0.5}
    assert sealed({"layer": np.int64(2)})["layer"] == 2
