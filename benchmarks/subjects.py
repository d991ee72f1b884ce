"""What is run side by side: spade_lens, plain Hugging Face, and the peers that are installed.

Every subject has a module tree of its own over the same weights: a bridge rebuilds the tree that
it wraps, so plain Hugging Face must not be measured on that.
"""

import copy
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import spade_lens as sl
from spade_lens import Settings
from spade_lens.models.masks import causal_mask

SEED = 0

Residuals = Callable[[], list[Tensor]]
"""Computes the residual stream [pos d_model] after every block."""


def random_prompt(model: sl.Model, n_tokens: int, seed: int = SEED) -> sl.Prompt:
    """The start token and random tokens; what they say makes no difference to the time."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, model.d_vocab, (n_tokens,), generator=generator).tolist()
    tokens[0] = model.tokenizer.bos_token_id
    return sl.Prompt(tokens=tuple(tokens))


def own_tree(hf_model: Any) -> Any:
    """A copy of the modules that shares the tensors."""
    shared = {id(t): t for t in (*hf_model.parameters(), *hf_model.buffers())}
    return copy.deepcopy(hf_model, shared)


# -- all residuals of a prompt


def ours_residuals(model: sl.Model, prompt: sl.Prompt) -> Residuals:
    return lambda: list(sl.capture(model, [prompt], settings=Settings(progress=False)).stack[1:])


def hugging_face_residuals(hf_model: Any, tokens: Tensor) -> Residuals:
    def run() -> list[Tensor]:
        out = hf_model(tokens, use_cache=False, output_hidden_states=True)
        # Hugging Face's last hidden state is after the final norm.
        return [h[0] for h in out.hidden_states[1:]]

    return run


def bridge_residuals(bridge: Any, tokens: Tensor) -> Residuals:
    def run() -> list[Tensor]:
        names = lambda name: name.endswith("hook_resid_post")  # noqa: E731
        _, cache = bridge.run_with_cache(tokens, names_filter=names, use_cache=False)
        return [cache[f"blocks.{i}.hook_resid_post"][0] for i in range(len(bridge.blocks))]

    return run


def nnsight_residuals(hf_model: Any, tokens: Tensor) -> Residuals:
    import nnsight

    wrapped = nnsight.NNsight(own_tree(hf_model))

    def run() -> list[Tensor]:
        with wrapped.trace(tokens, use_cache=False):
            saved = nnsight.save([layer.output for layer in wrapped.model.layers])
        return [h[0] for h in saved]

    return run


def make_bridge(model: sl.Model) -> Any:
    from transformer_lens.model_bridge import TransformerBridge

    return TransformerBridge.boot_transformers(
        model.name, hf_model=own_tree(model.original), tokenizer=model.tokenizer, device="cpu"
    )


def has(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


# -- blocks by hand


def blocks_by_hand(
    hf_model: Any, resid: Tensor, start: int, stop: int
) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """The blocks of a Llama called by hand at given positions.

    Returns:
        With mask and rotary tables made in every call, and with tables made once.
    """
    layers, rotary = hf_model.model.layers[start:stop], hf_model.model.rotary_emb
    made: dict[int, tuple[Tensor, tuple[Tensor, Tensor]]] = {}

    def tables(positions: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        return causal_mask(positions, dtype=resid.dtype), rotary(resid, positions)

    def run(positions: Tensor, mask: Tensor, cos_sin: tuple[Tensor, Tensor]) -> Tensor:
        h = resid
        for layer in layers:
            h = layer(h, attention_mask=mask, position_embeddings=cos_sin, position_ids=positions)
        return h

    def prepared(positions: Tensor) -> Tensor:
        if id(positions) not in made:
            made[id(positions)] = tables(positions)
        return run(positions, *made[id(positions)])

    return lambda positions: run(positions, *tables(positions)), prepared


# -- HookedTransformer, in transformer-lens 3.9


def make_hooked(hf_model: Any) -> nn.Module | None:
    """The same Llama as a ``HookedTransformer``; None in a transformer-lens that has none."""
    try:
        from transformer_lens import HookedTransformer, HookedTransformerConfig
        from transformer_lens.pretrained.weight_conversions import convert_llama_weights
    except ImportError:
        return None
    hf = hf_model.config
    cfg = HookedTransformerConfig(
        n_layers=hf.num_hidden_layers,
        d_model=hf.hidden_size,
        d_head=hf.hidden_size // hf.num_attention_heads,
        n_heads=hf.num_attention_heads,
        n_key_value_heads=hf.num_key_value_heads,
        d_mlp=hf.intermediate_size,
        d_vocab=hf.vocab_size,
        n_ctx=2048,
        act_fn="silu",
        gated_mlp=True,
        normalization_type="RMS",
        final_rms=True,
        eps=hf.rms_norm_eps,
        positional_embedding_type="rotary",
        rotary_dim=hf.hidden_size // hf.num_attention_heads,
        rotary_base=int(hf.rope_parameters["rope_theta"]),
        rotary_adjacent_pairs=False,
        original_architecture="LlamaForCausalLM",
        model_name="by hand",
        dtype=torch.float32,
        device="cpu",
    )
    hooked = HookedTransformer(cfg)
    hooked.load_and_process_state_dict(
        convert_llama_weights(hf_model, cfg),
        fold_ln=False,
        center_writing_weights=False,
        center_unembed=False,
        fold_value_biases=False,
    )
    return hooked.eval()
