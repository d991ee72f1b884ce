"""The engine stops, and is exactly the simulation, the lens and the model."""

import warnings
from collections import Counter
from dataclasses import fields, replace
from inspect import unwrap  # past the type checks that run in tests only
from itertools import pairwise
from typing import Any

import pytest
import torch
from reference import watch_blocks
from tiny import ARCHITECTURES, D_VOCAB, tiny

from spade_lens import Keep, LogitLens, Model, Prompt, Settings, Spade, load, read
from spade_lens.exits import (
    Confidence,
    ExitTrace,
    ExitWarning,
    FixedLayer,
    Oracle,
    Patience,
    Policy,
    SpadeExit,
    Threshold,
    exit_tables,
)
from spade_lens.exits.costs import flop_counter


def some_prompts(*, candidates: bool = False, equal: bool = False) -> list[Prompt]:
    """Ragged (or equal) lengths, two start tokens, an answer position before the end."""
    lengths = [12] * 6 if equal else [5, 14, 9, 3, 22, 9]
    prompts = []
    for k, n in enumerate(lengths):
        tokens = (2 if k == 4 and not equal else 1, *((7 * i + 5 * k) % 90 + 3 for i in range(n)))
        prompts.append(
            Prompt(
                tokens=tokens,
                answer=-2 if k == 2 and not equal else -1,
                target=5 + k,
                candidates=(5, 6, 7, 40 + k) if candidates else (),
                spans={"labels": (1, 2)},
            )
        )
    return prompts


LAYERS = [1, 2, 3]


@pytest.fixture(scope="module", params=list(ARCHITECTURES))
def any_model(request: pytest.FixtureRequest) -> Model:
    return load(tiny(request.param), name=request.param)


def typical(model: Model, prompts: list[Prompt], confidence: Confidence) -> float:
    """The threshold with which prompts leave at most layers, not too near any confidence."""
    [table] = exit_tables(model, prompts, confidence, layers=LAYERS)
    ordered = table.confidence.flatten().double().sort().values
    found = [float((low + high) / 2) for low, high in pairwise(ordered) if high - low > 1e-3 * high]
    return max(found, key=lambda v: len(set(table.simulate(Threshold(v)).exit_layer.tolist())))


def same(one: ExitTrace, other: ExitTrace) -> None:
    for field in fields(one):
        if field.name not in ("seconds", "flops_padding"):
            a, b = getattr(one, field.name), getattr(other, field.name)
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, field.name


@pytest.mark.parametrize("candidates", [False, True], ids=["vocabulary", "candidates"])
def test_engine_equals_simulation(any_model: Model, candidates: bool) -> None:
    prompts = some_prompts(candidates=candidates)
    spade = Spade(any_model, keep=Keep(spans=("labels",)))
    for lens in (LogitLens(any_model), spade):
        confidence = Confidence(lens, "margin")
        value = typical(any_model, prompts, confidence)
        [table] = exit_tables(any_model, prompts, confidence, answerers=spade, layers=LAYERS)
        policies: list[Policy] = [
            Threshold(value),
            Threshold({1: value, 3: 0.0}),
            Patience(2),
            FixedLayer(2),
        ]
        for policy in policies:
            engine = SpadeExit(any_model, confidence, policy, answerer=spade, layers=LAYERS)
            same(engine.run(prompts), table.simulate(policy))


def test_prompts_leave_at_several_layers(tiny_llama: Model) -> None:
    # Otherwise the test above would compare little.
    prompts = some_prompts()
    confidence = Confidence(LogitLens(tiny_llama), "margin")
    policy = Threshold(typical(tiny_llama, prompts, confidence))
    trace = SpadeExit(tiny_llama, confidence, policy, layers=LAYERS).run(prompts)
    assert len(set(trace.exit_layer.tolist())) >= 3


def test_never_exiting_is_the_full_model(any_model: Model) -> None:
    prompts = some_prompts()
    with pytest.warns(ExitWarning, match="never exits"):
        engine = SpadeExit(any_model, LogitLens(any_model), Threshold(torch.inf), layers=LAYERS)
    trace = engine.run(prompts)
    assert trace.exit_layer.tolist() == [any_model.n_layers] * len(prompts)
    with torch.no_grad():
        expected = [
            int(any_model.original(torch.tensor([p.tokens])).logits[0, p.answer].argmax())
            for p in prompts
        ]
    assert trace.answer.tolist() == expected
    assert trace.speedup == 1
    assert trace.checks.tolist() == [0] * len(prompts)


