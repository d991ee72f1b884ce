"""One settings object: the call, the context, the model and the default, from strong to weak."""

import ast
import io
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch

import spade_lens as sl
from spade_lens.checks import checked
from spade_lens.settings import Limits, _stack, limits, progress_bar, scoped


def test_the_call_goes_before_the_context_and_the_context_before_the_model(tiny_llama, monkeypatch):
    monkeypatch.setattr(tiny_llama, "settings", sl.Settings(memory_limit=3, batch_size=7))
    assert limits(tiny_llama).memory_limit == 3
    with sl.Settings(memory_limit=2):
        assert (limits(tiny_llama).memory_limit, limits(tiny_llama).batch_size) == (2, 7)
        with sl.Settings(batch_size=5):
            assert (limits(tiny_llama).memory_limit, limits(tiny_llama).batch_size) == (2, 5)
    assert limits().memory_limit == 4.0

    @scoped
    def inner(*, settings=None):
        return limits(tiny_llama).memory_limit

    with sl.Settings(memory_limit=2):
        assert inner(settings=sl.Settings(memory_limit=1)) == 1
        assert inner() == 2


def test_the_settings_of_a_failed_call_are_gone(tiny_llama):
    with pytest.raises(ValueError, match="memory_limit=1e-09"):
        sl.capture(tiny_llama, [tiny_llama.prompt("ab")], settings=sl.Settings(memory_limit=1e-9))
    assert limits(tiny_llama).memory_limit == 4.0


@pytest.mark.parametrize(
    "wrong", [{"memory_limit": 0}, {"memory_limit": float("nan")}, {"batch_size": 0}]
)
def test_what_is_not_positive_is_refused(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}="):
        sl.Settings(**wrong)


def test_another_type_is_refused(tiny_llama):
    with pytest.raises(TypeError, match="settings=4 was given; expected Settings"):
        sl.capture(tiny_llama, [tiny_llama.prompt("ab")], settings=4)


def test_rows_fit_the_fraction_and_the_batch_size():
    assert Limits(1.0, None, True, 2048).rows(2**20, fraction=1 / 2) == 512
    assert Limits(1.0, 3, True, 2048).rows(2**20, fraction=1 / 2) == 3
    assert Limits(1.0, None, True, 2048).rows(2**40) == 1


def test_only_the_outermost_bar_is_shown():
    with sl.Settings(progress=True):
        with progress_bar(total=2, delay=0, file=io.StringIO()) as outer:
            with progress_bar(total=2, delay=0, file=io.StringIO()) as inner:
                assert inner.disable
            assert not outer.disable
        with progress_bar(total=2, delay=0, file=io.StringIO()) as later:
            assert not later.disable
    with progress_bar(total=2) as hidden:  # the tests' own context
        assert hidden.disable


def test_any_batch_size_gives_the_same(tiny_llama):
    prompts = [tiny_llama.prompt("ab" * n) for n in (1, 2, 3, 4)]
    whole = sl.capture(tiny_llama, prompts).stack
    one_by_one = sl.capture(tiny_llama, prompts, settings=sl.Settings(batch_size=1)).stack
    torch.testing.assert_close(one_by_one, whole, atol=1e-5, rtol=1e-4)


def test_settings_that_end_out_of_turn_take_their_own_entry_away(tiny_llama):
    def batch_sizes():
        with sl.Settings(batch_size=3):
            yield limits(tiny_llama).batch_size

    generator = batch_sizes()
    assert next(generator) == 3
    with sl.Settings(batch_size=7):
        generator.close()
        assert limits(tiny_llama).batch_size == 7
    assert limits(tiny_llama).batch_size is None


def test_every_bar_of_work_with_a_model_asks_the_model():
    """``model.settings`` counts for all bars where there is a ``Model``.

    There is none in a download, a load, training, and work on vectors or exit tables.
    """
    without = set()
    for path in Path(sl.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            is_bar = isinstance(node, ast.Call) and ast.unparse(node.func) == "progress_bar"
            if is_bar and "model" not in {keyword.arg for keyword in node.keywords}:
                without.add(f"{path.parent.name}/{path.stem}")
    assert without == {
        "gates/fit",
        "geometry/probes",
        "models/checkpoints",
        "storage/download",
        "training/loop",
    }


def test_the_models_own_settings_hide_its_bars(tiny_llama, monkeypatch):
    shown = []

    def spy(**options):
        bar = progress_bar(**options)
        shown.append(not bar.disable)
        return bar

    monkeypatch.setattr("spade_lens.replay.run.progress_bar", spy)
    residuals = sl.replay.capture_for_replay(tiny_llama, [tiny_llama.prompt("ab")])
    outside = _stack.set(())  # the tests' own context would hide them all
    try:
        for progress in (False, True):
            monkeypatch.setattr(tiny_llama, "settings", sl.Settings(progress=progress))
            sl.replay.replay(tiny_llama, residuals, [0], [])
    finally:
        _stack.reset(outside)
    assert shown == [False, True]


def test_arguments_by_place_are_checked_by_their_own_annotations():
    @checked
    def f(n: int, *others: int, kind: Literal["a", "b"] = "a"):
        return (n, *others, kind)

    assert f(1, 2, 3) == (1, 2, 3, "a")
    with pytest.raises(TypeError, match="n='1' was given"):
        f("1", 2)
    with pytest.raises(TypeError, match="expected 'a' or 'b'"):
        f(1, kind=np.array(["a", "b"]))
