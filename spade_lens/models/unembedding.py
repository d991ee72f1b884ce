"""Logits of some tokens alone, where rows of the unembedding matrix give the model's own."""

from typing import Any, cast

import torch
from jaxtyping import Int
from torch import Tensor, nn

from spade_lens.models.hooks import quiet
from spade_lens.models.model import Model
from spade_lens.models.placed import has_own_forward, whole


@torch.no_grad()
def unembedding_rows(model: Model) -> tuple[Tensor, Tensor | None] | None:
    """Return weight and bias of the unembedding, if logits are that and nothing else."""
    original: Any = getattr(model.original, "original_model", model.original)
    get_head = getattr(original, "get_output_embeddings", None)
    head = get_head() if get_head is not None else None
    # Whatever else it is may give other logits once its weights are trained, as an adapter does.
    if type(head) is not nn.Linear or has_own_forward(head):
        return None
    weight, bias = cast(Tensor, whole(head, "weight")).to(model.device), whole(head, "bias")
    bias = None if bias is None else bias.to(model.device)
    if weight.shape != (model.d_vocab, model.d_model):
        return None
    generator = torch.Generator().manual_seed(0)
    # Many times the size of a normed residual, so that a soft cap shows.
    for scale in (1, 30):
        probe = torch.randn(4, model.d_model, generator=generator).to(model.device, model.dtype)
        with quiet():
            expected = model.structure.unembed(scale * probe).float()
        ours = nn.functional.linear(scale * probe, weight, bias).float()
        tolerance = 3e-2 if torch.finfo(model.dtype).bits < 32 else 1e-4
        if (ours - expected).abs().max() > tolerance * expected.abs().max():
            return None
    return weight, bias


def unembedding_of(model: Model, ids: Int[Tensor, " ids"]) -> nn.Linear | None:
    """Return the unembedding of some tokens alone, which reads what the final norm returns.

    Return None where other logits would come of it than the model's own: with a soft cap or a scale
    on them, or inside hooks, which would not fire.
    """
    rows = None if model.hooked else unembedding_rows(model)
    if rows is None:
        return None
    weight, bias = rows
    linear = nn.Linear(model.d_model, len(ids), bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.detach()[ids], requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach()[ids], requires_grad=False)
    return linear
