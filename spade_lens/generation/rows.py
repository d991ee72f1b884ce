"""Texts that are being written side by side: their tokens, and how blocks run on new ones.

A *span* is a run of blocks with a key/value cache of its own. Plain text has one span. Where the
blocks above a layer see other tokens than those below, or later, there are two.
"""

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from itertools import accumulate

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from spade_lens.generation.sampling import Draws
from spade_lens.generation.steering import Steering, columns_of
from spade_lens.generation.stops import Stops
from spade_lens.lenses.lens import check_readable
from spade_lens.models.backbone import Backbone
from spade_lens.models.cache import Branches, TokenCache
from spade_lens.models.hooks import rows_are
from spade_lens.models.model import Model
from spade_lens.models.places import pad_after


@dataclass(frozen=True, eq=False)
class Run:
    """Tokens on their way through the blocks; rows are padded after their ends.

    Args:
        resid: The residual stream.
        positions: Where the tokens stand in their texts.
        counts: How many of every row are real.
    """

    resid: Float[Tensor, "row pos d_model"]
    positions: Int[Tensor, "row pos"]
    counts: Sequence[int]

    def last(self) -> Float[Tensor, "row d_model"]:
        """Return every row's last real token."""
        rows = torch.arange(len(self.counts), device=self.resid.device)
        return self.resid[rows, torch.tensor(self.counts, device=rows.device) - 1]

    def select(self, columns: Sequence[Sequence[int]]) -> "Run":
        """Return some of the tokens, those of every row in the order given."""
        padded = pad_after(columns, self.resid.device)
        rows = torch.arange(len(columns), device=padded.device)[:, None]
        return Run(self.resid[rows, padded], self.positions[rows, padded], list(map(len, columns)))


def join_runs(runs: Sequence[Run]) -> Run:
    """Join runs of the same rows, one after the other."""
    if len(runs) == 1:
        return runs[0]
    widths = [run.resid.shape[1] for run in runs]
    whole = Run(
        torch.cat([run.resid for run in runs], dim=1),
        torch.cat([run.positions for run in runs], dim=1),
        [sum(counts) for counts in zip(*(run.counts for run in runs), strict=True)],
    )
    if set(whole.counts) == {sum(widths)}:  # nothing is padding
        return whole
    starts = accumulate(widths, initial=0)
    placed = list(zip(starts, runs, strict=False))
    return whole.select(
        [
            [start + column for start, run in placed for column in range(run.counts[row])]
            for row in range(len(whole.counts))
        ]
    )


