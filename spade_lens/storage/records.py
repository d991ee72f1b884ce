"""Save frozen dataclasses of tensors as safetensors with a JSON beside them, and load them again.

This module knows nothing of what the records mean.
"""

import types
from collections import Counter
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin

from torch import Tensor

from spade_lens.storage.files import (
    as_path,
    naming_damage,
    output_folder,
    read_json,
    read_tensors,
    sealed,
    unsealed,
    write_json,
    write_tensors,
)
from spade_lens.storage.origin import versions

_FORMAT = 5
_UNSEALED = 4
"""Files of this format have no hash of the JSON."""

R = TypeVar("R")


def write_pair(
    path: Path, kind: str, tensors: Mapping[str, Tensor], content: Mapping[str, Any]
) -> Path:
    """Write tensors, and a JSON beside them that says what they are.

    Args:
        path: The safetensors file; the JSON has the same name.
        kind: What it is.
        tensors: Tensors by name.
        content: What else the JSON says.

    Returns:
        ``path``.

    Raises:
        ValueError: If one of the files cannot be written.
    """
    path = output_folder(path.parent) / path.name
    # safetensors writes no memory under two names.
    uses = Counter(tensor.untyped_storage().data_ptr() for tensor in tensors.values())
    alone = {
        name: tensor if uses[tensor.untyped_storage().data_ptr()] == 1 else tensor.clone()
        for name, tensor in tensors.items()
    }
    digest = write_tensors(path, alone)
    about = {"format": _FORMAT, "kind": kind, "tensors_sha256": digest, "versions": versions()}
    write_json(path.with_suffix(".json"), sealed(about | dict(content)))
    return path


def read_pair(path: Path, *kinds: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read what :func:`write_pair` wrote: the content of the JSON, and the tensors.

    Args:
        path: The safetensors file.
        kinds: What it may be.

    Raises:
        FileNotFoundError: If one of the files is missing.
        ValueError: If the files are damaged, do not belong together or are of another kind.
    """
    place = path.with_suffix(".json")
    content = read_json(place)
    kind, written = content.get("kind"), content.get("format")
    if kind not in kinds or written not in (_UNSEALED, _FORMAT):
        raise ValueError(
            f"{place} describes a {kind!r}, format {written!r}; expected "
            f"{' or '.join(map(repr, kinds))}, format {_FORMAT}. It may be from another version of "
            "spade_lens: make it again with this one, or load it with that one."
        )
    again = f"make and save the {kind}"
    if written == _FORMAT or "sha256" in content:
        content = unsealed(place, content, again=again)
    return content, read_tensors(path, content.get("tensors_sha256"), of=str(kind), again=again)


def save_record(record: Any, folder: str | PathLike[str], *, kind: str) -> Path:
    """Write ``KIND.safetensors``, and ``KIND.json`` with all fields that are no tensors.

    Args:
        record: A dataclass of tensors, plain values and dataclasses of these.
        folder: The folder, made if it does not exist; a record of this kind in it is replaced.
        kind: What it is, and the name of the files.

    Returns:
        The folder.
    """
    plain: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    for field in fields(record):
        value = getattr(record, field.name)
        if isinstance(value, Tensor):
            tensors[field.name] = value
        elif is_dataclass(value):
            inner = {f.name: getattr(value, f.name) for f in fields(value)}
            inner_tensors = {name: t for name, t in inner.items() if isinstance(t, Tensor)}
            tensors |= {f"{field.name}.{name}": t for name, t in inner_tensors.items()}
            plain[field.name] = {n: v for n, v in inner.items() if n not in inner_tensors}
        else:
            plain[field.name] = value
    return write_pair(
        as_path(folder) / f"{kind}.safetensors", kind, tensors, {"fields": plain}
    ).parent


def load_record(cls: type[R], folder: str | PathLike[str], *, kind: str, **inner: type) -> R:
    """Return a record that :func:`save_record` wrote, equal to it in every field.

    Args:
        cls: The record's class.
        folder: The folder.
        kind: What it is, and the name of the files.
        inner: The classes of the fields that are dataclasses.

    Raises:
        FileNotFoundError: If one of the files is missing.
        ValueError: If the files are damaged, do not belong together or are of another kind.
    """
    path = as_path(folder) / f"{kind}.safetensors"
    content, tensors = read_pair(path, kind)
    with naming_damage(path.with_suffix(".json"), again=f"make and save the {kind}"):
        values = dict(content["fields"]) | tensors
        for field, inner_class in inner.items():
            prefix = f"{field}."
            own = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
            values[field] = made_of(inner_class, own | dict(content["fields"][field]))
        return made_of(cls, {name: value for name, value in values.items() if "." not in name})


def made_of(cls: type[R], values: dict[str, Any]) -> R:
    """Return a dataclass of fields as JSON gives them, each of the type that its annotation says.

    Fields with a default may be missing: older versions had not all of them.

    Raises:
        TypeError: If a field is missing, unknown or of another type.
    """
    hints: dict[str, Any] = {field.name: field.type for field in fields(cls)}  # type: ignore[arg-type]
    needed = {f.name for f in fields(cls) if f.default is MISSING}  # type: ignore[arg-type]
    values = {name: _plain(value) for name, value in values.items()}
    wrong = sorted((needed - set(values)) | (set(values) - set(hints)))
    wrong += [name for name in hints if name in values and not _fits(values[name], hints[name])]
    if wrong:
        raise TypeError(f"missing, unknown or of another type are {wrong}")
    return cls(**values)


def _fits(value: Any, hint: Any) -> bool:
    kind, inner = get_origin(hint) or hint, get_args(hint)
    if kind in (Union, types.UnionType):
        return any(_fits(value, one) for one in inner)
    if kind is tuple:
        return isinstance(value, tuple) and all(_fits(one, inner[0]) for one in value)
    if kind is dict:
        return isinstance(value, dict) and all(
            _fits(k, inner[0]) and _fits(v, inner[1]) for k, v in value.items()
        )
    return isinstance(value, kind) and isinstance(value, bool) <= (kind is bool)


def _plain(value: Any) -> Any:
    """Undo what JSON does: tuples become lists, and token ids become text."""
    if isinstance(value, list):
        return tuple(value)
    if isinstance(value, dict):
        return {int(k) if k.lstrip("-").isdigit() else k: v for k, v in value.items()}
    return value
