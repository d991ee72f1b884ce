"""A cheap check first, the expensive one for whom it lets through: engine equals simulation."""

from collections.abc import Sequence
from dataclasses import fields

import pytest
import torch
from made_tables import table
from tiny import tiny

from spade_lens import Keep, LogitLens, Model, Prompt, Spade, calibrate, load
from spade_lens.exits import (
    Checks,
    Confidence,
    ExitTable,
    ExitTrace,
    ExitWarning,
    Own,
    Patience,
    Policy,
    Screened,
    SpadeExit,
    Threshold,
    exit_tables,
    fit_gates,
    gate_features,
)
from spade_lens.exits.families import cascades
from spade_lens.exits.gates.rows import gate_rows

LAYERS = [1, 2, 3]


def some_prompts(*, candidates: bool = False, equal: bool = False) -> list[Prompt]:
    """Ragged (or equal) lengths, two start tokens, an answer position before the end."""
    prompts = []
    for k, n in enumerate([12] * 6 if equal else [5, 14, 9, 3, 22, 9]):
        tokens = (2 if k == 4 and not equal else 1, *((7 * i + 5 * k) % 90 + 3 for i in range(n)))
        prompts.append(
            Prompt(
                tokens,
                answer=-2 if k == 2 and not equal else -1,
                target=5 + k,
                candidates=(5, 6, 7, 40 + k) if candidates else (),
                spans={"labels": (1, 2)},
            )
        )
    return prompts


def same(one: ExitTrace, other: ExitTrace) -> None:
    for field in fields(one):
        if field.name not in ("seconds", "flops_padding"):
            a, b = getattr(one, field.name), getattr(other, field.name)
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, field.name


