"""The TransformerLens bridge of a model: the same weights, made on first use."""

import pytest
import torch
import transformers as hf
from tiny import ARCHITECTURES, TL39, tiny, tiny_tokenizer

from spade_lens import Prompt, UnsupportedModelError, capture, load

TOKENS = torch.tensor([[1, 5, 60, 7]])


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_it_gives_the_logits_of_the_model(name: str) -> None:
    hf_model = tiny(name)
    model = load(hf_model)
    if TL39 and name == "deepseek-v3":
        with pytest.raises(UnsupportedModelError, match="has no bridge"):
            _ = model.bridge
        return
    expected = hf_model(TOKENS).logits
    torch.testing.assert_close(model.bridge(TOKENS), expected, atol=1e-4, rtol=0.0)


def test_a_bridge_that_is_another_model_is_refused() -> None:
    config = hf.FalconConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_kv_heads=2,
        new_decoder_architecture=True,
        vocab_size=97,
    )
    model = load(hf.FalconForCausalLM(config).eval(), name="falcon")
    says = "Hooks cannot act on falcon and it has no bridge, but all else works"
    for _ in range(2):
        with pytest.raises(UnsupportedModelError, match=says):
            _ = model.bridge
        with (
            pytest.raises(UnsupportedModelError, match=says),
            model.hooks([("blocks.1.hook_resid_post", lambda x, hook: x)]),
        ):
            pass
        capture(model, [Prompt((1, 5, 6))])


def test_hooks_on_modules_are_not_on_the_bridge() -> None:
    hf_model = tiny("llama")
    model = load(hf_model, name="x")
    handle = hf_model.model.layers[1].register_forward_hook(lambda _m, _a, out: out * 2)
    with pytest.raises(RuntimeError, match="registered on modules of x, and the bridge"):
        _ = model.bridge
    handle.remove()
    torch.testing.assert_close(model.bridge(TOKENS), hf_model(TOKENS).logits, atol=1e-4, rtol=0.0)


def test_it_shares_the_weights_and_is_made_once() -> None:
    tokenizer = tiny_tokenizer()
    hf_model = tiny("llama")
    modules = {name: id(module) for name, module in hf_model.named_modules()}
    model = load(hf_model, tokenizer=tokenizer)
    assert "_on_bridge" not in vars(model._visits.backbone)
    bridge = model.bridge
    assert model.bridge is bridge
    pointers = {p.data_ptr() for p in hf_model.parameters()}
    of_bridge = {p.data_ptr(): p for p in bridge.original_model.parameters()}
    assert pointers <= of_bridge.keys()
    # TransformerLens 3.9 gives an unembedding without a bias one of zeros; nothing else is new.
    assert not any(of_bridge[pointer].any() for pointer in of_bridge.keys() - pointers)
    assert {name: id(module) for name, module in hf_model.named_modules()} == modules
    assert bridge.to_str_tokens("ab", prepend_bos=False) == ["a", "b"]
    assert bridge.tokenizer is not tokenizer


def test_a_loaded_bridge_is_its_own() -> None:
    bridge = load(tiny("llama")).bridge
    assert load(bridge).bridge is bridge
