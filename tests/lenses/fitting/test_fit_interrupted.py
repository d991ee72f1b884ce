"""Fitting that is interrupted: it goes on where it was, to the same lens."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny

from spade_lens import Model, load
from spade_lens.lenses.fitting.descent import _State
from spade_lens.lenses.fitting.fit import fit
from spade_lens.lenses.fitting.rows import Rows, rows_at
from spade_lens.lenses.fitting.text import CalibrationText, calibration_text
from spade_lens.lenses.linear import AffineMaps


@pytest.fixture(scope="module")
def text() -> CalibrationText:
    """Forty pieces of forty documents, written by the tiny model."""
    return calibration_text(load(tiny("llama")), n_pieces=40, n_tokens=32)


class Interrupted(Exception):
    pass


@pytest.fixture
def interrupt(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Lets the n-th batch of rows fail, and checkpoints after every batch."""
    monkeypatch.setattr("spade_lens.storage.checkpoint._SECONDS_BETWEEN", 0.0)
    monkeypatch.setattr("spade_lens.lenses.fitting.rows._BATCH_ROWS", 200)
    calls = {"n": 0, "last": -1}
    modules = ("run", "descent")

    def counted(*args: Any) -> Rows:
        calls["n"] += 1
        if calls["n"] == calls["last"]:
            raise Interrupted
        return rows_at(*args)

    for module in modules:
        monkeypatch.setattr(f"spade_lens.lenses.fitting.{module}.rows_at", counted)

    def at(n: int) -> None:
        calls.update(n=0, last=n)

    yield at, calls


@pytest.mark.parametrize("after", [1, 3, 6, 8, 12])
@pytest.mark.parametrize("kind", ["l-spade", "tuned"])
def test_resumed_is_uninterrupted(
    tiny_llama: Model, interrupt: Any, tmp_path: Path, after: int, kind: str
) -> None:
    at, calls = interrupt
    arguments: dict[str, Any] = {"layers": [1, 3], "passes": 1}
    pieces = calibration_text(tiny_llama, n_pieces=40, n_tokens=32)
    at(-1)
    whole = fit(kind, tiny_llama, pieces, **arguments)
    n_calls = calls["n"]
    at(after)
    with pytest.raises(Interrupted):
        fit(kind, tiny_llama, pieces, checkpoint=tmp_path, **arguments)
    at(-1)
    resumed = fit(kind, tiny_llama, pieces, checkpoint=tmp_path, **arguments)
    assert after < 3 or calls["n"] < n_calls
    for name, tensor in whole.maps.tensors.items():
        assert torch.equal(resumed.maps.tensors[name], tensor)
    assert resumed.about | {"seconds": 0} == whole.about | {"seconds": 0}
    assert list(tmp_path.iterdir()) == []


def test_text_that_the_model_wrote_is_not_written_twice(
    tiny_llama: Model, interrupt: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at, _ = interrupt
    at(2)
    with pytest.raises(Interrupted):
        fit("l-spade", tiny_llama, layers=[2], checkpoint=tmp_path)
    at(-1)
    monkeypatch.delattr("spade_lens.lenses.fitting.text.sample_text")
    lens = fit("l-spade", tiny_llama, layers=[2], checkpoint=tmp_path)
    assert lens.about["text"]["source"] == "sampled from tiny-llama"


def test_a_checkpoint_of_another_fit_is_refused(
    tiny_llama: Model, text: CalibrationText, interrupt: Any, tmp_path: Path
) -> None:
    at, _ = interrupt
    at(3)
    with pytest.raises(Interrupted):
        fit("l-spade", tiny_llama, text, checkpoint=tmp_path)
    with pytest.raises(ValueError, match=r"another run; different are \['layers'\]"):
        fit("l-spade", tiny_llama, text, layers=[1], checkpoint=tmp_path)


def test_the_state_of_a_descent_is_what_is_saved() -> None:
    state = _State.at(AffineMaps.identity([0, 1], 8))
    assert _State(**vars(state)).weight is state.weight