def test_a_fixed_layer_is_the_lens_read_there(any_model: Model) -> None:
    prompts = some_prompts()
    for spade in (Spade(any_model), Spade(any_model, keep=Keep(last=3)), LogitLens(any_model)):
        readout = read(prompts, spade, layers=[2])
        engine = SpadeExit(any_model, None, FixedLayer(2), answerer=spade, layers=[2])
        assert engine.run(prompts).answer.tolist() == readout.top_tokens[0, 0, :, 0].tolist()


def test_answers_are_candidates(tiny_llama: Model) -> None:
    prompts = some_prompts(candidates=True)
    trace = SpadeExit(tiny_llama, LogitLens(tiny_llama), Threshold(0.5), layers=LAYERS).run(prompts)
    assert all(int(a) in p.candidates for a, p in zip(trace.answer, prompts, strict=True))
    readout = read(prompts, Spade(tiny_llama), layers=[2])
    best = readout.candidates.gather(
        1, readout.candidate_logprobs[0, 0].argmax(dim=-1, keepdim=True)
    )
    fixed = SpadeExit(tiny_llama, None, FixedLayer(2), layers=[2]).run(prompts)
    assert fixed.answer.tolist() == best[:, 0].tolist()


def test_batch_equals_single_and_order_does_not_matter(any_model: Model) -> None:
    prompts = some_prompts()
    confidence = Confidence(LogitLens(any_model), "margin")
    policy = Threshold(typical(any_model, prompts, confidence))
    whole = SpadeExit(any_model, confidence, policy, layers=LAYERS).run(prompts)
    engine = SpadeExit(any_model, confidence, policy, layers=LAYERS)
    alone = engine.run(prompts, settings=Settings(batch_size=1))
    same(whole, alone)
    assert alone.flops_padding.tolist() == [0] * len(prompts)
    order = [3, 0, 5, 1, 4, 2]
    shuffled = SpadeExit(any_model, confidence, policy, layers=LAYERS).run(
        [prompts[i] for i in order]
    )
    assert shuffled.answer.tolist() == whole.answer[order].tolist()
    assert shuffled.exit_layer.tolist() == whole.exit_layer[order].tolist()
    assert shuffled.flops.tolist() == whole.flops[order].tolist()


