"""Search guided by a heuristic: candidates are judged by what follows them.

At each step the likeliest next tokens are candidates. Each is continued greedily by a few tokens.
The candidate with the highest ``log P + weight * h`` is kept, where ``h`` is the heuristic of the
continuation. Source: Huang et al., "DeAL: Decoding-time Alignment for Large Language Models"
(arXiv 2402.06147). Ours: the look-ahead never passes the tokens that are asked for, candidates
that cannot win are not run, several tokens may be kept at once, and the look-ahead may be read at
a lower layer.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from spade_lens.checks import as_several, check_number, warn
from spade_lens.generation.heuristics import Heuristic, judge, maximum_of, name_of
from spade_lens.generation.lookahead import Lookahead, Path, Top
from spade_lens.generation.rows import Rows, Run
from spade_lens.generation.stops import Stops
from spade_lens.generation.strategy import Round
from spade_lens.lenses.linear import LinearLens, check_linear_or_none
from spade_lens.lenses.named import refuse_unread
from spade_lens.models.hooks import rows_are
from spade_lens.models.places import check_below_last

SLOW_SECONDS = 10.0
"""A search warns once if its heuristics took longer than this in one step."""


@dataclass(frozen=True)
class Deal:
    """Choose each token by its log-probability and by a heuristic of what follows it.

    With ``weight`` 0 this is greedy text. Where all candidates' heuristics tie, the greedy token is
    kept. A heuristic that says its ``maximum`` makes the search cheap: a candidate that could not
    win even at the maximum is not run. The text is the same.

    Example:
        >>> from spade_lens.generation import Deal
        >>> def letters(prompt, continuation):
        ...     return continuation.count("e")
        >>> strategy = Deal(letters, k=97, lookahead=1, weight=20)
        >>> text = sl.generate("abcabc", 6, model=model, strategy=strategy)
        >>> text
        Generated(1 text of tiny-llama, 6 tokens, deal by letters, top 97, look-ahead 1, weight 20)
        >>> text.texts[0].count("e") > sl.generate("abcabc", 6, model=model).texts[0].count("e")
        True

    Args:
        heuristic: A function of (prompt, continuation), larger is better, or one for every prompt.
            Some are in :mod:`spade_lens.generation.heuristics`.
        k: How many candidates.
        lookahead: How many greedy tokens follow a candidate before it is judged.
        weight: What the heuristic is multiplied by, in nats.
        commit: How many tokens of the best continuation are kept in a step; the paper's is 1. Ours:
            more cost less.
        exit_layer: The layer that the look-ahead is read at; None for the last. Ours.
        lens: A linear lens that reads it there; by default the model's own norm and head.

    Raises:
        TypeError: If an argument is of another type.
        ValueError: If a number is out of range, several tokens shall be kept of a look-ahead that
            is read below the last layer, or a lens is given without a layer.
    """

    heuristic: Heuristic | Sequence[Heuristic]
    k: int = 5
    lookahead: int = 6
    weight: float = 10.0
    commit: int = 1
    exit_layer: int | None = None
    lens: LinearLens | None = None

    def __post_init__(self) -> None:
        several: Any = [self.heuristic] if callable(self.heuristic) else as_several(self.heuristic)
        if not several or not all(callable(h) and not isinstance(h, type) for h in several):
            raise TypeError(
                f"heuristic={self.heuristic!r:.80} was given; expected a function of (prompt, "
                "continuation), such as KeywordCoverage(['sun', 'sea']), or one for every prompt."
            )
        for one in several:
            maximum_of(one)
        object.__setattr__(self, "heuristic", several[0] if len(several) == 1 else tuple(several))
        check_number("k", self.k, least=1)
        check_number("lookahead", self.lookahead, least=0)
        check_number("weight", self.weight, least=0, whole=False)
        if self.weight == float("inf"):
            raise ValueError("weight=inf was given; expected a finite number, 0 or more.")
        check_number("commit", self.commit, least=1)
        if self.commit > 1 + self.lookahead:
            raise ValueError(
                f"commit={self.commit} was given with lookahead={self.lookahead}; expected at most "
                f"{1 + self.lookahead}, the candidate and what follows it."
            )
        check_linear_or_none(self.lens)
        if self.exit_layer is not None:
            self._check_exit()
        elif self.lens is not None:
            raise ValueError(
                f"lens={self.lens.name!r} was given without exit_layer=; expected the layer that "
                "it reads at."
            )

    def _check_exit(self) -> None:
        check_number("exit_layer", self.exit_layer, least=1)
        if not self.lookahead:
            raise ValueError(
                f"exit_layer={self.exit_layer} was given with lookahead=0; expected some "
                "look-ahead, since nothing else is read there."
            )
        if self.commit > 1:
            raise ValueError(
                f"commit={self.commit} and exit_layer={self.exit_layer} were given; expected "
                "commit=1, since tokens that were read below the last layer are not the model's."
            )

    @property
    def several(self) -> tuple[Heuristic, ...]:
        """The heuristics."""
        return self.heuristic if isinstance(self.heuristic, tuple) else (self.heuristic,)

    @property
    def name(self) -> str:
        """The name in tables."""
        names = dict.fromkeys(map(name_of, self.several))
        at = "" if self.exit_layer is None else f" read at {self.exit_layer}"
        at += "" if self.lens is None else f" by {self.lens.name}"
        steps = f", {self.commit} at a time" if self.commit > 1 else ""
        return (
            f"deal by {' and '.join(names)}, top {self.k}, look-ahead {self.lookahead}{at}, "
            f"weight {self.weight:g}{steps}"
        )

    @property
    def borders(self) -> tuple[int, ...]:
        """The layer that the look-ahead is read at, if it is not the last."""
        return () if self.exit_layer is None else (self.exit_layer,)

    @property
    def drafts(self) -> int:
        """How many tokens a step looks ahead at most, of all candidates."""
        return self.k * max(1, self.lookahead)

    def writer(self, rows: Rows) -> "_Search":
        """Return what writes a batch.

        Raises:
            ValueError: If there is not one heuristic for every prompt, the look-ahead is not read
                below the model's last layer, the lens is another model's or does not read there,
                or tokens shall be drawn.
        """
        n = len(rows.steering.prompts)
        if len(self.several) not in (1, n):
            raise ValueError(
                f"{len(self.several)} heuristics were given for {n} prompts; expected one, or one "
                "for every prompt."
            )
        if rows.draws.sampling is not None:
            raise ValueError(
                f"sampling={rows.draws.sampling} was given; expected None: a search takes the best "
                "candidate."
            )
        if self.exit_layer is not None:
            given = f"exit_layer={self.exit_layer} was given"
            check_below_last(rows.model, self.exit_layer, given)
            if self.lens is not None:
                refuse_unread(self.lens, rows.model, [self.exit_layer])
        return _Search(rows, self)


@dataclass
class _State:
    """What a row knows at its end: what comes next, and how it goes on greedily if that ran."""

    next: Top
    ahead: Path | None = None


class _Search:
    def __init__(self, rows: Rows, strategy: Deal) -> None:
        self._rows, self._strategy = rows, strategy
        self._searches = strategy.weight > 0 and strategy.k > 1
        self._ahead = Lookahead(rows, strategy.k if self._searches else 1, strategy.lens)
        # What ran ahead is kept, but not its captured residuals: those of the text are wanted.
        runs_ahead = self._searches and strategy.lookahead > 0
        self._keeps = runs_ahead and not rows.steering.layers
        self._longest = 1 + strategy.lookahead if self._searches else 1
        self._states: list[_State] = []
        self._seconds, self._warned = 0.0, False

    def select(self, rows: Sequence[int]) -> None:
        """Keep some of the rows."""
        self._states = [self._states[row] for row in rows]

    def round(self) -> list[Round]:
        """Choose the next tokens of every row."""
        rows, ahead = self._rows, self._ahead
        if not self._states:
            self._states = [_State(top) for top in ahead.tops(rows.read_next())]
        lengths = [min(self._longest, left) for left in rows.left]
        counts = ahead.extend([state.ahead for state in self._states], lengths)
        self._seconds = 0.0
        greedy = [state.ahead or Path([state.next.tokens[0]]) for state in self._states]
        whole = [
            len(path.tokens) >= lengths[row] or ahead.ended(row, path)
            for row, path in enumerate(greedy)
        ]
        others = [self._rivals(row, path, whole[row]) for row, path in enumerate(greedy)]
        unfinished = [
            [*([] if done else [path]), *of_row]
            for path, done, of_row in zip(greedy, whole, others, strict=True)
        ]
        if any(unfinished):
            more = ahead.branch(unfinished, lengths)
            counts = [a + b for a, b in zip(counts, more, strict=True)]
        won = [self._best(row, [greedy[row], *others[row]]) for row in range(len(greedy))]
        kept = [path.tokens[: max(1, min(self._strategy.commit, path.ran))] for path in won]
        rounds = [
            Round(
                tokens,
                self._logprobs(row, won[row], len(tokens)),
                counts[row],
                len(tokens) if self._keeps and won[row].ran else 0,
                greedy=[self._states[row].next.tokens[0], *tokens[1:]],
            )
            for row, tokens in enumerate(kept)
        ]
        self._warn_if_slow()
        self._go_on(won, kept)
        return rounds

    def _rivals(self, row: int, greedy: Path, whole: bool) -> list[Path]:
        """Return the candidates of a row, but for the greedy one, that could win."""
        top, weight = self._states[row].next, self._strategy.weight
        if not self._searches:
            return []
        gap = float("inf")
        if whole:
            most = maximum_of(self._heuristic(row))
            gap = weight * (most - self._judge(row, greedy)) if most < gap else gap
        return [
            Path([token])
            for token, logprob in zip(top.tokens[1:], top.logprobs[1:], strict=True)
            if top.logprobs[0] - logprob < gap
        ]

    def _best(self, row: int, paths: Sequence[Path]) -> Path:
        """Return the candidate with the highest score; the likeliest of those that tie."""
        if len(paths) == 1:
            return paths[0]
        known = dict(
            zip(self._states[row].next.tokens, self._states[row].next.logprobs, strict=True)
        )
        scores = [
            known[path.tokens[0]] + self._strategy.weight * self._judge(row, path) for path in paths
        ]
        return paths[scores.index(max(scores))]

    def _judge(self, row: int, path: Path) -> float:
        """Return the heuristic of a row's text with a path."""
        if path.value is not None:
            return path.value
        rows = self._rows
        number = rows.numbers[row]
        prompt = rows.steering.prompts[number]
        new = rows.tokens[row][len(prompt) :]
        text = self._stops.cut(self._stops.text([*new, *path.tokens]))
        start = time.perf_counter()
        path.value = judge(self._heuristic(row), prompt.text, text, step=len(new), number=number)
        self._seconds += time.perf_counter() - start
        return path.value

    @property
    def _stops(self) -> Stops:
        assert self._rows.stops is not None  # the loop says where texts end
        return self._rows.stops

    def _heuristic(self, row: int) -> Heuristic:
        several = self._strategy.several
        return several[self._rows.numbers[row] if len(several) > 1 else 0]

    def _logprobs(self, row: int, path: Path, n: int) -> list[float]:
        """Return the log-probabilities of a path's first tokens."""
        top = self._states[row].next
        first = top.logprobs[list(top.tokens).index(path.tokens[0])]
        return [first, *(top.logprobs[0] for top in path.tops[: n - 1])]

    def _go_on(self, won: Sequence[Path], kept: Sequence[Sequence[int]]) -> None:
        """Make the caches those of the new texts, and read what comes next."""
        rows = self._rows
        starts = list(map(len, rows.tokens))
        rows.done = [start + len(new) for start, new in zip(starts, kept, strict=True)]
        goes_on = [
            len(new) < left and not self._ahead.ended(row, Path(list(new)))
            for row, (new, left) in enumerate(zip(kept, rows.left, strict=True))
        ]
        if self._keeps:
            self._adopt(won, kept, starts)
            if len(rows.caches) > 1:
                self._finish(won, goes_on, starts)
            return
        # Every kept token runs now. Without captures, those that end a text need not.
        needed = [goes or bool(rows.steering.layers) for goes in goes_on]
        tokens = [new if needs else [] for new, needs in zip(kept, needed, strict=True)]
        if any(tokens):
            run = rows.enter(tokens, starts)
            self._read(self._climb(run, 0), [row for row, new in enumerate(tokens) if new])

    def _adopt(
        self, won: Sequence[Path], kept: Sequence[Sequence[int]], starts: Sequence[int]
    ) -> None:
        """Keep what ran of the winners in the cache that ran them."""
        lengths = [
            start + (0 if path.columns else path.ran)
            for path, start in zip(won, starts, strict=True)
        ]
        self._rows.caches[0].adopt(lengths, [path.columns for path in won])
        for row, (path, new) in enumerate(zip(won, kept, strict=True)):
            if path.ran >= len(new):
                self._states[row] = _State(path.tops[len(new) - 1], path.after(len(new)))

    def _finish(self, won: Sequence[Path], goes_on: Sequence[bool], starts: Sequence[int]) -> None:
        """Run the chosen tokens, which were read at a lower layer, through the blocks above it."""
        rows = self._rows
        going = [row for row, goes in enumerate(goes_on) if goes]
        if not going:
            return
        blank = torch.zeros_like(won[going[0]].resid[0])
        resid = torch.stack([path.resid[0] if path.resid else blank for path in won])[:, None]
        positions = torch.tensor(starts, device=resid.device)[:, None]
        self._read(self._climb(Run(resid, positions, list(map(int, goes_on))), 1), going)
        lengths = list(rows.caches[0].lengths)
        for row in going:
            state = self._states[row]
            if state.ahead is not None and state.ahead.tokens[0] != state.next.tokens[0]:
                # At the last layer the text goes on otherwise than the look-ahead read.
                state.ahead = None
                lengths[row] = rows.done[row]
        rows.caches[0].crop(lengths)

    def _climb(self, run: Run, first: int) -> Run:
        for span in range(first, len(self._rows.caches)):
            run = self._rows.climb(run, span)
        return run

    def _read(self, run: Run, going: Sequence[int]) -> None:
        """Read what comes after the last token that ran of some rows."""
        rows = self._rows
        with rows_are([rows.numbers[row] for row in going]):
            logits = rows.logits(run.last()[list(going)])
        for row, top in zip(going, self._ahead.tops(logits), strict=True):
            self._states[row].next = top

    def _warn_if_slow(self) -> None:
        if self._seconds > SLOW_SECONDS and not self._warned:
            self._warned = True
            names = " and ".join(dict.fromkeys(map(name_of, self._strategy.several)))
            done = [
                len(tokens) - len(self._rows.steering.prompts[i])
                for i, tokens in zip(self._rows.numbers, self._rows.tokens, strict=True)
            ]
            warn(
                f"The heuristic {names} took {self._seconds:.0f} seconds at step {max(done)}, for "
                f"{len(done)} texts. Give a faster one, a smaller k, or say its maximum."
            )
