"""Memory limit, batch size and progress: one object, one default, for everything that runs a model.

This module knows nothing of models or tasks. A setting is looked up in four places. From the
strongest to the weakest: ``settings=`` of the call, the innermost ``with Settings(...)`` around it,
``model.settings``, and the default. It also knows where a user's call begins and ends.
"""

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, fields
from math import inf
from threading import get_ident
from types import TracebackType
from typing import TYPE_CHECKING, Any, ParamSpec, Protocol, TypeVar, runtime_checkable
from weakref import WeakSet

from spade_lens.checks import checked, visible

if TYPE_CHECKING:
    from tqdm.auto import tqdm

P = ParamSpec("P")
R = TypeVar("R")

_MEMORY_LIMIT = 4.0
_BATCH_TOKENS = 2048


@dataclass(frozen=True)
class Settings:
    """What a run may take and show. ``None`` leaves a setting as it is outside.

    Example:
        >>> with Settings(progress=False):
        ...     residuals = capture(model, prompts, settings=Settings(memory_limit=1))

    Args:
        memory_limit: About the most memory to take beside the model's weights, in GiB; 4 by
            default.
        batch_size: How many prompts or rows run side by side at most; by default as many as the
            memory limit allows.
        progress: Show a progress bar when the work takes longer than two seconds; by default yes.

    Raises:
        TypeError: If one of them is of a wrong type.
        ValueError: If ``memory_limit`` or ``batch_size`` is not positive.
    """

    memory_limit: float | None = None
    batch_size: int | None = None
    progress: bool | None = None

    def __post_init__(self) -> None:
        _check_types(self.memory_limit, self.batch_size, self.progress)
        if self.memory_limit is not None and not 0 < self.memory_limit < inf:
            raise ValueError(
                f"memory_limit={self.memory_limit} was given; expected a number of GiB above 0."
            )
        if self.batch_size is not None and self.batch_size < 1:
            raise ValueError(f"batch_size={self.batch_size} was given; expected 1 or more.")

    def __enter__(self) -> "Settings":
        _stack.set((*_stack.get(), self))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        # Its own entry, which need not be the last where generators end out of turn.
        stack = _stack.get()
        own = [i for i, settings in enumerate(stack) if settings is self]
        if own:
            _stack.set((*stack[: own[-1]], *stack[own[-1] + 1 :]))


@checked
def _check_types(
    memory_limit: float | None, batch_size: int | None, progress: bool | None
) -> None: ...


_stack: ContextVar[tuple[Settings, ...]] = ContextVar("settings", default=())
_bars: "WeakSet[tqdm[Any]]" = WeakSet()


@dataclass(frozen=True)
class Limits:
    """The settings in force, none of them open.

    Args:
        memory_limit: In GiB.
        batch_size: How many prompts or rows at most; None for as many as memory allows.
        progress: Whether to show a progress bar.
        batch_tokens: How many tokens run side by side at most. On two CPU cores batches of four
            times as many took up to 1.3 times as long (SmolLM2-135M).
    """

    memory_limit: float
    batch_size: int | None
    progress: bool
    batch_tokens: int

    @property
    def memory_bytes(self) -> float:
        """The memory limit in bytes."""
        return self.memory_limit * 2**30

    def part(self, fraction: float) -> Settings:
        """Return settings that leave a step a fraction of the memory."""
        return Settings(memory_limit=self.memory_limit * fraction)

    def rows(self, bytes_per_row: float, *, fraction: float = 1 / 64) -> int:
        """Return how many rows fit a fraction of the memory limit: at least one.

        Example:
            >>> Limits(4.0, None, True, 2048).rows(4 * 49152)  # float32 logits of 49152 tokens
            341

        Args:
            bytes_per_row: What one row takes, in bytes.
            fraction: The fraction of the memory limit that all rows together may take.
        """
        fitting = max(1, int(self.memory_bytes * fraction / bytes_per_row))
        return fitting if self.batch_size is None else min(fitting, self.batch_size)


