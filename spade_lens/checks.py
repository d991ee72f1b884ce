"""Refuse arguments of a wrong type at the door, by a function's own annotations.

This module knows no rooms. It looks at plain annotations only: numbers, yes or no, text, one of
several words, tensors with their dimensions, data frames, classes of this library, and several of
these. Several whole numbers (layers, prompts, token ids) go through :func:`whole_numbers`.
Everything else is for the function itself to check.
"""

import functools
import inspect
import math
import sys
import types
import unicodedata
import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import fields
from numbers import Integral, Real
from os import PathLike
from typing import Any, Literal, ParamSpec, TypeVar, Union, get_args, get_origin

P = ParamSpec("P")
R = TypeVar("R")

_NAMES = {int: "a whole number", float: "a number", bool: "True or False", str: "a string"}
_NUMBERS = {"Float": "floating-point numbers", "Int": "whole numbers", "Bool": "yes or no"}
_ORIGINS: dict[Any, str] = {Mapping: "a mapping", Callable: "a function", PathLike: "a path"}
_OTHERS = {("pandas", "DataFrame"), ("torch", "Tensor"), ("matplotlib", "Figure")}
_LEAST = {"seed": 0}
_MOST = {"seed": 2**63 - 1}  # what torch's generators take
_NOT_THE_USERS = ("spade_lens", "contextlib", "jaxtyping", "beartype")  # the last three wrap ours
_EXAMPLES = {"keep": " For example keep=Keep(last=2)."}
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


def warn(text: str, category: type[Warning] = UserWarning) -> None:
    """Warn at the user's own line: the nearest one outside this package."""
    frame, level = sys._getframe(1), 2
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in _NOT_THE_USERS:
        frame, level = frame.f_back, level + 1
    warnings.warn(text, category, stacklevel=level)


def check_number(name: str, value: Any, *, least: float | None = None, whole: bool = True) -> None:
    """Raise if an argument is no (whole) number, or one below the least."""
    kind = "a whole number" if whole else "a number"
    expected = kind if least is None else f"{kind}, {least} or more"
    if not _is(value, int if whole else float):
        not_a_number = not whole and isinstance(value, Real) and not isinstance(value, bool)
        error = ValueError if not_a_number else TypeError
        raise error(f"{name}={value!r} was given; expected {expected}.")
    if least is not None and not float(value) >= least:
        raise ValueError(f"{name}={value} was given; expected {expected}.")


def check_fields(record: Any) -> None:
    """Raise if a field of a dataclass is of a type that its plain annotation excludes."""
    for field in fields(record):
        if (kinds := _plain(field.type)) is not None:
            _check(field.name, getattr(record, field.name), kinds)


def as_plain(given: Any) -> Any:
    """Return arrays, tensors and columns as lists or numbers, anything else as it is."""
    try:
        return given.tolist() if hasattr(given, "tolist") else given
    except (RuntimeError, NotImplementedError):  # sparse, or without values
        return given


def as_several(given: Any) -> list[Any] | None:
    """Return what was given one by one: the items of a list, a generator, an array or a column.

    A set of numbers or of texts is taken in ascending order. None if it is no such thing: a text,
    a mapping, a table.
    """
    given = as_plain(given)
    if isinstance(given, set | frozenset):
        given = sorted(given) if all(map(is_whole, given)) else sorted(given, key=str)
    if not isinstance(given, Iterable) or isinstance(given, str | bytes | bytearray | Mapping):
        return None
    if hasattr(given, "columns") or hasattr(given, "tolist"):
        return None
    return [as_plain(one) for one in given]


def is_whole(given: Any) -> bool:
    """Whether this is a whole number; True and False are none."""
    return isinstance(given, Integral) and not isinstance(given, bool)


def spelled(numbers: Sequence[int]) -> str:
    """Return whole numbers as text.

    Example:
        >>> spelled(range(31)), spelled([3, 1])
        ('0 to 30', '3, 1')
    """
    first, last = (numbers[0], numbers[-1]) if numbers else (0, 0)
    run = len(numbers) > 2 and list(numbers) == list(range(first, last + 1))
    return f"{first} to {last}" if run else ", ".join(map(str, numbers))


def whole_numbers(
    given: Any,
    name: str,
    expected: str,
    *,
    below: int | None = None,
    distinct: bool = True,
    empty: bool = False,
) -> list[int]:
    """Return one whole number or several as a list, in the order given.

    Example:
        >>> whole_numbers(range(3, 0, -1), "layers=", "layers 0 to 3", below=4)
        [3, 2, 1]
        >>> whole_numbers([4, 1], "layers=", "layers 0 to 3", below=4)
        Traceback (most recent call last):
        ...
        ValueError: layers=[4, 1] was given, and [4] lie outside; expected layers 0 to 3.

    Args:
        given: A number, or several in a list, a range, a generator, a set, an array or a tensor.
        name: What stands before the value in the message, such as ``"layers="``.
        expected: What is expected, for the message.
        below: All are from 0 to below this; any number by default.
        distinct: Whether a number may occur once only.
        empty: Whether there may be none.

    Raises:
        TypeError: If something else is given.
        ValueError: If there are none, one lies outside, or one occurs twice.
    """
    plain = as_plain(given)
    several = [plain] if is_whole(plain) else as_several(plain)
    if several is None or not all(map(is_whole, several)):
        raise TypeError(f"{name}{_shown(given)} was given; expected {expected}.")
    numbers = [int(one) for one in several]
    outside = [n for n in numbers if below is not None and not 0 <= n < below]
    twice = [n for n, count in Counter(numbers).items() if distinct and count > 1]
    if outside or twice or not (numbers or empty):
        problem = f", and {outside} lie outside" if outside else ""
        problem = problem or (f", and {twice} twice; give each once" if twice else "")
        raise ValueError(f"{name}{_shown(numbers)} was given{problem}; expected {expected}.")
    return numbers


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


