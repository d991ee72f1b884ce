"""Residuals of texts at a layer and at the top, kept in half precision to be read many times."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from spade_lens.models.model import Model
from spade_lens.models.places import pad_after
from spade_lens.prompts.prompt import Prompt
from spade_lens.settings import limits, progress_bar

_LARGEST = 65504.0
"""Of float16. Only massive activations of start tokens are larger."""
_BATCH_TOKENS = 4096


@dataclass(frozen=True, eq=False)
class Batch:
    """Some texts side by side, padded after their ends.

    Args:
        pieces: Which texts they are.
        low: Residuals at the layer.
        top: Residuals at the last layer.
        positions: Where they stand.
        valid: False for padding, and for the first token of a text, whose residual is like no
            other.
    """

    pieces: Sequence[int]
    low: Float[Tensor, "row pos d_model"]
    top: Float[Tensor, "row pos d_model"]
    positions: Int[Tensor, "row pos"]
    valid: Bool[Tensor, "row pos"]


@dataclass(frozen=True, eq=False)
class Streams:
    """Residuals of texts, one after the other.

    Args:
        pieces: The texts.
        low: Residuals at the layer, in float16.
        top: Residuals at the last layer, in float16.
    """

    pieces: Sequence[Prompt]
    low: Float[Tensor, "token d_model"]
    top: Float[Tensor, "token d_model"]

    def __post_init__(self) -> None:
        lengths = [len(piece) for piece in self.pieces]
        starts = list(accumulate(lengths, initial=0))
        object.__setattr__(self, "_starts", starts)
        object.__setattr__(self, "_order", sorted(range(len(lengths)), key=lengths.__getitem__))

    _starts: Sequence[int] = ()
    _order: Sequence[int] = ()

    @classmethod
    @torch.no_grad()
    def of(cls, model: Model, layer: int, pieces: Sequence[Prompt]) -> "Streams":
        """Run texts, and keep their residuals.

        Raises:
            ValueError: If they take more than the memory limit.
        """
        model.check_prompts(pieces)
        n_tokens = sum(map(len, pieces))
        needed, most = 4 * n_tokens * model.d_model, limits(model).memory_bytes
        if needed > most:
            raise ValueError(
                f"The residuals of {n_tokens} tokens take {needed / 2**30:.1f} GiB, and the memory "
                f"limit is {most / 2**30:.1f} GiB. Give less text, or "
                "settings=Settings(memory_limit=...)."
            )
        empty = torch.empty(n_tokens, model.d_model, dtype=torch.float16, device=model.device)
        streams = cls(pieces, empty, torch.empty_like(empty))
        with progress_bar(total=n_tokens, desc="run text", unit="token", model=model) as bar:
            for some in streams.batches(_BATCH_TOKENS):
                tokens = pad_after([pieces[i].tokens for i in some], model.device)
                positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
                low = model.run_blocks(model.embed(tokens, positions), positions, 0, layer)
                top = model.run_blocks(low, positions, layer, model.n_layers)
                for row, i in enumerate(some):
                    start, stop = streams._starts[i], streams._starts[i + 1]
                    for kept, made in ((streams.low, low), (streams.top, top)):
                        kept[start:stop] = made[row, : stop - start].clamp(-_LARGEST, _LARGEST)
                bar.update(sum(len(pieces[i]) for i in some))
        return streams

    @property
    def n_tokens(self) -> int:
        """How many tokens there are."""
        return self._starts[-1]

    def first(self, n_tokens: int) -> "Streams":
        """Return the first texts, of about so many tokens together, and at least one text."""
        return self.split(max(1, sum(stop <= n_tokens for stop in self._starts[1:])))[0]

    def split(self, n_pieces: int) -> tuple["Streams", "Streams"]:
        """Return the first texts, so many of them, and the others; nothing is copied."""
        at = self._starts[n_pieces]
        return (
            Streams(self.pieces[:n_pieces], self.low[:at], self.top[:at]),
            Streams(self.pieces[n_pieces:], self.low[at:], self.top[at:]),
        )

    def batches(self, n_tokens: int) -> list[list[int]]:
        """Return which texts run side by side: of about one length, about ``n_tokens`` in all."""
        found: list[list[int]] = [[]]
        for i in self._order:
            if found[-1] and (len(found[-1]) + 1) * len(self.pieces[i]) > n_tokens:
                found.append([])
            found[-1].append(i)
        return found

    def draw(self, n_tokens: int) -> list[int]:
        """Return texts of about one length, drawn by torch's generator, likewise."""
        first = int(torch.randint(len(self._order), ()))
        chosen: list[int] = []
        total = 0
        while total < n_tokens and len(chosen) < len(self._order):
            chosen.append(self._order[(first + len(chosen)) % len(self._order)])
            total += len(self.pieces[chosen[-1]])
        return chosen

    def get(self, pieces: Sequence[int]) -> Batch:
        """Return texts side by side."""
        device = self.low.device
        lengths = torch.tensor([len(self.pieces[i]) for i in pieces], device=device)[:, None]
        starts = torch.tensor([self._starts[i] for i in pieces], device=device)[:, None]
        columns = torch.arange(max(len(self.pieces[i]) for i in pieces), device=device)[None]
        at = starts + torch.minimum(columns, lengths - 1)
        return Batch(
            pieces,
            self.low[at].float(),
            self.top[at].float(),
            columns.expand_as(at),
            (columns > 0) & (columns < lengths),
        )

    def __iter__(self) -> Iterator[Batch]:
        """Go through all texts."""
        return (self.get(some) for some in self.batches(_BATCH_TOKENS // 4))
