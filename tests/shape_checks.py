"""The run-time checks of shapes and types in tests, at a small part of their price.

``--jaxtyping-packages`` puts ``jaxtyping.jaxtyped`` on every function of the package. As it comes,
it binds the arguments of each call in Python and checks the parameters twice, which more than
doubled the time of a read of a tiny model. Here beartype checks parameters and return once, within
a scope of jaxtyping that holds the sizes of this call's axes. What is checked is the same.

Importing this module is what puts it in place; it has to come before the package.
"""

import dataclasses
import inspect
from collections.abc import Callable
from contextlib import ContextDecorator
from functools import partial, update_wrapper
from types import CellType, CodeType, FunctionType
from typing import Any, get_type_hints

import jaxtyping

_as_it_comes = jaxtyping.jaxtyped


class Scope(ContextDecorator, type(jaxtyping.jaxtyped("context"))):
    """Sizes of axes that hold for one call.

    A decorator of contextlib, whose frames the package skips when it looks for the user's line.
    """


_scope = Scope()


def resolved(hint: Any, names: dict[str, Any]) -> Any:
    """The annotation without strings; anything where a name is there for mypy alone."""

    def holder() -> None: ...

    holder.__annotations__ = {"hint": hint}
    try:
        return get_type_hints(holder, names, include_extras=True)["hint"]
    except Exception:  # as in jaxtyping, whatever it is
        return Any


def jaxtyped(given: Any = None, *, typechecker: Callable[[Any], Any]) -> Any:
    """Check the parameters and the return of a function, or of the ``__init__`` of a dataclass."""
    if given is None:
        return partial(jaxtyped, typechecker=typechecker)
    if inspect.isclass(given):
        own = given.__init__
        if dataclasses.is_dataclass(given) and not hasattr(own, "__wrapped__"):
            given.__init__ = jaxtyped(own, typechecker=typechecker)
        return given
    if not isinstance(given, FunctionType) or inspect.isgeneratorfunction(given):
        return _as_it_comes(given, typechecker=typechecker)
    hints = {name: resolved(h, given.__globals__) for name, h in given.__annotations__.items()}
    if any("{" in str(hint) for hint in hints.values()):  # a size that is an argument's value
        return _as_it_comes(given, typechecker=typechecker)
    # What the function itself says of its types stays as it is written.
    typed = _copy(given, given.__closure__)
    typed.__annotations__ = hints
    return update_wrapper(_scope(_checking(typed, typechecker)), given)


def _copy(given: FunctionType, closure: tuple[CellType, ...] | None) -> FunctionType:
    name, defaults = given.__name__, given.__defaults__
    copy = FunctionType(given.__code__, given.__globals__, name, defaults, closure)
    copy.__kwdefaults__ = given.__kwdefaults__
    update_wrapper(copy, given)
    del copy.__wrapped__
    return copy


_inner: dict[CodeType, tuple[FunctionType, FunctionType]] = {}


def _checking(typed: FunctionType, typechecker: Callable[[Any], Any]) -> Any:
    """What checks a function and calls it.

    A function inside another is defined anew in every call of that. What checks it is made once
    for all, of a copy that closes over nothing, and then calls the function at hand.
    """
    if "<locals>" not in typed.__qualname__:
        return typechecker(typed)
    hollow, made = _inner.get(typed.__code__, (None, None))
    if hollow is None or made is None or hollow.__annotations__ != typed.__annotations__:
        hollow = _copy(typed, tuple(CellType() for _ in typed.__closure__ or ()))
        hollow.__annotations__ = typed.__annotations__
        made = typechecker(hollow)
        _inner[typed.__code__] = hollow, made
    held = getattr(made, "__kwdefaults__", None) or {}
    if not any(value is hollow for value in held.values()):
        return typechecker(typed)
    checking = FunctionType(
        made.__code__, made.__globals__, made.__name__, made.__defaults__, made.__closure__
    )
    checking.__kwdefaults__ = {n: typed if v is hollow else v for n, v in held.items()}
    return checking


jaxtyping.jaxtyped = jaxtyped
