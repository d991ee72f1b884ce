"""The study on the real model: what it measures is what the engine does, and nothing is lost."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from spade_lens import LogitLens, Model, studies
from spade_lens.exits import Checks, Confidence, ExitWarning
from spade_lens.settings import one_call
from spade_lens.stats import proportion_interval
from spade_lens.studies import ExitPlan
from spade_lens.studies.base import StudyResult
from spade_lens.studies.exits.study import ExitStudy

pytestmark = [
    pytest.mark.download,
    pytest.mark.filterwarnings("ignore::spade_lens.exits.ExitWarning"),  # few prompts
]
SHORT: dict[str, Any] = {
    "task": "antonym",
    "shots": 4,
    "calibration": 20,
    "samples": 8,
    "keep": ("start+answer", "last 8", "attention 3"),
    "layers": (15, 24),
    "timed": 4,
    "rounds": 1,
    "losses": (None, 0.2),
}


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("study")


@pytest.fixture(scope="module")
def found(smollm2: Model, out: Path) -> StudyResult:
    return study(smollm2, **SHORT, guarantee=0.4, risk=0.1, out=out)


def study(model: Model, **arguments: Any) -> StudyResult:
    """With a check that need not be fitted."""
    return studies.study(model, ExitPlan(checks=[LogitLens(model)], **arguments))


def test_points_are_what_the_engine_does(smollm2: Model, found: StudyResult, out: Path) -> None:
    checks = [LogitLens(smollm2)]
    plan = ExitPlan(**SHORT, checks=checks, guarantee=0.4, risk=0.1, out=out)
    from_disk = ExitStudy(smollm2, plan)
    rules = from_disk.rules()
    points = found.tables["points"].set_index(["rule", "wanted"])
    assert set(points.index.get_level_values(0)) == {
        *("ours", "the paper's", "certified", "fixed layer", "random exits"),
        *("fewer demonstrations", "shorter prompt", "oracle"),
    }
    row = points.loc[("ours", 0.2)]
    with one_call():
        smollm2.expect_rows(100)  # as in the study, whose start token runs once for all prompts
        trace = rules["ours", 0.2].engine().run(from_disk.test_prompts)
    assert row["accuracy"] == pytest.approx(trace.accuracy)
    assert row["speedup"] == pytest.approx(trace.speedup)
    assert row["loss"] == pytest.approx(row["full_accuracy"] - row["accuracy"])
    assert row["wall_speedup"] > 0
    paper = points.loc[("the paper's", 0.2)]
    assert (paper["keep"], paper["check"]) == ("start+answer", "logit lens, entropy")
    # Demonstrations for just as many FLOPs, where fewer of them cost so little.
    fewer = points.loc[("fewer demonstrations", 0.2)]
    assert "of 4 demonstrations" in fewer["policy"]
    assert fewer["speedup"] == pytest.approx(row["speedup"], rel=0.01)
    by_chance = points.loc[("random exits", 0.2)]
    assert by_chance["exit_layer"] == pytest.approx(row["exit_layer"])
    assert by_chance["early"] == pytest.approx(row["early"])
    fixed = points.loc[("fixed layer", 0.2)]
    assert (fixed["check"], fixed["family"]) == ("", "fixed layer")
    assert bool(row["beats_fixed"]) == (row["beyond_fixed_low"] > 0)
    assert pd.isna(fixed["beyond_fixed"]) and not pd.isna(paper["beyond_fixed"])
    # From the embedding on, nothing but the kept tokens is run.
    shorter = points.loc["shorter prompt"].iloc[0]
    assert shorter["exit_layer"] == 0 and shorter["speedup"] > row["speedup"]


def test_everything_is_written(found: StudyResult, out: Path) -> None:
    figures = {f"{n}.{s}" for n in ("front", "exit-layers", "reliability") for s in ("png", "pdf")}
    tables = {"points", "sweeps", "tried", "exits", "iso-compute", "reliability"}
    tables |= {"gated-reliability"}
    expected = {*figures, *(f"{n}.csv" for n in tables), "table.txt", "exit.json", "parts"}
    assert {p.name for p in out.iterdir()} == expected
    about = json.loads((out / "exit.json").read_text())
    assert about["candidate_layers"] == [15, 24]
    assert about["checks"][0]["name"] == "logit lens, entropy"
    exits = pd.read_csv(out / "exits.csv")
    assert len(exits) == 8 * 5 and set(exits["task"]) == {"antonym"}
    ours = exits[exits["policy"] == "ours, loss at most 0.2"]
    assert (
        ours["correct"].mean()
        == found.tables["points"].query("rule == 'ours' and wanted == 0.2")["accuracy"].item()
    )
    low, high = proportion_interval(round(8 * found.tables["points"]["full_accuracy"][0]), 8)
    assert f"[{low:.2f}, {high:.2f}]; chance 0.125" in found.text
    assert (out / "table.txt").read_text() == found.text + "\n"


def test_what_is_finished_is_not_run_again(
    smollm2: Model, found: StudyResult, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("run again")

    monkeypatch.setattr(sys.modules["spade_lens.studies.exits.study"], "compare_wall_clock", never)
    monkeypatch.setattr(sys.modules["spade_lens.studies.exits.study"], "tables_of", never)
    again = study(smollm2, **SHORT, guarantee=0.4, risk=0.1, out=out)
    pd.testing.assert_frame_equal(again.tables["points"], found.tables["points"])
    # Anything that decides the result makes it another one.
    with pytest.raises(AssertionError, match="run again"):
        study(smollm2, **SHORT | {"layers": (15, 23)}, out=out)


class SureTwice:
    """A policy of a user's own: leave at the second check that is sure."""

    name, reads = "sure twice", True

    def stops(self, layers: Sequence[int]) -> tuple[int, ...]:
        return tuple(layers)

    def leaves(self, checks: Checks) -> torch.Tensor:
        return (checks.confidence > 0.5).sum(dim=0) >= 2


def second_logit(logits: torch.Tensor) -> torch.Tensor:
    """A confidence of a user's own: how far the second option is behind."""
    return -logits.softmax(dim=-1).topk(2).values[:, 1]


def test_a_policy_and_a_confidence_of_ones_own(smollm2: Model, tmp_path: Path) -> None:
    plan = ExitPlan(
        **SHORT | {"rounds": 0, "losses": (0.5,), "keep": ("start+answer",)},
        checks=[Confidence(LogitLens(smollm2), second_logit)],
        families=[SureTwice(), "threshold"],
        out=tmp_path,
    )
    tables = studies.study(smollm2, plan).tables
    assert set(tables["sweeps"]["family"]) == {"sure twice", "threshold"}
    assert "logit lens, second_logit" in set(tables["sweeps"]["check"])
    assert "sure twice" in set(tables["tried"]["policy"])
    assert set(tables["points"]["rule"]) >= {"ours", "the paper's", "oracle"}
    about = json.loads((tmp_path / "exit.json").read_text())
    assert about["config"]["families"] == ["sure twice", "threshold"]
    assert about["checks"][0]["name"] == "logit lens, second_logit"


def test_a_model_at_chance_is_said_to_be(smollm2: Model, tmp_path: Path) -> None:
    few = {"task": "antonym", "shots": 0, "samples": 6, "calibration": 6, "rounds": 0}
    with pytest.warns(ExitWarning):
        found = study(smollm2, **few, keep=["start+answer"], layers=[24], out=tmp_path)
    assert "NOT clearly above chance" in found.text
    assert "clock" not in found.text
