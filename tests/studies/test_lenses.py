"""The main job: what it writes, that it resumes, and that bad input is met before any compute."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from tiny import tiny, tiny_tokenizer

import spade_lens
from spade_lens import Keep, LogitLens, Model, Spade, load, read
from spade_lens.studies import lenses as demo_module
from spade_lens.studies.lenses import demo, plan_demo
from spade_lens.tasks import WordPairTask

# No white space, which the tiny tokenizer does not know.
PAIRS = [[c, c.upper()] for c in "abcdefgh"]
SHORT: dict[str, Any] = {"pairs": PAIRS, "shots": 2, "samples": 10, "seed": 1}


def test_readings_are_those_of_read(tiny_llama: Model, tmp_path: Path) -> None:
    result = demo(tiny_llama, **SHORT, layers=[3, 1], out=tmp_path)
    task = WordPairTask.from_pairs(PAIRS, name="own pairs")
    prompts = task.prompts(tiny_llama.tokenizer, 10, shots=2, seed=1)
    alone = Spade(tiny_llama, keep=Keep(start=False), name="SPADE (answer alone)")
    lenses = [LogitLens(tiny_llama), Spade(tiny_llama), alone]
    expected = read(prompts, lenses, layers=[1, 3, 4], top_k=1).to_frame()
    ours = result.readings
    assert ours["query"].tolist() == [
        q for _ in range(9) for _, (q, _) in task.sample(10, shots=2, seed=1)
    ]
    same = ["lens", "layer", "prompt", "position", "agrees", "top_1", "target", "correct"]
    assert ours[same].astype(object).equals(expected[same].astype(object))
    for column in ("entropy", "kl", "target_logprob"):
        assert ours[column].to_numpy() == pytest.approx(expected[column].to_numpy(), abs=1e-4)
    last = result.summary.query("layer == 4 and measure == 'agreement'")
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
    assert about["config"]["layers_read"] == [0, 1, 2, 3, 4]
    assert "SPADE-EXIT was left out: " in about["early_exit"]  # eight pairs make no splits
    assert result.table + "\n" == (tmp_path / "table.txt").read_text()
    said = capsys.readouterr().out
    assert result.table in said
    assert str(tmp_path / "accuracy.png") in said
    assert max(map(len, result.table.splitlines())) <= 100


def test_resumes_after_an_interruption(
    tiny_llama: Model,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tasks = [
        WordPairTask.from_pairs(PAIRS, name="one/two"),  # a name that is no file name
        WordPairTask.from_pairs([[b, a] for a, b in PAIRS], name="back"),
    ]
    whole = demo(tiny_llama, tasks=tasks, shots=1, samples=4, out=tmp_path / "whole")
    really = demo_module.read
    reads = []

    def until_the_second_task(*args: Any, **kwargs: Any) -> Any:
        reads.append(1)
        if len(reads) == 2:
            raise KeyboardInterrupt
        return really(*args, **kwargs)

    monkeypatch.setattr(demo_module, "read", until_the_second_task)
    with pytest.raises(KeyboardInterrupt):
        demo(tiny_llama, tasks=tasks, shots=1, samples=4, out=tmp_path / "cut")
    capsys.readouterr()
    resumed = demo(tiny_llama, tasks=tasks, shots=1, samples=4, out=tmp_path / "cut")
    assert len(reads) == 3
    assert "used again from" in capsys.readouterr().out
    pd.testing.assert_frame_equal(resumed.readings, whole.readings)

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
    assert set(result.readings["query"]) == {"NA", "nan"}
    odd = pd.DataFrame({"top_1": ["\r", "\n", '"', "NA", "", "\x00", "a,b", "\r\n"], "x": 0.1})
    path = spade_lens.storage.write_csv(tmp_path / "odd.csv", odd)
    pd.testing.assert_frame_equal(demo_module._load(path), odd)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"tasks": ["present-pats"]}, "Did you mean 'present-past'"),
        ({"tasks": ["antonym", "antonym"]}, "tasks of different names"),
        ({"tasks": []}, "at least one"),
        ({"samples": 0}, "at least one prompt"),
        ({"shots": 500}, "Ask for at most"),
        ({"layers": [3, 31], "n_layers": 30}, r"\[3, 31\] were asked for; expected .* to 30"),
        ({"layers": [-1]}, "expected layers from 0 on"),
        ({"layers": []}, "expected layers from 0 on"),
    ],
)
def test_plans_that_cannot_be(wrong: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        plan_demo(**{"out": tmp_path / "out"} | wrong)
    assert not (tmp_path / "out").exists()


def test_model_and_plan_must_fit(tiny_llama: Model, tmp_path: Path) -> None:
    plan = plan_demo(**SHORT, layers=[1, 9], out=tmp_path)
    with pytest.raises(ValueError, match="Layer 9 was asked for; tiny-llama has layers 0"):
        demo_module.run_demo(tiny_llama, plan)
    with pytest.raises(ValueError, match=r"Prompt 0 has \d+ tokens; tiny-llama takes at most 128"):
        demo(tiny_llama, tasks=["antonym"], shots=20, samples=1, out=tmp_path)


@pytest.mark.download
@pytest.mark.slow
def test_on_the_real_model_spade_reads_before_the_logit_lens(
    smollm2: Model, tmp_path: Path
) -> None:
    result = demo(smollm2, tasks=["present-past"], samples=8, layers=[18, 24], out=tmp_path)
    accuracy = result.summary.query("measure == 'accuracy'").set_index(["lens", "layer"])["mean"]
    assert accuracy["SPADE", 24] >= 0.7
    assert accuracy["logit lens", 24] == 0
    assert accuracy["SPADE", 18] == 0
    assert accuracy["SPADE", 30] == accuracy["logit lens", 30] >= 0.7
