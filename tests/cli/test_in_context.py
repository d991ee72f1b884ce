"""The command that trains small transformers in context: what it writes, and what it refuses."""

from pathlib import Path

import pandas as pd
import pytest
from typer.testing import CliRunner, Result

from spade_lens.cli.commands import app


def run(*args: str) -> Result:
    return CliRunner().invoke(app, ["in-context", *args])


def test_it_writes_the_study(tmp_path: Path) -> None:
    task = ("--d", "2", "--examples", "4", "--noise", "0.3")
    size = ("--n-layers", "1", "--width", "8", "--steps", "4")
    few = ("--prompts", "20", "--paste-steps", "0", "--part", "risk", "--part", "probes")
    done = run(*task, *size, *few, "--seed", "1", "--seed", "2", "--out", str(tmp_path))
    assert done.exit_code == 0, done.output
    assert set(pd.read_csv(tmp_path / "probes.csv")["seed"]) == {1, 2}
    assert "Bayes ridge on Phi" in done.stdout and str(tmp_path / "risk.png") in done.stdout


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--noise", "0"], "A task with noise=0 was given"),
        (["--width", "10"], "expected a width that the number of heads divides"),
        (["--steps", "0"], "steps=0 was given; expected a whole number, 1 or more"),
        (["--part", "everything"], "expected some of"),
        (["--prompts", "3"], "prompts=3 was given; expected 20 or more"),
    ],
)
def test_bad_input_is_one_message(args: list[str], message: str, tmp_path: Path) -> None:
    failed = run(*args, "--out", str(tmp_path / "out"))
    assert failed.exit_code == 1
    assert message in " ".join(failed.output.split())
    assert "Traceback" not in failed.output
