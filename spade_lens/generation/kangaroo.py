"""Kangaroo: a small trained attention layer that drafts from a lower layer of the model.

Source: Liu et al., Kangaroo (arXiv 2404.18911). The blocks below the layer and the unembedding stay
as they are. Between them the paper has a norm, multi-head attention with a key/value cache of its
own, a residual path and a norm, and no feed-forward part. Ours: the residual path may be an affine
map, a feed-forward part may follow, and the last norm is the model's own. The diagonal or map
before that norm does what weights of its own would do.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from spade_lens.checks import check_fields, check_number, checked, whole_numbers
from spade_lens.generation.rows import Rows, Run
from spade_lens.models.cache import TokenCache
from spade_lens.models.few_rows import fast_copy
from spade_lens.models.identity import (
    identity_of,
    read_made_with,
    refuse_another,
    refuse_unnamed,
)
from spade_lens.models.model import Model
from spade_lens.models.places import check_below_last
from spade_lens.models.unembedding import unembedding_of
from spade_lens.storage.files import as_path, naming_damage
from spade_lens.storage.records import write_pair

_KIND = "kangaroo"
_BASE = 10000.0
"""Of the rotary embedding."""


class Adapter(nn.Module):
    """Attention over residuals at a layer, which predicts the last one.

    ``h = path(x) + attention(norm(x))``, where the path is a diagonal or an affine map; then
    ``h + feed_forward(norm(h))`` if there is one.

    Args:
        d_model: The width of the residual stream.
        n_heads: How many heads; each has an even number of dimensions.
        linear: Whether the residual path is an affine map of standardised residuals.
        hidden: The width of the feed-forward part; 0 for none, as in the paper.

    Raises:
        ValueError: If the heads do not divide the width, or a number is out of range.
    """

    def __init__(self, d_model: int, n_heads: int, *, linear: bool = True, hidden: int = 0) -> None:
        super().__init__()
        check_number("d_model", d_model, least=1)
        check_number("n_heads", n_heads, least=1)
        check_number("hidden", hidden, least=0)
        if d_model % (2 * n_heads):
            raise ValueError(
                f"n_heads={n_heads} was given; expected a number that divides {d_model}, the "
                "width, into heads of an even number of dimensions."
            )
        self.config = {"d_model": d_model, "n_heads": n_heads, "linear": linear, "hidden": hidden}
        self.norm = nn.RMSNorm(d_model, eps=1e-5)
        self.query = nn.Linear(d_model, d_model, bias=False)
        self.key = nn.Linear(d_model, d_model, bias=False)
        self.value = nn.Linear(d_model, d_model, bias=False)
        self.out = nn.Linear(d_model, d_model, bias=False)
        nn.init.zeros_(self.out.weight)
        self.mean: Tensor
        self.scale: Tensor
        self.register_buffer("mean", torch.zeros(d_model))
        self.register_buffer("scale", torch.ones(d_model))
        self.path = nn.Linear(d_model, d_model) if linear else None
        self.gain = None if linear else nn.Parameter(torch.ones(d_model))
        if hidden:
            self.hidden_norm = nn.RMSNorm(d_model, eps=1e-5)
            self.up = nn.Linear(d_model, 2 * hidden, bias=False)
            self.down = nn.Linear(hidden, d_model, bias=False)
            nn.init.zeros_(self.down.weight)

    def keys_values(
        self, resid: Float[Tensor, "row pos d_model"], positions: Int[Tensor, "row pos"]
    ) -> tuple[Float[Tensor, "row head pos d_head"], Float[Tensor, "row head pos d_head"]]:
        """Return the keys, after the rotary embedding, and the values of tokens."""
        normed = self.norm(resid)
        return _rotated(self._heads(self.key(normed)), positions), self._heads(self.value(normed))

    def read(
        self,
        resid: Float[Tensor, "row pos d_model"],
        positions: Int[Tensor, "row pos"],
        keys: Float[Tensor, "row head keys d_head"],
        values: Float[Tensor, "row head keys d_head"],
        valid: Bool[Tensor, "row keys"] | None = None,
        *,
        causal: bool = False,
    ) -> Float[Tensor, "row pos d_model"]:
        """Return what takes the place of the last residuals.

        Args:
            resid: Residuals at the layer.
            positions: Where they stand.
            keys: The keys that they attend to.
            values: The values.
            valid: False for keys that no token attends to.
            causal: Whether the keys are those of the same tokens, each of which attends to itself
                and those before it.
        """
        query = _rotated(self._heads(self.query(self.norm(resid))), positions)
        mask = None if valid is None else rearrange(valid, "row keys -> row 1 1 keys")
        mixed = F.scaled_dot_product_attention(query, keys, values, mask, is_causal=causal)
        attended = self.out(rearrange(mixed, "row head pos d_head -> row pos (head d_head)"))
        if self.path is not None:
            hidden = self.path((resid - self.mean) / self.scale) + attended
        else:
            assert self.gain is not None
            hidden = self.gain * resid + attended
        if self.config["hidden"]:
            gate, up = self.up(self.hidden_norm(hidden)).chunk(2, dim=-1)
            hidden = hidden + self.down(F.silu(gate) * up)
        return hidden

    def forward(
        self, resid: Float[Tensor, "row pos d_model"], positions: Int[Tensor, "row pos"]
    ) -> Float[Tensor, "row pos d_model"]:
        """Return what takes the place of the last residuals, of whole texts."""
        keys, values = self.keys_values(resid, positions)
        return self.read(resid, positions, keys, values, causal=True)

    def _heads(self, x: Tensor) -> Tensor:
        return rearrange(
            x, "row pos (head d_head) -> row head pos d_head", head=self.config["n_heads"]
        )


def _rotated(
    x: Float[Tensor, "row head pos d_head"], positions: Int[Tensor, "row pos"]
) -> Float[Tensor, "row head pos d_head"]:
    """Return queries or keys after the rotary embedding."""
    half = x.shape[-1] // 2
    rates = _BASE ** -(torch.arange(half, device=x.device) / half)
    angles = rearrange(positions[..., None] * rates, "row pos half -> row 1 pos half")
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


@dataclass(frozen=True, eq=False)
class Kangaroo:
    """Guess with a trained adapter at a lower layer, and the model's own unembedding.

    Made by :func:`spade_lens.training.train_kangaroo`, or loaded by :func:`load_kangaroo`. Give it
    to :class:`Speculate`, whose ``eta`` is the paper's second exit.

    Source: Liu et al., Kangaroo (arXiv 2404.18911).

    Args:
        model: The model that it was trained for.
        layer: The layer that it reads.
        adapter: The adapter.
        ids: The tokens that it may draft, beside those of a row's own prompt; None for all. Fewer
            make the unembedding cheaper, and other tokens are never drafted.
        about: How it was trained, ready for JSON.

    Raises:
        TypeError: If the layer is no whole number, or the adapter is none.
        ValueError: If the layer is not below the model's last, the adapter is of another width, or
            the ids are none of the model's.
    """

    model: Model = field(repr=False)
    layer: int
    adapter: Adapter = field(repr=False)
    ids: Int[Tensor, " ids"] | None = field(default=None, repr=False)
    about: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        check_fields(self)
        check_layer(self.model, self.layer)
        object.__setattr__(self, "layer", int(self.layer))
        if not isinstance(self.adapter, Adapter):
            raise TypeError(
                f"adapter={self.adapter!r:.60} was given; expected one that train_kangaroo made."
            )
        if self.adapter.config["d_model"] != self.model.d_model:
            raise ValueError(
                f"An adapter of width {self.adapter.config['d_model']} was given; expected "
                f"{self.model.d_model}, that of {self.model.name}."
            )
        if self.ids is not None:
            most = self.model.d_vocab
            within = f"token ids below {most}, the vocabulary of {self.model.name}"
            ids = sorted(whole_numbers(self.ids, "ids=", within, below=most))
            object.__setattr__(self, "ids", torch.tensor(ids, device=self.model.device))

    @property
    def name(self) -> str:
        """The name in tables."""
        few = "" if self.ids is None else f", {len(self.ids)} tokens"
        return f"kangaroo at {self.layer}{few}"

    def begin(self, rows: Rows) -> "_State":
        """Return the state for a batch: keys and values of the adapter's own.

        Raises:
            ValueError: If the rows are of another model.
        """
        if rows.model is not self.model:
            refuse_another(rows.model, identity_of(self.model), f"The adapter at {self.layer}")
        return _State(self, rows)

    def save(self, folder: str | PathLike[str]) -> Path:
        """Write ``kangaroo.safetensors`` and ``kangaroo.json`` into a folder; return it.

        Raises:
            ValueError: If the model has changed since the adapter was trained.
        """
        identity = identity_of(self.model)
        refuse_unnamed(identity, "The adapter")
        refuse_another(self.model, self.about.get("model", identity), "The adapter")
        content = {
            "model": identity,
            "layer": self.layer,
            "adapter": self.adapter.config,
            "about": dict(self.about),
        }
        tensors = {f"adapter.{name}": x for name, x in self.adapter.state_dict().items()}
        if self.ids is not None:
            tensors["ids"] = self.ids
        path = as_path(folder) / f"{_KIND}.safetensors"
        return write_pair(path, _KIND, tensors, content).parent


@checked
def load_kangaroo(folder: str | PathLike[str], model: Model) -> Kangaroo:
    """Return what :meth:`Kangaroo.save` wrote.

    Example:
        >>> load_kangaroo("kangaroo/4", model)  # doctest: +SKIP

    Raises:
        FileNotFoundError: If one of the files is missing.
        ValueError: If it belongs to another model, or the files are damaged.
    """
    path, content, tensors = read_made_with(model, folder, _KIND)
    with naming_damage(path, again="train and save the adapter"):
        ids = tensors.pop("ids", None)
        adapter = Adapter(**content["adapter"])
        adapter.load_state_dict({n.removeprefix("adapter."): x for n, x in tensors.items()})
        adapter = adapter.to(model.device, model.dtype).eval().requires_grad_(False)
        ids = None if ids is None else ids.to(model.device)
        return Kangaroo(model, content["layer"], adapter, ids, content["about"])


def check_layer(model: Model, layer: int) -> None:
    """Raise unless drafts can come from a layer.

    Raises:
        TypeError: If it is no whole number.
        ValueError: If it is not from 1 to the last but one.
    """
    check_number("layer", layer, least=1)
    check_below_last(model, layer, f"layer={layer} was given")


class _State:
    """The adapter's keys and values of the tokens of a batch."""

    def __init__(self, kangaroo: Kangaroo, rows: Rows) -> None:
        model = rows.model
        self._rows = rows
        self._adapter: Any = fast_copy(kangaroo.adapter, packed=False)
        self._cache = TokenCache(len(rows.tokens), rows.room, model.device)
        self._ids: Tensor | None = None
        n_ids = model.d_vocab
        if kangaroo.ids is not None:
            prompts = [torch.tensor(sorted({*row})).to(kangaroo.ids) for row in rows.tokens]
            self._ids = torch.cat([kangaroo.ids, *prompts]).unique()
            # [row ids]: a row drafts what it drafts alone, so only its own prompt adds tokens.
            self._other_rows = torch.stack(
                [~torch.isin(self._ids, torch.cat([kangaroo.ids, own])) for own in prompts]
            )
            head = unembedding_of(model, self._ids)
            self._head: Any = None if head is None else fast_copy(head, packed=False)
            # The cost decides how long drafts are, so that it must not depend on the batch.
            n_ids = n_ids if head is None else len(kangaroo.ids)
        # A block has about 12 d_model^2 weights; the unembedding costs about four blocks.
        weights = sum(p.numel() for p in kangaroo.adapter.parameters())
        blocks = kangaroo.layer + weights / (12 * model.d_model**2) + 4 * n_ids / model.d_vocab
        self.cost = blocks / (model.n_layers + 4)

    def feed(self, run: Run) -> Float[Tensor, "row d_model"]:
        """Take residuals at the layer; return what stands for every row's last residual."""
        keys, values = self._adapter.keys_values(run.resid, run.positions)
        self._cache.update(0, keys, values)
        self._cache.keep(run.positions, run.counts)
        tokens = self._cache.tokens
        assert tokens is not None  # a row has a token
        last = run.select([[max(0, n - 1)] for n in run.counts])
        read = self._adapter.read(last.resid, last.positions, *tokens.keys_values(0), tokens.valid)
        return read[:, 0]

    def logits(self, hidden: Float[Tensor, "row d_model"]) -> Float[Tensor, "row d_vocab"]:
        """Return logits of the next token; minus infinity where it may not be drafted."""
        if self._ids is None:
            return self._rows.logits(hidden)
        if self._head is None:
            few = self._rows.logits(hidden)[:, self._ids]
        else:
            few = self._head(self._rows.normed(hidden)).float()
        few = few.masked_fill(self._other_rows, -torch.inf)
        return few.new_full((len(few), self._rows.model.d_vocab), -torch.inf).index_copy_(
            1, self._ids, few
        )

    def crop(self, lengths: Sequence[int]) -> None:
        """Forget what came after the first tokens of every row."""
        self._cache.crop(lengths)

    def select(self, rows: Sequence[int]) -> None:
        """Keep some of the rows."""
        self._cache.select(rows)
        if self._ids is not None:
            self._other_rows = self._other_rows[list(rows)]
