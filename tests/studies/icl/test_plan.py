"""Arguments of experiments are met before any model is loaded."""

from pathlib import Path
from typing import Any

import pytest

from spade_lens.studies import IclPlan
from spade_lens.tasks import RuleTask, task
from spade_lens.tasks.resolve import task as make_task

TINY = RuleTask("tiny", {"x": tuple("abc"), "y": tuple("def")})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"task": "antonyms"}, "no task 'antonyms'. Did you mean 'antonym'"),
        ({"task": "animal/contry"}, "no category 'contry'. Did you mean 'country'"),
        ({"experiments": ["patchin"]}, r"no experiment 'patchin'.*Did you mean 'patching'"),
        ({"experiments": []}, "expected some of .*shots"),
        ({"shots": 0}, "shots=0.*without demonstrations there is no rule"),
        ({"few": 0}, "few=0"),
        ({"samples": 0}, "n=0 was given; expected a whole number, 1 or more"),
        ({"seed": -1}, "seed"),
        ({"layers": []}, "at least one"),
        ({"layers": [-1]}, "expected layers from 0 on"),
        ({"heads": 0}, "heads=0"),
        ({"top_k": 0}, "top_k=0"),
        ({"folds": 1}, "folds=1"),
        ({"lead": 0.0}, "lead=0.0"),
        ({"labels": ("A", "A")}, "all distinct"),
        ({"labels": ("A", "B", "C")}, "one label for each"),
        ({"task": "antonym", "labels": ("A", "B")}, "outputs of its own"),
        ({"task": "sst2"}, "'sst2' is a decision task and has no episodes"),
        ({"other": "animal/country"}, "is the task itself"),
        ({"task": TINY, "shots": 8}, "Ask for fewer shots or give more inputs"),
        ({"samples": 3}, "a single prompt of the rule"),
        ({"samples": 4, "experiments": ["geometry"]}, "too few for the geometry"),
        ({"samples": 3, "experiments": ["heads"]}, "samples=3 are too few to choose heads"),
    ],
)
def test_what_is_refused(arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    known: dict[str, Any] = {"task": "animal/country", "experiments": ["patching"]}
    options = known | arguments
    with pytest.raises(ValueError, match=message):
        IclPlan(options.pop("task"), options.pop("experiments"), out=tmp_path, **options)


def test_a_plan_knows_its_prompts_and_its_other_task(tmp_path: Path) -> None:
    plan = IclPlan("animal/country", "all", samples=32, out=tmp_path)
    assert (len(plan.episodes), plan.shots, plan.few) == (32, 16, 16)
    assert set(plan.experiments) == {
        *("shots", "patching", "contributions", "heads", "knockout", "saliency", "geometry"),
        *("sufficiency", "reading"),
    }
    with pytest.raises(ValueError, match=r"\[31\] were asked for.*30 \(the model's output\)"):
        IclPlan("animal/country", "shots", layers=[31], out=tmp_path).check_layers(30)
    assert plan.other_episodes is not None and plan.other_episodes[0].task == "number-size"
    assert plan.classes is not None and plan.classes["horse"] == "animal"
    own = IclPlan("animal/country", ["shots"], samples=4, labels=("X", "Y"), out=tmp_path)
    assert own.config["labels"] == ["X", "Y"]
    assert own.other_episodes is not None and own.other_episodes[0].labels == ("X", "Y")
    pairs = IclPlan("present-past", ["shots"], samples=4, out=tmp_path)
    assert pairs.other_episodes is not None and pairs.other_episodes[0].task == "country-capital"
    assert pairs.classes is None
    # Of three classes there is no other task that would fit.
    three = IclPlan("animal/country/fruit", ["shots"], samples=9, labels=list("ABC"), out=tmp_path)
    assert three.other_episodes is None
    assert three.chance == pytest.approx(1 / 3)


def test_tasks_by_name_and_by_pairs(tmp_path: Path) -> None:
    pairs = make_task([[c, c.upper()] for c in "abcdefgh"], name="letters")
    how: dict[str, Any] = {"shots": 2, "samples": 9, "out": tmp_path, "experiments": "shots"}
    assert IclPlan("string-length", **how).chosen_task is task("string-length")
    assert IclPlan("antonym", **how).chosen_task is task("antonym")
    assert IclPlan(pairs, **how).chosen_task is pairs
    assert IclPlan(TINY, **how).chosen_task is TINY
