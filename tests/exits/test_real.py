"""The same exactness on SmolLM2-135M, with the word-pair prompts that the readings are made on."""

import pytest
import torch

from spade_lens import Keep, LogitLens, Model, Spade, tasks
from spade_lens.exits import (
    Confidence,
    FixedLayer,
    SpadeExit,
    Threshold,
    exit_tables,
)
from spade_lens.exits.costs import flop_counter

pytestmark = pytest.mark.download
LAYERS = [18, 24, 27]


def test_engine_simulation_and_torchs_counter_agree(smollm2: Model) -> None:
    prompts = tasks.task("present-past").prompts(smollm2.tokenizer, 6, shots=4)
    spade = Spade(smollm2, keep=Keep(spans=("query", "labels")))
    confidence = Confidence(LogitLens(smollm2), "margin")
    [table] = exit_tables(smollm2, prompts, confidence, answerers=spade, layers=LAYERS)
    ordered = table.confidence.flatten().double().sort().values
    widest = int(ordered.diff().argmax())
    policy = Threshold(float(ordered[widest : widest + 2].mean()))
    engine = SpadeExit(smollm2, confidence, policy, answerer=spade, layers=LAYERS)
    with flop_counter() as counter:
        trace = engine.run(prompts)
    expected = table.simulate(policy)
    assert len(set(trace.exit_layer.tolist())) >= 2
    for name in ("exit_layer", "answer", "checks", "layer_tokens", "flops", "full_flops"):
        assert torch.equal(getattr(trace, name), getattr(expected, name)), name
    assert int((trace.flops + trace.flops_padding).sum()) == counter.get_total_flops()


def test_a_fixed_layer_is_spades_table(smollm2: Model) -> None:
    prompts = tasks.task("present-past").prompts(smollm2.tokenizer, 4, shots=4)
    [table] = exit_tables(smollm2, prompts, LogitLens(smollm2), layers=[24])
    trace = SpadeExit(smollm2, None, FixedLayer(24), layers=[24]).run(prompts)
    assert torch.equal(trace.answer, table.exit_answer[0])
