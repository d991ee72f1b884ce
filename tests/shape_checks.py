"""The run-time checks of shapes and types in tests, at a small part of their price.

``--jaxtyping-packages`` puts ``jaxtyping.jaxtyped`` on every function of the package. As it comes,
it binds the arguments of each call in Python and checks the parameters twice, which took a third
of all tests. Here beartype checks parameters and return once, within a scope of jaxtyping that
holds the sizes of this call's axes. What is checked is the same.

Importing this module is what puts it in place; it has to come before the package.
"""

import dataclasses
import inspect
from collections.abc import Callable
from contextlib import ContextDecorator
from functools import partial, update_wrapper
from types import FunctionType
from typing import Any, get_type_hints

import jaxtyping

_as_it_comes = jaxtyping.jaxtyped
_context = jaxtyping.jaxtyped("context")


class Scope(ContextDecorator):
    """Sizes of axes that hold for one call.

    A decorator of contextlib, whose frames the package skips when it looks for the user's line.
    """

    def __enter__(self) -> None:
        _context.__enter__()

    def __exit__(self, *error: Any) -> None:
        _context.__exit__(*error)


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
    typed = FunctionType(
        given.__code__, given.__globals__, given.__name__, given.__defaults__, given.__closure__
    )
    update_wrapper(typed, given)
    del typed.__wrapped__
    typed.__kwdefaults__, typed.__annotations__ = given.__kwdefaults__, hints
    return update_wrapper(_scope(typechecker(typed)), given)


jaxtyping.jaxtyped = jaxtyped
