"""The command that sweeps drafts: what it writes, and one message for what goes wrong."""

from pathlib import Path

import pandas as pd
import pytest
from tiny import tiny, tiny_tokenizer
from typer.testing import CliRunner, Result

from spade_lens.cli.commands import app


def run(*args: str) -> Result:
    return CliRunner().invoke(app, ["speculate", *args])


def test_it_writes_the_study(tmp_path: Path) -> None:
    model, data, out = tmp_path / "model", tmp_path / "data.jsonl", tmp_path / "out"
    tiny("llama").save_pretrained(model)
    tiny_tokenizer().save_pretrained(model)
    data.write_text('{"prompt": "abab", "kind": "a"}\n{"prompt": "cd", "kind": "b"}\n' * 2)
    args = ("--model", str(model), "--data", str(data), "--out", str(out), "--samples", "1")
    short = ("--layers", "1,3", "--drafts", "1-2", "--max-new-tokens", "4", "--rounds", "1")
    done = run(*args, *short, "--eta", "0", "--eta", "0.5", "--timed", "1")
    assert done.exit_code == 0, done.output
    points = pd.read_csv(out / "points.csv", keep_default_na=False)
    assert set(points["kind"]) == {"all", "a", "b"} and set(points["draft_tokens"]) == {1, 2}
    assert set(points["layer"]) == {0, 1, 3} and set(points["eta"]) == {0.0, 0.5}
    assert set(points[points["kind"] == "all"]["n"]) == {2}
    assert "needed: the pooled acceptance" in done.stdout and str(out / "points.csv") in done.stdout


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--layers", "0"], "expected layers that can draft, from 1 to 29"),
        (["--layers", "30"], "expected layers that can draft, from 1 to 29"),
        (["--layers", "x"], "neither a layer nor a rising range"),
        (["--drafts", "0"], "expected numbers of tokens, 1 or more"),
        (["--drafts", "4-2"], "--drafts '4-2': '4-2' is neither a number nor a rising range"),
        (["--eta", "2"], "expected numbers from 0 to 1"),
        (["--eta", "nan"], "expected"),
        (["--timed", "-1"], "expected 0 or more"),
        (["--max-new-tokens", "0"], "1 or more"),
        (["--data", "nowhere.txt"], "There is no file 'nowhere.txt'"),
    ],
)
def test_bad_input_is_one_message(args: list[str], message: str, tmp_path: Path) -> None:
    failed = run(*args, "--out", str(tmp_path / "out"))
    assert failed.exit_code == 1
    assert message in " ".join(failed.output.split())
    assert "Traceback" not in failed.output
