"""Checks: at load, that the five pieces put together are the model; at a call, of its input."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from spade_lens.models.backbone import Backbone, KeyValueCache
from spade_lens.models.errors import UnsupportedModelError


@torch.no_grad()
def check_pieces(
    backbone: Backbone,
    reference: Callable[[Int[Tensor, "1 pos"]], Float[Tensor, "1 pos d_vocab"]],
    name: str,
) -> None:
    """Compare the pieces with the model's own logits, on two prompts of unequal lengths at once.

    They run plain; padded before, at different positions, in two halves; and with cached keys. The
    same function checks a model in which hooks fire, where there are no cached keys.

    Args:
        backbone: The model in pieces.
        reference: The model as its own code runs it, from tokens to logits.
        name: For the message.

    Raises:
        UnsupportedModelError: If logits differ by more than rounding.
    """
    n = min(backbone.n_check, backbone.n_ctx)
    lengths = (n, max(1, n // 3))
    device, top = backbone.device, backbone.n_layers
    generator = torch.Generator().manual_seed(0)
    # A model that reads vectors has a few ids all the same, and gives other numbers.
    n_ids = getattr(backbone, "n_ids", backbone.d_vocab)
    tokens = torch.randint(0, n_ids, (2, n), generator=generator)
    tokens[1, 0] = tokens[0, 0]  # they share a start token
    tokens = tokens.to(device)
    expected = [reference(tokens[i : i + 1, :end])[0].to(device) for i, end in enumerate(lengths)]
    positions = torch.arange(n, device=device).expand(2, n)

    def compare(resid: Tensor, what: str, first: int = 0, step: int = 1) -> None:
        """Compare residuals, of both prompts from a position on, with the model."""
        for i, end in enumerate(lengths):
            own = expected[i][first:end:step]
            _compare(backbone, resid[i][: len(own)], own, name, what)

    stream = [backbone.embed(tokens, positions)]
    resid = backbone.run_blocks(
        stream[0], positions, 0, top, after_block=lambda _, after: stream.append(after)
    )
    compare(resid, "on two plain prompts")

    # Arbitrary tokens before the prompts, which the mask has to hide.
    pads = [n - end + n // 4 for end in lengths]
    pad = torch.tensor(pads, device=device)[:, None]
    places = torch.arange(n + n // 4, device=device)[None]
    valid, padded_positions = places >= pad, (places - pad).clamp(min=0)
    padded = torch.where(valid, tokens.gather(1, padded_positions), tokens[0, -1])
    resid = backbone.embed(padded, padded_positions)
    # In two halves, since what blocks get besides must not depend on the residuals.
    for start, stop in ((0, top // 2), (top // 2, top)):
        resid = backbone.run_blocks(resid, padded_positions, start, stop, valid=valid)
    rows = torch.stack([resid[i].roll(-p, 0)[:n] for i, p in enumerate(pads)])
    compare(rows, "with padding before the prompts, in two halves,")

    even, odd = slice(0, None, 2), slice(1, None, 2)
    cached = backbone.cached_tokens(positions[:, even], lambda layer: stream[layer][:, even])
    if cached is not None:
        resid = backbone.run_blocks(
            stream[0][:, odd], positions[:, odd], 0, top, cache=KeyValueCache(cached)
        )
        what = "with every other token's keys and values made of its residuals"
        compare(resid, what, first=1, step=2)
    prefix = backbone.prefix(int(tokens[0, 0]))
    if prefix is not None:
        cache = KeyValueCache(prefix.cached)
        resid = backbone.run_blocks(stream[0][:, 1:], positions[:, 1:], 0, top, cache=cache)
        compare(resid, "with the start token's keys and values reused", first=1)


def _compare(
    backbone: Backbone,
    resid: Float[Tensor, "pos d_model"],
    expected: Float[Tensor, "pos d_vocab"],
    name: str,
    what: str,
) -> None:
    if not len(expected):
        return
    logits = backbone.unembed(backbone.final_norm(resid))
    error = (logits.double() - expected.double()).abs().max().item()
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


def within(numbers: Int[Tensor, "*any"], stop: int) -> bool:
    """Return whether all numbers are from 0 to ``stop - 1``."""
    return not numbers.numel() or bool(((numbers >= 0) & (numbers < stop)).all())


def check_positions(positions: Int[Tensor, "*any"], shape: Sequence[int], n_ctx: int) -> None:
    """Raise unless every token has a position inside the context.

    Raises:
        ValueError: If positions are of another shape or out of range.
    """
    if positions.shape != torch.Size(shape) or not within(positions, n_ctx):
        raise ValueError(
            f"Positions of shape {list(positions.shape)} were given for tokens of shape "
            f"{list(shape)}; expected one for every token, from 0 to {n_ctx - 1}."
        )
