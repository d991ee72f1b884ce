"""The check at load: the five pieces put together are the model, or the model is refused."""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from spade_lens.models.backbone import Backbone, KeyValueCache
from spade_lens.models.errors import UnsupportedModelError

_LONGEST = 64
"""Tokens of the probe: more than the windows of small models have, and quick on large ones."""


def check_pieces(
    backbone: Backbone,
    reference: Callable[[Int[Tensor, "1 pos"]], Float[Tensor, "1 pos d_vocab"]],
    name: str,
) -> None:
    """Compare the pieces with the model's own logits: plain, padded, and with cached keys.

    Args:
        backbone: The model in pieces.
        reference: The model as its own code runs it, from tokens to logits.
        name: For the message.

    Raises:
        UnsupportedModelError: If logits differ by more than rounding.
    """
    n = min(_LONGEST, backbone.n_ctx)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, backbone.d_vocab, (1, n), generator=generator).to(backbone.device)
    with torch.no_grad():
        expected = reference(tokens).float()
        positions = torch.arange(n, device=backbone.device)[None]
        pad = n // 4
        # Arbitrary tokens before the prompt, which the mask has to hide.
        padded = torch.cat([tokens[:, :pad].flip(1), tokens], dim=1)
        padded_positions = torch.cat([positions[:, :pad] * 0, positions], dim=1)
        valid = torch.ones_like(padded, dtype=torch.bool)
        valid[:, :pad] = False
        resid = backbone.run_blocks(
            backbone.embed(padded, padded_positions),
            padded_positions,
            0,
            backbone.n_layers,
            valid=valid,
        )[:, pad:]
        _compare(backbone, resid, expected, name, "with padding before the prompt")
        resid = backbone.run_blocks(
            backbone.embed(tokens, positions), positions, 0, backbone.n_layers
        )
        _compare(backbone, resid, expected, name, "on a plain prompt")
        stream = [backbone.embed(tokens, positions)]
        backbone.run_blocks(
            stream[0],
            positions,
            0,
            backbone.n_layers,
            after_block=lambda _, after: stream.append(after),
        )
        even, odd = slice(0, None, 2), slice(1, None, 2)
        cached = backbone.cached_tokens(positions[:, even], lambda layer: stream[layer][:, even])
        if cached is not None:
            resid = backbone.run_blocks(
                stream[0][:, odd],
                positions[:, odd],
                0,
                backbone.n_layers,
                cache=KeyValueCache(cached),
            )
            what = "with every other token's keys and values made of its residuals"
            _compare(backbone, resid, expected[:, odd], name, what)
        prefix = backbone.prefix(int(tokens[0, 0]))
        if prefix is not None:
            resid = backbone.run_blocks(
                stream[0][:, 1:],
                positions[:, 1:],
                0,
                backbone.n_layers,
                cache=KeyValueCache(prefix.cached),
            )
            what = "with the start token's keys and values reused"
            _compare(backbone, resid, expected[:, 1:], name, what)


def _compare(
    backbone: Backbone,
    resid: Float[Tensor, "1 pos d_model"],
    expected: Float[Tensor, "1 pos d_vocab"],
    name: str,
    what: str,
) -> None:
    logits = backbone.unembed(backbone.final_norm(resid)[0]).float()
    error = (logits - expected[0]).abs().max().item()
    # Half precision keeps 8 bits: other batch shapes alone move logits by a percent of their size.
    tolerance = 3e-2 if torch.finfo(backbone.dtype).bits < 32 else 1e-4
    bound = tolerance * max(1.0, expected.abs().max().item())
    if not error <= bound:
        raise UnsupportedModelError(
            f"{name} cannot be read exactly: its embedding, blocks, final norm and unembedding "
            f"put together {what} differ from the model's own logits by {error:.3g} (allowed "
            f"{bound:.3g}). Its blocks probably depend on more than residuals, positions and a "
            "causal mask (ALiBi, recurrent state, per-call caches); such models are not supported."
        )
