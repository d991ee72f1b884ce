"""A policy, a confidence, features and a family of a user's own, in calibration and engine."""

import warnings
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tiny import spanned_prompts

from spade_lens import Keep, LogitLens, Model, calibrate
from spade_lens.exits import (
    Checks,
    Confidence,
    ExitTable,
    ExitWarning,
    Policy,
    SpadeExit,
    Threshold,
    exit_tables,
)
from spade_lens.exits.confidence import MEASURES
from spade_lens.exits.families import FAMILIES, families

LAYERS = [1, 2, 3]


def log_odds(logits: torch.Tensor) -> torch.Tensor:
    """The likeliest option's logit minus the next one's."""
    best = logits.topk(2, dim=-1).values
    return best[:, 0] - best[:, 1]


def norm_and_odds(finals: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    return torch.stack([finals.norm(dim=-1), log_odds(logits)], dim=1)


class Gate:
    """A policy of a user's own: a line through the features of the last check."""

    name, reads = "gate", True

    def __init__(self, weights: tuple[float, float] = (0.0, 1.0), bias: float = 0.0) -> None:
        self.weights, self.bias = torch.tensor(weights), bias
        self.seen: list[tuple[int, ...]] = []

    def stops(self, layers: Sequence[int]) -> tuple[int, ...]:
        return tuple(layers)

    def leaves(self, checks: Checks) -> torch.Tensor:
        self.seen.append(tuple(checks.features.shape))
        return checks.features[-1] @ self.weights > self.bias


def gated(model: Model) -> tuple[Confidence, Gate]:
    """A gate that lets about half of the prompts go at the first layer."""
    check = Confidence(LogitLens(model), log_odds, features=norm_and_odds)
    [table] = exit_tables(model, spanned_prompts(12), check, layers=LAYERS)
    return check, Gate(bias=float(table.features[0, :, 1].median()))


def test_a_confidence_of_ones_own_is_a_function_of_the_logits(tiny_llama: Model) -> None:
    check = Confidence(LogitLens(tiny_llama), log_odds)
    prompts = spanned_prompts(12)
    [table] = exit_tables(tiny_llama, prompts, check, layers=LAYERS)
    assert table.check == "logit lens, log_odds"
    with torch.no_grad():
        residuals = tiny_llama.read(prompts, "logit", layers=[2], top_k=2)
    top = residuals.top_logprobs[0, 0]
    torch.testing.assert_close(table.confidence[1], top[:, 0] - top[:, 1], rtol=1e-4, atol=1e-4)
    policy = Threshold(float(table.confidence.median()))
    trace = SpadeExit(tiny_llama, check, policy, layers=LAYERS).run(prompts)
    assert torch.equal(trace.exit_layer, table.simulate(policy).exit_layer)
    assert len(set(trace.exit_layer.tolist())) > 1


def test_a_policy_sees_features_in_the_engine_and_in_the_simulation(tiny_llama: Model) -> None:
    check, gate = gated(tiny_llama)
    prompts = spanned_prompts(12)
    [table] = exit_tables(tiny_llama, prompts, check, layers=LAYERS)
    assert table.features.shape == (3, 12, 2)
    expected = table.simulate(gate)
    engine = SpadeExit(tiny_llama, check, gate, layers=LAYERS)
    trace = engine.run(prompts)
    assert torch.equal(trace.exit_layer, expected.exit_layer)
    assert torch.equal(trace.flops, expected.flops)
    assert gate.seen[0] == (1, 12, 2)
    assert {shape[0] for shape in gate.seen} == {1, 2, 3}
    assert 1 in trace.exit_layer and len(set(trace.exit_layer.tolist())) > 1
    assert isinstance(gate, Policy)


@pytest.mark.parametrize("how", ["policy", "list", "mapping", "function"])
def test_a_policy_of_ones_own_is_chosen_and_run(tiny_llama: Model, how: str) -> None:
    check, gate = gated(tiny_llama)
    prompts = spanned_prompts(12)
    given: Any = {
        "policy": gate,
        "list": ["threshold", gate],
        "mapping": {"gate": [gate, Gate(bias=1e9)], "fixed": Threshold(0.5)},
        "function": {"gate": lambda table: [gate]},
    }[how]
    calibration = calibrate(
        tiny_llama, prompts, keep=Keep(), checks=check, families=given, layers=LAYERS
    )
    assert set(calibration.families) >= {"gate"}
    rule = calibration.best(1.0, family="gate", measure="agreement")
    assert rule.policy is gate
    expected = rule.table(calibration.tables).simulate(gate)
    assert rule.choice.speedup == pytest.approx(expected.speedup)
    assert torch.equal(rule.engine().run(prompts).exit_layer, expected.exit_layer)
    assert "gate" in set(calibration.tried(1.0, measure="agreement")["family"])


def test_measures_and_families_can_be_added_by_name(
    tiny_llama: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(MEASURES, "log-odds", log_odds)
    monkeypatch.setitem(FAMILIES, "two", lambda table: [Threshold(9.0), Threshold(0.0)])
    check = Confidence(LogitLens(tiny_llama), "log-odds")
    calibration = calibrate(
        tiny_llama, spanned_prompts(12), keep="last 4", checks=check, layers=LAYERS
    )
    assert "two" in calibration.families
    assert calibration.best(1.0, family="two", measure="agreement").check == "logit lens, log-odds"


def test_what_ones_own_work_returns_is_checked_and_named(tiny_llama: Model) -> None:
    prompts = spanned_prompts(4)

    def run(policy: Any = None, **how: Any) -> None:
        check = Confidence(LogitLens(tiny_llama), **how)
        SpadeExit(tiny_llama, check, policy or Threshold(0.5), layers=LAYERS).run(prompts)

    def number(logits: torch.Tensor) -> Any:
        return 0.5

    def too_many(logits: torch.Tensor) -> torch.Tensor:
        return logits

    def no_number(logits: torch.Tensor) -> torch.Tensor:
        return logits[:, 0] * torch.nan

    for measure, message in (
        (number, r"measure 'number' returned a float; expected a tensor .* shape \[4\]"),
        (too_many, r"measure 'too_many' returned shape \[4, \d+\]; expected .*\[4\]"),
        (no_number, "measure 'no_number' returned NaN"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            run(measure=measure)
    with pytest.raises(ValueError, match=r"features .*log_odds.* returned shape \[4\]"):
        run(measure=log_odds, features=lambda finals, logits: logits[:, 0])

    class Wrong(Gate):
        def leaves(self, checks: Checks) -> Any:
            return checks.confidence[-1]

    class Long(Gate):
        def leaves(self, checks: Checks) -> Any:
            return torch.ones(9, dtype=torch.bool)

    class Elsewhere(Gate):
        def stops(self, layers: Sequence[int]) -> tuple[int, ...]:
            return (0, 1)

    for policy, message in (
        (Wrong(), "leaves.. of the policy 'gate' returned torch.float32; expected .*booleans"),
        (Long(), r"leaves.. of the policy 'gate' returned shape \[9\]; expected \[4\]"),
        (Elsewhere(), r"stops.. of the policy 'gate': \[0, 1\] was returned; .* layers 1 to 3"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            run(policy)
    with pytest.raises(ValueError, match="no family 'patients'; expected 'fixed layer'"):
        calibrate(tiny_llama, prompts, families="patients")


def test_calibration_takes_what_is_at_hand(tiny_llama: Model) -> None:
    texts = ["abcdefghijklmnop"[i:] for i in range(12)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExitWarning)  # a random model: hardly anything is safe
        calibration = calibrate(
            tiny_llama, texts, keep=["last 4", "learned 1", "attention 1"], layers=2
        )
        rule = calibration.best(0.5, measure="agreement")
        certain = calibration.certified(0.9, risk=0.9, measure="agreement")
    assert len(calibration) == 12
    assert {table.keep for table in calibration.tables} == {"last 4", "learned 1", "attention 1"}
    assert "12 prompts" in repr(calibration) and "last 4" in repr(calibration)
    assert rule.spade.name in repr(rule) and "speedup" in repr(rule)
    assert certain.family == "threshold, certified"
    # Certified on the second half alone.
    assert certain.choice.n == 6
    assert len(rule.engine().run(texts[0])) == 1


def test_families_are_of_the_table(tiny_llama: Model) -> None:
    [table] = exit_tables(tiny_llama, spanned_prompts(6), "logit", layers=LAYERS)
    assert isinstance(table, ExitTable)
    assert list(families(table)) == [f for f in FAMILIES if f in families(table)]
    assert "cascade" not in families(table)  # there is no first check
    assert [p.name for p in families(table)["fixed layer"]] == ["layer 3", "layer 2", "layer 1"]