def between(values: torch.Tensor) -> float:
    """A threshold in the widest gap near the middle, so that rounding moves nobody across it."""
    ordered = values.flatten().double().sort().values
    some = ordered[len(ordered) // 4 : len(ordered) - len(ordered) // 4]
    widest = int((some[1:] / some[:-1].clamp(min=1e-12)).argmax())
    return float(some[widest : widest + 2].mean())


def least_of(made: ExitTable) -> dict[int, float]:
    """Some of the prompts are let through at every layer, and some are not."""
    assert made.screen is not None
    return dict(zip(made.layers, map(between, made.screen), strict=True))


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("candidates", [False, True], ids=["vocabulary", "candidates"])
def test_engine_equals_simulation(name: str, candidates: bool) -> None:
    model = load(tiny(name), name=name)
    prompts = some_prompts(candidates=candidates)
    spade = Spade(model, keep=Keep(spans=("labels",)))
    other = Spade(model)
    cheap = Confidence(LogitLens(model), "margin")
    checks = Own("margin", after=cheap), Confidence(other, "margin", after=cheap)
    for check, answerer in ((check, spade) for check in checks):
        [made] = exit_tables(model, prompts, check, answerers=answerer, layers=LAYERS)
        least = least_of(made)
        value = between(made.confidence)
        policies: list[Policy] = [
            Screened(Threshold({1: 0.0, 3: 0.0}), least),
            Screened(Threshold(value), least),
            Screened(Patience(2), least),
            Threshold(value),  # reads both for all
        ]
        for policy in policies:
            confidence = check.of(answerer) if isinstance(check, Own) else check
            engine = SpadeExit(model, confidence, policy, answerer=answerer, layers=LAYERS)
            trace = engine.run(prompts)
            same(trace, made.simulate(policy))
            if policy is not policies[1]:
                continue
            alone = [engine.run(prompt) for prompt in prompts]
            assert torch.equal(torch.cat([one.answer for one in alone]), trace.answer)
            assert torch.equal(torch.cat([one.flops_checks for one in alone]), trace.flops_checks)
    first = made.simulate(policies[0])
    assert len(set(first.exit_layer.tolist())) > 1


class Watched(Spade):
    """SPADE that counts the prompts that it is read for."""

    def __init__(self, model: Model) -> None:
        super().__init__(model)
        self.read: list[int] = []

    def final_residuals(self, residuals, readings: Sequence, layers):  # type: ignore[no-untyped-def]
        self.read.append(len(readings))
        return super().final_residuals(residuals, readings, layers)


def test_the_expensive_check_runs_for_those_let_through_alone(tiny_llama: Model) -> None:
    prompts = some_prompts(equal=True)
    spade = Watched(tiny_llama)
    check = Confidence(spade, after=Confidence(LogitLens(tiny_llama)))
    [made] = exit_tables(tiny_llama, prompts, check, answerers=spade, layers=LAYERS)
    assert made.screen is not None
    never = Screened(Threshold(2.0), least_of(made))
    spade.read.clear()
    trace = SpadeExit(tiny_llama, check, never, answerer=spade, layers=LAYERS).run(prompts)
    passing = (made.screen >= torch.tensor(list(least_of(made).values()))[:, None]).sum(dim=1)
    assert ((passing > 0) & (passing < 6)).all()
    assert spade.read == passing.tolist()
    assert int(trace.checks.sum()) == int(passing.sum())
    dear, cheap = made.prices.check, made.prices.screen
    assert cheap is not None
    least = torch.tensor(list(least_of(made).values()))[:, None]
    expected = (dear * (made.screen >= least) + cheap).sum(dim=0)
    assert torch.equal(trace.flops_checks, expected)
    nobody = Screened(Threshold(0.0), 2.0)
    spade.read.clear()
    trace = SpadeExit(tiny_llama, check, nobody, answerer=spade, layers=LAYERS).run(prompts)
    assert spade.read == []
    assert set(trace.exit_layer.tolist()) == {4}


def test_a_cascade_is_calibrated_saved_and_run(tiny_llama: Model, tmp_path) -> None:  # type: ignore[no-untyped-def]
    prompts = some_prompts() * 3
    prompts = [Prompt(p.tokens[:-1] + (20 + i,), target=5) for i, p in enumerate(prompts)]
    check = Own(after=Confidence(LogitLens(tiny_llama)))
    calibration = calibrate(tiny_llama, prompts, keep=Keep(), checks=check, layers=LAYERS)
    assert "cascade" in set(calibration.tried(1.0, measure="agreement")["family"])
    rule = calibration.best(1.0, measure="agreement", family="cascade")
    assert isinstance(rule.policy, Screened)
    [made] = calibration.tables
    expected = made.simulate(rule.policy)
    same(rule.engine().run(prompts), expected)
    made.save(tmp_path)
    same(ExitTable.load(tmp_path).simulate(rule.policy), expected)
    half = made.of(range(9)).simulate(rule.policy)
    assert torch.equal(half.exit_layer, expected.exit_layer[:9])


def test_a_policy_of_features_sees_them_only_where_some_were_read(tiny_llama: Model) -> None:
    class Sure:
        name, reads = "sure", True

        def stops(self, layers: Sequence[int]) -> tuple[int, ...]:
            return tuple(layers)

        def leaves(self, checks: Checks) -> torch.Tensor:
            return checks.features[-1, :, 0] > 0

        def let_through(self, screen: torch.Tensor, layers: Sequence[int]) -> torch.Tensor:
            return torch.full((screen.shape[1],), layers[-1] == 2)

    first = Confidence(LogitLens(tiny_llama))
    check = Confidence(Spade(tiny_llama), features=gate_features, after=first)
    prompts = some_prompts(candidates=True)
    [made] = exit_tables(tiny_llama, prompts, check, layers=LAYERS)
    trace = SpadeExit(tiny_llama, check, Sure(), layers=LAYERS).run(prompts)
    same(trace, made.simulate(Sure()))
    assert set(trace.exit_layer.tolist()) == {2}


def test_gates_are_charged_for_both_checks(tiny_llama: Model) -> None:
    first = Confidence(LogitLens(tiny_llama))
    check = Confidence(Spade(tiny_llama), features=gate_features, after=first)
    prompts = [
        Prompt((1, *((7 * i + 5 * k) % 90 + 3 for i in range(3 + k % 9))), candidates=(5, 6, 7))
        for k in range(30)
    ]
    [made] = exit_tables(tiny_llama, prompts, check, layers=LAYERS)
    rows, full = gate_rows(made, "disagrees"), made.prices.full
    for gate in fit_gates(made, "jei", loss="disagrees", costs=[0.1, 3.0]).policies:
        trace = made.simulate(gate)
        stop = torch.searchsorted(torch.tensor(made.prices.stops), trace.exit_layer)
        looked = torch.arange(len(LAYERS))[:, None] <= stop
        assert torch.allclose((rows.check * looked).sum(dim=0) * full, trace.flops_checks.double())
        with pytest.raises(ValueError, match="which is a fitted gate"):
            Screened(gate, 0.5)


def test_cascades_that_cannot_be_are_refused(tiny_llama: Model) -> None:
    lens = LogitLens(tiny_llama)
    with pytest.raises(ValueError, match="comes after none"):
        SpadeExit(tiny_llama, lens, Screened(Threshold(0.5), 0.5), layers=LAYERS)
    made = table(torch.rand(2, 4), torch.ones(2, 4))
    with pytest.raises(ValueError, match="comes after none"):
        made.simulate(Screened(Threshold(0.5), 0.5))
    assert cascades(made) == []
    with pytest.raises(ValueError, match="expected a confidence that comes first"):
        Confidence(lens, after=Confidence(lens, "margin", after=Confidence(lens)))
    with pytest.raises(TypeError, match="after"):
        Own(after=lens)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="policy"):
        Screened("threshold", 0.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="which screens by itself"):
        Screened(Screened(Threshold(0.5), 0.5), 0.2)
    with pytest.raises(ValueError, match=r"least confidences for layers \[7\]"):
        Screened(Threshold(0.5), {1: 0.2, 7: 0.2}).stops(LAYERS)
    with pytest.raises(ValueError, match="least"):
        Screened(Threshold(0.5), float("nan"))


def test_a_cascade_that_never_exits_runs_to_the_end(tiny_llama: Model) -> None:
    prompts = some_prompts()
    check = Confidence(Spade(tiny_llama), after=Confidence(LogitLens(tiny_llama)))
    [made] = exit_tables(tiny_llama, prompts, check, layers=LAYERS)
    never = Threshold(float("inf"))
    with pytest.warns(ExitWarning, match="never exits"):
        engine = SpadeExit(tiny_llama, check, never, layers=LAYERS)
    same(engine.run(prompts), made.simulate(never))


@pytest.mark.parametrize("value", [float("inf"), -float("inf")])
def test_infinite_confidences_can_screen(tiny_llama: Model, value: float) -> None:
    def measure(logits: torch.Tensor) -> torch.Tensor:
        return torch.where(torch.arange(len(logits)) % 2 == 0, value, logits[:, 0])

    check = Confidence(Spade(tiny_llama), after=Confidence(LogitLens(tiny_llama), measure))
    [made] = exit_tables(tiny_llama, some_prompts(), check, layers=LAYERS)
    for policy in cascades(made):
        made.simulate(policy)
