"""A TransformerLens 3.9 ``HookedTransformer``, run block by block at any positions.

TransformerLens 4 no longer has the class, so nothing here imports it: objects are recognised by
their class name. We work on a twin of the user's model that shares its weights and takes positions
and masks from us. ``HookedTransformer`` copies some matrices into another memory layout on *every*
forward pass. The twin stores these matrices in that layout: the results are equal to the bit, and
small passes are several times faster. The user's model is left as it is.
"""

import copy
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from spade_lens.models.backbone import AfterBlock, Cache, Uncached, soft_capped
from spade_lens.models.errors import UnsupportedModelError
from spade_lens.models.masks import causal_mask

_CHECK = 48


class HookedTransformerBackbone(Uncached):
    """The five operations on a ``HookedTransformer``.

    Its own cache holds keys before the rotary embedding, so it gives none to reuse.

    Args:
        hooked: The model. It is never changed; the matrices stored in another layout (of the gated
            MLPs, the attention and the unembedding) take their memory a second time.

    Raises:
        UnsupportedModelError: If its positions are neither rotary nor learned embeddings, or its
            attention is not causal.
    """

    def __init__(self, hooked: Any) -> None:
        cfg = hooked.cfg
        if cfg.positional_embedding_type not in ("rotary", "standard"):
            raise UnsupportedModelError(
                f"This HookedTransformer has {cfg.positional_embedding_type!r} positions; only "
                "'rotary' and 'standard' ones can be placed freely."
            )
        if cfg.attention_dir != "causal":
            raise UnsupportedModelError(
                f"This HookedTransformer's attention is {cfg.attention_dir!r}, not causal."
            )
        self.roots = self.bypassed = (hooked,)
        self.twin = None
        self.hooked = _twin(hooked)
        self.n_layers, self.d_model = cfg.n_layers, cfg.d_model
        self.d_vocab, self.n_ctx = cfg.d_vocab_out, cfg.n_ctx
        first = next(hooked.parameters())
        self.dtype, self.device = first.dtype, first.device
        self._placed = _Placed()
        self._windows: list[int | None] = []
        for block in self.hooked.blocks:
            attention = block.attn
            local = getattr(attention, "attn_type", "global") == "local"
            window = cfg.window_size if local else None
            self._windows.append(window)
            attention.apply_causal_mask = self._placed.mask_for(window)
            if cfg.positional_embedding_type == "rotary":
                attention.apply_rotary = self._placed.rotary_for(attention)
        self.n_check = max([_CHECK, *(window + 8 for window in self._windows if window)])

    def refresh(self) -> None:
        """Copy the matrices that are stored in another layout once more."""
        for twin, module in zip(self.hooked.modules(), self.roots[0].modules(), strict=True):
            for name, weight in module._parameters.items():
                stored = twin._parameters[name]
                if stored is not weight:
                    stored.data.copy_(weight.data)

    def bridge(self) -> None:
        """Return None: a ``TransformerBridge`` wraps Hugging Face models only."""

    def embed(
        self, tokens: Int[Tensor, "batch pos"], positions: Int[Tensor, "batch pos"]
    ) -> Float[Tensor, "batch pos d_model"]:
        """Return the residual stream at layer 0."""
        resid = self.hooked.hook_embed(self.hooked.embed(tokens))
        if self.hooked.cfg.positional_embedding_type == "standard":
            resid = resid + self.hooked.hook_pos_embed(self.hooked.pos_embed.W_pos[positions])
        return resid

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
        assert cache is None, "a HookedTransformer gives no keys (see ``cached_tokens``)"
        masks = {
            window: causal_mask(positions, dtype=self.dtype, valid=valid, window=window)
            for window in set(self._windows[start:stop])
        }
        outer = self._placed.now  # a hook may run the model in the middle of a run
        self._placed.now = positions, masks
        try:
            for index in range(start, stop):
                resid = self.hooked.blocks[index](resid)
                if after_block is not None:
                    replaced = after_block(index + 1, resid)
                    resid = resid if replaced is None else replaced
        finally:
            self._placed.now = outer
        return resid

    def final_norm(self, resid: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows d_model"]:
        """Apply the normalisation before the unembedding."""
        if self.hooked.cfg.normalization_type is None:
            return resid
        flat = resid.reshape(-1, 1, self.d_model)  # a row is a prompt of one token to hooks
        return self.hooked.ln_final(flat).reshape(resid.shape)

    def unembed(self, normed: Float[Tensor, "rows d_model"]) -> Float[Tensor, "rows d_vocab"]:
        """Return logits, the soft cap included."""
        logits = self.hooked.unembed(normed[:, None])[:, 0]
        return soft_capped(logits, self.hooked.cfg.output_logits_soft_cap)

    def hookable(self) -> tuple["HookedTransformerBackbone", Any]:
        """Return this, and the object whose hook names are those of the model."""
        return self, self.roots[0]


class _Placed:
    """The positions and masks of the present call, read by all attention layers of the twin."""

    now: tuple[Tensor, dict[int | None, Tensor]] | None = None

    def mask_for(self, window: int | None) -> Any:
        def apply_causal_mask(scores: Tensor, *_: Any, **__: Any) -> Tensor:
            assert self.now is not None
            return scores + self.now[1][window]

        return apply_causal_mask

    def rotary_for(self, attention: Any) -> Any:
        def apply_rotary(x: Tensor, *_: Any, **__: Any) -> Tensor:
            n_turned = attention.cfg.rotary_dim
            turned, rest = x[..., :n_turned], x[..., n_turned:]
            assert self.now is not None
            positions = self.now[0]
            cos = attention.rotary_cos[positions][:, :, None]  # [batch pos 1 rotary_dim]
            sin = attention.rotary_sin[positions][:, :, None]
            turned = turned * cos + attention.rotate_every_two(turned) * sin
            return torch.cat([turned, rest], dim=-1)

        return apply_rotary


def _twin(hooked: Any) -> Any:
    shared = {id(t): t for t in (*hooked.parameters(), *hooked.buffers())}
    if hooked.tokenizer is not None:
        shared[id(hooked.tokenizer)] = hooked.tokenizer
    twin = copy.deepcopy(hooked, shared)
    for module, of_user in zip(twin.modules(), hooked.modules(), strict=True):
        # Hooks that the user adds or takes away later fire here too.
        module._forward_hooks = of_user._forward_hooks
        module._forward_pre_hooks = of_user._forward_pre_hooks
    for block in twin.blocks:
        for name in ("W_Q", "W_K", "W_V", "_W_K", "_W_V"):
            _relay(block.attn, name, "head d_in d_out -> head d_out d_in")
        _relay(block.attn, "W_O", "head d_head d_model -> d_model head d_head")
        if twin.cfg.gated_mlp and not twin.cfg.attn_only:
            for name in ("W_gate", "W_in", "W_out"):
                _relay(block.mlp, name, "d_in d_out -> d_out d_in")
    _relay(twin.unembed, "W_U", "d_model d_vocab -> d_vocab d_model")
    return twin


def _relay(module: nn.Module, name: str, layout: str) -> None:
    """Change the memory layout of a matrix, but not its shape and values."""
    weight = module._parameters.get(name)
    if weight is None:
        return
    back = " -> ".join(reversed(layout.split(" -> ")))
    stored = rearrange(rearrange(weight.detach(), layout).contiguous(), back)
    module._parameters[name] = nn.Parameter(stored, requires_grad=weight.requires_grad)
