"""The table of tokens that leave early has intervals only where there are enough prompts."""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from spade_lens.stats.intervals import mean_interval

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The benchmark as a module."""
    monkeypatch.syspath_prepend(str(FOLDER))
    spec = importlib.util.spec_from_file_location("token_exit_script", FOLDER / "token_exit.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_few_prompts_have_no_intervals(script: Any) -> None:
    agreement = [0.2, 0.9, 0.4, 0.6, 0.5]
    frame = pd.DataFrame(
        {
            "kind": ["chat"] * 2 + ["documents"] * 3,
            "strategy": "one",
            "agreement": agreement,
            "kl": 1.0,
            "blocks": 0.5,
            "speed": [1.0, 2.0, 1.0, 1.0, 1.0],
        }
    )
    table = script.summary(frame).set_index("kind")
    ends = [name for name in table if name.endswith(("_low", "_high"))]
    assert len(ends) == 8 and table.loc[["chat", "documents"], ends].isna().all(axis=None)
    assert table.loc["chat", "agreement"] == pytest.approx(0.55)
    assert table.loc["chat", "speed"] == pytest.approx(2**0.5, abs=1e-4)
    low, high = mean_interval(np.array(agreement))
    found = table.loc["all", ["agreement_low", "agreement_high"]].tolist()
    assert found == pytest.approx([low, high], abs=1e-4)
    assert "0.55 [" not in script.table(table.reset_index().assign(kind="all").head(1))


def test_the_committed_table_has_no_impossible_intervals(script: Any) -> None:
    frame = pd.read_csv(script.OUT)
    for measure in ("agreement", "blocks"):
        assert not (frame[f"{measure}_low"] < 0).any() and not (frame[f"{measure}_high"] > 1).any()
    assert len(script.table(frame).splitlines()) == 2 + frame["strategy"].nunique()
