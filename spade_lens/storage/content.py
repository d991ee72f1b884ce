"""One hash of what decides a result: plain values, tensors, functions, and a user's own objects.

Two functions of one name have one hash only if they do the same: their code, their defaults, and
the values around them that they use count. Libraries count by name; their versions are kept beside.
This module knows nothing of what is hashed.
"""

import functools
import hashlib
import pickle
import sys
import types
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import fields, is_dataclass
from os import PathLike
from typing import Any
from uuid import uuid4

import numpy as np
import torch
from torch import Tensor

from spade_lens.storage.origin import Identified

# What a class has beside what its author wrote, and what generated methods say as well.
_OF_CLASSES = {"__dict__", "__weakref__", "__doc__", "__module__", "__annotations__", "_abc_impl"}
_OF_CLASSES |= {"__dataclass_fields__", "__dataclass_params__"}
_NAMED: tuple[Any, ...] = (types.ModuleType, types.BuiltinFunctionType)
_NAMED += (types.MemberDescriptorType, types.GetSetDescriptorType)
_WRAPPERS = {property: "fget", functools.cached_property: "func", staticmethod: "__func__"}
_WRAPPERS |= {classmethod: "__func__", types.MethodType: "__func__"}


def content_sha256(content: Any) -> str:
    """Return a short hash of everything that an object is made of.

    What cannot be looked into, such as an open file, has another hash each time, so that it is
    never taken for something else. A class may name what decides its objects in a method
    ``deciding()``.

    Example:
        >>> def times(n):
        ...     return lambda x: n * x
        >>> content_sha256(times(2)) == content_sha256(times(2))
        True
        >>> content_sha256(times(2)) == content_sha256(times(3))
        False

    Args:
        content: Anything.
    """
    digest = hashlib.sha256()
    for piece in _pieces(content, ()):
        digest.update(piece if isinstance(piece, bytes) else f"{piece}\n".encode())
    return digest.hexdigest()[:16]


def _pieces(thing: Any, above: tuple[int, ...]) -> Iterator[str | bytes]:
    """Yield what tells a thing from others; ``above`` are the ids of those that it is part of."""
    if id(thing) in above:
        yield f"again {above.index(id(thing))}"
        return
    yield f"<{type(thing).__name__}"
    parts: Any = ()
    if isinstance(thing, None | bool | int | float | complex | str | torch.dtype | torch.device):
        yield repr(thing)
    elif isinstance(thing, PathLike):
        yield str(thing)
    elif isinstance(thing, bytes):
        yield thing
    elif isinstance(thing, Tensor | np.ndarray):
        yield from _numbers(thing)
    elif isinstance(thing, Identified):  # a model
        yield thing.sha256
    elif isinstance(thing, Mapping):
        parts = [part for item in thing.items() for part in item]
    elif isinstance(thing, Set):
        yield repr(sorted(content_sha256(part) for part in thing))
    elif isinstance(thing, Sequence):
        parts = thing
    elif isinstance(thing, types.FunctionType):
        parts = _of_function(thing)
    elif isinstance(thing, types.CodeType):
        yield thing.co_code
        parts = [thing.co_consts, thing.co_names]
    elif isinstance(thing, type):
        yield f"{thing.__module__}.{thing.__qualname__}"
        inside = {k: v for k, v in vars(thing).items() if k not in _OF_CLASSES}
        parts = [] if _of_library(thing) else [thing.__bases__, inside]
    elif isinstance(thing, _NAMED):
        yield f"{getattr(thing, '__module__', None)}.{thing.__name__}"
    elif type(thing) in _WRAPPERS:
        parts = [getattr(thing, _WRAPPERS[type(thing)]), getattr(thing, "__self__", None)]
    elif isinstance(thing, functools.partial):
        parts = [thing.func, thing.args, thing.keywords]
    else:
        parts = _of_object(thing)
    for part in parts:
        yield from _pieces(part, (*above, id(thing)))
    yield ">"


def _numbers(thing: Any) -> Iterator[str | bytes]:
    yield f"{thing.dtype} {tuple(thing.shape)}"
    if isinstance(thing, Tensor):
        yield thing.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    else:
        yield repr(thing.tolist()) if thing.dtype == object else thing.tobytes()


def _of_function(function: types.FunctionType) -> list[Any]:
    cells = [cell.cell_contents for cell in function.__closure__ or ()]
    parts: list[Any] = [function.__defaults__, function.__kwdefaults__, cells]
    if _of_library(function):
        name = f"{function.__module__}.{function.__qualname__}"
        return [name, *parts] if "<locals>" in name else [name]
    known, code = function.__globals__, function.__code__
    return [*parts, code, {name: known[name] for name in _names(code) if name in known}]


def _names(code: types.CodeType) -> list[str]:
    """Return all names that code and the functions inside it look up."""
    inner = [c for c in code.co_consts if isinstance(c, types.CodeType)]
    return sorted({*code.co_names, *(name for c in inner for name in _names(c))})


def _of_object(thing: Any) -> list[Any]:
    kind = type(thing)
    if hasattr(kind, "deciding"):
        return [kind, thing.deciding()]
    if is_dataclass(thing):
        return [kind, {f.name: getattr(thing, f.name, None) for f in fields(thing)}]
    if hasattr(thing, "__dict__"):
        # What is computed on first use tells nothing new.
        lazy = functools.cached_property
        late = [name for name in vars(thing) if isinstance(getattr(kind, name, None), lazy)]
        return [kind, {name: value for name, value in vars(thing).items() if name not in late}]
    try:
        return [kind, pickle.dumps(thing)]
    except Exception:
        return [kind, uuid4().hex]


def _of_library(thing: Any) -> bool:
    top = (thing.__module__ or "").partition(".")[0]
    place = getattr(sys.modules.get(top), "__file__", None) or ""
    return top in sys.stdlib_module_names or top == "spade_lens" or "-packages" in place