@runtime_checkable
class HasSettings(Protocol):
    """What :func:`limits` asks of a model."""

    settings: Settings

    @property
    def device(self) -> Any:
        """Where it runs."""
        ...


class SettingsOf:
    """Memory limit, batch size and progress of everything that runs a model."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = f"_{name}"

    def __get__(self, model: Any, owner: type | None = None) -> Settings:
        settings: Settings = getattr(model, self._name)
        return settings

    def __set__(self, model: Any, given: Settings) -> None:
        if not isinstance(given, Settings):
            raise TypeError(
                f"settings={given!r} was given; expected Settings, such as "
                "Settings(memory_limit=2, progress=False)."
            )
        setattr(model, self._name, given)


def limits(model: HasSettings | None = None) -> Limits:
    """Return the settings in force here, for work with a model or without one.

    Args:
        model: The model whose own settings stand below those of the context.
    """
    merged: dict[str, Any] = {"memory_limit": _MEMORY_LIMIT, "batch_size": None, "progress": True}
    for settings in (*(() if model is None else (model.settings,)), *_stack.get()):
        given = {field.name: getattr(settings, field.name) for field in fields(settings)}
        merged |= {name: value for name, value in given.items() if value is not None}
    return Limits(**merged, batch_tokens=_BATCH_TOKENS)


class Call:
    """One call by a user, from its beginning to its end, in one thread.

    Attributes:
        kept: What is known for the length of the call, by any key.
        at_end: What is done when it ends.
        depth: How many functions with ``settings=`` are open, one inside the other.
    """

    def __init__(self) -> None:
        self.kept: dict[Any, Any] = {}
        self.at_end = ExitStack()
        self.depth = 0
        self.thread = get_ident()


_call: ContextVar[Call | None] = ContextVar("call", default=None)


@contextmanager
def one_call() -> Iterator[Call]:
    """Open a call, or join the one that is open around this."""
    call = _call.get()
    # A context may be copied into another thread, but a call belongs to one.
    if call is not None and call.thread == get_ident():
        yield call
        return
    call = Call()
    token = _call.set(call)
    try:
        with call.at_end:
            yield call
    finally:
        call.thread = -1  # a context copied meanwhile, as of an asyncio task, may outlive the call
        _call.reset(token)


def scoped(function: Callable[P, R]) -> Callable[P, R]:
    """Make a function one call, and let its ``settings=`` hold for everything that it calls.

    The function takes ``settings: Settings | None = None`` by keyword and need not look at it:
    :func:`limits` and :func:`progress_bar` do. Its arguments are checked; see :func:`checked`.
    """
    function = checked(function)

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        given = kwargs.get("settings")
        with one_call() as call, given if isinstance(given, Settings) else nullcontext():
            call.depth += 1
            try:
                return function(*args, **kwargs)
            finally:
                call.depth -= 1

    return run


def is_nested() -> bool:
    """Whether the function that runs was called by another of ours, not by a user."""
    call = _call.get()
    return call is not None and call.depth > 1


def progress_bar(
    items: Iterable[Any] | None = None, *, model: HasSettings | None = None, **options: Any
) -> "tqdm[Any]":
    """Return a progress bar, hidden where the settings say so or another bar is open around it.

    Args:
        items: What to iterate over; None for a bar that is updated by hand.
        model: The model that runs; see :func:`limits`.
        options: Further arguments of ``tqdm``, such as ``total``, ``desc`` and ``unit``.
    """
    from tqdm.auto import tqdm  # here: it takes a while to import

    # A bar that has been closed is disabled.
    options = {k: visible(v) if k == "desc" else v for k, v in options.items()}
    hidden = not limits(model).progress or any(not bar.disable for bar in _bars)
    bar = tqdm(items, disable=hidden, **({"delay": 2} | options))
    if not hidden:
        _bars.add(bar)
    return bar
