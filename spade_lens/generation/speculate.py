"""Lossless speculation: a drafter guesses several tokens, the model verifies them in one pass.

Sources: Leviathan et al. (arXiv 2211.17192) and Chen et al. (arXiv 2302.01318) for the rule of
acceptance; LayerSkip (arXiv 2404.16710) for drafts by the lower blocks, whose cache and residuals
the verification uses again; Kangaroo (arXiv 2404.18911) for a draft that stops where it is unsure.
Greedy text is the text without drafts, but for ties of rounding. Sampled text has the same
distribution.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor

from spade_lens.checks import check_number
from spade_lens.generation.drafters import Drafter, LayerDrafter, TokenDrafter, guesses
from spade_lens.generation.rows import Rows, Run, join_runs
from spade_lens.generation.strategy import Round


@dataclass(frozen=True)
class Speculate:
    """Draft tokens, verify them in one pass, and keep those that the model would have written.

    Example:
        >>> from spade_lens.generation import LayerExit, Speculate
        >>> text = sl.generate("abab", 6, model=model, strategy=Speculate(LayerExit(2)))
        >>> text.tokens == sl.generate("abab", 6, model=model).tokens
        True

    Args:
        drafter: What guesses: :class:`PromptLookup`, :class:`LayerExit` or your own.
        draft_tokens: How many tokens a round drafts at most.
        eta: A draft from a layer ends after a token whose probability is below this (Kangaroo);
            0 for drafts of full length.

    Raises:
        TypeError: If the drafter is none, or a number is of a wrong type.
        ValueError: If ``draft_tokens`` is below 1, or ``eta`` is not from 0 to 1.
    """

    drafter: Drafter
    draft_tokens: int = 5
    eta: float = 0.0

    def __post_init__(self) -> None:
        if not isinstance(self.drafter, Drafter) or not (
            hasattr(self.drafter, "begin" if self.drafter.layer else "draft")
        ):
            raise TypeError(
                f"drafter={self.drafter!r} was given; expected a drafter such as PromptLookup(), "
                "LayerExit(8), or an object with name, layer=0 and draft(tokens, most)."
            )
        check_number("draft_tokens", self.draft_tokens, least=1)
        check_number("eta", self.eta, whole=False)
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta={self.eta} was given; expected a probability from 0 to 1.")

    @property
    def name(self) -> str:
        """The name in tables."""
        eta = f", eta {self.eta:g}" if self.eta else ""
        return f"{self.drafter.name}, {self.draft_tokens} drafts{eta}"

    @property
    def borders(self) -> tuple[int, ...]:
        """The drafter's layer, if it reads one."""
        return (self.drafter.layer,) if self.drafter.layer else ()

    @property
    def drafts(self) -> int:
        """How many tokens a round drafts at most."""
        return self.draft_tokens

    def writer(self, rows: Rows) -> "_Speculation":
        """Return what writes a batch.

        Raises:
            ValueError: If the drafter's layer is not below the model's last.
        """
        if self.drafter.layer >= rows.model.n_layers:
            raise ValueError(
                f"The drafter {self.drafter.name!r} reads layer {self.drafter.layer}; expected one "
                f"below {rows.model.n_layers}, the last of {rows.model.name}."
            )
        return _Speculation(rows, self)


@dataclass
class _Draft:
    """What was drafted for one row."""

    tokens: list[int] = field(default_factory=list)
    # What each was drawn from; None where the drafter is sure, and where nothing is drawn.
    probabilities: list[Tensor | None] = field(default_factory=list)
    unsure: bool = False