class Seen:
    """Counts calls of every block and the tokens they see, without a hook."""

    def __init__(self, engine: SpadeExit, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: Counter[int] = Counter()
        self.tokens: Counter[int] = Counter()
        watch_blocks(monkeypatch, engine.setup.model.original, self.count)
        _ = engine.setup.costs  # the model sees that, and is checked and measured anew
        self.calls.clear()
        self.tokens.clear()

    def count(self, index: int, resid: torch.Tensor) -> None:
        self.calls[index] += 1
        self.tokens[index] += resid.shape[0] * resid.shape[1]


@pytest.mark.parametrize("times", [1, 4])
def test_nothing_above_the_exit_sees_a_dropped_token(
    tiny_llama: Model, times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = some_prompts(equal=True) * times
    n, length = len(prompts), len(prompts[0])
    # Where there are many prompts the start token runs once, alone, and is not charged.
    alone, kept = (1, 1) if n >= 16 else (0, 2)
    engine = SpadeExit(tiny_llama, None, FixedLayer(2), layers=[2])
    seen = Seen(engine, monkeypatch)
    trace = engine.run(prompts)
    assert seen.calls == {block: 1 + alone for block in range(4)}
    assert seen.tokens == {0: n * length + alone, 1: n * length + alone} | {
        block: n * kept + alone for block in (2, 3)
    }
    assert int(trace.layer_tokens.sum()) == sum(seen.tokens.values()) - 4 * alone


def test_the_batch_shrinks_as_prompts_leave(
    tiny_llama: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = some_prompts(equal=True)
    n, length = len(prompts), len(prompts[0])
    confidence = Confidence(LogitLens(tiny_llama), "margin")
    policy = Threshold(typical(tiny_llama, prompts, confidence))
    engine = SpadeExit(tiny_llama, confidence, policy, layers=LAYERS)
    seen = Seen(engine, monkeypatch)
    trace = engine.run(prompts)
    left = Counter(trace.exit_layer.tolist())
    assert 0 < left[4] < n
    expected = {
        block: sum(length if exit_layer > block else 2 for exit_layer in trace.exit_layer.tolist())
        for block in range(4)
    }
    assert dict(seen.tokens) == expected
    assert int(trace.layer_tokens.sum()) == sum(expected.values())


def test_a_ragged_batch_gets_narrower(tiny_llama: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    long, short = some_prompts()[4], some_prompts()[0]

    class LongLeaves:
        name = "the long one leaves"
        reads = False

        def stops(self, layers: Any) -> tuple[int, ...]:
            return (1,)

        def leaves(self, checks: Any) -> torch.Tensor:
            # Batches are sorted by length.
            return torch.tensor([False, True])

    engine = SpadeExit(tiny_llama, None, LongLeaves(), layers=[1])
    seen = Seen(engine, monkeypatch)
    trace = engine.run([long, short])
    assert trace.exit_layer.tolist() == [1, 4]
    assert seen.tokens[0] == 2 * len(long)
    assert [seen.tokens[b] for b in (1, 2, 3)] == [len(short) + 2] * 3


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt-neox", "gemma2"])
def test_flops_are_those_torch_counts(name: str) -> None:
    model = load(tiny(name))
    # Another start token and a longer query, so that the tails are padded and come in two groups.
    prompts = some_prompts(candidates=True)[:4] + some_prompts()[4:]
    prompts[1] = replace(prompts[1], spans={"labels": (1, 2, 5, 6)})
    spade = Spade(model, keep=Keep(spans=("labels",)))
    for confidence in (Confidence(LogitLens(model), "margin"), Confidence(spade, "margin")):
        policy = Threshold(typical(model, prompts, confidence))
        # Checks by SPADE are padded too, which no column holds: run those one by one.
        batch_size = 1 if confidence.lens is spade else None
        engine = SpadeExit(model, confidence, policy, answerer=spade, layers=LAYERS)
        with flop_counter() as counter:
            trace = engine.run(prompts, settings=Settings(batch_size=batch_size))
        assert int((trace.flops + trace.flops_padding).sum()) == counter.get_total_flops()
        assert bool(trace.flops_padding.any()) is (batch_size is None)


def test_the_full_models_flops_are_those_of_hugging_face(any_model: Model) -> None:
    prompts = some_prompts(equal=True)[:2]
    trace = SpadeExit(any_model, None, FixedLayer(2), layers=[2]).run(prompts)
    tokens = torch.tensor([p.tokens for p in prompts])
    with torch.no_grad(), flop_counter() as counter:
        any_model.original(tokens, use_cache=False)
    # Hugging Face unembeds every position; the ledger only the answer's.
    spare = len(prompts) * (tokens.shape[1] - 1) * 2 * any_model.d_model * D_VOCAB
    assert int(trace.full_flops.sum()) == pytest.approx(counter.get_total_flops() - spare, rel=1e-6)


def test_seconds_are_the_runs(tiny_llama: Model) -> None:
    trace = SpadeExit(tiny_llama, LogitLens(tiny_llama), Threshold(0.9), layers=LAYERS).run(
        some_prompts()
    )
    assert bool((trace.seconds > 0).all())


def test_trace_as_a_table(tiny_llama: Model) -> None:
    prompts = some_prompts()
    prompts[1] = replace(prompts[1], target=None, target_tokens=())
    frame = SpadeExit(tiny_llama, None, FixedLayer(2), layers=[2]).run(prompts).to_frame()
    assert frame["correct"].isna().tolist() == [False, True, False, False, False, False]
    assert (frame["flops"] < frame["full_flops"]).all()
    assert frame["early"].all()


def test_clear_errors(tiny_llama: Model) -> None:
    lens = LogitLens(tiny_llama)
    with pytest.raises(TypeError, match="simulate"):
        unwrap(SpadeExit.__init__)(object.__new__(SpadeExit), tiny_llama, lens, Oracle())
    with pytest.raises(ValueError, match="reads a lens; give one"):
        SpadeExit(tiny_llama, None, Threshold(0.5))
    with pytest.raises(ValueError, match="own output"):
        SpadeExit(tiny_llama, lens, Threshold(0.5), layers=[2, 4])
    with pytest.raises(ValueError, match=r"candidate layers \[1, 2\]"):
        SpadeExit(tiny_llama, None, FixedLayer(3), layers=[1, 2])
    with pytest.raises(ValueError, match=r"thresholds for layers \[3\]"):
        SpadeExit(tiny_llama, lens, Threshold({3: 0.5}), layers=[1, 2])
    other = load(tiny("gpt2"), name="another")
    with pytest.raises(ValueError, match="different models .another, tiny-llama"):
        SpadeExit(tiny_llama, LogitLens(other), Threshold(0.5))
    engine = SpadeExit(tiny_llama, Confidence(lens, over="candidates"), Threshold(0.5))
    with pytest.raises(ValueError, match="prompt 0 has no candidates"):
        engine.run(some_prompts())


def test_patience_longer_than_the_candidates_never_exits(tiny_llama: Model) -> None:
    with pytest.warns(ExitWarning, match="never exits"):
        SpadeExit(tiny_llama, LogitLens(tiny_llama), Patience(4), layers=LAYERS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SpadeExit(tiny_llama, LogitLens(tiny_llama), Patience(3), layers=LAYERS)