class Rows:
    """A batch of texts. Rows leave it when their text ends.

    Args:
        model: The model.
        numbers: The prompt of every row.
        steering: What is written and kept, and all prompts.
        draws: How tokens are drawn.
        max_new_tokens: How many tokens are written at most.
        borders: The layers between spans.
        drafts: How many more tokens may run in a round, of which not all need to stand.

    Attributes:
        room: How many tokens a row has at most, drafts included.
        tokens: The tokens of every row so far, those that have not run yet included.
        done: How many of them have run.
        left: How many more tokens are asked for.
        caches: The key/value cache of every span; none where there are no caches.
        stops: What ends a text, for strategies that look ahead; None where nothing does.
    """

    def __init__(
        self,
        model: Model,
        numbers: Sequence[int],
        steering: Steering,
        draws: Draws,
        max_new_tokens: int,
        *,
        borders: Sequence[int] = (),
        drafts: int = 0,
    ) -> None:
        self.model, self.steering, self.draws = model, steering, draws
        self.numbers = list(numbers)
        self.tokens = [list(steering.prompts[i].tokens) for i in numbers]
        self.done = [0] * len(self.numbers)
        self.left = [max_new_tokens] * len(self.numbers)
        self.stops: Stops | None = None
        self.room = max(map(len, self.tokens)) + max_new_tokens + drafts + 1
        decoder = model.decoder(packed=drafts > 0)
        self._pieces: Backbone | Model = model if decoder is None else decoder
        self.borders = (0, *borders, model.n_layers)
        self.caches: list[TokenCache] = []
        if decoder is not None:
            self._make_caches(self.room)

    def widen(self, more: int) -> None:
        """Make room in the caches for so many more tokens a row, before any has run."""
        self._make_caches(self.room + more)

    def _make_caches(self, room: int) -> None:
        n, device = len(self.numbers), self.model.device
        self.caches = [TokenCache(n, room, device) for _ in self.borders[1:]]

    def pending(self) -> list[list[int]]:
        """Return the tokens of every row that have not run yet."""
        return [tokens[done:] for tokens, done in zip(self.tokens, self.done, strict=True)]

    def enter(self, tokens: Sequence[Sequence[int]], first: Sequence[int]) -> Run:
        """Embed tokens of every row, of which the first stands at position ``first``.

        A row may have none; then a token that does not count stands in its place.
        """
        counts = [len(row) for row in tokens]
        padded = pad_after([row or [0] for row in tokens], self.model.device)
        columns = torch.arange(padded.shape[1], device=padded.device)
        starts = torch.tensor(first, device=padded.device)[:, None]
        # Padding stands after a row's end, where nothing looks.
        return self._embed(padded, (starts + columns).clamp(max=self.model.n_ctx - 1), counts)

    def enter_at(self, tokens: Sequence[Sequence[int]], positions: Sequence[Sequence[int]]) -> Run:
        """Embed tokens of every row that stand at given positions; a row may have none."""
        padded, at = (
            pad_after([row or [0] for row in of], self.model.device) for of in (tokens, positions)
        )
        return self._embed(padded, at, [len(row) for row in tokens])

    def _embed(
        self, padded: Int[Tensor, "row pos"], positions: Int[Tensor, "row pos"], counts: list[int]
    ) -> Run:
        with rows_are(self.numbers, counts):
            resid = self._pieces.embed(padded, positions)
        if self.steering.acts:
            real = columns_of(positions, counts)
            patched = self.steering.after_block(0, resid, self.numbers, real)
            resid = resid if patched is None else patched
        return Run(resid, positions, counts)

    def climb(self, run: Run, span: int, branches: Branches | None = None) -> Run:
        """Run a span of blocks; its cache keeps the tokens, or branches of it do."""
        start, stop = self.borders[span], self.borders[span + 1]
        cache = self.caches[span] if self.caches else None
        columns = columns_of(run.positions, run.counts) if self.steering.acts else []

        def after_block(layer: int, resid: Tensor) -> Tensor | None:
            return self.steering.after_block(layer, resid, self.numbers, columns)

        with rows_are(self.numbers, run.counts):
            resid = self._pieces.run_blocks(
                run.resid,
                run.positions,
                start,
                stop,
                cache=cache if branches is None else branches,
                after_block=after_block if self.steering.acts else None,
            )
        if cache is not None and branches is None:
            cache.keep(run.positions, run.counts)
        return Run(resid, run.positions, run.counts)

    def fill(
        self, run: Run, span: int, change: Callable[[int, nn.Module], nn.Module] | None = None
    ) -> None:
        """Give a span's cache tokens that do not run through its blocks.

        Their keys and values in every block are those that it makes of ``run.resid``, or that
        ``change(number, block)`` makes of it.
        """
        assert not isinstance(self._pieces, Model)  # there are caches
        pieces = self._pieces if change is None else self._pieces.having_blocks(change)
        assert pieces is not None
        cached = pieces.cached_tokens(run.positions, lambda _: run.resid)
        assert cached is not None
        cache = self.caches[span]
        for block in range(self.borders[span], self.borders[span + 1]):
            cache.update(block, *cached.keys_values(block))
        cache.keep(run.positions, run.counts)

    def normed(self, resid: Float[Tensor, "row d_model"]) -> Float[Tensor, "row d_model"]:
        """Return what the unembedding reads of residuals at the last layer."""
        return self._pieces.final_norm(resid)

    def logits(self, resid: Float[Tensor, "row d_model"]) -> Float[Tensor, "row d_vocab"]:
        """Return the logits of residuals at the last layer, in float32.

        Raises:
            ValueError: If they are NaN or infinite: a token on top of such is no answer.
        """
        logits: Tensor = self._pieces.unembed(self.normed(resid)).float()
        if len(logits):
            check_readable(logits.amax(dim=-1), self.model.name)
        return logits

    def run_pending(self) -> Run:
        """Run all tokens that have not run yet through all blocks."""
        if not self.caches:  # hooks may act, so all of the text runs as it would by itself
            self.done = [0] * len(self.done)
        run = self.enter(self.pending(), self.done)
        for span in range(len(self.borders) - 1):
            run = self.climb(run, span)
        self.done = [len(tokens) for tokens in self.tokens]
        return run

    def read_next(self) -> Float[Tensor, "row d_vocab"]:
        """Run all tokens that have not run yet; return the logits of every row's next token."""
        last = self.run_pending().last()
        with rows_are(self.numbers):
            return self.logits(last)

    def crop(self, lengths: Sequence[int]) -> None:
        """Forget what ran of every row's text beyond ``lengths``, in all spans."""
        for cache in self.caches:
            cache.crop(lengths)
        self.done = list(lengths)

    def copies(self, rows: Sequence[int]) -> "Rows":
        """Return rows of another batch, each a copy of one of these and its cache."""
        other = copy(self)
        other.caches = [copy(cache) for cache in self.caches]
        other.select(rows)
        other.tokens = [list(tokens) for tokens in other.tokens]
        return other

    def select(self, rows: Sequence[int]) -> None:
        """Keep some of the rows."""
        for cache in self.caches:
            cache.select(rows)
        self.tokens = [self.tokens[row] for row in rows]
        self.numbers, self.done, self.left = (
            [values[row] for row in rows] for values in (self.numbers, self.done, self.left)
        )
