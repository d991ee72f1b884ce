"""Windows are what the model does, however long; what is no window is refused."""

import time
from typing import Any

import pytest
import torch
import transformers as hf
from tiny import D_VOCAB, tiny

from spade_lens import Prompt, Spade, UnsupportedModelError, capture, load, read
from spade_lens.models.windows import window_of

LONG = Prompt(tokens=(1, *((7 * i * i + 3 * i) % 90 + 3 for i in range(399))))


@pytest.mark.parametrize(
    ("name", "windows"),
    [
        ("llama", [None] * 4),
        ("mistral", [5] * 4),
        ("qwen2", [None, None, 5, 5]),
        ("gemma2", [5, None, 5, None]),
        ("gpt-oss", [5, None, 5, None]),
        ("gpt-neo", [None, 5, None, 5]),
        ("deepseek-v3", [None] * 4),
    ],
)
def test_they_are_found(name: str, windows: list[int | None]) -> None:
    assert load(tiny(name))._visits.backbone._windows == windows


def long_gpt_neo(window: int = 256) -> Any:
    torch.manual_seed(0)
    config = hf.GPTNeoConfig(
        hidden_size=32,
        num_layers=4,
        num_heads=4,
        vocab_size=D_VOCAB,
        window_size=window,
        max_position_embeddings=600,
        attention_types=[[["global", "local"], 2]],
    )
    model = hf.GPTNeoForCausalLM(config).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data *= 15
    return model


@pytest.mark.parametrize("kept", [[0, 397, 399], [0, 143, 144, 399], [0, 100, 300, 399]])
def test_a_local_window_is_one_of_positions(kept: list[int]) -> None:
    hf_model = long_gpt_neo()
    model = load(hf_model)
    resid = capture(model, [LONG]).at(0)[1][kept][None]
    at = torch.tensor(kept)
    lowest = torch.finfo(torch.float32).min
    causal = torch.full((len(kept), len(kept)), lowest).triu(1)[None, None]
    local = causal.masked_fill(at[:, None] - at[None] >= 256, lowest)
    with torch.no_grad():
        for i in (1, 2, 3):
            out = hf_model.transformer.h[i](resid, attention_mask=local if i % 2 else causal)
            resid = out[0] if isinstance(out, tuple) else out
        expected = hf_model.lm_head(hf_model.transformer.ln_f(resid))[0, -1].log_softmax(-1)
    lens = Spade(model, keep=lambda prompt, answer: kept)
    readout = read([LONG], lens, layers=[1], top_k=D_VOCAB)
    ids, logprobs = readout.top_tokens[0, 0, 0], readout.top_logprobs[0, 0, 0]
    torch.testing.assert_close(logprobs, expected[ids], atol=1e-4, rtol=0.0)


def test_blocks_that_cut_by_order_get_no_cached_tokens() -> None:
    # Holes among cached tokens would count as tokens there.
    assert load(tiny("gpt-neo"))._visits.backbone.prefix(1) is None
    assert load(tiny("mistral"))._visits.backbone.prefix(1) is not None


def test_a_window_that_no_setting_names_is_refused() -> None:
    hf_model = long_gpt_neo(200)
    hf_model.config.window_size = 300
    with pytest.raises(UnsupportedModelError, match=r"Block 1 .* does not attend to all"):
        load(hf_model)


def test_the_mask_counts_and_not_the_settings_of_each_block() -> None:
    hf_model = tiny("gemma2")
    hf_model.config.sliding_window = 9  # masks are made of it, attention modules still say 5
    assert load(hf_model)._visits.backbone._windows == [9, None, 9, None]


def test_chunks_are_refused() -> None:
    order = torch.arange(12)
    chunks = (order[:, None] >= order) & (order[:, None] // 4 == order // 4)
    with pytest.raises(UnsupportedModelError, match="in another way than by the last few tokens"):
        window_of(chunks[None, None], 12, "x")
    window = (order[:, None] >= order) & (order[:, None] - order < 4)
    assert window_of(window[None, None], 12, "x") == 4
    assert window_of(window.float()[None, None] - 1, 12, "x") == 4
    config = hf.Llama4TextConfig(
        hidden_size=32,
        intermediate_size=48,
        intermediate_size_mlp=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=D_VOCAB,
        head_dim=8,
        num_local_experts=2,
        attention_chunk_size=64,
        pad_token_id=0,
    )
    with pytest.raises(UnsupportedModelError, match="chunked_attention"):
        load(hf.Llama4ForCausalLM(config).eval())


def test_long_windows_are_proven_quickly() -> None:
    config = tiny("mistral").config
    config.sliding_window, config.max_position_embeddings = 4096, 32768
    model = hf.MistralForCausalLM(config).eval()
    start = time.perf_counter()
    assert load(model)._visits.backbone._windows == [4096] * 4
    assert time.perf_counter() - start < 20
    config.sliding_window = 20_000  # longer than what is looked at: longer prompts are refused
    model = hf.MistralForCausalLM(config).eval()
    assert load(model).n_ctx == 8194


def test_rows_that_see_each_other_are_refused() -> None:
    hf_model = tiny("llama")
    mlp = hf_model.model.layers[1].mlp
    mlp.act_fn = type("Mixing", (torch.nn.Module,), {"forward": lambda _, x: x - x.mean(0)})()
    mlp.eval()
    with pytest.raises(UnsupportedModelError, match="on two plain prompts differ"):
        load(hf_model)


def test_blocks_that_get_something_made_of_the_tokens_are_refused() -> None:
    config = hf.Gemma4TextConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=D_VOCAB,
        head_dim=8,
        sliding_window=16,
        vocab_size_per_layer_input=D_VOCAB,
        hidden_size_per_layer_input=8,
        num_kv_shared_layers=0,
        pad_token_id=0,
    )
    with pytest.raises(UnsupportedModelError, match="Gemma4ForCausalLM"):
        load(hf.Gemma4ForCausalLM(config).eval())