def is_word(given: Any) -> bool:
    r"""Whether this is a text with something to see, nothing damaged and no white space around.

    Line ends and tabs may stand inside.

    Example:
        >>> is_word("New York"), is_word("York "), is_word("\u200b"), is_word("Yo\x00rk")
        (True, False, False, False)
    """
    if not isinstance(given, str) or given != given.strip() or visible(given) != given:
        return False
    return "\ufffd" not in given and any(unicodedata.category(c)[0] not in "CZ" for c in given)


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
    return kinds if all(map(_is_plain, kinds)) else None


def _is_plain(kind: Any) -> bool:
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Sequence:  # several whole numbers may come in more ways
        return inner[0] is not int
    if kind in (*_NAMES, type(None)) or origin in (Literal, Mapping, Callable, tuple, PathLike):
        return True
    return isinstance(kind, type) and (
        hasattr(kind, "dim_str")
        or (kind.__module__.split(".")[0], kind.__name__) in _OTHERS
        or (kind.__module__.startswith("spade_lens.") and not getattr(kind, "_is_protocol", False))
    )


def _check(name: str, value: Any, kinds: tuple[Any, ...]) -> None:
    words = [word for kind in kinds if get_origin(kind) is Literal for word in get_args(kind)]
    if any(_is(value, kind) for kind in kinds) or (
        isinstance(value, str | bool) and value in words
    ):
        least = _LEAST.get(name)
        if least is not None and value is not None and value < least:
            raise ValueError(f"{name}={value!r} was given; expected {least} or more.")
        most = _MOST.get(name)
        if most is not None and value is not None and value > most:
            raise ValueError(f"{name}={value!r} was given; expected {most} or less.")
        return
    expected = [
        _named(kind) for kind in kinds if kind is not type(None) and get_origin(kind) is not Literal
    ]
    expected += [repr(word) for word in words]
    advice = "".join(_ADVICE.get(getattr(kind, "__name__", ""), "") for kind in kinds)
    advice += _EXAMPLES.get(name, "")
    another_word = bool(words) and isinstance(value, str)
    not_a_number = float in kinds and isinstance(value, Real) and not isinstance(value, bool)
    kind_of_error = ValueError if another_word or not_a_number else TypeError
    raise kind_of_error(
        f"{name}={_shown(value)} was given; expected {' or '.join(expected)}.{advice}"
    )


def _is(value: Any, kind: Any) -> bool:
    if kind is type(None):
        return value is None
    if kind is int:
        return is_whole(value)
    if kind is float:
        return isinstance(value, Real) and not isinstance(value, bool) and not math.isnan(value)
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Sequence, tuple):
        text = isinstance(value, str | bytes | bytearray) and inner[0] is not Hashable
        if not isinstance(value, Sequence) or text:
            return False
        each = inner[:1] * len(value) if origin is Sequence or Ellipsis in inner else inner
        return len(each) == len(value) and all(map(_fits, value, each))
    if origin is Callable:
        return callable(value)
    if origin in (Mapping, PathLike):
        return isinstance(value, origin)
    return isinstance(kind, type) and isinstance(value, kind)


def _fits(value: Any, annotation: Any) -> bool:
    kinds = _plain(annotation)
    # Functions say themselves what they make of NaN among numbers.
    value = 0.0 if isinstance(value, float) and math.isnan(value) else value
    return kinds is None or any(_is(value, kind) for kind in kinds)


def _named(kind: Any) -> str:
    """What messages call a plain type."""
    inner = [one for one in get_args(kind) if one is not Ellipsis]
    if get_origin(kind) in (Sequence, tuple):
        each = " and ".join(" or ".join(map(_named, _plain(one) or ())) for one in inner)
        return f"a list of {each}" if each.strip(" and") else "a list"
    if get_origin(kind) in _ORIGINS:
        return _ORIGINS[get_origin(kind)]
    if hasattr(kind, "dim_str"):
        return f"a tensor [{kind.dim_str}] of {_NUMBERS.get(kind.dtype.__name__, 'numbers')}"
    return _NAMES.get(kind, getattr(kind, "__name__", str(kind)))


def _shown(value: Any) -> str:
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{type(value).__name__} of shape {tuple(value.shape)} and {value.dtype}"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:50]}... ({type(value).__name__})"
