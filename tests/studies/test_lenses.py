"""The main job: what it writes, that it resumes, and that bad input is met before any compute."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from tiny import tiny, tiny_tokenizer

import spade_lens
from spade_lens import Keep, LogitLens, Model, Spade, load, read
from spade_lens.studies import LensPlan, lenses, study
from spade_lens.studies.base import StudyResult
from spade_lens.tasks.resolve import task as make_task

# The tiny tokenizer writes every space as one unknown token, with which all answers begin.
pytestmark = pytest.mark.filterwarnings("ignore::spade_lens.prompts.TokenWarning")

# No white space, which the tiny tokenizer does not know.
PAIRS = [[c, c.upper()] for c in "abcdefgh"]
SHORT: dict[str, Any] = {"pairs": PAIRS, "shots": 2, "samples": 10, "seed": 1}


def demo(model: Model, *, fresh: bool = False, **arguments: Any) -> StudyResult:
    return study(model, LensPlan(**arguments), fresh=fresh)


def test_readings_are_those_of_read(tiny_llama: Model, tmp_path: Path) -> None:
    result = demo(tiny_llama, **SHORT, layers=[3, 1], out=tmp_path)
    task = make_task(PAIRS, name="own pairs")
    prompts = task.prompts(tiny_llama.tokenizer, 10, shots=2, seed=1)
    alone = Spade(tiny_llama, keep=Keep(start=False), name="SPADE (answer alone)")
    three = [LogitLens(tiny_llama), Spade(tiny_llama), alone]
    expected = read(prompts, three, layers=[3, 1, 4], top_k=1).to_frame()
    ours = result.tables["readings"]
    assert ours["query"].tolist() == [
        q for _ in range(9) for _, (q, _) in task.sample(10, shots=2, seed=1)
    ]
    same = ["lens", "layer", "prompt", "position", "agrees", "top_1", "target", "correct"]
    assert ours[same].astype(object).equals(expected[same].astype(object))
    for column in ("entropy", "kl", "target_logprob"):
        assert ours[column].to_numpy() == pytest.approx(expected[column].to_numpy(), abs=1e-4)
    last = result.tables["summary"].query("layer == 4 and measure == 'agreement'")
    assert last["mean"].tolist() == [1.0, 1.0, 1.0]


def test_everything_is_written(
    tiny_llama: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = demo(tiny_llama, **SHORT, out=tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {
        *("readings.csv", "summary.csv", "table.txt", "demo.json", "parts"),
        *("accuracy.png", "accuracy.pdf", "agreement.png", "agreement.pdf"),
    }
    readings = pd.read_csv(tmp_path / "readings.csv", keep_default_na=False)
    assert len(readings) == 3 * 5 * 10
    about = json.loads((tmp_path / "demo.json").read_text())
    assert about["model"]["sha256"] == tiny_llama.sha256
    assert about["config"]["seed"] == 1
    assert about["layers_read"] == [0, 1, 2, 3, 4]
    assert result.text + "\n" == (tmp_path / "table.txt").read_text()
    assert repr(result).startswith("StudyResult(tables: readings [150], summary [")
    assert result.to_frame() is result.tables["readings"]
    with pytest.raises(ValueError, match="no table 'nothing'; expected one of"):
        result.to_frame("nothing")
    said = capsys.readouterr().out
    assert result.text in said
    assert str(tmp_path / "accuracy.png") in said
    assert max(map(len, result.text.splitlines())) <= 100


def test_resumes_after_an_interruption(
    tiny_llama: Model,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tasks = [
        make_task(PAIRS, name="one/two"),  # a name that is no file name
        make_task([[b, a] for a, b in PAIRS], name="back"),
    ]
    whole = demo(tiny_llama, tasks=tasks, shots=1, samples=4, out=tmp_path / "whole")
    really = lenses.read
    reads = []

    def until_the_second_task(*args: Any, **kwargs: Any) -> Any:
        reads.append(1)
        if len(reads) == 2:
            raise KeyboardInterrupt
        return really(*args, **kwargs)

    monkeypatch.setattr(lenses, "read", until_the_second_task)
    with pytest.raises(KeyboardInterrupt):
        demo(tiny_llama, tasks=tasks, shots=1, samples=4, out=tmp_path / "cut")
    capsys.readouterr()
    resumed = demo(tiny_llama, tasks=tasks, shots=1, samples=4, out=tmp_path / "cut")
    assert len(reads) == 3
    assert "one/two" in capsys.readouterr().out
    pd.testing.assert_frame_equal(resumed.tables["readings"], whole.tables["readings"])

    demo(tiny_llama, tasks=tasks, shots=1, samples=4, out=tmp_path / "cut")
    assert len(reads) == 3  # all finished
    demo(tiny_llama, tasks=tasks, shots=1, samples=4, out=tmp_path / "cut", seed=5)
    assert len(reads) == 5  # another configuration
    demo(tiny_llama, tasks=tasks, shots=1, samples=4, out=tmp_path / "cut", fresh=True)
    assert len(reads) == 7
    other = load(tiny("llama-eager"), tokenizer=tiny_tokenizer(), name="tiny-llama")
    other.original.model.norm.weight.data *= 2
    demo(other, tasks=tasks, shots=1, samples=4, out=tmp_path / "cut")
    assert len(reads) == 9  # other weights under the same name


def test_tokens_that_look_like_missing_values_survive(tiny_llama: Model, tmp_path: Path) -> None:
    result = demo(tiny_llama, pairs=[["NA", "null"], ["nan", "None"]], shots=1, samples=2,
                  out=tmp_path)  # fmt: skip
    assert set(result.tables["readings"]["query"]) == {"NA", "nan"}
    odd = pd.DataFrame({"top_1": ["\r", "\n", '"', "NA", "", "\x00", "a,b", "\r\n"], "x": 0.1})
    path = spade_lens.storage.write_csv(tmp_path / "odd.csv", odd)
    again = pd.read_csv(path, keep_default_na=False, lineterminator="\n")
    pd.testing.assert_frame_equal(again, odd)
    under_way = lenses.LensStudy(tiny_llama, LensPlan(**SHORT, out=tmp_path))
    for _ in range(2):  # made, and from disk
        pd.testing.assert_frame_equal(under_way.parts("odd", ["all"], lambda _: odd), odd)
    assert under_way.used_again == ["odd"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"tasks": ["present-pats"]}, "Did you mean 'present-past'"),
        ({"tasks": ["antonym", "antonym"]}, "tasks of different names"),
        ({"tasks": []}, "at least one"),
        ({"samples": 0}, "n=0 was given; expected a whole number, 1 or more"),
        ({"shots": 500}, "Ask for at most"),
        ({"layers": [-1]}, "expected layers from 0 on"),
        ({"layers": []}, "expected layers from 0 on"),
    ],
)
def test_plans_that_cannot_be(wrong: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        LensPlan(**{"out": tmp_path / "out"} | wrong)
    assert not (tmp_path / "out").exists()


def test_layers_of_a_plan(tmp_path: Path) -> None:
    assert LensPlan(**SHORT, layers=2, out=tmp_path).chosen_layers == (2,)
    assert LensPlan(**SHORT, layers=iter([3, 1]), out=tmp_path).chosen_layers == (3, 1)
    with pytest.raises(ValueError, match=r"\[3\] twice; give each once"):
        LensPlan(**SHORT, layers=[3, 1, 3], out=tmp_path)


def test_model_and_plan_must_fit(tiny_llama: Model, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"\[9\] were asked for; expected .* to 4"):
        demo(tiny_llama, **SHORT, layers=[1, 9], out=tmp_path)
    with pytest.raises(ValueError, match=r"Prompt 0 has \d+ tokens; tiny-llama takes at most 128"):
        demo(tiny_llama, tasks=["antonym"], shots=20, samples=1, out=tmp_path)


@pytest.mark.download
@pytest.mark.slow
def test_on_the_real_model_spade_reads_before_the_logit_lens(
    smollm2: Model, tmp_path: Path
) -> None:
    result = demo(smollm2, tasks=["present-past"], samples=8, layers=[18, 24], out=tmp_path)
    accuracy = (
        result.tables["summary"].query("measure == 'accuracy'").set_index(["lens", "layer"])["mean"]
    )
    assert accuracy["SPADE", 24] >= 0.7
    assert accuracy["logit lens", 24] == 0
    assert accuracy["SPADE", 18] == 0
    assert accuracy["SPADE", 30] == accuracy["logit lens", 30] >= 0.7
