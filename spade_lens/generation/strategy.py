"""What a way of writing text must do, and the plain way: every token through every block."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from spade_lens.generation.rows import Rows, Run


@dataclass(frozen=True)
class Round:
    """What one row gained in one round.

    Args:
        tokens: Its new tokens, at least one.
        logprobs: Their log-probabilities under what decided, before any warping.
        drafted: How many tokens were drafted.
        accepted: How many of them were accepted; these come first among ``tokens``.
        drafter: What drafted them.
        layer: The layer that the tokens were read at; None for the last.
        greedy: The likeliest token in the place of each, where a search may take another one.
        prompt_layer: The layer that the prompt left at, where that is decided for each.
    """

    tokens: Sequence[int]
    logprobs: Sequence[float]
    drafted: int = 0
    accepted: int = 0
    drafter: str = ""
    layer: int | None = None
    greedy: Sequence[int] = ()
    prompt_layer: int | None = None


@runtime_checkable
class Writer(Protocol):
    """Writes the texts of one batch, round by round."""

    def round(self) -> list[Round]:
        """Return new tokens of every row. The caller adds them to ``rows.tokens``."""
        ...

    def select(self, rows: Sequence[int]) -> None:
        """Keep some of the rows; the others have ended. ``Rows`` has its own ``select``."""
        ...


@runtime_checkable
class Strategy(Protocol):
    """A way of writing text. One of your own needs these."""

    @property
    def name(self) -> str:
        """The name in tables."""
        ...

    @property
    def borders(self) -> Sequence[int]:
        """The layers between spans of blocks with caches of their own."""
        ...

    @property
    def drafts(self) -> int:
        """How many tokens a round may draft at most."""
        ...

    def writer(self, rows: Rows) -> Writer:
        """Return what writes a batch.

        Raises:
            ValueError: If the strategy does not fit the model.
        """
        ...


@dataclass(frozen=True)
class Plain:
    """Every new token runs through all blocks, as in Hugging Face's ``generate``."""

    name = "plain"
    borders = ()
    drafts = 0

    def writer(self, rows: Rows) -> "PlainWriter":
        """Return what writes a batch."""
        return PlainWriter(rows)


@dataclass
class PlainWriter:
    """Writes one token a round.

    Args:
        rows: The batch.
    """

    rows: Rows = field(repr=False)

    def prefill(self) -> None:
        """Run what of the prompts does not run as new tokens do: nothing."""

    def force(self) -> Run:
        """Run all tokens that have not run yet as new ones do, wherever they come from."""
        return self.rows.run_pending()

    def read_first(self) -> Float[Tensor, "row d_vocab"]:
        """Run the prompts; return the logits of every row's first new token."""
        return self.rows.read_next()

    def round(self) -> list[Round]:
        """Return one new token of every row."""
        rows = self.rows
        return self.rounds_of(rows.read_next() if any(rows.done) else self.read_first())

    def rounds_of(self, logits: Float[Tensor, "row d_vocab"]) -> list[Round]:
        """Return the token that is chosen from the logits of every row."""
        rows = self.rows
        chosen = rows.draws.choose(rows.numbers, logits)
        index = torch.tensor(chosen, device=logits.device)[:, None]
        logprobs = logits.gather(1, index)[:, 0] - logits.logsumexp(dim=-1)
        return [Round([token], [p]) for token, p in zip(chosen, logprobs.tolist(), strict=True)]

    def select(self, rows: Sequence[int]) -> None:
        """Do nothing: all that there is belongs to the rows."""
