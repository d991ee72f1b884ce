"""Continuations of several texts at once, each greedy after its first token, on one cache.

The candidates of a row share its cached tokens. Their own keys and values stand after them, and no
cache is copied. This module knows how to run ahead, not what is looked for.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from spade_lens.generation.rows import Rows, Run
from spade_lens.lenses.linear import LinearLens
from spade_lens.models.hooks import rows_are


@dataclass(frozen=True)
class Top:
    """The likeliest next tokens at one place, the likeliest first.

    Args:
        tokens: The tokens.
        logprobs: Their log-probabilities.
    """

    tokens: Sequence[int]
    logprobs: Sequence[float]


@dataclass
class Path:
    """A continuation of a row's text. All of its tokens but the last have run.

    Args:
        tokens: The tokens.
        tops: What comes next after each token that has run.
        resid: The residuals of these tokens where they were read.
        columns: The cache's columns of these tokens; empty where they follow the text itself.
        value: What the heuristic gave for the text with it; None before it was asked.
    """

    tokens: list[int]
    tops: list[Top] = field(default_factory=list)
    resid: list[Float[Tensor, " d_model"]] = field(default_factory=list)
    columns: list[int] = field(default_factory=list)
    value: float | None = None

    @property
    def ran(self) -> int:
        """How many of its tokens have run."""
        return len(self.tops)

    def after(self, n: int) -> "Path":
        """Return what is left of it after its first tokens; these have run."""
        return Path(self.tokens[n:], self.tops[n:], self.resid[n:])


class Lookahead:
    """Runs continuations of the rows of a batch.

    Args:
        rows: The batch. Its first span of blocks reads the continuations.
        k: How many next tokens are wanted at each place.
        lens: What reads them there; None for the model's own norm and head.
    """

    def __init__(self, rows: Rows, k: int, lens: LinearLens | None = None) -> None:
        self._rows, self._k, self._lens = rows, min(k, rows.model.d_vocab), lens

    def tops(self, logits: Float[Tensor, "place d_vocab"]) -> list[Top]:
        """Return the likeliest next tokens of every place."""
        norm = logits.logsumexp(dim=-1)
        values, tokens = logits.topk(self._k, dim=-1)
        # Where several tokens tie, plain decoding takes what argmax gives.
        first = logits.argmax(dim=-1)
        made = []
        for row, (of_row, scores, top) in enumerate(
            zip(tokens.tolist(), (values - norm[:, None]).tolist(), first.tolist(), strict=True)
        ):
            ranked = [(t, p) for t, p in zip(of_row, scores, strict=True) if t != top]
            best = (top, float(logits[row, top] - norm[row]))
            chosen = [best, *ranked][: self._k]
            made.append(Top([t for t, _ in chosen], [p for _, p in chosen]))
        return made

    def ended(self, row: int, path: Path) -> bool:
        """Whether a row's text ends with the last token of a path."""
        rows = self._rows
        prompt = rows.steering.prompts[rows.numbers[row]]
        new = [*rows.tokens[row][len(prompt) :], *path.tokens]
        return rows.stops is not None and bool(rows.stops.ends(new))

    def extend(self, paths: Sequence[Path | None], lengths: Sequence[int]) -> list[int]:
        """Run paths that follow the texts themselves up to so many tokens.

        Returns:
            How many tokens of every row ran.
        """
        rows, counts = self._rows, [0] * len(paths)
        while True:
            going = {
                row: path
                for row, path in enumerate(paths)
                if path is not None
                and len(path.tokens) < lengths[row]
                and not self.ended(row, path)
            }
            if not going:
                return counts
            new = [going[row].tokens[-1:] if row in going else [] for row in range(len(paths))]
            first = [
                len(tokens) + (going[row].ran if row in going else 0)
                for row, tokens in enumerate(rows.tokens)
            ]
            run = rows.climb(rows.enter(new, first), 0)
            self._take(run, [(row, 0) for row in going], list(going.values()))
            for row in going:
                counts[row] += 1

    def branch(self, paths: Sequence[Sequence[Path]], lengths: Sequence[int]) -> list[int]:
        """Run other paths of every row, side by side, up to so many tokens of each.

        Returns:
            How many tokens of every row ran.
        """
        rows = self._rows
        branches = rows.caches[0].branches([len(tokens) for tokens in rows.tokens])
        counts = [0] * len(paths)
        while True:
            going = [
                [
                    (number, path)
                    for number, path in enumerate(of_row)
                    if len(path.tokens) < lengths[row] and not self.ended(row, path)
                ]
                for row, of_row in enumerate(paths)
            ]
            widest = max(map(len, going))
            if not widest:
                return counts
            numbers = [
                [number for number, _ in of_row] + [-1] * (widest - len(of_row)) for of_row in going
            ]
            branches.run(torch.tensor(numbers, device=rows.model.device))
            run = rows.enter_at(
                [[path.tokens[-1] for _, path in of_row] for of_row in going],
                [
                    [len(tokens) + path.ran for _, path in of_row]
                    for tokens, of_row in zip(rows.tokens, going, strict=True)
                ],
            )
            run = rows.climb(run, 0, branches)
            columns = branches.keep(run.positions)
            places = [(row, at) for row, of_row in enumerate(going) for at in range(len(of_row))]
            self._take(run, places, [path for of_row in going for _, path in of_row])
            for row, of_row in enumerate(going):
                counts[row] += len(of_row)
                for at, (_, path) in enumerate(of_row):
                    path.columns.append(columns[at])

    def _take(self, run: Run, places: Sequence[tuple[int, int]], paths: Sequence[Path]) -> None:
        """Read what comes next at some places of a run, and add the likeliest to their paths."""
        rows = self._rows
        at, columns = torch.tensor(places, device=run.resid.device).T
        resid = run.resid[at, columns]
        read = resid if self._lens is None else self._lens.at(resid, rows.borders[1])
        with rows_are([rows.numbers[row] for row, _ in places]):
            tops = self.tops(rows.logits(read))
        for n, path in enumerate(paths):
            path.tops.append(tops[n])
            path.resid.append(resid[n])
            path.tokens.append(tops[n].tokens[0])
