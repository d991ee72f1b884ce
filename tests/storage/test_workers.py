"""Processes that share a folder share the work, also when one of them dies."""

import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import filelock
import pandas as pd
import pytest

from spade_lens.settings import Settings
from spade_lens.storage import parts
from spade_lens.storage.parts import in_parts

# Python 3.12 warns of a fork beside threads, of which these processes have none that matters.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
NAMES = [f"part-{i:02}" for i in range(12)]
CONFIG = {"seed": 0}


def work(folder: Path, log: Path, dies_in: str | None, begin: Any = None) -> None:
    """Make the table as one of several processes, and say in a file which parts."""
    if begin is not None:
        begin.wait(60)  # or the first would be done before the second is there

    def make(name: str) -> pd.DataFrame:
        with log.open("a") as file:
            file.write(f"{name} {os.getpid()}\n")
        if name == dies_in:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.1 if begin else 0)
        return pd.DataFrame({"name": [name], "x": [int(name[-2:]) / 7]})

    with Settings(progress=False):
        frame = in_parts(NAMES, make, folder=folder, config=CONFIG, desc="parts")
    assert frame["name"].tolist() == NAMES


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.json")}


def test_three_workers_of_whom_one_is_killed_write_the_same_bytes(tmp_path: Path) -> None:
    work(tmp_path / "one", tmp_path / "one.log", None)
    folder, log = tmp_path / "three", tmp_path / "three.log"
    context = multiprocessing.get_context("fork")  # a new Python takes seconds to start
    dying = context.Process(target=work, args=(folder, log, "part-05"))
    dying.start()
    dying.join(60)
    assert dying.exitcode == -signal.SIGKILL and 0 < len(files(folder)) < len(NAMES)
    begin = context.Barrier(2)
    others = [context.Process(target=work, args=(folder, log, None, begin)) for _ in range(2)]
    for process in others:
        process.start()
    for process in others:
        process.join(60)
    assert [process.exitcode for process in others] == [0, 0]
    assert files(folder) == files(tmp_path / "one") and not list(folder.glob(".*.lock"))
    made = [line.split() for line in log.read_text().splitlines()]
    counts = {name: sum(name == part for part, _ in made) for name in NAMES}
    assert counts == {name: 2 if name == "part-05" else 1 for name in NAMES}
    assert {int(pid) for _, pid in made} == {dying.pid, *(process.pid for process in others)}


def test_a_part_that_another_process_makes_is_waited_for(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    inside = context.Event()

    def slow(name: str) -> pd.DataFrame:
        inside.set()
        time.sleep(0.3)
        return pd.DataFrame({"by": [os.getpid()]})

    def other() -> None:
        in_parts(["a"], slow, folder=tmp_path, config=CONFIG, desc="parts")

    process = context.Process(target=other)
    process.start()
    assert inside.wait(60)
    frame = in_parts(["a"], slow, folder=tmp_path, config=CONFIG, desc="parts")
    process.join(60)
    assert frame["by"].tolist() == [process.pid]


def test_a_worker_of_another_configuration_is_refused(tmp_path: Path) -> None:
    work(tmp_path, tmp_path / "log", None)
    with pytest.raises(ValueError, match=r"partial results of another run; different are \['seed'"):
        in_parts(NAMES, lambda _: pd.DataFrame(), folder=tmp_path, config={"seed": 1}, desc="")


@pytest.mark.parametrize(
    "error",
    [NotImplementedError("FileSystem does not appear to support flock"), OSError(37, "No locks")],
)
def test_a_file_system_without_locks_is_named_and_nothing_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    class Without(filelock.FileLock):  # type: ignore[misc, valid-type]
        def acquire(self, *_: object, **__: object) -> None:
            raise error

    monkeypatch.setattr(parts, "FileLock", Without)
    with pytest.warns(UserWarning, match=r"cannot be locked \(.*ocks?\), so processes that"):
        work(tmp_path / "folder", tmp_path / "log", None)
    assert len(files(tmp_path / "folder")) == len(NAMES) + 1


def test_a_lock_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    lock = tmp_path / ".a.lock"
    lock.mkdir()  # one of another user cannot be opened either
    with pytest.raises(ValueError, match=r"\.a\.lock cannot be locked"):
        in_parts(
            ["a"], lambda name: pd.DataFrame({"p": [name]}), folder=tmp_path, config={}, desc=""
        )
    lock.rmdir()
    in_parts(["a"], lambda name: pd.DataFrame({"p": [name]}), folder=tmp_path, config={}, desc="")
    assert (tmp_path / "a.json").exists()
