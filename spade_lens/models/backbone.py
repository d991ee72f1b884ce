"""What every kind of model must do for us: the five operations, and nothing else.

A backbone is one of the adapters in this folder around somebody else's model (a Hugging Face
module, a TransformerLens ``TransformerBridge``, a ``HookedTransformer``). It takes tensors as
they come; checking what a user asked for is the business of ``Model``.
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

AfterBlock = Callable[[int, Tensor], Tensor | None]
"""Called with (layer, residual after that many blocks); a tensor it returns takes its place."""

FwdHooks = Iterable[tuple[Any, Callable[..., Any]]]
"""TransformerLens hooks: pairs of a hook name (or a filter on names) and a function."""


@dataclass(frozen=True)
class Prefix:
    """Keys and values of a token that stands before a sequence, for every block.

    Args:
        positions: The positions of the prefix's tokens.
        resid: The residual stream of the (single) token at every layer.
        keys: By block, the keys after the rotary embedding.
        values: By block, the values.
    """

    positions: Int[Tensor, " prefix"]
    resid: Float[Tensor, "layers d_model"]
    keys: tuple[Float[Tensor, "1 kv_head prefix d_head"], ...]
    values: tuple[Float[Tensor, "1 kv_head prefix d_head"], ...]


@runtime_checkable
class Backbone(Protocol):
    """The five operations on one model, at given positions."""

    n_layers: int
    d_model: int
    d_vocab: int
    n_ctx: int
    dtype: torch.dtype
    device: torch.device

    def embed(
        self, tokens: Int[Tensor, "batch pos"], positions: Int[Tensor, "batch pos"]
    ) -> Float[Tensor, "batch pos d_model"]:
        """The residual stream at layer 0."""
        ...

    def run_blocks(
        self,
        resid: Float[Tensor, "batch pos d_model"],
        positions: Int[Tensor, "batch pos"],
        start: int,
        stop: int,
        *,
        valid: Bool[Tensor, "batch pos"] | None = None,
        prefix: Prefix | None = None,
        after_block: AfterBlock | None = None,
    ) -> Float[Tensor, "batch pos d_model"]:
        """Blocks ``start`` to ``stop - 1`` on the given residuals at the given positions."""
        ...

    def final_norm(self, resid: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows d_model"]:
        """The normalisation before the unembedding."""
        ...

    def unembed(self, normed: Float[Tensor, "rows d_model"]) -> Float[Tensor, "rows d_vocab"]:
        """Logits, the model's soft cap or scale included."""
        ...

    def prefix(self, token: int) -> Prefix | None:
        """Keys and values of ``token`` alone at position 0; None where it cannot be had."""
        ...

    def hooks(self, fwd_hooks: FwdHooks) -> AbstractContextManager["Backbone"]:
        """A context in which TransformerLens hooks fire in all operations of what it yields."""
        ...
