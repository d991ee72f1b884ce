"""Pytest plumbing for every test and docstring; helpers that tests import are in tests/."""

import os

# Before anything imports the libraries that read them.
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test never waits for the hub: cached, or refused
# Idle threads that spin slow everything else down, on two busy cores many times.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("MPLBACKEND", "Agg")  # figures without a screen

from collections.abc import Iterator
from typing import Any

import pytest
import shape_checks  # noqa: F401  (before the package, whose functions it checks)
import torch
from tiny import tiny, tiny_tokenizer

import spade_lens

# It changes jaxtyping where it is imported, which doctest would do a second time.
collect_ignore = ["tests/shape_checks.py"]


@pytest.fixture(autouse=True)
def _same_numbers_every_time() -> None:
    """Random weights and samples do not depend on which tests ran before."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_progress_bars() -> Iterator[None]:
    """Tests that want a bar ask for it: settings=Settings(progress=True)."""
    with spade_lens.Settings(progress=False):
        yield


@pytest.fixture(scope="session")
def tiny_llama() -> spade_lens.Model:
    """A tiny Llama with a tokenizer of single characters."""
    return spade_lens.load(tiny("llama"), tokenizer=tiny_tokenizer(), name="tiny-llama")


@pytest.fixture(scope="session")
def smollm2() -> spade_lens.Model:
    """The real default model."""
    return spade_lens.load("smollm2-135m-instruct")


@pytest.fixture(autouse=True)
def _docstring_names(doctest_namespace: dict[str, Any], request: pytest.FixtureRequest) -> None:
    """What docstring examples may use without saying where it comes from."""
    if isinstance(request.node, pytest.DoctestItem):
        model = request.getfixturevalue("tiny_llama")
        of_the_module = request.node.dtest.globs
        doctest_namespace.clear()  # it is shared: a room of the last example hides a function here
        doctest_namespace.update(
            {n: getattr(spade_lens, n) for n in spade_lens.__all__ if n not in of_the_module}
        )
        doctest_namespace["sl"] = spade_lens
        # Here "prompts" are prompts, not the room.
        doctest_namespace["model"] = model
        doctest_namespace["prompts"] = [model.prompt("ab->AB,cd->"), model.prompt("q->")]
