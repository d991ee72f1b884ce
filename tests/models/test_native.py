"""Bridges over TransformerLens' own small models: with a vocabulary, and of vectors."""

from typing import Any

import pytest
import torch
from tiny import TL39

import spade_lens as sl
from spade_lens.models.identity import identity_of
from spade_lens.training import InContextNetwork, InContextTask
from spade_lens.training.in_context.network import NetworkSize

pytestmark = pytest.mark.skipif(TL39, reason="TransformerLens 3.9 has no native models")

TASK = InContextTask(d_x=2, d_phi=2, examples=5)


@pytest.fixture(scope="module")
def network() -> InContextNetwork:
    return InContextNetwork(TASK, NetworkSize(3, 16, 2)).eval()


@pytest.mark.parametrize("positions", ["standard", "rotary"])
def test_a_model_with_a_vocabulary_is_read_as_any_other(positions: str) -> None:
    from transformer_lens.config import TransformerBridgeConfig
    from transformer_lens.model_bridge import TransformerBridge

    config: dict[str, Any] = {"n_layers": 2, "d_model": 16, "d_head": 8, "n_heads": 2, "n_ctx": 60}
    config |= {"d_vocab": 30, "act_fn": "gelu", "normalization_type": "LN", "seed": 0}
    config["positional_embedding_type"] = positions
    bridge = TransformerBridge.boot_native(TransformerBridgeConfig.from_dict(config)).eval()
    model = sl.load(bridge)
    assert (model.n_layers, model.d_vocab, model.n_ctx) == (2, 30, 60)
    tokens = torch.tensor([[3, 7, 9, 2]])
    resid = model.run_blocks(model.embed(tokens), torch.arange(4)[None], 0, 2)
    torch.testing.assert_close(model.logits(resid[0]), bridge(tokens)[0])
    prompt = sl.Prompt(tokens=(3, 7, 9, 2), target=5)
    frame = sl.read([prompt], ["logit", "spade"], model=model).to_frame()
    assert frame[frame["layer"] == 2]["agrees"].all()
    assert model.bridge is bridge
    with model.hooks([("blocks.0.attn.hook_pattern", lambda pattern, hook: pattern * 0)]):
        other = sl.read([prompt], ["logit"], model=model).to_frame()
    assert not other["entropy"].equals(frame[frame["lens"] == "logit lens"]["entropy"])


def test_a_model_of_vectors_runs_as_residuals(network: InContextNetwork) -> None:
    model = sl.load(network.bridge(), name="in context")
    drawn = TASK.draw(3, seed=0)
    stream = network.residuals(drawn)
    assert (model.n_ctx, model.n_layers, model.d_vocab) == (10, 3, 1)
    keep = [0, 3, 8]
    positions = torch.tensor(keep).expand(3, -1)
    with torch.no_grad():
        resid = model.run_blocks(stream[1][:, keep], positions, 1, 3)
        expected = network.run_blocks(stream[1][:, keep], 1, 3)
        torch.testing.assert_close(resid, expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(model.logits(stream[3][:, 8]), network(drawn)[:, -1])
    assert len(model.sha256) == 64


def test_what_needs_a_vocabulary_is_refused(network: InContextNetwork) -> None:
    model = sl.load(network.bridge(), name="in context")
    message = "in context reads vectors and gives 1 numbers: it has no vocabulary"
    for refused in (
        lambda: sl.read("text", model=model),
        lambda: sl.read([sl.Prompt(tokens=(1, 0))], model=model),
        lambda: sl.LogitLens(model),
        lambda: sl.Spade(model).model.prompts("text"),
        lambda: model.embed(torch.tensor([[0, 1]])),
        lambda: sl.generate([sl.Prompt(tokens=(1, 0))], 1, model=model),
    ):
        with pytest.raises(sl.UnsupportedModelError, match=message):
            refused()


@pytest.mark.parametrize("d", [1, 2, 3])
def test_no_network_of_vectors_passes_for_a_language_model(d: int) -> None:
    task = sl.training.InContextTask(d_x=d, d_phi=d, examples=3, form="dynamical")
    trained = InContextNetwork(task, NetworkSize(1, 8, 2)).eval()
    with pytest.raises(sl.UnsupportedModelError, match=f"gives {d} numbers"):
        sl.load(trained.bridge(), name="in context").embed(torch.tensor([[0, 1]]))


def test_networks_have_an_identity_by_their_weights(network: InContextNetwork) -> None:
    first, again = (identity_of(sl.load(network.bridge(), name="n")) for _ in range(2))
    assert first == again
    other = InContextNetwork(TASK, NetworkSize(3, 16, 2, seed=1)).eval()
    assert identity_of(sl.load(other.bridge(), name="n")) != first
