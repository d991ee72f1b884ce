"""The one model type: five operations on the residual stream, and the words around them.

Layers are counted as in TransformerLens: "layer l" is the residual stream *after* l blocks, so
layer 0 is the embedding and layer ``n_layers`` is what the model itself unembeds.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from spade_lens.lazy import verb
from spade_lens.models.backbone import (
    AfterBlock,
    Backbone,
    CachedTokens,
    FwdHooks,
    KeyValueCache,
    Prefix,
)
from spade_lens.models.check import check_pieces
from spade_lens.models.errors import UnsupportedModelError
from spade_lens.prompts.inputs import PromptsLike, as_prompts
from spade_lens.prompts.prompt import Prompt, encode, single_token
from spade_lens.settings import Settings


class Model:
    """A causal language model in five pieces: embed, run blocks, final norm, unembed, hooks.

    Made by :func:`spade_lens.load`, which refuses a model whose pieces put together are not the
    model. Nothing here changes the model it was made of.

    Args:
        backbone: The adapter around the actual model.
        tokenizer: Its Hugging Face tokenizer; None where only tokens will be given.
        name: Its name in tables, figures and messages.
        reference: The model as its own code runs it, from tokens to logits, for the check.
        original: The object that was loaded (a Hugging Face model or a HookedTransformer).

    Attributes:
        settings: Memory limit, batch size and progress of everything that runs this model; see
            :class:`spade_lens.Settings`.

    Raises:
        UnsupportedModelError: If the pieces do not give the model's own logits.
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        tokenizer: Any,
        name: str,
        reference: Callable[[Int[Tensor, "1 pos"]], Float[Tensor, "1 pos d_vocab"]],
        original: Any,
    ) -> None:
        check_pieces(backbone, reference, name)
        self._backbone = backbone
        self._prefixes: dict[int, Prefix | None] = {}
        self._hooked = False
        self.settings = Settings()
        self.tokenizer = tokenizer
        self.name = name
        self.original = original

    def __repr__(self) -> str:
        return (
            f"Model({self.name!r}, n_layers={self.n_layers}, d_model={self.d_model}, "
            f"d_vocab={self.d_vocab}, {self.dtype}, {self.device})"
        )

    # -- what it is

    @property
    def n_layers(self) -> int:
        """The number of blocks; also the layer that is the model's own output."""
        return self._backbone.n_layers

    @property
    def d_model(self) -> int:
        """The width of the residual stream."""
        return self._backbone.d_model

    @property
    def d_vocab(self) -> int:
        """The number of logits."""
        return self._backbone.d_vocab

    @property
    def n_ctx(self) -> int:
        """The longest prompt in tokens; with LongRoPE, that of the original rotary embedding."""
        return self._backbone.n_ctx

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of weights and residuals."""
        return self._backbone.dtype

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self._backbone.device

    @cached_property
    def sha256(self) -> str:
        """A hash of all parameters, so that results and lenses know the model they belong to."""
        digest = hashlib.sha256()
        for key, tensor in sorted(self.original.state_dict().items()):
            digest.update(key.encode())
            data = tensor.detach().cpu().contiguous().view(-1)
            digest.update(data.view(torch.uint8).numpy().data)
        return digest.hexdigest()

    @property
    def hooked(self) -> bool:
        """Whether this is inside :meth:`hooks`."""
        return self._hooked

    @property
    def bridge(self) -> Any:
        """The TransformerLens ``TransformerBridge`` over the same weights, made on first use.

        It is a view of this model: it shares its parameters and does not change its modules. Of a
        model that was loaded from a bridge it is that bridge.

        Example:
            >>> logits, cache = model.bridge.run_with_cache(torch.tensor([[1, 5, 6]]))
            >>> cache["blocks.3.hook_out"].shape
            torch.Size([1, 3, 32])

        Raises:
            UnsupportedModelError: If there is none, for a ``HookedTransformer``.
        """
        bridge = self._backbone.bridge()
        if bridge is None:
            raise UnsupportedModelError(
                f"{self.name} is a {type(self.original).__name__}, and a TransformerBridge wraps "
                "Hugging Face models only. Use model.original, or load the Hugging Face model."
            )
        return bridge

    # -- the five operations

    def embed(
        self,
        tokens: Int[Tensor, "batch pos"],
        positions: Int[Tensor, "batch pos"] | None = None,
    ) -> Float[Tensor, "batch pos d_model"]:
        """Return the residual stream at layer 0.

        Args:
            tokens: Token ids.
            positions: Their positions; 0, 1, 2, ... by default.

        Returns:
            What the first block sees: token embeddings, scaled as the model does, and learned
            position embeddings where it has them.
        """
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        return self._backbone.embed(tokens, positions)

    def run_blocks(
        self,
        resid: Float[Tensor, "batch pos d_model"],
        positions: Int[Tensor, "batch pos"],
        start: int,
        stop: int,
        *,
        valid: Bool[Tensor, "batch pos"] | None = None,
        cache: KeyValueCache | None = None,
        after_block: AfterBlock | None = None,
    ) -> Float[Tensor, "batch pos d_model"]:
        """Run blocks ``start`` to ``stop - 1``, and no others, on given residuals.

        The residuals form a sequence of their own, at the positions given, which need not be
        consecutive. A token attends to itself, to the tokens before it in the sequence and to
        cached tokens at lower positions, and to nothing else.

        Args:
            resid: The residual stream at layer ``start``.
            positions: Each token's position in its full prompt, for the rotary embedding and
                for sliding windows.
            start: The layer at which ``resid`` was taken.
            stop: The layer to return.
            valid: False for padding, to which no token attends.
            cache: Cached tokens to attend to, from :meth:`cached_tokens` or :meth:`prefix`, and
                where to store the keys and values of this sequence. Only where
                :meth:`cached_tokens` is not None.
            after_block: Called with (layer, residual) after every block. A tensor that it returns
                replaces the residual.

        Returns:
            The residual stream at layer ``stop``.

        Raises:
            ValueError: If the layers are out of range.
        """
        if not 0 <= start <= stop <= self.n_layers:
            raise ValueError(
                f"start={start} and stop={stop} were given; {self.name} has layers 0 to "
                f"{self.n_layers}, and stop cannot be lower than start."
            )
        return self._backbone.run_blocks(
            resid, positions, start, stop, valid=valid, cache=cache, after_block=after_block
        )

    def final_norm(self, resid: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows d_model"]:
        """Apply the normalisation between the last block and the unembedding."""
        return self._backbone.final_norm(resid)

    def unembed(self, normed: Float[Tensor, "rows d_model"]) -> Float[Tensor, "rows d_vocab"]:
        """Return logits of normalised residuals, the model's soft cap included."""
        return self._backbone.unembed(normed)

    def logits(self, resid: Float[Tensor, "row d_model"]) -> Float[Tensor, "row d_vocab"]:
        """Return the logits of residuals at layer ``n_layers``, in float32.

        Args:
            resid: Residuals as the last block, or a lens, gives them; ``limits(model)`` says how
                many rows of logits fit the memory limit.
        """
        return self.unembed(self.final_norm(resid)).float()

    @contextmanager
    def hooks(self, fwd_hooks: FwdHooks) -> Iterator[None]:
        """Open a context in which TransformerLens hooks fire in all other operations.

        Example:
            >>> seen = []
            >>> hooks = [("blocks.3.attn.hook_pattern", lambda pattern, hook: seen.append(pattern))]
            >>> with model.hooks(hooks):  # doctest: +SKIP
            ...     residuals = capture(model, prompts)

        Args:
            fwd_hooks: Pairs of a TransformerLens hook name (or filter) and a function of
                ``(activation, hook)``; a tensor it returns replaces the activation.
        """
        outer, outer_hooked = self._backbone, self._hooked
        with outer.hooks(fwd_hooks) as hooked:
            self._backbone, self._hooked = hooked, True
            try:
                yield
            finally:
                self._backbone, self._hooked = outer, outer_hooked

    def prefix(self, token: int) -> Prefix | None:
        """Return keys, values and residuals of a start token, which depend on it alone.

        They are computed once for each token. None inside :meth:`hooks` (which may change them)
        and on a ``HookedTransformer``.
        """
        if self._hooked:
            return None
        if token not in self._prefixes:
            with torch.no_grad():
                self._prefixes[token] = self._backbone.prefix(token)
        return self._prefixes[token]

    def cached_tokens(
        self,
        positions: Int[Tensor, "rows cached"],
        resid_at: Callable[[int], Tensor],
    ) -> CachedTokens | None:
        """Make cached tokens of known residuals, for sequences in which they do not run.

        Their keys and values in a block are computed from their residuals when the block runs: a
        norm, the projections and the rotary embedding. None as for :meth:`prefix`.

        Example:
            >>> residuals = capture(model, prompts[:1])
            >>> from spade_lens.models.backbone import KeyValueCache
            >>> positions = torch.arange(12)[None]
            >>> tokens = model.cached_tokens(
            ...     positions[:, :9], lambda layer: residuals.layer(layer)[None, :9]
            ... )
            >>> last = model.run_blocks(
            ...     residuals.layer(2)[None, 9:],
            ...     positions[:, 9:],
            ...     2,
            ...     4,
            ...     cache=KeyValueCache(tokens),
            ... )
            >>> torch.allclose(last, residuals.layer(4)[None, 9:], atol=1e-4)
            True

        Args:
            positions: Where they stand. One row serves a batch of any size.
            resid_at: Returns their residuals ``[rows cached d_model]`` at a layer.
        """
        return None if self._hooked else self._backbone.cached_tokens(positions, resid_at)

    # -- words

    def prompt(
        self,
        text: str,
        *,
        target: str | int | None = None,
        candidates: Sequence[str | int] = (),
        bos: bool | str = True,
    ) -> Prompt:
        """Make a prompt of a text, read at its last token.

        Args:
            text: The text, as it goes to the tokenizer.
            target: The right next token, as text (with its leading space) or as id.
            candidates: Tokens among which a decision is made.
            bos: See :func:`spade_lens.prompts.prompt.encode`.

        Raises:
            TypeError: If text, target or candidates are of a wrong type.
            ValueError: If the text is empty or too long, the start token is missing, or a target
                or candidate is not a single token.
        """
        if self.tokenizer is None:
            raise ValueError(
                f"{self.name} was loaded without a tokenizer. Give load(..., tokenizer=...), or "
                "make the Prompt of token ids."
            )
        if isinstance(candidates, str) or not isinstance(candidates, Iterable):
            raise TypeError(
                f"candidates={candidates!r} was given; expected several tokens, such as "
                "(' yes', ' no')."
            )
        prompt = Prompt(
            tokens=encode(self.tokenizer, text, bos=bos),
            target=None if target is None else self._token(target),
            candidates=tuple(self._token(c) for c in candidates),
            text=text,
        )
        self.check_prompts([prompt])
        return prompt

    def prompts(self, given: PromptsLike) -> list[Prompt]:
        """Return prompts of what is at hand, checked to be runnable before any compute is spent.

        Example:
            >>> [len(prompt) for prompt in model.prompts(["ab", "abc"])]
            [3, 4]

        Args:
            given: A string, the messages of a chat, a prompt, or a list of these.

        Raises:
            TypeError: If something else is given.
            ValueError: If there are none, or as :meth:`check_prompts` does.
        """
        prompts = as_prompts(self.tokenizer, given)
        self.check_prompts(prompts)
        return prompts

    def word(self, token: int) -> str:
        """Return the text of a token id; its number where there is no tokenizer."""
        return str(token) if self.tokenizer is None else self.tokenizer.decode([token])

    def read(self, prompts: PromptsLike, *arguments: Any, **options: Any) -> Any:
        """Read prompts by lenses at every layer: :func:`spade_lens.read` with this model.

        Example:
            >>> model.read("ab->", "logit", layers=2).to_frame()["layer"].tolist()
            [2]
        """
        return verb("read")(prompts, *arguments, model=self, **options)

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """Raise if a prompt cannot be run, before any compute is spent.

        Raises:
            ValueError: If there are no prompts, one is longer than the context, or has a token
                id outside the vocabulary.
        """
        if not prompts:
            raise ValueError("No prompts were given. Give at least one.")
        for i, prompt in enumerate(prompts):
            if len(prompt) > self.n_ctx:
                raise ValueError(
                    f"Prompt {i} has {len(prompt)} tokens; {self.name} takes at most {self.n_ctx}. "
                    "Shorten it, or use fewer demonstrations."
                )
            named = [*prompt.tokens, *prompt.candidates]
            named += [] if prompt.target is None else [prompt.target]
            if not (0 <= min(named) and max(named) < self.d_vocab):
                wrong = [t for t in named if not 0 <= t < self.d_vocab]
                raise ValueError(
                    f"Prompt {i} has token ids {wrong[:5]} outside the vocabulary of "
                    f"{self.d_vocab}. Was it made with another model's tokenizer?"
                )

    def _token(self, token: str | int) -> int:
        return single_token(self.tokenizer, token) if isinstance(token, str) else token
