"""Hooks: what one may know of the run it fires in, and which prompts run side by side.

A hook sees a batch. It must do to it what it would do to each prompt alone, so while hooks may act,
prompts run in the order given, and only prompts of equal length run side by side unless the hooks
asked for more. A hook's input is its own: what it writes in place reaches no other run.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, Literal, Protocol, cast, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from spade_lens.models.backbone import AfterBlock, Backbone, Cache
from spade_lens.settings import is_nested

Phase = Literal["prompt", "lens"]
Batching = Literal["any lengths", "equal lengths", "one prompt"]
"""Which prompts may run side by side, from the laxest to the strictest."""


@dataclass(frozen=True)
class HookRun:
    """What runs while a hook fires: ``model.running``, read inside a hook.

    Example:
        >>> def steer(resid, hook):
        ...     run = model.running
        ...     resid[torch.arange(len(resid)), run.last] += 1
        ...     return resid
        >>> with model.hooks([("blocks.1.hook_resid_post", steer)], ragged=True):
        ...     residuals = capture(model, ["ab", "abcd"])

    Args:
        phase: ``"prompt"`` where tokens of prompts run, ``"lens"`` where a lens goes on from a
            layer with what it kept of them, and where its result is unembedded.
        prompts: For every row, the number of its prompt in the order given to the function that
            runs it (:func:`spade_lens.capture`, :func:`spade_lens.read`, ...); None where rows are
            not a user's prompts, or you call the model's five operations yourself.
        positions: Every token's position in its prompt; None in the final norm and the
            unembedding, where each row is one token.
        mask: False for padding.
        start: The layer from which the tokens run.
        stop: The layer to which they run; ``start`` in the embedding, the final norm and the
            unembedding.
    """

    phase: Phase
    prompts: tuple[int, ...] | None
    positions: Int[Tensor, "row pos"] | None
    mask: Bool[Tensor, "row pos"]
    start: int
    stop: int

    @property
    def last(self) -> Int[Tensor, " row"]:
        """The column of every row's last token."""
        return self.mask.shape[1] - 1 - self.mask.flip(1).int().argmax(dim=1)


@dataclass(frozen=True)
class _Told:
    """What is known of the rows that will run; ``numbers`` are those of prompts further out."""

    phase: Phase = "prompt"
    of_user: bool = True
    numbers: tuple[int, ...] | None = None
    prompts: tuple[int, ...] | None = None
    lengths: tuple[int, ...] | None = None

    def outside(self, prompts: Iterable[int]) -> tuple[int, ...] | None:
        """Return a user's numbers of prompts; None where the user did not give these prompts."""
        if not self.of_user or (self.numbers is None and is_nested()):
            return None
        return tuple(prompts if self.numbers is None else (self.numbers[i] for i in prompts))


_NOTHING = _Told()
_told: ContextVar[_Told] = ContextVar("told", default=_NOTHING)
_run: ContextVar[HookRun | None] = ContextVar("run", default=None)
_quiet: ContextVar[int] = ContextVar("quiet", default=0)


@contextmanager
def _setting(variable: ContextVar[Any], value: Any) -> Iterator[None]:
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


@contextmanager
def rows_are(prompts: Iterable[int], lengths: Sequence[int] | None = None) -> Iterator[None]:
    """Tell hooks which prompts the rows of a batch are, and how many tokens of each are real."""
    told = _told.get()
    real = None if lengths is None else tuple(lengths)
    with _setting(_told, replace(told, prompts=told.outside(prompts), lengths=real)):
        yield


@contextmanager
def numbered(prompts: Iterable[int] | None) -> Iterator[None]:
    """Inside, prompt ``i`` is the one that is ``prompts[i]`` outside; None for none of a user's."""
    told = _told.get()
    numbers = None if prompts is None else told.outside(prompts)
    with _setting(_told, _Told(told.phase, numbers is not None, numbers)):
        yield


@contextmanager
def in_lens() -> Iterator[None]:
    """Tell hooks that what runs is a lens."""
    with _setting(_told, replace(_told.get(), phase="lens", prompts=None, lengths=None)):
        yield


@contextmanager
def quiet() -> Iterator[None]:
    """Let the hooks that are open do nothing, while something is measured on made-up numbers."""
    with _setting(_quiet, _quiet.get() + 1):
        yield


