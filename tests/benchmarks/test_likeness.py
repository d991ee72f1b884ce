"""Likeness of rule vectors beside prompts without the rule, against a computation of its own."""

import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path

import pandas as pd
import pytest
import torch

from spade_lens import Model
from spade_lens.icl import rule_vectors
from spade_lens.plots import registry as figures
from spade_lens.prompts import Template
from spade_lens.studies import IclPlan, study
from spade_lens.studies.icl import registry
from spade_lens.tasks import Episode
from spade_lens.tasks.resolve import task as make_task

TIGHT = Template(pair="{input}>{output}", query="{input}>", separator=";")
PAIRS = make_task([[c, c.upper()] for c in "abcdefgh"], name="upper")
OTHER = make_task([[c, chr(ord(c) + 1)] for c in "ijklmnop"], name="next")


@pytest.fixture
def likeness() -> Iterator[None]:
    """The experiment of the benchmarks, registered for one test."""
    path = Path(__file__).parents[2] / "benchmarks" / "likeness.py"
    spec = importlib.util.spec_from_file_location("likeness", path)
    assert spec is not None and spec.loader is not None
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    yield
    del registry._EXPERIMENTS["likeness"]
    figures._KINDS.pop("likeness")


@pytest.mark.usefixtures("likeness")
@pytest.mark.filterwarnings("ignore:(?s).*there is nothing to explain")
def test_likeness_beside_others(tiny_llama: Model, tmp_path: Path) -> None:
    plan = IclPlan(
        PAIRS, "likeness", samples=12, shots=2, other=OTHER, template=TIGHT, layers=[1, 3],
        out=tmp_path,
    )  # fmt: skip
    frame = study(tiny_llama, plan).tables["likeness"]
    assert (tmp_path / "likeness.png").exists()
    _check(tiny_llama, frame)


def _check(model: Model, frame: pd.DataFrame) -> None:
    """Every row, against vectors and pairs of its own."""
    episodes = PAIRS.episodes(12, shots=2)

    def vectors(some: Sequence[Episode]) -> torch.Tensor:
        prompts = [e.prompt(model.tokenizer, template=TIGHT) for e in some]
        return rule_vectors(model, prompts, layers=[3]).tensor[0].double()

    def within(some: torch.Tensor) -> float:
        return float(torch.cosine_similarity(some[:, 0], some[:, 1], dim=-1).mean())

    own = vectors(episodes)
    shuffled, third = (
        vectors([e.shuffled(first + i) for i, e in enumerate(episodes)]) for first in (0, 12)
    )
    middle = third.mean(dim=(0, 1))
    another = vectors(OTHER.episodes(12, shots=2)).flatten(0, 1)
    across = torch.cosine_similarity(own.flatten(0, 1)[:, None], another[None], dim=-1).mean()
    expected = {
        ("own", "within a prompt", "nothing"): within(own),
        ("outputs shuffled", "within a prompt", "nothing"): within(shuffled),
        ("own less shuffled", "within a prompt", "nothing"): within(own) - within(shuffled),
        ("own and another task's", "across rules", "nothing"): float(across),
        ("own", "within a prompt", "mean of shuffled"): within(own - middle),
        ("outputs shuffled", "within a prompt", "mean of shuffled"): within(shuffled - middle),
    }
    at_layer = frame[frame["layer"] == 3].set_index(["prompts", "comparison", "center"])["mean"]
    for key, value in expected.items():
        assert at_layer[key] == pytest.approx(value, abs=1e-5), key
