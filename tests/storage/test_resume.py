"""Runs that were interrupted go on, and never with the partial results of another run."""

import io
from pathlib import Path

import pandas as pd
import pytest
import torch

from spade_lens.settings import Settings, progress_bar
from spade_lens.storage.checkpoint import Checkpoint
from spade_lens.storage.parts import in_parts

CPU = torch.device("cpu")


def test_a_stage_comes_back_until_it_is_cleared(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3), "done": torch.tensor(2)}
    first = Checkpoint(tmp_path, {"seed": 0, "layers": (1, 2)})
    first.save("fit", tensors)
    assert first.load("fit", CPU) is None  # less than half a minute has passed
    first.save("fit", tensors, now=True)
    again = Checkpoint(tmp_path, {"seed": 0, "layers": [1, 2]})
    back = again.load("fit", CPU)
    assert back is not None and torch.equal(back["a"], tensors["a"])
    again.clear("fit")
    assert again.load("fit", CPU) is None and not list(tmp_path.iterdir())


def test_parts_that_exist_are_not_made_again(tmp_path: Path) -> None:
    made = []

    def make(name: str) -> pd.DataFrame:
        made.append(name)
        if name == "b" and made.count("b") == 1:
            raise KeyboardInterrupt
        return pd.DataFrame({"name": [name], "x": [0.1]})

    def run() -> pd.DataFrame:
        return in_parts(list("abc"), make, folder=tmp_path, config={"seed": 0}, desc="parts")

    with pytest.raises(KeyboardInterrupt):
        run()
    assert run()["name"].tolist() == ["a", "b", "c"]
    assert made == ["a", "b", "b", "c"]


def test_another_run_is_refused_with_one_message(tmp_path: Path) -> None:
    Checkpoint(tmp_path / "fit", {"seed": 0, "n": 5}).save("fit", {"a": torch.ones(1)}, now=True)
    frame = pd.DataFrame({"a": [1]})
    config = {"seed": 0, "n": 5}
    in_parts(["a"], lambda _: frame, folder=tmp_path / "parts", config=config, desc="")
    message = (
        r"partial results of another run; different are \['n'\]: there \{'n': 5\}, here "
        r"\{'n': 6\}\. Delete it"
    )
    with pytest.raises(ValueError, match=message):
        Checkpoint(tmp_path / "fit", {"seed": 0, "n": 6}).load("fit", CPU)
    with pytest.raises(ValueError, match=message):
        in_parts(
            ["a"], lambda _: frame, folder=tmp_path / "parts", config=config | {"n": 6}, desc=""
        )


def test_a_single_part_shows_the_bars_of_what_makes_it() -> None:
    hidden = []

    def make(name: str) -> pd.DataFrame:
        with progress_bar(total=1, file=io.StringIO()) as bar:
            hidden.append(bar.disable)
        return pd.DataFrame({"name": [name]})

    with Settings(progress=True):
        for names in ("a", "ab"):
            in_parts(list(names), make, folder=None, config={}, desc="parts")
    assert hidden == [False, True, True]


def test_missing_whole_numbers_come_back_as_they_were(tmp_path: Path) -> None:
    def make(name: str) -> pd.DataFrame:
        return pd.DataFrame({"target_id": pd.array([1, None], dtype="Int64"), "text": ["NA", ""]})

    written = []
    for _ in range(2):
        frame = in_parts(["a"], make, folder=tmp_path, config={}, desc="parts")
        written.append(frame.to_csv(index=False))
    assert written[0] == written[1] == "target_id,text\n1,NA\n,\n"
