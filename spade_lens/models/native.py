"""A ``TransformerBridge`` over one of TransformerLens' own small models (``boot_native``).

Some of these have a vocabulary and are language models. Others read vectors and give numbers, as
the small transformers that learn in context do. Those run as residuals, and have no tokens.
"""

from typing import Any

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from spade_lens.models.backbone import AfterBlock, Cache, Uncached, soft_capped
from spade_lens.models.errors import UnsupportedModelError
from spade_lens.models.masks import causal_mask

_CHECK = 48


class NativeBackbone(Uncached):
    """The five operations on a bridge over a ``NativeModel``.

    Args:
        bridge: The bridge. It is never changed.

    Raises:
        UnsupportedModelError: If the model's attention is not causal.
    """

    twin = None

    def __init__(self, bridge: Any) -> None:
        inner = bridge.original_model
        cfg = inner.cfg
        if cfg.attention_dir != "causal":
            raise UnsupportedModelError(
                f"This model's attention is {cfg.attention_dir!r}; expected 'causal'."
            )
        self.roots: tuple[nn.Module, ...] = (bridge, inner)
        self.bypassed = self.roots
        self._bridge, self._inner = bridge, inner
        self.n_layers, self.d_model, self.n_ctx = cfg.n_layers, cfg.d_model, cfg.n_ctx
        # The check pads by a quarter, and these blocks hold a mask of the context's length.
        self.n_check = max(1, min(_CHECK, 4 * self.n_ctx // 5))
        self.d_vocab = cfg.d_vocab_out if cfg.d_vocab_out > 0 else cfg.d_vocab
        self.reads_tokens = self.d_vocab == cfg.d_vocab
        self.n_ids = cfg.d_vocab
        first = next(inner.parameters())
        self.dtype, self.device = first.dtype, first.device

    def refresh(self) -> None:
        """Do nothing: nothing is made of the values of weights."""

    def bridge(self) -> Any:
        """Return the bridge that was loaded."""
        return self._bridge

    def hookable(self) -> tuple["NativeBackbone", Any]:
        """Return this, and the bridge: hooks fire in its blocks."""
        return self, self._bridge

    def embed(
        self, tokens: Int[Tensor, "batch pos"], positions: Int[Tensor, "batch pos"]
    ) -> Float[Tensor, "batch pos d_model"]:
        """Return the residual stream at layer 0."""
        resid = self._inner.tok_embed(tokens)
        return resid if self._inner.pos is None else resid + self._inner.pos(positions)

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
        assert cache is None, "this backbone gives no keys (see ``cached_tokens``)"
        mask = causal_mask(positions, dtype=self.dtype, valid=valid)
        mask = mask.expand(len(resid), -1, -1, -1)
        for index in range(start, stop):
            block = self._inner.layers[index]
            out = block(resid, attention_mask=mask, position_ids=positions)
            resid = out[0] if isinstance(out, tuple) else out
            if after_block is not None:
                replaced = after_block(index + 1, resid)
                resid = resid if replaced is None else replaced
        return resid

    def final_norm(self, resid: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows d_model"]:
        """Apply the normalisation before the unembedding."""
        flat = resid.reshape(-1, 1, self.d_model)  # a row is a prompt of one token to hooks
        return self._inner.ln_out(flat).reshape(resid.shape)

    def unembed(self, normed: Float[Tensor, "rows d_model"]) -> Float[Tensor, "rows d_vocab"]:
        """Return logits, or the numbers that the model predicts, the soft cap included."""
        logits: Tensor = self._inner.head(normed[:, None])[:, 0]
        return soft_capped(logits, self._inner.output_logits_soft_cap)
