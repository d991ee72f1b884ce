"""A model that cannot be served is refused for its true reason."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from tiny import D_VOCAB, tiny

from spade_lens import UnsupportedModelError, load
from spade_lens.models.adapters import bridge_over


def nan(model: Any) -> Any:
    model.model.layers[2].mlp.up_proj.weight.data[3, 4] = torch.nan
    return model


def nan_in_a_row_that_no_probe_reads(model: Any) -> Any:
    model.model.embed_tokens.weight.data[96] = torch.inf
    return model


def one_part_in_training(model: Any) -> Any:
    model.model.layers[1].self_attn.attention_dropout = 0.1
    model.model.layers[1].train()
    return model


def a_dropout_in_training(model: Any) -> Any:
    model.model.layers[1].mlp.act_fn = torch.nn.Sequential(torch.nn.SiLU(), torch.nn.Dropout())
    return model


def dynamic_int8(model: Any) -> Any:
    return torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)


def another_head(model: Any) -> Any:
    model.lm_head = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.Linear(32, 97))
    return model


def wider_head(model: Any) -> Any:
    model.lm_head = torch.nn.Linear(32, 200)
    return model


def norm_in_single(model: Any) -> Any:
    model.bfloat16().model.norm.float()
    return model


def one_weight_on_meta(model: Any) -> Any:
    model.lm_head.to("meta")
    return model


@pytest.mark.filterwarnings("ignore:.*(quantiz|migrat).*")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (nan, r"NaN or infinite weights \(at model\.layers\.2\.mlp\.up_proj\.weight\)"),
        (nan_in_a_row_that_no_probe_reads, r"infinite weights \(at model\.embed_tokens\.weight\)"),
        (
            one_part_in_training,
            r"training mode \(dropout is on\) at model\.layers\.1\.self_attn\.",
        ),
        (a_dropout_in_training, r"training mode .* at model\.layers\.1\.mlp\.act_fn\.1\. Call"),
        (lambda model: model.train(), r"training mode .* at the whole model.*\.eval\(\)"),
        (lambda model: model.to("meta"), r"on the meta device"),
        (one_weight_on_meta, r"meta device, .*\(at lm_head\.weight\)"),
        (dynamic_int8, r"int8 quantisation .*range of a whole batch"),
        (lambda model: model.to(torch.float8_e4m3fn), r"weights of 8 bits \(torch\.float8_e4m3fn"),
        (another_head, r"unembedding of LlamaForCausalLM is a Sequential, without a matrix"),
        (wider_head, r"embedding of 97 tokens and an unembedding of 200"),
        (norm_in_single, r"weights are torch\.bfloat16 and torch\.float32; cast them to one"),
        (lambda model: model.model, r"LlamaModel is a base model, .* LlamaForCausalLM"),
    ],
)
def test_the_message_names_the_reason(change: Callable[[Any], Any], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        load(change(tiny("llama")))


def test_the_same_inside_a_bridge() -> None:
    bridge = bridge_over(nan(tiny("llama")))
    with pytest.raises(UnsupportedModelError, match="NaN or infinite weights"):
        load(bridge)


@pytest.mark.parametrize("kind", ["BertModel", "BertLMHeadModel", "T5ForConditionalGeneration"])
def test_what_looks_ahead_is_refused_for_that(kind: str) -> None:
    config: Any = hf.BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
    )
    if kind.startswith("T5"):
        config = hf.T5Config(d_model=32, num_layers=2, num_heads=4, d_ff=48)
    with pytest.raises(UnsupportedModelError, match=f"{kind} is not a causal language model"):
        load(getattr(hf, kind)(config).eval())


def test_a_multimodal_model_says_which_part_to_load() -> None:
    text = tiny("gemma3").config
    vision = hf.SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        image_size=28,
        patch_size=14,
    )
    config = hf.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=1)
    model = hf.Gemma3ForConditionalGeneration(config).eval()
    with pytest.raises(UnsupportedModelError, match="multimodal") as told:
        load(model)
    assert "its submodule model.language_model with the unembedding" in str(told.value)
    # What the message says to do gives the same logits.
    code = str(told.value).split("In code: ")[1].split("; load(text)")[0]
    names: dict[str, Any] = {"AutoModelForCausalLM": hf.AutoModelForCausalLM, "model": model}
    exec(code, names)
    tokens = torch.tensor([[1, 17, 4, 80, 9]])
    with torch.no_grad():
        torch.testing.assert_close(names["text"](tokens).logits, model(tokens).logits)
    assert load(names["text"]).d_vocab == D_VOCAB


def test_a_wrapper_says_where_the_model_is() -> None:
    wrapped = torch.nn.DataParallel(tiny("llama"))
    with pytest.raises(TypeError, match=r"wraps a LlamaForCausalLM. Give load\(\) .*: \.module\."):
        load(wrapped)
