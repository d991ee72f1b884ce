"""Lossless speculation: drafters guess several tokens, the model verifies them in one pass.

Sources: Leviathan et al. (arXiv 2211.17192) and Chen et al. (arXiv 2302.01318) for the rule of
acceptance; LayerSkip (arXiv 2404.16710) for drafts by the lower blocks, whose cache and residuals
the verification uses again; Kangaroo (arXiv 2404.18911) for a draft that stops where it is unsure.
Greedy text is the text without drafts, but for ties of rounding. Sampled text has the same
distribution.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from spade_lens.checks import check_number
from spade_lens.generation.draft_length import Acceptance, steps_of
from spade_lens.generation.drafters import Drafter, PromptLookup, guesses
from spade_lens.generation.rows import Rows, Run, join_runs
from spade_lens.generation.strategy import Round
from spade_lens.models.places import check_below_last

LOOKUPS = tuple(PromptLookup(length) for length in (6, 4, 3, 2, 1))
"""The lookups that need no training: the longest that finds its place speaks."""


@dataclass(frozen=True)
class Speculate:
    """Draft tokens, verify them in one pass, and keep those that the model would have written.

    The first drafter that has a guess speaks, so the surest stands first. How many tokens it may
    draft is what pays by its acceptance so far in the same text: perhaps none. Then it is tried
    again with one token after 16 rounds, and after ever longer pauses. This is ours.

    Example:
        >>> from spade_lens.generation import LayerExit, Speculate
        >>> text = sl.generate("abab", 6, model=model, strategy=Speculate(LayerExit(2)))
        >>> text.tokens == sl.generate("abab", 6, model=model).tokens
        True

    Args:
        drafters: What guesses: one or several of :class:`PromptLookup`, :class:`LayerExit`,
            :class:`Kangaroo` or your own, at most one of which reads a layer; it comes last.
            Lookups of 6 to 1 tokens by default.
        draft_tokens: How many tokens a round drafts at most.
        eta: A draft from a layer ends after a token whose probability is below this (Kangaroo);
            0 for no such end.
        adaptive: Whether drafts are as long as pays. If not, all have ``draft_tokens`` tokens.

    Raises:
        TypeError: If a drafter is none, or a number is of a wrong type.
        ValueError: If there are no drafters, or several that read a layer, ``draft_tokens`` is
            below 1, or ``eta`` is not from 0 to 1.
    """

    drafters: Drafter | Sequence[Drafter] = LOOKUPS
    draft_tokens: int = 11
    eta: float = 0.0
    adaptive: bool = True

    def __post_init__(self) -> None:
        given: Any = self.drafters
        several = tuple(given) if isinstance(given, Sequence) else (given,)
        for one in several:
            kind = "begin" if getattr(one, "layer", 0) else "draft"
            if isinstance(one, type) or not isinstance(one, Drafter) or not hasattr(one, kind):
                raise TypeError(
                    f"drafter={one!r} was given; expected a drafter such as PromptLookup(), "
                    "LayerExit(8), or an object with name, layer=0 and draft(tokens, most)."
                )
        if not several or any(one.layer for one in several[:-1]):
            raise ValueError(
                f"drafters={[one.name for one in several]} were given; expected at least one, and "
                "of those that read a layer at most one, as the last."
            )
        object.__setattr__(self, "drafters", several)
        check_number("draft_tokens", self.draft_tokens, least=1)
        check_number("eta", self.eta, whole=False)
        if not isinstance(self.adaptive, bool):
            raise TypeError(f"adaptive={self.adaptive!r} was given; expected True or False.")
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta={self.eta} was given; expected a probability from 0 to 1.")

    @property
    def several(self) -> tuple[Drafter, ...]:
        """The drafters."""
        return tuple(self.drafters) if isinstance(self.drafters, Sequence) else (self.drafters,)

    @property
    def name(self) -> str:
        """The name in tables."""
        eta = f", eta {self.eta:g}" if self.eta else ""
        length = "up to " if self.adaptive else ""
        names = "lookups" if self.several == LOOKUPS else " + ".join(d.name for d in self.several)
        return f"{names}, {length}{self.draft_tokens} drafts{eta}"

    @property
    def borders(self) -> tuple[int, ...]:
        """The layer that a drafter reads, if one does."""
        return (self.several[-1].layer,) if self.several[-1].layer else ()

    @property
    def drafts(self) -> int:
        """How many tokens a round drafts at most."""
        return self.draft_tokens

    def writer(self, rows: Rows) -> "_Speculation":
        """Return what writes a batch.

        Raises:
            ValueError: If a drafter's layer is not below the model's last.
        """
        last = self.several[-1]
        given = f"The drafter {last.name!r} reads layer {last.layer}"
        check_below_last(rows.model, last.layer, given)
        return _Speculation(rows, self)


@dataclass
class _Draft:
    """What is drafted for one row: by whom, how many tokens at most, and which."""

    by: int = -1
    most: int = 0
    tokens: list[int] = field(default_factory=list)
    # What each was drawn from; None where the drafter is sure, and where nothing is drawn.
    probabilities: list[Tensor | None] = field(default_factory=list)
    unsure: bool = False


class _Speculation:
    def __init__(self, rows: Rows, strategy: Speculate) -> None:
        self._rows, self._strategy = rows, strategy
        self._drafters = strategy.several
        self._steps = steps_of(rows.model, strategy.draft_tokens)
        self._known = [[Acceptance() for _ in self._drafters] for _ in rows.tokens]
        self._state: Any = None
        if self._drafters[-1].layer:
            self._state = self._drafters[-1].begin(rows)  # type: ignore[attr-defined]

    def select(self, rows: Sequence[int]) -> None:
        """Keep some of the rows."""
        self._known = [self._known[row] for row in rows]
        if self._state is not None:
            self._state.select(rows)

    def round(self) -> list[Round]:
        """Draft for every row, verify, and return what stands."""
        rows = self._rows
        drafts = [self._plan(row) for row in range(len(rows.tokens))]
        run = self._run(drafts)
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

    def _plan(self, row: int) -> _Draft:
        """Return who drafts for a row, and what, if it reads tokens alone."""
        strategy, rows = self._strategy, self._rows
        # One token comes from the model itself.
        most = min(strategy.draft_tokens, rows.left[row] - 1)
        drafters: Sequence[Any] = self._drafters if most else ()
        for i, drafter in enumerate(drafters):
            n = most
            if strategy.adaptive:
                cost = self._state.cost if drafter.layer else 0.0
                n = self._known[row][i].next_length(most, self._steps, cost)
            if drafter.layer:
                return _Draft(i, n)
            guessed = guesses(drafter, tuple(rows.tokens[row]), n, rows.model.d_vocab) if n else []
            if guessed:
                return _Draft(i, 0, guessed, [None] * len(guessed))
        return _Draft()

    def _run(self, drafts: Sequence[_Draft]) -> Run:
        """Run what has not run yet and the drafts; a drafter at a layer drafts on the way."""
        rows, state = self._rows, self._state
        first = rows.done
        new = [
            [*pending, *draft.tokens] for pending, draft in zip(rows.pending(), drafts, strict=True)
        ]
        run = rows.climb(rows.enter(new, first), 0)
        if state is None:
            return run
        runs, hidden = [run], state.feed(run)
        while True:
            first = [start + len(tokens) for start, tokens in zip(first, new, strict=True)]
            # A row that gave no token has stopped.
            goes_on = [
                bool(gave) and len(draft.tokens) < draft.most and not draft.unsure
                for gave, draft in zip(new, drafts, strict=True)
            ]
            if not any(goes_on):
                return rows.climb(join_runs(runs), 1)
            logits = state.logits(hidden)
            new = [
                [self._guess(row, drafts[row], logits[row])] if goes else []
                for row, goes in enumerate(goes_on)
            ]
            run = rows.climb(rows.enter(new, first), 0)
            runs.append(run)
            hidden = state.feed(run)

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
            tokens += draws.choose([number], logits[len(draft.tokens) :][:1])
        accepted = len(tokens) - 1
        if draft.tokens:
            self._known[row][draft.by].update(len(draft.tokens), accepted)
        logprobs = logits[: len(tokens)].log_softmax(dim=-1)
        return Round(
            tokens,
            [float(logprobs[n, token]) for n, token in enumerate(tokens)],
            len(draft.tokens),
            accepted,
            self._drafters[draft.by].name if draft.tokens else "",
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
