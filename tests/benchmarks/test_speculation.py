"""Verdicts of speeds beside plain text are those of their intervals."""

import runpy
from pathlib import Path

import pandas as pd
import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.parametrize("name", ["speculation", "speculation-peers"])
def test_the_committed_verdicts_are_those_of_the_intervals(name: str) -> None:
    table = pd.read_csv(FOLDER / f"{name}.csv")
    assert ((table["verdict"] == "faster") == (table["speedup_low"] > 1)).all()
    assert ((table["verdict"] == "slower") == (table["speedup_high"] < 1)).all()
    assert "undecided" in set(table["verdict"])


def test_a_speed_whose_interval_holds_1_is_undecided() -> None:
    seconds = {"plain": (2.0, 2.0, 2.0), "slow": (4.0, 4.2, 3.9), "noisy": (4.0, 1.0, 2.5)}
    rows = [
        {"kind": "chat", "prompt": i, "strategy": name, "seconds": taken, "seconds_of_one": 0.5}
        for name, times in seconds.items()
        for i, taken in enumerate(times)
    ]
    frame = pd.DataFrame(rows).assign(same_tokens=True, acceptance=0.5, tokens_per_round=1.5)
    table = runpy.run_path(str(FOLDER / "speculation.py"))["summary"](frame)
    chat = table[table["kind"] == "chat"].set_index("strategy")
    assert chat["speedup"]["noisy"] < 1
    verdicts = {"plain": "undecided", "slow": "slower", "noisy": "undecided"}
    assert chat["verdict"].to_dict() == verdicts
