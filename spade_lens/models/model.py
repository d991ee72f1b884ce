"""The one model type: five operations on the residual stream, and the words around them.

Layers are counted as in TransformerLens: "layer l" is the residual stream *after* l blocks, so
layer 0 is the embedding and layer ``n_layers`` is what the model itself unembeds.
"""

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from spade_lens.checks import as_several, plain_name
from spade_lens.models.backbone import AfterBlock, Backbone, Cache, CachedTokens, Prefix
from spade_lens.models.check import check_pieces, check_positions, within
from spade_lens.models.errors import UnsupportedModelError, refuse_vectors
from spade_lens.models.hookable import Hookable
from spade_lens.models.precision import precision_of
from spade_lens.models.tree import weights_sha256
from spade_lens.models.verbs import Verbs
from spade_lens.models.visits import Visit, Visits
from spade_lens.prompts.answers import answer_ids, warn_of_candidates, with_answer
from spade_lens.prompts.inputs import PromptsLike, as_prompts, check_fit
from spade_lens.prompts.prompt import Prompt, StartToken, encode, token_text
from spade_lens.settings import Settings, SettingsOf, one_call


class Model(Hookable, Verbs):
    """A causal language model in five pieces: embed, run blocks, final norm, unembed, hooks.

    Made by :func:`spade_lens.load`, which refuses a model whose pieces put together are not the
    model. Nothing here changes the model it was made of.

    Every call begins with a look at it. If modules, hooks, types or settings are not what they
    were, it is taken apart and checked anew. Nothing made of the values of weights outlives a call.
    A call has the model to itself, so threads may share it.

    Args:
        take_apart: Returns the adapter around the actual model as it is now.
        tokenizer: Its Hugging Face tokenizer; None where only tokens will be given.
        name: Its name in tables, figures and messages.
        reference: The model as its own code runs it, from tokens to logits, for the check.
        original: The object that was loaded (a Hugging Face model or a HookedTransformer).

    Raises:
        UnsupportedModelError: If the pieces do not give the model's own logits.
    """

    settings = SettingsOf()

    def __init__(
        self,
        take_apart: Callable[[], Backbone],
        *,
        tokenizer: Any,
        name: str,
        reference: Callable[[Int[Tensor, "1 pos"]], Float[Tensor, "1 pos d_vocab"]],
        original: Any,
    ) -> None:
        self.settings = Settings()
        self.tokenizer = tokenizer
        self.name = plain_name(name, "a model")
        self._original = original
        self._visits = Visits(
            take_apart, check=lambda backbone: check_pieces(backbone, reference, name), name=name
        )

    def __repr__(self) -> str:
        at = self._visits.backbone
        return (
            f"Model({self.name!r}, n_layers={at.n_layers}, d_model={at.d_model}, "
            f"d_vocab={at.d_vocab}, {at.dtype}, {at.device}, weights of {self.precision})"
        )

    def __reduce__(self) -> NoReturn:
        raise TypeError(f"{self!r} cannot be copied or pickled: load() it where it is needed.")

    @property
    def structure(self) -> Backbone:
        """The same object for as long as modules, types and settings are what they are."""
        self._visits.now()
        return self._visits.backbone

    @property
    def _now(self) -> Visit:
        return self._visits.now()

    # -- what it is

    @property
    def original(self) -> Any:
        """The object that was loaded, which may be changed but not replaced."""
        return self._original

    @property
    def n_layers(self) -> int:
        """The number of blocks; also the layer that is the model's own output."""
        return self._now.backbone.n_layers

    @property
    def d_model(self) -> int:
        """The width of the residual stream."""
        return self._now.backbone.d_model

    @property
    def d_vocab(self) -> int:
        """The number of logits; of a model without a vocabulary, of the numbers it gives."""
        return self._now.backbone.d_vocab

    @property
    def n_ctx(self) -> int:
        """The longest prompt in tokens; with LongRoPE, that of the original rotary embedding."""
        return self._now.backbone.n_ctx

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of weights and residuals."""
        return self._now.backbone.dtype

    @property
    def precision(self) -> str:
        """How its weights were stored, such as ``"Q4_1, 5.7 bits a weight"``."""
        return precision_of(self.original)

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self._now.backbone.device

    @property
    @one_call()
    def sha256(self) -> str:
        """A hash of all parameters, so that results and lenses know the model they belong to."""
        now = self._now
        if now.sha256 is None:
            now.sha256 = weights_sha256(self.original)
        return now.sha256

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
        bridge = self._visits.bridge()
        if bridge is None:
            raise UnsupportedModelError(
                f"{self.name} is a {type(self.original).__name__}, and a TransformerBridge wraps "
                "Hugging Face models only. Use model.original, or load the Hugging Face model."
            )
        return bridge

    # -- the five operations

    @one_call()
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

        Raises:
            ValueError: If tokens or positions are of another shape or out of range.
        """
        now = self._now.backbone
        refuse_vectors(now, self.name)
        if tokens.ndim != 2 or not within(tokens, now.d_vocab):
            raise ValueError(
                f"Tokens of shape {list(tokens.shape)} were given; expected [batch pos], with ids "
                f"from 0 to {now.d_vocab - 1}."
            )
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        check_positions(positions, tokens.shape, now.n_ctx)
        return now.embed(tokens, positions)

    @one_call()
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
            ValueError: If layers or positions are out of range, or positions of another shape.
        """
        check_positions(positions, resid.shape[:2], self.n_ctx)
        if not 0 <= start <= stop <= self.n_layers:
            raise ValueError(
                f"start={start} and stop={stop} were given; {self.name} has layers 0 to "
                f"{self.n_layers}, and stop cannot be lower than start."
            )
        return self._now.backbone.run_blocks(
            resid, positions, start, stop, valid=valid, cache=cache, after_block=after_block
        )

    @one_call()
    def final_norm(self, resid: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows d_model"]:
        """Apply the normalisation between the last block and the unembedding."""
        return self._now.backbone.final_norm(resid)

    @one_call()
    def unembed(self, normed: Float[Tensor, "rows d_model"]) -> Float[Tensor, "rows d_vocab"]:
        """Return logits of normalised residuals, the model's soft cap included."""
        return self._now.backbone.unembed(normed)

    @one_call()
    def logits(self, resid: Float[Tensor, "row d_model"]) -> Float[Tensor, "row d_vocab"]:
        """Return the logits of residuals at layer ``n_layers``, in float32.

        Args:
            resid: Residuals as the last block, or a lens, gives them; ``limits(model)`` says how
                many rows of logits fit the memory limit.
        """
        return self.unembed(self.final_norm(resid)).float()

    @one_call()
    def expect_rows(self, n: int) -> None:
        """Say how many rows this call will run; see :meth:`prefix`."""
        self._now.expect_rows(n)

    @one_call()
    def prefix(self, token: int) -> Prefix | None:
        """Return keys, values and residuals of a start token, which depend on it alone.

        They are computed once in a call. None where :attr:`hooked` (hooks may change them), on a
        ``HookedTransformer``, and unless :meth:`expect_rows` told of enough rows for it to pay.
        """
        return self._now.prefix(token)

    @one_call()
    def cached_tokens(
        self,
        positions: Int[Tensor, "rows cached"],
        resid_at: Callable[[int], Tensor],
    ) -> CachedTokens | None:
        """Make cached tokens of known residuals, for sequences in which they do not run.

        Their keys and values in a block are computed from their residuals when the block runs: a
        norm, the projections and the rotary embedding. None where :attr:`hooked`, and on a
        ``HookedTransformer``.

        Args:
            positions: Where they stand. One row serves a batch of any size.
            resid_at: Returns their residuals ``[rows cached d_model]`` at a layer.
        """
        now = self._now
        return None if now.hooked else now.backbone.cached_tokens(positions, resid_at)

    @one_call()
    def decoder(self, *, packed: bool = False) -> Backbone | None:
        """Return the same five operations for decoding: a few rows at a time, with a cache.

        None where :attr:`hooked` (hooks may change what a cache holds), and on a
        ``HookedTransformer``. It holds for this call.

        Args:
            packed: Whether to store weights a second time, for 3 to 12 rows on a CPU in float32.
        """
        return self._now.decoder(packed=packed)

    # -- words

    def prompt(
        self,
        text: str,
        *,
        target: str | int | Sequence[int] | None = None,
        candidates: Sequence[str | int | Sequence[int]] = (),
        bos: StartToken = True,
    ) -> Prompt:
        """Make a prompt of a text, read at its last token.

        Args:
            text: The text, as it goes to the tokenizer.
            target: The right answer, of one token or several: a text (with its leading space), a
                token id or several. Its first token is ``Prompt.target``.
            candidates: Answers among which a decision is made.
            bos: See :func:`spade_lens.prompts.prompt.encode`.

        Raises:
            TypeError: If text, target or candidates are of a wrong type.
            ValueError: If the text is empty or too long, the start token is missing, or a target
                or candidate is empty.

        Warns:
            TokenWarning: If another candidate begins with the target's first token.
        """
        if self.tokenizer is None:
            raise ValueError(
                f"{self.name} was loaded without a tokenizer. Give load(..., tokenizer=...), or "
                "make the Prompt of token ids."
            )
        several = as_several(candidates)
        if several is None:
            raise TypeError(
                f"candidates={candidates!r} was given; expected several tokens, such as "
                "(' yes', ' no')."
            )
        plain = Prompt(tokens=encode(self.tokenizer, text, bos=bos), text=text)
        whole = () if target is None else answer_ids(self.tokenizer, text, target, "target")
        each = [answer_ids(self.tokenizer, text, c, "candidates") for c in several]
        prompt = with_answer(plain, whole, each)
        self.check_prompts([prompt])
        if prompt.shares_first_token:
            warn_of_candidates(self.tokenizer, prompt)
        return prompt

    @one_call()
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
        refuse_vectors(self._now.backbone, self.name)
        prompts = as_prompts(self.tokenizer, given)
        self.check_prompts(prompts)
        return prompts

    def word(self, token: int) -> str:
        """Return the text of a token id, leading space included; its number without a tokenizer."""
        return token_text(self.tokenizer, token)

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """Raise if a prompt cannot be run, before any compute is spent.

        Raises:
            ValueError: If there are no prompts, one is longer than the context, or has a token
                id outside the vocabulary.
        """
        if not prompts:
            raise ValueError("No prompts were given. Give at least one.")
        now = self._now.backbone
        refuse_vectors(now, self.name)
        check_fit(prompts, n_ctx=now.n_ctx, d_vocab=now.d_vocab, name=self.name)
