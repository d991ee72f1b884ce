"""Refuse arguments of a wrong type at the door, by a function's own annotations.

This module knows no rooms. It looks at plain annotations only: numbers, yes or no, text, one of
several words, and classes of this library. Everything else is for the function itself to check.
"""

import functools
import inspect
import types
import unicodedata
from collections.abc import Callable, Hashable, Iterable
from numbers import Integral, Real
from typing import Any, Literal, ParamSpec, TypeVar, Union, get_args, get_origin

P = ParamSpec("P")
R = TypeVar("R")

_NAMES = {int: "a whole number", float: "a number", bool: "True or False", str: "a string"}
_LEAST = {"seed": 0}
_ADVICE = {
    "Model": " Make one with spade_lens.load(), for example load('smollm2-135m-instruct') or "
    "load(hugging_face_model, tokenizer=tokenizer).",
    "Settings": " For example settings=Settings(memory_limit=2, progress=False).",
}


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """Let a function refuse arguments that its plain annotations exclude.

    Example:
        >>> @checked
        ... def draw(n: int, *, kind: Literal["rule", "pairs"] = "rule") -> int:
        ...     return n
        >>> draw(3)
        3
        >>> draw("3")
        Traceback (most recent call last):
        ...
        TypeError: n='3' was given; expected a whole number.
        >>> draw(3, kind="rules")
        Traceback (most recent call last):
        ...
        ValueError: kind='rules' was given; expected 'rule' or 'pairs'.
    """
    signature = inspect.signature(function)
    plain = {}
    for name, parameter in signature.parameters.items():
        if (kinds := _plain(parameter.annotation)) is not None:
            plain[name] = kinds
    order = [
        name
        for name, parameter in signature.parameters.items()
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    ]

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        for name, value in (*zip(order, args, strict=False), *kwargs.items()):
            if name in plain:
                _check(name, value, plain[name])
        return function(*args, **kwargs)

    return call


def check_number(name: str, value: Any, *, least: float | None = None, whole: bool = True) -> None:
    """Raise if an argument is no (whole) number, or one below the least."""
    kind = "a whole number" if whole else "a number"
    expected = kind if least is None else f"{kind}, {least} or more"
    if not _is(value, int if whole else float):
        raise TypeError(f"{name}={value!r} was given; expected {expected}.")
    if least is not None and not float(value) >= least:
        raise ValueError(f"{name}={value} was given; expected {expected}.")


def whole_numbers(name: str, given: Any, expected: str) -> list[int]:
    """Return one or several whole numbers, ascending, each once."""
    several = isinstance(given, Iterable) and not isinstance(given, str)
    asked = list(given) if several else [given]
    if not all(_is(number, int) for number in asked):
        raise TypeError(f"{name}={given!r} was given; expected {expected}.")
    return sorted({int(number) for number in asked})


def plain_name(name: Any, of: str) -> str:
    r"""Return a name if tables, figures and a terminal can show it.

    Example:
        >>> plain_name("\x1b[2J", "a task")
        Traceback (most recent call last):
        ...
        ValueError: '\x1b[2J' is the name of a task; expected a line of text without control ...

    Args:
        name: The name.
        of: What has it, for messages.

    Raises:
        TypeError: If it is no text.
        ValueError: If it holds control characters, such as the beginning of a colour.
    """
    if not isinstance(name, str):
        raise TypeError(f"{name!r:.80} is the name of {of}; expected text.")
    if has_control_characters(name):
        raise ValueError(
            f"{name!r:.80} is the name of {of}; expected a line of text without control characters."
        )
    return name


def has_control_characters(text: str) -> bool:
    """Whether a text holds what a terminal obeys instead of showing it, or breaks a line."""
    return any(unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") for c in text)


def visible(text: str) -> str:
    r"""Return a text with control characters written out, line ends and tabs excepted.

    Example:
        >>> visible("a\x1b[31mb\n")
        'a\\x1b[31mb\n'
    """
    return "".join(
        repr(c)[1:-1] if has_control_characters(c) and c not in "\n\t" else c for c in text
    )


def _plain(annotation: Any) -> tuple[Any, ...] | None:
    """The plain types that an annotation allows; None if it is not plain."""
    union = get_origin(annotation) in (Union, types.UnionType)
    kinds = get_args(annotation) if union else (annotation,)
    for kind in kinds:
        of_ours = (
            isinstance(kind, type)
            and kind.__module__.startswith("spade_lens.")
            and not getattr(kind, "_is_protocol", False)
        )
        if kind not in (*_NAMES, type(None)) and not of_ours and get_origin(kind) is not Literal:
            return None
    return kinds


def _check(name: str, value: Any, kinds: tuple[Any, ...]) -> None:
    words = [word for kind in kinds if get_origin(kind) is Literal for word in get_args(kind)]
    if any(_is(value, kind) for kind in kinds) or (isinstance(value, Hashable) and value in words):
        least = _LEAST.get(name)
        if least is not None and value is not None and value < least:
            raise ValueError(f"{name}={value!r} was given; expected {least} or more.")
        return
    expected = [
        _NAMES.get(kind, getattr(kind, "__name__", ""))
        for kind in kinds
        if kind is not type(None) and get_origin(kind) is not Literal
    ]
    expected += [repr(word) for word in words]
    advice = "".join(_ADVICE.get(getattr(kind, "__name__", ""), "") for kind in kinds)
    kind_of_error = ValueError if words and isinstance(value, str) else TypeError
    raise kind_of_error(
        f"{name}={_shown(value)} was given; expected {' or '.join(expected)}.{advice}"
    )


def _is(value: Any, kind: Any) -> bool:
    if kind is type(None):
        return value is None
    if kind is int:
        return isinstance(value, Integral) and not isinstance(value, bool)
    if kind is float:
        return isinstance(value, Real) and not isinstance(value, bool)
    return isinstance(kind, type) and isinstance(value, kind)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:50]}... ({type(value).__name__})"