def quietness() -> int:
    """Return how many :func:`quiet` are open; a hook acts in those that were when it was opened."""
    return _quiet.get()


def running() -> HookRun | None:
    """Return what runs; None where no hook fires."""
    return _run.get()


@runtime_checkable
class _MayBeHooked(Protocol):
    @property
    def hooked(self) -> bool: ...

    @property
    def batching(self) -> Batching: ...


def side_by_side(
    model: _MayBeHooked,
    lengths: Sequence[int],
    fits: Callable[[int, int], bool] = lambda n_rows, longest: True,
) -> list[list[int]]:
    """Return which rows run in one batch, in the order to run them in.

    Without hooks the shortest come first. With hooks rows keep the order given, and those of a
    batch follow each other and are of equal length unless the hooks allow any.

    Args:
        model: The model that runs them.
        lengths: How many tokens of every row run.
        fits: Whether a batch of so many rows, padded to so many tokens, is small enough. One row
            always is.
    """
    rows = range(len(lengths))
    if not model.hooked:
        groups = [sorted(rows, key=lambda i: lengths[i])]
    elif model.batching == "any lengths":
        groups = [list(rows)]
    elif model.batching == "one prompt":
        groups = [[row] for row in rows]
    else:
        groups = [list(equal) for _, equal in groupby(rows, key=lambda i: lengths[i])]
    batches: list[list[int]] = []
    for group in groups:
        longest = 0
        for row in group:
            longest = max(longest, lengths[row])
            if row != group[0] and fits(len(batches[-1]) + 1, longest):
                batches[-1].append(row)
            else:
                batches.append([row])
                longest = lengths[row]
    return batches


def hooked(backbone: Backbone) -> Backbone:
    """Return a backbone in which hooks may act: it tells them what runs, and gives them copies."""
    return cast(Backbone, _HookedBackbone(backbone))


class _HookedBackbone:
    def __init__(self, inner: Backbone) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def embed(
        self, tokens: Int[Tensor, "batch pos"], positions: Int[Tensor, "batch pos"]
    ) -> Float[Tensor, "batch pos d_model"]:
        """Return the residual stream at layer 0."""
        with _fires(positions, tokens.shape, 0, 0):
            return self.inner.embed(tokens.clone(), positions)

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
        """Run blocks ``start`` to ``stop - 1``; ``after_block`` gets copies too."""
        assert cache is None, "hooks may change what a cache holds"
        own = after_block

        def copied(layer: int, after: Tensor) -> Tensor | None:
            return None if own is None else own(layer, after.clone())

        with _fires(positions, positions.shape, start, stop, valid):
            return self.inner.run_blocks(
                resid.clone(), positions, start, stop, valid=valid, after_block=copied
            )

    def final_norm(self, resid: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows d_model"]:
        """Apply the normalisation before the unembedding."""
        shape = (resid.shape[:-1].numel(), 1)
        with _fires(None, shape, self.inner.n_layers, self.inner.n_layers):
            return self.inner.final_norm(resid.clone())

    def unembed(self, normed: Float[Tensor, "rows d_model"]) -> Float[Tensor, "rows d_vocab"]:
        """Return logits, the model's soft cap or scale included."""
        with _fires(None, (len(normed), 1), self.inner.n_layers, self.inner.n_layers):
            return self.inner.unembed(normed.clone())

    def prefix(self, token: int) -> None:
        """Return None: hooks may change what a start token gives."""

    def cached_tokens(self, positions: Tensor, resid_at: Callable[[int], Tensor]) -> None:
        """Return None likewise."""


@contextmanager
def _fires(
    positions: Tensor | None,
    shape: Sequence[int],
    start: int,
    stop: int,
    valid: Tensor | None = None,
) -> Iterator[None]:
    """Say what runs. Nothing that a hook runs itself is taken for these rows."""
    n_rows, width = shape
    told = _told.get()
    mask = torch.ones(n_rows, width, dtype=torch.bool) if valid is None else valid
    if told.lengths is not None and len(told.lengths) == n_rows:
        mask = mask & (torch.arange(width) < torch.tensor(told.lengths)[:, None]).to(mask.device)
    if positions is not None:
        mask = mask.to(positions.device)
    known = told.prompts is not None and len(told.prompts) == n_rows
    run = HookRun(told.phase, told.prompts if known else None, positions, mask, start, stop)
    with _setting(_run, run), _setting(_told, _NOTHING):
        yield
