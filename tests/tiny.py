"""Tiny models of random weights, one of every family that must work, for exactness tests."""

from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import torch
import transformers as hf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from spade_lens.prompts.prompt import Prompt

D_VOCAB = 97
_LLAMA: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": D_VOCAB,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GPT: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "vocab_size": D_VOCAB,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GEMMA = {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 5}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_DEEPSEEK = {
    **_LLAMA,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "head_dim": 8,
    "first_k_dense_replace": 1,
}
_ALTERNATING = ["sliding_attention", "full_attention"] * 2

TL39 = version("transformer-lens") < "4"
"""Whether TransformerLens is 3.9, whose bridges do less."""

ARCHITECTURES: dict[str, Callable[[], Any]] = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_LLAMA)),
    "llama-eager": lambda: hf.LlamaForCausalLM(
        hf.LlamaConfig(**_LLAMA, attn_implementation="eager")
    ),
    "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**_GPT)),
    "gpt-neox": lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**_GPT, intermediate_size=48)),
    "opt": lambda: hf.OPTForCausalLM(
        hf.OPTConfig(**_GPT, ffn_dim=48, word_embed_proj_dim=32, pad_token_id=0)
    ),
    "mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**_LLAMA, sliding_window=5)),
    "qwen2": lambda: hf.Qwen2ForCausalLM(
        hf.Qwen2Config(**_LLAMA, use_sliding_window=True, sliding_window=5, max_window_layers=2)
    ),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**_LLAMA, head_dim=8)),
    "gemma2": lambda: hf.Gemma2ForCausalLM(
        # Caps small enough to bite on random weights.
        hf.Gemma2Config(
            **_LLAMA,
            **_GEMMA,
            attn_logit_softcapping=0.5,
            final_logit_softcapping=0.5,
            attn_implementation="eager",
        )
    ),
    "gemma3": lambda: hf.Gemma3ForCausalLM(
        hf.Gemma3TextConfig(**_LLAMA, **_GEMMA, layer_types=_ALTERNATING)
    ),
    "phi3": lambda: hf.Phi3ForCausalLM(hf.Phi3Config(**_LLAMA, sliding_window=5)),
    "mixtral": lambda: hf.MixtralForCausalLM(
        hf.MixtralConfig(**_LLAMA, num_local_experts=4, num_experts_per_tok=2)
    ),
    "deepseek-v3": lambda: hf.DeepseekV3ForCausalLM(
        hf.DeepseekV3Config(**_DEEPSEEK, n_group=2, topk_group=1)
    ),
    "gpt-oss": lambda: hf.GptOssForCausalLM(
        hf.GptOssConfig(
            **_LLAMA, num_local_experts=4, num_experts_per_tok=2, head_dim=8, sliding_window=5
        )
    ),
}

MORE_ARCHITECTURES: dict[str, Callable[[], Any]] = ARCHITECTURES | {
    "gpt-neo": lambda: hf.GPTNeoForCausalLM(
        hf.GPTNeoConfig(
            hidden_size=32,
            num_layers=4,
            num_heads=4,
            vocab_size=D_VOCAB,
            window_size=5,
            max_position_embeddings=128,
            attention_types=[[["global", "local"], 2]],
            bos_token_id=1,
            eos_token_id=2,
        )
    ),
    "xglm": lambda: hf.XGLMForCausalLM(
        hf.XGLMConfig(
            d_model=32,
            num_layers=4,
            attention_heads=4,
            ffn_dim=48,
            vocab_size=D_VOCAB,
            max_position_embeddings=128,
            pad_token_id=0,
        )
    ),
    "qwen2-moe": lambda: hf.Qwen2MoeForCausalLM(
        hf.Qwen2MoeConfig(**_LLAMA, **_EXPERTS, shared_expert_intermediate_size=16)
    ),
    "qwen3-moe": lambda: hf.Qwen3MoeForCausalLM(
        hf.Qwen3MoeConfig(**_LLAMA, **_EXPERTS, head_dim=8)
    ),
    "olmoe": lambda: hf.OlmoeForCausalLM(hf.OlmoeConfig(**_LLAMA, **_EXPERTS)),
    "deepseek-v2": lambda: hf.DeepseekV2ForCausalLM(
        hf.DeepseekV2Config(**_DEEPSEEK, n_group=1, topk_group=1)
    ),
    "granite-moe": lambda: hf.GraniteMoeForCausalLM(
        hf.GraniteMoeConfig(
            **_LLAMA,
            num_local_experts=4,
            num_experts_per_tok=2,
            residual_multiplier=0.5,
            embedding_multiplier=2.0,
            logits_scaling=3.0,
            attention_multiplier=0.3,
        )
    ),
}
"""For the tests of loading and replay alone: the others take long enough."""


def tiny(name: str = "llama") -> Any:
    """A tiny Hugging Face model with weights large enough that attention is far from flat."""
    torch.manual_seed(0)
    model = MORE_ARCHITECTURES[name]().eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data *= 5
    return model


def tiny_tokenizer() -> Any:
    """A tokenizer of 97 tokens: three special ones and single characters, BOS not added."""
    characters = [chr(c) for c in range(33, 127)]  # 94 printable ones
    vocabulary = {t: i for i, t in enumerate(["<pad>", "<s>", "</s>", *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def spanned_prompts(n: int = 6) -> list[Prompt]:
    """Prompts of three lengths with the spans that keep sets name, and a target."""
    prompts = []
    for k in range(n):
        tokens = (1, *((7 * i + 5 * k) % 90 + 3 for i in range(11 + k % 3)))
        end = len(tokens)
        spans = {
            "labels": (2, 4, 6),
            "query": tuple(range(8, end - 1)),
            "demo0/output": (2,),
            "none": (),
        }
        prompts.append(Prompt(tokens=tokens, target=3, spans=spans))
    return prompts
