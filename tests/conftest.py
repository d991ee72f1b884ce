"""Pytest plumbing for every test; helpers that tests import are modules of their own beside it."""

import os

# Before anything imports the libraries that read them.
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test never waits for the hub: cached, or refused
os.environ.setdefault("MPLBACKEND", "Agg")  # figures without a screen

import pytest
import torch


@pytest.fixture(autouse=True)
def _same_numbers_every_time() -> None:
    """Random weights and samples do not depend on which tests ran before."""
    torch.manual_seed(0)