class _Speculation:
    def __init__(self, rows: Rows, strategy: Speculate) -> None:
        self._rows, self._strategy = rows, strategy
        self._drafter = strategy.drafter
        self._state = None
        if self._drafter.layer:
            room = max(map(len, rows.tokens)) + max(rows.left) + strategy.draft_tokens + 1
            self._state = cast(LayerDrafter, self._drafter).begin(rows, room)

    def select(self, rows: Sequence[int]) -> None:
        """Keep some of the rows."""
        if self._state is not None:
            self._state.select(rows)

    def round(self) -> list[Round]:
        """Draft for every row, verify, and return what stands."""
        rows = self._rows
        # One token comes from the model itself.
        most = [min(self._strategy.draft_tokens, left - 1) for left in rows.left]
        drafts, run = self._from_layer(most) if self._state else self._from_tokens(most)
        columns = [
            range(n - 1 - len(draft.tokens), n) for n, draft in zip(run.counts, drafts, strict=True)
        ]
        verified = run.select([list(at) for at in columns])
        flat = [verified.resid[row, : len(at)] for row, at in enumerate(columns)]
        logits = rows.logits(torch.cat(flat)).split([len(at) for at in columns])
        rounds = [self._settle(row, draft, logits[row]) for row, draft in enumerate(drafts)]
        lengths = [
            len(tokens) + done.accepted for tokens, done in zip(rows.tokens, rounds, strict=True)
        ]
        rows.crop(lengths)
        if self._state is not None:
            self._state.crop(lengths)
        return rounds

    def _from_tokens(self, most: Sequence[int]) -> tuple[list[_Draft], Run]:
        """Draft from the tokens alone; run them after the tokens that have not run yet."""
        rows, drafter = self._rows, cast(TokenDrafter, self._drafter)
        d_vocab = rows.model.d_vocab
        drafts = []
        for tokens, n in zip(rows.tokens, most, strict=True):
            guessed = guesses(drafter, tuple(tokens), n, d_vocab) if n else []
            drafts.append(_Draft(guessed, [None] * len(guessed)))
        new = [
            [*pending, *draft.tokens] for pending, draft in zip(rows.pending(), drafts, strict=True)
        ]
        return drafts, rows.climb(rows.enter(new, rows.done), 0)

    def _from_layer(self, most: Sequence[int]) -> tuple[list[_Draft], Run]:
        """Draft token by token from the lower blocks; run the upper ones on all of them."""
        rows, state = self._rows, self._state
        assert state is not None
        drafts = [_Draft() for _ in rows.tokens]
        first, new = rows.done, rows.pending()
        runs: list[Run] = []
        while True:
            run = rows.climb(rows.enter(new, first), 0)
            runs.append(run)
            hidden = state.feed(run)
            first = [start + len(tokens) for start, tokens in zip(first, new, strict=True)]
            goes_on = [
                # A row that gave no token has stopped.
                bool(new[row]) and len(draft.tokens) < most[row] and not draft.unsure
                for row, draft in enumerate(drafts)
            ]
            if not any(goes_on):
                break
            logits = rows.logits(hidden)
            new = [
                [self._guess(row, drafts[row], logits[row])] if goes else []
                for row, goes in enumerate(goes_on)
            ]
        return drafts, rows.climb(join_runs(runs), 1)

    def _guess(self, row: int, draft: _Draft, logits: Float[Tensor, " d_vocab"]) -> int:
        """Draft one token of a row."""
        draws = self._rows.draws
        if draws.sampling is None:
            token, of = int(logits.argmax()), None
        else:
            of = draws.sampling.probabilities(logits)
            token = draws.draw(self._rows.numbers[row], of)
        draft.tokens.append(token)
        draft.probabilities.append(of)
        if self._strategy.eta:
            draft.unsure = float(logits.softmax(dim=-1)[token]) < self._strategy.eta
        return token

    def _settle(self, row: int, draft: _Draft, logits: Float[Tensor, "drafts d_vocab"]) -> Round:
        """Accept drafts of a row as far as they stand, and add a token of the model's own."""
        draws, number = self._rows.draws, self._rows.numbers[row]
        tokens: list[int] = []
        for n, token in enumerate(draft.tokens):
            if draws.sampling is None:
                chosen = int(logits[n].argmax())
            else:
                chosen = self._accepted(number, token, draft.probabilities[n], logits[n])
            tokens.append(chosen)
            if chosen != token:
                break
        else:
            tokens.append(draws.choose(number, logits[len(draft.tokens)]))
        logprobs = logits[: len(tokens)].log_softmax(dim=-1)
        return Round(
            tokens,
            [float(logprobs[n, token]) for n, token in enumerate(tokens)],
            len(draft.tokens),
            len(tokens) - 1,
            self._drafter.name if draft.tokens else "",
        )

    def _accepted(
        self, number: int, token: int, guess: Tensor | None, logits: Float[Tensor, " d_vocab"]
    ) -> int:
        """Return the draft with probability min(1, p / q), or a draw from what is left of p."""
        draws = self._rows.draws
        assert draws.sampling is not None
        wanted = draws.sampling.probabilities(logits)
        offered = guess
        if offered is None:
            offered = torch.zeros_like(wanted)
            offered[token] = 1.0
        if draws.uniform(number) * float(offered[token]) < float(wanted[token]):
            return token
        return draws.draw(number, (wanted - offered).clamp(min=0.0))
