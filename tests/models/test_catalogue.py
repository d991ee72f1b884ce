"""The catalogue: facts that hang together, and names that are found or refused helpfully."""

import re

import pytest

from spade_lens.models.catalogue import CATALOG, catalog, lookup


def test_the_embedded_default_comes_first():
    assert next(iter(CATALOG)) == "smollm2-135m-instruct"


@pytest.mark.parametrize("name", CATALOG)
def test_every_entry_is_complete(name):
    entry = CATALOG[name]
    assert entry.name == name == name.lower()
    assert entry.files and entry.origin
    for file in entry.files:
        assert re.fullmatch(r"[0-9a-f]{64}", file.sha256)
        assert file.n_bytes > 0
        assert "/" not in file.file_name
    assert entry.licence in {"Apache-2.0", "MIT"}
    assert entry.room_bytes > entry.disk_bytes > 0


def test_table_has_a_row_for_each_model():
    table = catalog().set_index("name")
    assert list(table.index) == list(CATALOG)
    assert table.loc["smollm2-135m-instruct", "download_mb"] == 92.9
    assert table.loc["tinyllama-1.1b-chat", "disk_mb"] == 322.6
    assert table.loc["stories15m", "n_params"] == 15_191_712
    assert table.loc["tinyllama-1.1b-chat", "precision"] == "IQ2_XXS, 2.3 bits a weight"
    assert not table.isna().any().any()


def test_case_does_not_matter():
    assert lookup("SmolLM2-135M-Instruct") is CATALOG["smollm2-135m-instruct"]


def test_unknown_name_gets_the_nearest_names():
    with pytest.raises(ValueError, match="No model named 'smollm-135m'.*Did you mean 'smollm2-135"):
        lookup("smollm-135m")


def test_unknown_name_far_from_all_gets_the_list():
    with pytest.raises(ValueError) as error:
        lookup("qqqq")
    assert "Did you mean" not in str(error.value)
    assert all(name in str(error.value) for name in CATALOG)


def test_mismatch_names_what_was_expected_and_what_was_found(tmp_path):
    file = CATALOG["stories15m"].files[1]
    path = tmp_path / file.file_name
    path.write_bytes(b"short")
    assert file.mismatch(path) == "has the wrong size: expected 432717 bytes, got 5"
    path.write_bytes(bytes(file.n_bytes))
    problem = file.mismatch(path)
    assert problem is not None
    assert problem.startswith(f"has the wrong sha256: expected {file.sha256}, got ")
