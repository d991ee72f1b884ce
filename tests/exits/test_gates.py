"""Learned gates: exact in the engine, optimal where the optimum is known, and saved as they are."""

import json
import warnings
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_tables import table as made
from sklearn.linear_model import RidgeCV
from tiny import tiny, tiny_tokenizer

from spade_lens import Keep, LogitLens, Model, Prompt, Settings, Spade, calibrate, load
from spade_lens.exits import (
    Checks,
    Confidence,
    ExitTable,
    ExitTrace,
    ExitWarning,
    FixedLayer,
    Gates,
    Policy,
    SpadeExit,
    exit_tables,
    fit_gates,
    gate_features,
    load_gates,
    sweep,
)
from spade_lens.exits.controls import outcomes
from spade_lens.exits.gates.features import history_inputs
from spade_lens.exits.gates.gate import hazard
from spade_lens.exits.gates.jei import gate_targets
from spade_lens.exits.gates.regression import RIDGES, Ridge
from spade_lens.exits.gates.rows import gate_rows
from spade_lens.exits.gates.stopping import stopping_rules

LAYERS = [1, 2, 3]
KINDS = ["stopping", "jei", "jei, cross-fitted"]


@pytest.fixture(autouse=True)
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Descents are shorter here, unless a test is about what they learn."""
    monkeypatch.setattr("spade_lens.exits.gates.jei._STEPS", 200)


def some_prompts(n: int, *, seed: int = 0, options: int = 4) -> list[Prompt]:
    generator = np.random.default_rng(seed)
    prompts = []
    for _ in range(n):
        length = int(generator.integers(4, 12))
        tokens = (1, *(int(t) for t in generator.integers(3, 97, length)))
        candidates = tuple(int(t) for t in generator.choice(90, options, replace=False) + 3)
        prompts.append(Prompt(tokens, target=candidates[0], candidates=candidates))
    return prompts


def same(one: ExitTrace, other: ExitTrace) -> None:
    for field in fields(one):
        if field.name not in ("seconds", "flops_padding"):
            a, b = getattr(one, field.name), getattr(other, field.name)
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, field.name


@pytest.fixture(scope="module")
def spade(tiny_llama: Model) -> Spade:
    return Spade(tiny_llama, keep=Keep(last=2))


@pytest.fixture(scope="module")
def checks(tiny_llama: Model, spade: Spade) -> list[Confidence]:
    return [Confidence(x, features=gate_features) for x in (LogitLens(tiny_llama), spade)]


@pytest.fixture(scope="module")
def tables(tiny_llama: Model, spade: Spade, checks: list[Confidence]) -> list[ExitTable]:
    with Settings(progress=False):
        return exit_tables(tiny_llama, some_prompts(60), checks, answerers=spade, layers=LAYERS)


# What gates see


@pytest.mark.parametrize("n_options", [1, 2, 5])
def test_features_are_those_of_the_definition(n_options: int) -> None:
    logits = 3 * torch.randn(7, n_options)
    logits = torch.cat([logits, torch.full((7, 2), -torch.inf)], dim=1)
    p = logits.double().softmax(dim=-1)
    ordered = p.sort(dim=-1, descending=True).values
    square = p**2 / (p**2).sum(dim=-1, keepdim=True)

    def entropy(q: torch.Tensor) -> torch.Tensor:
        return -torch.special.xlogy(q, q).sum(dim=-1)

    expected = [ordered[:, 0], entropy(p), ordered[:, 0] - ordered[:, 1], entropy(square)]
    features = gate_features(torch.empty(7, 0), logits)
    assert features.dtype == torch.float32
    assert torch.allclose(features.double(), torch.stack(expected, dim=1), atol=1e-6)


def test_features_of_a_sure_readout_are_finite() -> None:
    logits = torch.tensor([[1e4, 0.0, -1e4], [-torch.inf, 3.0, -torch.inf]])
    assert gate_features(torch.empty(2, 0), logits).tolist() == [[1, 0, 1, 0]] * 2


def test_with_two_options_the_features_are_functions_of_one_number() -> None:
    logits = torch.randn(200, 2)
    features = gate_features(torch.empty(200, 0), logits)
    order = features[:, 0].argsort()
    for column, sign in ((1, -1), (2, 1), (3, -1)):
        assert (sign * features[order, column].diff() >= -1e-6).all()


def test_the_history_is_compared_with() -> None:
    seen = Checks(
        layers=(1, 2, 3),
        confidence=torch.tensor([[0.1, 0.5], [0.2, 0.5], [0.4, 0.6]]),
        answer=torch.tensor([[7, 8], [6, 8], [6, 8]]),
        features=torch.tensor([[[1.0], [2.0]], [[1.0], [4.0]], [[3.0], [4.0]]]),
    )
    expected = [[0.4, 3.0, 0.2, 2.0, 1.0, 0.5], [0.6, 4.0, 0.1, 0.0, 1.0, 1.0]]
    assert torch.allclose(history_inputs(seen), torch.tensor(expected).double())
    first = Checks((1,), seen.confidence[:1], seen.answer[:1], seen.features[:1])
    assert history_inputs(first)[:, 2:].eq(0).all()


# Exact in the engine


@pytest.mark.parametrize("which", [0, 1], ids=["logit lens", "own"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_engine_is_the_simulation(
    kind: Any,
    which: int,
    tiny_llama: Model,
    spade: Spade,
    checks: list[Confidence],
    tables: list[ExitTable],
) -> None:
    gates = fit_gates(tables[which], kind, loss="disagrees", costs=[0.2, 1])
    prompts = some_prompts(16, seed=1)
    [table] = exit_tables(tiny_llama, prompts, checks[which], answerers=spade, layers=LAYERS)
    exits = set()
    for gate in gates.policies:
        assert isinstance(gate, Policy)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExitWarning)  # a careful one never exits
            engine = SpadeExit(tiny_llama, checks[which], gate, answerer=spade, layers=LAYERS)
        trace = engine.run(prompts)
        same(trace, table.simulate(gate))
        single = [int(engine.run(prompt).exit_layer) for prompt in prompts[:5]]
        assert single == trace.exit_layer[:5].tolist()
        exits |= set(trace.exit_layer.tolist())
    assert len(exits) > 1


@pytest.mark.parametrize("kind", KINDS)
def test_more_is_saved_the_more_flops_cost(kind: Any, tables: list[ExitTable]) -> None:
    gates = fit_gates(tables[1], kind, loss="disagrees", costs=[0.001, 0.3, 1000])
    compute = sweep(tables[1], gates.policies)["compute"].tolist()
    assert compute[0] > compute[-1]


def test_gates_are_calibrated_like_any_policy(
    tiny_llama: Model, checks: list[Confidence], tables: list[ExitTable]
) -> None:
    keep = {"two": Keep(last=2), "other": Keep(last=3)}
    common: dict[str, Any] = {"keep": keep, "checks": checks[0], "layers": LAYERS}
    training = calibrate(tiny_llama, some_prompts(40, seed=2), **common)
    gates = fit_gates(training.tables[0], loss="disagrees", costs=[0.3, 1.0, 5.0])
    new = some_prompts(30, seed=3)
    calibration = calibrate(
        tiny_llama, new, families={"gates": gates, "fixed": FixedLayer(2)}, **common
    )
    rule = calibration.best(1.0, measure="agreement", family="gates")
    assert rule.spade.name == training.tables[0].keep
    trace = rule.engine().run(new)
    same(trace, rule.table(calibration.tables).simulate(rule.policy))
    tried = calibration.tried(1.0, measure="agreement")
    # The other keep set has no gates.
    assert set(tried[tried["family"] == "gates"]["keep"]) == {training.tables[0].keep}
    with pytest.raises(ValueError, match="share 40 prompts"):
        calibrate(tiny_llama, some_prompts(40, seed=2), families={"gates": gates}, **common).best(
            1.0, measure="agreement"
        )


# The rule of JEI-DNN


def test_hazards_are_those_of_a_plain_loop() -> None:
    gates = torch.rand(6, 500).double()
    gates[:, :50] = gates[:, :50].round()
    expected = torch.empty_like(gates)
    for prompt in range(500):
        total, stays = 0.0, 1.0
        for layer in range(6):
            exits = max(0.0, min(float(gates[layer, prompt]), 1 - total))
            total += float(gates[layer, prompt])
            a = min(max(exits / stays, 0.0), 1.0) if stays > 1e-12 else 1.0
            stays *= 1 - a
            expected[layer, prompt] = a
    assert torch.allclose(hazard(gates), expected, atol=1e-9)


def test_targets_are_one_from_the_cheapest_stop_on(tables: list[ExitTable]) -> None:
    rows, costs = gate_rows(tables[0], "cross-entropy"), [0.1, 1.0]
    targets = gate_targets(rows, costs)
    table = rows.table
    for c, cost in enumerate(costs):
        for prompt in range(len(rows)):
            full = int(table.prices.full[prompt])
            spent, totals = 0, []
            for stop in range(len(LAYERS) + 1):
                if stop < len(LAYERS):
                    spent += int(table.prices.check[stop, prompt])
                right = int(table.right_option[prompt])
                flops = int(table.prices.trunk[stop, prompt] + table.prices.answer[stop, prompt])
                loss = -float(table.logprobs[stop, prompt, right])
                totals.append(loss + cost * (flops + spent) / full)
            best = int(np.argmin(totals))
            assert targets[c, :, prompt].tolist() == [
                float(layer >= best) for layer in range(len(LAYERS))
            ]


def test_gates_of_jei_learn_a_threshold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spade_lens.exits.gates.jei._STEPS", 1000)
    training, new = two_kinds(200, seed=0), two_kinds(200, seed=1)
    for kind in ("jei", "jei, cross-fitted"):
        gates = fit_gates(training, kind, loss="wrong", costs=[0.5])
        trace = new.simulate(gates.policies[0])
        assert trace.accuracy >= 0.97
        assert trace.speedup >= 1.2


# Optimal stopping


def test_a_ridge_regression_is_that_of_scikit_learn() -> None:
    inputs, target = torch.randn(50, 6).double(), torch.randn(50).double()
    inputs[:, 2], inputs[:, 3] = 0.0, inputs[:, 4]
    target += 0.4 * inputs[:, 0]
    weights, bias = Ridge(inputs).line(target)
    scaled = (inputs - inputs.mean(dim=0)) / inputs.std(dim=0).clamp(min=1e-9)
    known = RidgeCV(RIDGES.numpy()).fit(scaled.numpy(), target.numpy())
    assert np.allclose((inputs @ weights + bias).numpy(), known.predict(scaled.numpy()))


def two_kinds(n: int, *, seed: int, noise: float = 0.0) -> ExitTable:
    """A half of the prompts is right at layer 10, the other half at the end only.

    The feature says which, with noise; the confidence says nothing.
    """
    generator = torch.Generator().manual_seed(seed)
    easy = torch.arange(n) % 2 == 0
    right = easy.expand(2, n)
    table = made(torch.rand(2, n, generator=generator), right)
    feature = easy.double() + noise * torch.randn(2, n, generator=generator)
    return replace(table, features=feature[..., None].float())


def test_backward_regression_finds_the_optimum() -> None:
    training, new = two_kinds(100, seed=0), two_kinds(100, seed=1)
    gates = fit_gates(training, loss="wrong", costs=[0.01, 0.3, 3.0])
    careful, good, hasty = gates.policies
    trace = new.simulate(good)
    easy = torch.arange(100) % 2 == 0
    # Checking once suffices: the hard prompts are known at layer 10, and go to the end.
    assert good.layers == (10,)
    assert (trace.exit_layer == torch.where(easy, 10, 30)).all()
    # It is worth 2/3 of the FLOPs for an eighth of them at .01 too, but not at 3: all leave.
    assert new.simulate(careful).accuracy == 1
    assert not hasty.reads
    assert hasty.layers == (10,)
    assert new.simulate(hasty).flops.unique().tolist() == [12]


def test_the_value_is_that_of_new_prompts() -> None:
    # In-sample values of many inputs on few rows would be too good.
    generator = torch.Generator().manual_seed(0)
    values, real = [], []
    for seed in range(16):
        training, new = (two_kinds(60, seed=s, noise=1.0) for s in (seed, seed + 1000))
        noisy = [
            replace(
                t, features=torch.cat([t.features, torch.randn(2, 60, 8, generator=generator)], -1)
            )
            for t in (training, new)
        ]
        rows = gate_rows(noisy[0], "wrong")
        fold = rows.folds(5, torch.Generator().manual_seed(seed))
        [rule] = stopping_rules(rows, [0.5], fold)
        values.append(rule.value)
        gates = fit_gates(noisy[0], loss="wrong", costs=[0.5], seed=seed)
        trace = noisy[1].simulate(gates.policies[0])
        real.append(1 - trace.accuracy + 0.5 * float((trace.flops / trace.full_flops).mean()))
    gap = np.array(real) - np.array(values)
    assert abs(gap.mean()) < 0.03 + 2 * gap.std() / 16**0.5


@pytest.mark.parametrize("loss", ["wrong", "disagrees"])
def test_a_gate_of_noise_loses_no_more_than_noise(loss: Any) -> None:
    # Leaving at layer 10, for all, costs .3 + .5 x 12/31; the model's own answers are right.
    best = min(0.3 + 0.5 * 12 / 31, 0.15 + 0.5 * 22 / 31, 0.5)
    costs = []
    for seed in range(16):
        pair = []
        for s in (seed, seed + 100):
            generator = torch.Generator().manual_seed(s)
            right = torch.rand(2, 150, generator=generator) < torch.tensor([[0.7], [0.85]])
            table = made(torch.rand(2, 150, generator=generator), right)
            pair.append(replace(table, features=torch.randn(2, 150, 4, generator=generator)))
        gate = fit_gates(pair[0], loss=loss, costs=[0.5], seed=seed).policies[0]
        one = outcomes(pair[1], gate)
        costs.append(1 - one.accuracy + 0.5 * one.compute)
    error = np.std(costs) / len(costs) ** 0.5
    assert np.mean(costs) - best < 0.015 + 2 * error


def test_one_layer_and_no_features_suffice() -> None:
    table = two_kinds(60, seed=0)
    one = replace(
        table,
        layers=(10,),
        confidence=table.features[:1, :, 0],
        features=torch.empty(1, 60, 0),
        check_answer=table.check_answer[:1],
        exit_answer=table.exit_answer[:1],
        logprobs=torch.empty(2, 60, 0),
        prices=replace(
            table.prices,
            stops=(10, 30),
            **{
                name: getattr(table.prices, name)[[0, 2]]
                for name in ("trunk", "answer", "answer_tokens")
            },
            check=table.prices.check[:1],
            check_tokens=table.prices.check_tokens[:1],
        ),
    )
    trace = one.simulate(fit_gates(one, loss="wrong", costs=[0.3]).policies[0])
    assert trace.accuracy == 1
    assert trace.speedup > 1


@pytest.mark.parametrize("kind", KINDS)
def test_the_seed_decides(kind: Any, tables: list[ExitTable]) -> None:
    given: dict[str, Any] = {"loss": "disagrees", "costs": [0.5]}
    one, again, other = (fit_gates(tables[1], kind, seed=s, **given).policies[0] for s in (0, 0, 1))
    assert torch.equal(one.weights, again.weights)
    assert kind == "stopping" or not torch.equal(one.weights, other.weights)


# Saved


@pytest.mark.parametrize("kind", KINDS)
def test_saved_gates_are_the_same(
    kind: Any, tables: list[ExitTable], tiny_llama: Model, tmp_path: Path
) -> None:
    gates = fit_gates(tables, kind, loss="disagrees", costs=[0.3, 2])
    assert len(gates.policies) == 4
    loaded = load_gates(gates.save(tmp_path / "gates", tiny_llama), tiny_llama)
    assert torch.equal(loaded.identity, gates.identity)
    assert loaded.about == gates.about
    assert repr(loaded) == repr(gates)
    for one, other in zip(gates.policies, loaded.policies, strict=True):
        assert (one.name, one.rule, one.layers, one.reads) == (
            *(other.name, other.rule, other.layers, other.reads),
        )
        assert one.made_for == other.made_for
        assert torch.equal(one.weights, other.weights)
        assert torch.equal(one.bias, other.bias)


def test_files_of_another_model_or_damaged_ones_are_refused(
    tables: list[ExitTable], tiny_llama: Model, tmp_path: Path
) -> None:
    gates = fit_gates(tables[0], loss="disagrees", costs=[1])
    with torch.random.fork_rng():
        torch.manual_seed(7)
        other = load(tiny("gpt2"), tokenizer=tiny_tokenizer(), name="other")
        twin = load(tiny("gpt2"), tokenizer=tiny_tokenizer(), name="tiny-llama")
    with pytest.raises(ValueError, match="expected tiny-llama"):
        gates.save(tmp_path, other)
    gates.save(tmp_path, tiny_llama)
    with pytest.raises(ValueError, match="belongs to 'tiny-llama'"):
        load_gates(tmp_path, twin)
    about = json.loads((tmp_path / "gates.json").read_text())
    about["gates"][0]["name"] = "a better one"
    (tmp_path / "gates.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match=r"gates\.json"):
        load_gates(tmp_path, tiny_llama)
    with pytest.raises(FileNotFoundError):
        load_gates(tmp_path / "nowhere", tiny_llama)


# Refused


def without(table: ExitTable, **changes: Any) -> ExitTable:
    return replace(table, **changes)


def spoilt(values: torch.Tensor, by: float) -> torch.Tensor:
    values = values.clone()
    values.view(-1)[0] = by
    return values


WRONG: dict[str, tuple[Callable[[ExitTable], Any], str]] = {
    "no table": (lambda t: [], "at least one exit table"),
    "few prompts": (lambda t: t.of(range(19)), "expected at least 20 prompts"),
    "no targets": (
        lambda t: without(t, right_option=torch.full_like(t.right_option, -1)),
        "loss='disagrees', which needs no target",
    ),
    "no candidates": (lambda t: without(t, logprobs=t.logprobs[..., :0]), "0 of the 60 prompts"),
    "NaN": (lambda t: without(t, features=spoilt(t.features, float("nan"))), "1 features of"),
    "infinite": (
        lambda t: without(t, confidence=spoilt(t.confidence, torch.inf)),
        "1 confidences of",
    ),
    "two of one check": (lambda t: [t, t], "expected one for each"),
    "two models": (lambda t: [t, without(t, model="b", keep="x")], "expected one model"),
}


@pytest.mark.parametrize("case", WRONG)
def test_tables_that_teach_nothing_are_refused(case: str, tables: list[ExitTable]) -> None:
    spoil, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        fit_gates(spoil(tables[0]))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"costs": []}, "cost weights above 0"),
        ({"costs": [0.0, 1.0]}, "cost weights above 0"),
        ({"costs": [1.0, 1.0]}, "names one weight twice"),
        ({"folds": 1}, "folds=1"),
        ({"folds": 61}, "folds=61"),
        ({"kind": "jei"}, r"Confidence\(lens, features=gate_features\)"),
    ],
)
def test_other_arguments_are_checked(
    given: dict[str, Any], message: str, tables: list[ExitTable]
) -> None:
    table = tables[0]
    if "kind" in given:
        table = replace(table, features=table.features[..., :0])
    with pytest.raises(ValueError, match=message):
        fit_gates(table, **given)


def test_gates_refuse_what_they_were_not_fitted_for(
    tiny_llama: Model, spade: Spade, checks: list[Confidence], tables: list[ExitTable]
) -> None:
    gates = fit_gates(tables[1], "jei", loss="disagrees", costs=[0.5])
    [gate] = gates.policies
    with pytest.raises(ValueError, match="fitted for {'check'"):
        tables[0].simulate(gate)
    with pytest.raises(ValueError, match="fitted for {'check'"):
        SpadeExit(tiny_llama, checks[0], gate, answerer=spade, layers=LAYERS)
    with pytest.raises(ValueError, match="fitted for {'keep'"):
        SpadeExit(tiny_llama, checks[1], gate, answerer=Spade(tiny_llama), layers=LAYERS)
    with pytest.raises(ValueError, match="candidate layers are 2, 3"):
        SpadeExit(tiny_llama, checks[1], gate, answerer=spade, layers=[2, 3])
    bare = Confidence(spade)
    engine = SpadeExit(tiny_llama, bare, gate, answerer=spade, layers=LAYERS)
    with pytest.raises(ValueError, match="Checks with 0 features"):
        engine.run("ab")
    with pytest.raises(ValueError, match="share 60 prompts"):
        gates(tables[1])
    other = replace(tables[1], model="another", identity=tables[1].identity + 1)
    with pytest.raises(ValueError, match="this table is of another"):
        gates(other)
    assert isinstance(gates, Gates)
    assert gates(replace(tables[0], identity=tables[0].identity + 1)) == ()
