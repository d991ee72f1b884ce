"""Arguments of a study are met before any model is loaded."""

from pathlib import Path
from typing import Any

import pytest

from spade_lens.studies import ExitPlan
from spade_lens.tasks.resolve import as_decisions
from spade_lens.tasks.resolve import task as make_task


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"families": "thresholds"}, "no family 'thresholds'; expected .*'threshold'"),
        ({"calibration": 0}, "calibration=0"),
        ({"samples": 0}, "samples=0"),
        ({"timed": 0}, "timed=0"),
        ({"learn_from": 0}, "learn_from=0"),
        ({"checks": ()}, "at least one lens"),
        ({"rounds": -1}, "rounds=-1"),
        ({"seed": -1}, "seed=-1"),
        ({"losses": ()}, r"losses=\[\]"),
        ({"losses": (1.5,)}, "from 0 to 1"),
        ({"guarantee": 0.05}, "25 calibration prompts here.*takes 118"),
        ({"guarantee": 1.5}, "guarantee=1.5"),
        ({"keep": ("queries",)}, r"no keep set \['queries'\].*'query\+labels'.*'learned N'"),
        ({"keep": "attention 0"}, r"no keep set \['attention 0'\]"),
        ({"task": "animal/country"}, "has no train, calibration and test split"),
        ({"task": "antonyms"}, "no task 'antonyms'. Did you mean 'antonym'.*sst2"),
    ],
)
def test_what_is_refused(arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        ExitPlan(**{"task": "antonym", "out": tmp_path} | arguments)


def test_a_plan_takes_what_the_splits_have(tmp_path: Path) -> None:
    plan = ExitPlan("antonym", calibration=1000, samples=1000, out=tmp_path)
    assert (plan.calibration, plan.samples, plan.timed) == (25, 41, 32)
    assert plan.candidate_layers(30) == (6, 9, 12, 15, 18, 21, 24, 27)
    assert plan.candidate_layers(22) == (6, 8, 10, 12, 14, 16, 18, 20)
    assert plan.candidate_layers(4) == (1, 2, 3)
    assert plan.keep == "auto"
    assert ExitPlan("antonym", keep="learned 4", out=tmp_path).keep == "learned 4"
    fixed = ExitPlan("antonym", layers=[12, 24], out=tmp_path)
    assert fixed.candidate_layers(30) == (12, 24)
    with pytest.raises(ValueError, match="layers from 0 to 23"):
        fixed.candidate_layers(24)


def test_tasks_by_name_and_by_pairs() -> None:
    letters = "abcdefghijklmnopqrstuvwxyz"
    pairs = [[c, c.upper()] for c in letters]
    own = make_task(pairs, name="letters")
    assert as_decisions("antonym").name == "antonym"
    with pytest.raises(ValueError, match="Give more pairs"):
        as_decisions(own)
    task = as_decisions(own, shots=4)
    assert sum(task.split_sizes().values()) == 26
    assert as_decisions(task) is task
