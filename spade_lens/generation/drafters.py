"""What guesses the next tokens: n-grams of the text, an exit at a lower layer, or your own.

A drafter reads either the tokens alone (``layer`` 0), or the residual stream at a layer, where it
may keep a state of its own. It never decides what is written: the model verifies every guess.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from spade_lens.checks import check_number, whole_numbers
from spade_lens.generation.rows import Rows, Run


@runtime_checkable
class Drafter(Protocol):
    """Guesses tokens of one text from its tokens. A drafter of your own needs these.

    Example:
        >>> class Repeats:
        ...     name, layer = "repeats", 0
        ...     def draft(self, tokens, most):
        ...         return [tokens[-1]] * most
        >>> from spade_lens.generation import Speculate
        >>> text = sl.generate("abab", 4, model=model, strategy=Speculate(Repeats()))
        >>> text.tokens == sl.generate("abab", 4, model=model).tokens
        True
    """

    @property
    def name(self) -> str:
        """The name in tables."""
        ...

    @property
    def layer(self) -> int:
        """The layer that it reads; 0 for the tokens alone."""
        ...


@runtime_checkable
class TokenDrafter(Drafter, Protocol):
    """A drafter that reads tokens."""

    def draft(self, tokens: Sequence[int], most: int) -> Sequence[int]:
        """Return guesses of what follows these tokens, ``most`` at most; none if it has none."""
        ...


@runtime_checkable
class LayerState(Protocol):
    """What a drafter that reads a layer knows of the rows of a batch."""

    @property
    def cost(self) -> float:
        """About what a draft costs, in passes of the whole model over one token."""
        ...

    def feed(self, run: Run) -> Float[Tensor, "row d_model"]:
        """Take residuals at the layer; return what stands for every row's last residual."""
        ...

    def logits(self, hidden: Float[Tensor, "row d_model"]) -> Float[Tensor, "row d_vocab"]:
        """Return logits of the next token of what :meth:`feed` returned, in float32."""
        ...

    def crop(self, lengths: Sequence[int]) -> None:
        """Forget what came after the first tokens of every row."""
        ...

    def select(self, rows: Sequence[int]) -> None:
        """Keep some of the rows."""
        ...


@runtime_checkable
class LayerDrafter(Drafter, Protocol):
    """A drafter that reads the residual stream at its layer."""

    def begin(self, rows: Rows) -> LayerState:
        """Return its state for a batch, before any token ran.

        A row has ``rows.room`` tokens at most.
        """
        ...


@dataclass(frozen=True)
class PromptLookup:
    """Guess that what followed the text's last tokens before follows them again.

    Source: Saxena, prompt lookup decoding (2023), which Hugging Face has as
    ``prompt_lookup_num_tokens``.

    Example:
        >>> PromptLookup(3).draft([1, 2, 3, 4, 1, 2, 3], most=2)
        [4, 1]

    Args:
        length: How many last tokens are looked up. More are right more often, and seldom found.

    Raises:
        TypeError: If it is no whole number.
        ValueError: If it is below 1.
    """

    length: int = 3
    layer = 0

    def __post_init__(self) -> None:
        check_number("length", self.length, least=1)

    @property
    def name(self) -> str:
        """The name in tables."""
        return f"lookup of {self.length}"

    def draft(self, tokens: Sequence[int], most: int) -> list[int]:
        """Return what followed the latest earlier place of the text's last tokens."""
        if len(tokens) <= self.length:
            return []
        text = array("q", tokens)
        n, size = len(text), text.itemsize
        whole, ending = text.tobytes(), text[n - self.length :].tobytes()
        # The place may overlap with the ending, as in a text that repeats itself.
        stop = (n - 1) * size
        while (at := whole.rfind(ending, 0, stop)) >= 0:
            if at % size == 0:
                first = at // size + self.length
                return list(text[first : first + most])
            stop = at + len(ending) - 1
        return []


@dataclass(frozen=True)
class LayerExit:
    """Guess with the model's own head at a lower layer, as LayerSkip does.

    Source: Elhoushi et al., LayerSkip (arXiv 2404.16710). A model that was not trained for early
    exits guesses badly there.

    Args:
        layer: The layer, from 1 to ``n_layers - 1``.

    Raises:
        TypeError: If the layer is no whole number.
        ValueError: If it is below 1.
    """

    layer: int

    def __post_init__(self) -> None:
        check_number("layer", self.layer, least=1)

    @property
    def name(self) -> str:
        """The name in tables."""
        return f"exit at {self.layer}"

    def begin(self, rows: Rows) -> "_Stateless":
        """Return the state for a batch, which holds nothing of its tokens."""
        return _Stateless(rows, self.layer)


class _Stateless:
    def __init__(self, rows: Rows, layer: int) -> None:
        self.logits = rows.logits
        # The blocks below the layer, and the unembedding, which costs about four blocks.
        self.cost = (layer + 4) / (rows.model.n_layers + 4)

    def feed(self, run: Run) -> Float[Tensor, "row d_model"]:
        """Return the residuals as they are."""
        return run.last()

    def crop(self, lengths: Sequence[int]) -> None:
        """Do nothing."""

    def select(self, rows: Sequence[int]) -> None:
        """Do nothing."""


def guesses(drafter: TokenDrafter, tokens: Sequence[int], most: int, d_vocab: int) -> list[int]:
    """Return a drafter's guesses, checked, since any drafter may be a user's own.

    Raises:
        TypeError: If it returns something else than token ids.
        ValueError: If one is outside the vocabulary.
    """
    return whole_numbers(
        drafter.draft(tokens, most),
        f"draft() of the drafter {drafter.name!r}: ",
        f"token ids below {d_vocab}",
        below=d_vocab,
        distinct=False,
        empty=True,
    )[:most]
