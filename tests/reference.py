"""Reference runs for exactness tests: the Hugging Face blocks called by hand, one row at a time.

Written without the library's masks, batching, prefixes or recorders: keyword arguments of each
family's block are spelled out here.
"""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor


def blocks_of(hf_model: Any) -> Any:
    base = hf_model.base_model
    base = getattr(base, "decoder", base)
    return getattr(base, "layers", None) or base.h


def watch_blocks(
    monkeypatch: pytest.MonkeyPatch, hf_model: Any, seen: Callable[[int, Tensor], None]
) -> None:
    """Call ``seen`` with (block, residual) whenever a block has run to its end, without a hook.

    With hooks on its modules a model runs in another way: nothing is shared among prompts.
    """
    blocks = list(blocks_of(hf_model))
    forward = type(blocks[0]).forward

    def watched(block: Any, *args: Any, **kwargs: Any) -> Any:
        out = forward(block, *args, **kwargs)
        index = next((i for i, known in enumerate(blocks) if known is block), None)
        if index is not None:
            seen(index, args[0] if args else kwargs["hidden_states"])
        return out

    monkeypatch.setattr(type(blocks[0]), "forward", watched)


@torch.no_grad()
def hidden_states(hf_model: Any, tokens: Sequence[int]) -> list[Tensor]:
    """The residual stream [pos d_model] at every layer, by plain forward hooks."""
    stream: list[Tensor] = []
    blocks = blocks_of(hf_model)

    def before(_module: Any, args: Any, kwargs: Any) -> None:
        stream.append((args[0] if args else kwargs["hidden_states"])[0].clone())

    def after(_module: Any, _args: Any, out: Any) -> None:
        stream.append((out[0] if isinstance(out, tuple) else out)[0].clone())

    handles = [blocks[0].register_forward_pre_hook(before, with_kwargs=True)]
    handles += [block.register_forward_hook(after) for block in blocks]
    try:
        hf_model(torch.tensor([tokens]), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return stream


@torch.no_grad()
def logits(hf_model: Any, tokens: Sequence[int]) -> Tensor:
    """The model's own logits [pos d_vocab]."""
    return hf_model(torch.tensor([tokens]), use_cache=False).logits[0]


@torch.no_grad()
def reduced_run(hf_model: Any, resid: Tensor, positions: Sequence[int], start: int) -> Tensor:
    """Logits of the last of a few tokens [pos d_model] after blocks start..n_layers."""
    config = hf_model.config
    base = hf_model.base_model
    base = getattr(base, "decoder", base)
    at = torch.tensor([positions])
    hidden = resid[None]
    kinds = getattr(config, "layer_types", None) or getattr(config, "attention_layers", None)
    window = getattr(config, "sliding_window", None) or getattr(config, "window_size", None)
    for index in range(start, config.num_hidden_layers):
        kind = kinds[index] if kinds else None
        sliding = window is not None and kind in (None, "sliding_attention", "local")
        n = len(positions)
        mask = torch.full((1, 1, n, n), torch.finfo(hidden.dtype).min, dtype=hidden.dtype)
        for q in range(n):
            for k in range(q + 1):
                if not sliding or positions[q] - positions[k] < window:
                    mask[0, 0, q, k] = 0
        kwargs: dict[str, Any] = {"attention_mask": mask, "position_ids": at}
        if hasattr(base, "rotary_emb"):
            by_kind = config.model_type == "gemma3_text"
            rotary = base.rotary_emb(hidden, at, kind) if by_kind else base.rotary_emb(hidden, at)
            kwargs["position_embeddings"] = rotary
        out = blocks_of(hf_model)[index](hidden, **kwargs)
        hidden = out[0] if isinstance(out, tuple) else out
    norm = next(
        getattr(base, name)
        for name in ("norm", "ln_f", "final_layer_norm", "layer_norm")
        if getattr(base, name, None) is not None
    )
    out = hf_model.get_output_embeddings()(norm(hidden))[0, -1]
    cap = getattr(config, "final_logit_softcapping", None)
    return out if cap is None else cap * torch.tanh(out / cap)
