"""What every kind of model must do for us: the five operations, and keys and values to reuse.

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


KeysValues = tuple[
    Float[Tensor, "rows kv_head keys d_head"], Float[Tensor, "rows kv_head keys d_head"]
]
"""Keys, after the rotary embedding, and values of some tokens in one block."""

KeepKeys = Callable[[int, Tensor, Tensor], None]
"""Called with (block, its keys, its values) of the tokens that run."""


@dataclass(frozen=True)
class Past:
    """Tokens that a sequence sees without running them: each is seen from all later positions.

    They may stand anywhere, between the tokens of the sequence too.

    Args:
        positions: Where they stand; one row serves for any batch.
        keys_values: Gives their keys and values in a block, when it is that block's turn.
        valid: False for holes, which no token sees.
    """

    positions: Int[Tensor, "rows past"]
    keys_values: Callable[[int], KeysValues]
    valid: Bool[Tensor, "rows past"] | None = None


@dataclass(frozen=True)
class Prefix:
    """A start token that has been run alone.

    Args:
        resid: Its residual stream at every layer.
        past: The token, for sequences that follow it.
    """

    resid: Float[Tensor, "layers d_model"]
    past: Past


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
        past: Past | None = None,
        after_block: AfterBlock | None = None,
        keep: KeepKeys | None = None,
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

    def past(
        self,
        positions: Int[Tensor, "rows past"],
        resid_at: Callable[[int], Tensor],
    ) -> Past | None:
        """Tokens whose residuals [rows past d_model] are known; None where keys cannot be had."""
        ...

    def hooks(self, fwd_hooks: FwdHooks) -> AbstractContextManager["Backbone"]:
        """A context in which TransformerLens hooks fire in all operations of what it yields."""
        ...
