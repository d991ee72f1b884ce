"""Bad input gets the library's own message, before the model runs: what was given, what to do."""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import bad_input
import pytest


@cache
def report() -> dict[str, Any]:
    """What every public function says of bad input, in a process without run-time type checks."""
    done = subprocess.run(
        [sys.executable, bad_input.__file__],
        capture_output=True,
        text=True,
        env=os.environ
        | {"PYTHONPATH": os.pathsep.join([str(Path(bad_input.__file__).parent), *sys.path])},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def test_it_is_refused_with_a_message_of_ours():
    raw = {
        case: (said["kind"], said["message"], said["where"])
        for case, said in report()["cases"].items()
        if not said["ours"] or said["kind"] not in ("TypeError", "ValueError", "FileNotFoundError")
    }
    assert not raw


def test_what_users_write_themselves_is_checked_and_named():
    raw = {case: said for case, said in report()["users"].items() if not said["ours"]}
    assert not raw
    assert len(report()["users"]) >= 10


def test_arrays_tensors_and_columns_are_as_good_as_lists():
    assert not [way for way, (expected, actual) in report()["ways"].items() if expected != actual]


def test_nothing_is_computed_first():
    assert not {case: said["runs"] for case, said in report()["cases"].items() if said["runs"]}


def test_the_message_says_what_to_do():
    words = (
        "expected",
        "positions 0",
        "give",
        "use",
        "choose",
        "make",
        "load",
        "add",
        "layers 0",
        "there are",
        "the tasks are",
        "0 or more",
        "at least",
        "must",
    )
    silent = {
        case: said["message"]
        for case, said in report()["cases"].items()
        if not any(word in said["message"].lower() for word in words)
    }
    assert not silent, "\n".join(f"{case}: {message}" for case, message in silent.items())


@pytest.mark.parametrize("at_least", [100])
def test_all_public_functions_are_tried(at_least):
    assert len(report()["cases"]) >= at_least or len(report()["functions"]) < 30
