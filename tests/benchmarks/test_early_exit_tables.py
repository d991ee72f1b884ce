"""The tables of the early-exit benchmark are those that one pass over the prompts gives."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import spade_lens as sl
from spade_lens.exits import Confidence, ExitTable, Own, Threshold, exit_tables, gate_features

FOLDER = Path(__file__).parents[2] / "benchmarks"
LAYERS = [1, 2, 3]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The benchmark's module of tables."""
    monkeypatch.syspath_prepend(str(FOLDER))
    import early_exit_tables  # type: ignore[import-not-found]

    return early_exit_tables


def check_same(one: ExitTable, other: ExitTable) -> None:
    for field in fields(ExitTable):
        a, b = getattr(one, field.name), getattr(other, field.name)
        if isinstance(a, Tensor):
            torch.testing.assert_close(a, b, equal_nan=True, rtol=1e-4, atol=1e-5)
        elif field.name not in ("prices", "words"):
            assert a == b, field.name
    for field in ("trunk", "check", "answer", "check_tokens", "answer_tokens"):
        assert torch.equal(getattr(one.prices, field), getattr(other.prices, field)), field
    for policy in (Threshold(0.4), Threshold({1: 0.5, 3: 0.1})):
        a, b = one.simulate(policy), other.simulate(policy)
        torch.testing.assert_close(a.flops, b.flops)
        assert a.exit_layer.tolist() == b.exit_layer.tolist()


def test_checks_are_added_to_tables_afterwards(script: Any, tiny_llama: sl.Model) -> None:
    prompts = [
        sl.Prompt((1, *range(3 + n, 9 + 2 * n)), candidates=(5, 6, 7), target=5 + n % 3)
        for n in range(18)
    ]  # so many that SPADE stores the start token
    spade = sl.Spade(tiny_llama, keep=sl.Keep(last=3))
    own = Own(features=gate_features)
    kept = exit_tables(
        tiny_llama,
        prompts,
        [Confidence(sl.LogitLens(tiny_llama), features=script._residual), own],
        answerers=spade,
        layers=LAYERS,
    )
    head = sl.fit("candidates", tiny_llama, prompts, target="right", layers=LAYERS)
    cheap = Confidence(head, features=gate_features)
    behind = Own(features=gate_features, after=cheap)
    expected = exit_tables(tiny_llama, prompts, [cheap, behind], answerers=spade, layers=LAYERS)
    [few] = exit_tables(tiny_llama, prompts[:2], cheap, answerers=spade, layers=LAYERS)
    assert (few.prices.answer[0] > expected[0].prices.answer[0, :2]).all()
    added = script.with_check(kept[0], tiny_llama, prompts, spade, cheap)
    check_same(added, expected[0])
    screened = script.screened(kept[1], added, tiny_llama, prompts, spade, behind.of(spade))
    check_same(screened, expected[1])
    parts = [kept[0].of(range(2)), kept[0].of(range(2, 18))]
    check_same(script.joined(parts), kept[0])


def test_tables_of_other_prompts_are_not_taken_for_these(
    script: Any, tiny_llama: sl.Model, tmp_path: Path
) -> None:
    prompts = [sl.Prompt((1, 5 + n, 9), candidates=(5, 6), target=5 + n // 5) for n in range(6)]
    spades = [sl.Spade(tiny_llama)]
    options = {"layers": LAYERS, "folder": tmp_path}
    made = script.measured(tiny_llama, prompts[:4], spades, **options)
    again = script.measured(tiny_llama, prompts[:4], spades, **options, run=False)
    check_same(again[0], made[0])
    with pytest.raises(RuntimeError, match="holds tables of other prompts; move it away"):
        script.measured(tiny_llama, prompts[2:], spades, **options)
    # These have the same targets.
    with pytest.raises(RuntimeError, match="holds tables of other prompts; move it away"):
        script.measured(tiny_llama, [*prompts[1:4], prompts[0]], spades, **options)
    with pytest.raises(RuntimeError, match="holds tables of other prompts; move it away"):
        script.measured(tiny_llama, prompts[:4], spades, **options | {"layers": [1, 2]})
