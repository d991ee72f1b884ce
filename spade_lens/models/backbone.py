"""What every kind of model must do: the five operations, and keys and values to reuse.

A backbone is an adapter around somebody else's model (a Hugging Face module, a TransformerLens
``TransformerBridge``, a ``HookedTransformer``). It does not check its input: ``Model`` does.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

AfterBlock = Callable[[int, Tensor], Tensor | None]
"""Called with (layer, residual after that many blocks). A tensor it returns replaces it."""

FwdHooks = Iterable[tuple[Any, Callable[..., Any]]]
"""TransformerLens hooks: pairs of a hook name (or a filter on names) and a function."""

KeysValues = tuple[
    Float[Tensor, "rows kv_head keys d_head"], Float[Tensor, "rows value_head keys d_value"]
]
"""Keys, after the rotary embedding, and values of some tokens in one block.

They are what the block hands to its cache. DeepSeek's latent attention hands over a latent and a
rotary part, of other sizes.
"""

StoreKeys = Callable[[int, Tensor, Tensor], None]
"""Called with (block, keys, values) of the tokens that run, each ``[batch kv_head pos d_head]``."""


@dataclass(frozen=True, eq=False)
class CachedTokens:
    """Tokens that a sequence attends to without running them, from all later positions.

    They may stand anywhere, also between the tokens of the sequence.

    Args:
        positions: Where they stand. One row serves a batch of any size.
        keys_values: Returns their keys and values in a block; called when the block runs.
        valid: False for holes, which no token attends to.
        paths: For a sequence of tokens that each end a continuation of their own: which cached
            tokens each attends to. Tokens of the sequence then do not attend to each other.
    """

    positions: Int[Tensor, "rows cached"]
    keys_values: Callable[[int], KeysValues]
    valid: Bool[Tensor, "rows cached"] | None = None
    paths: Bool[Tensor, "rows pos cached"] | None = None


@runtime_checkable
class Cache(Protocol):
    """What a run of blocks asks of a key/value cache."""

    @property
    def tokens(self) -> CachedTokens | None:
        """The cached tokens that the sequence attends to, for the mask."""
        ...

    def update(self, block: int, keys: Tensor, values: Tensor) -> KeysValues:
        """Take the keys and values of the sequence; return all that the block attends to."""
        ...


@dataclass(frozen=True)
class KeyValueCache:
    """Cached tokens to attend to, and where to write the keys and values of a run.

    Args:
        tokens: The cached tokens that the sequence attends to.
        store: Receives the keys and values of the sequence, block by block.
    """

    tokens: CachedTokens | None = None
    store: StoreKeys | None = None

    def update(self, block: int, keys: Tensor, values: Tensor) -> KeysValues:
        """Return the keys and values of the cached tokens, then those of the sequence."""
        if self.store is not None:
            self.store(block, keys, values)
        if self.tokens is None:
            return keys, values
        rows = (keys.shape[0], -1, -1, -1)
        cached_keys, cached_values = self.tokens.keys_values(block)
        # [batch kv_head cached + pos d_head]
        return (
            torch.cat([cached_keys.expand(rows), keys], dim=2),
            torch.cat([cached_values.expand(rows), values], dim=2),
        )


@dataclass(frozen=True, eq=False)
class Prefix:
    """A start token that has been run alone.

    Args:
        resid: Its residual stream at every layer.
        cached: The token, for sequences that follow it.
    """

    resid: Float[Tensor, "layers d_model"]
    cached: CachedTokens


@runtime_checkable
class Backbone(Protocol):
    """The five operations on one model, at given positions.

    ``n_check`` is how many tokens a prompt must have to prove the pieces right: more than a window
    that nothing else proves.
    """

    n_check: int
    n_layers: int
    d_model: int
    d_vocab: int
    n_ctx: int
    dtype: torch.dtype
    device: torch.device

    @property
    def roots(self) -> Sequence[nn.Module]:
        """The user's modules, which hold all that decides what the model gives."""
        ...

    @property
    def bypassed(self) -> Sequence[nn.Module]:
        """Those of the modules that are never called as a whole, so that their hooks don't fire."""
        ...

    @property
    def twin(self) -> nn.Module | None:
        """The bridge that was made over the user's modules, if one was."""
        ...

    def refresh(self) -> None:
        """Forget everything that was made of the values of weights or buffers."""
        ...

    def bridge(self) -> Any:
        """Return the ``TransformerBridge`` over the same weights; None where there is none."""
        ...

    def embed(
        self, tokens: Int[Tensor, "batch pos"], positions: Int[Tensor, "batch pos"]
    ) -> Float[Tensor, "batch pos d_model"]:
        """Return the residual stream at layer 0."""
        ...

    def run_blocks(
        self,
        resid: Float[Tensor, "batch pos d_model"],
        positions: Int[Tensor, "batch pos"],
        start: int,
        stop: int,
        *,
        valid: Bool[Tensor, "batch pos"] | None = None,
        cache: Cache | None = None,
        after_block: AfterBlock | None = None,
    ) -> Float[Tensor, "batch pos d_model"]:
        """Run blocks ``start`` to ``stop - 1`` on the given residuals at the given positions."""
        ...

    def final_norm(self, resid: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows d_model"]:
        """Apply the normalisation before the unembedding."""
        ...

    def unembed(self, normed: Float[Tensor, "rows d_model"]) -> Float[Tensor, "rows d_vocab"]:
        """Return logits, the model's soft cap or scale included."""
        ...

    def prefix(self, token: int) -> Prefix | None:
        """Run ``token`` alone at position 0; None where keys and values are not available."""
        ...

    def cached_tokens(
        self, positions: Int[Tensor, "rows cached"], resid_at: Callable[[int], Tensor]
    ) -> CachedTokens | None:
        """Make keys and values of known residuals ``[rows cached d_model]``; None likewise."""
        ...

    def for_few_rows(self, *, packed: bool) -> "Backbone | None":
        """Return one with the same weights for decoding; None where blocks take no cache."""
        ...

    def having_blocks(self, change: Callable[[int, nn.Module], nn.Module]) -> "Backbone | None":
        """Return one with ``change(number, block)`` for every block; None likewise."""
        ...

    def hookable(self) -> tuple["Backbone", Any]:
        """Return a backbone in which TransformerLens hooks fire, and the object that has them."""
        ...


class Uncached:
    """What a backbone answers whose blocks give no keys and values to reuse: None everywhere."""

    def prefix(self, token: int) -> Prefix | None:
        """Return None, as :meth:`cached_tokens` does."""
        return None

    def cached_tokens(
        self,
        positions: Int[Tensor, "rows cached"],
        resid_at: Callable[[int], Tensor],
    ) -> CachedTokens | None:
        """Return None: there is no cache."""
        return None

    def for_few_rows(self, *, packed: bool) -> None:
        """Return None likewise."""

    def having_blocks(self, change: Callable[[int, nn.Module], nn.Module]) -> None:
        """Return None likewise."""


def soft_capped(logits: Float[Tensor, "rows d_vocab"], cap: float) -> Float[Tensor, "rows d_vocab"]:
    """Return logits bent to stay within ``cap``; as they are where it is 0 or less."""
    return cap * torch.tanh(logits / cap) if cap > 0 else logits
