"""Save frozen dataclasses of tensors as safetensors with a JSON beside them, and load them again.

This module knows nothing of what the records mean.
"""

from dataclasses import fields, is_dataclass
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from spade_lens.storage.files import (
    as_path,
    naming_damage,
    output_folder,
    read_json,
    read_tensors,
    write_json,
    write_tensors,
)
from spade_lens.storage.origin import versions

_FORMAT = 3

R = TypeVar("R")


def save_record(record: Any, folder: str | PathLike[str], *, kind: str) -> Path:
    """Write ``KIND.safetensors``, and ``KIND.json`` with all fields that are no tensors.

    Args:
        record: A dataclass of tensors, plain values and dataclasses of these.
        folder: The folder, made if it does not exist; a record of this kind in it is replaced.
        kind: What it is, and the name of the files.

    Returns:
        The folder.
    """
    place = output_folder(folder)
    plain: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    for field in fields(record):
        value = getattr(record, field.name)
        if isinstance(value, Tensor):
            tensors[field.name] = value.clone()  # safetensors writes no memory under two names
        elif is_dataclass(value):
            inner = {f.name: getattr(value, f.name) for f in fields(value)}
            inner_tensors = {name: t for name, t in inner.items() if isinstance(t, Tensor)}
            tensors |= {f"{field.name}.{name}": t.clone() for name, t in inner_tensors.items()}
            plain[field.name] = {n: v for n, v in inner.items() if n not in inner_tensors}
        else:
            plain[field.name] = value
    digest = write_tensors(place / f"{kind}.safetensors", tensors)
    content = {"format": _FORMAT, "kind": kind, "fields": plain, "tensors_sha256": digest}
    write_json(place / f"{kind}.json", content | {"versions": versions()})
    return place


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
    place = as_path(folder)
    content = read_json(place / f"{kind}.json")
    if (content.get("kind"), content.get("format")) != (kind, _FORMAT):
        raise ValueError(
            f"{place / kind}.json describes a {content.get('kind')!r}, format "
            f"{content.get('format')!r}; expected {kind!r}, format {_FORMAT}. It may be from "
            "another version of spade_lens."
        )
    with naming_damage(place / f"{kind}.json", again=f"make and save the {kind}"):
        plain = dict(content.get("fields", {}))
        path = place / f"{kind}.safetensors"
        tensors = read_tensors(
            path, str(content.get("tensors_sha256")), of=kind, again=f"make and save the {kind}"
        )
        values = {name: _plain(value) for name, value in plain.items()} | tensors
        for field, inner_class in inner.items():
            prefix = f"{field}."
            own = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
            texts = {name: _plain(value) for name, value in (plain.get(field) or {}).items()}
            values[field] = inner_class(**own, **texts)
    values = {name: value for name, value in values.items() if "." not in name}
    expected = {field.name for field in fields(cls)}  # type: ignore[arg-type]
    if set(values) != expected:
        raise ValueError(
            f"{place / kind}.json lacks {sorted(expected - set(values))}; make and save the "
            f"{kind} again."
        )
    return cls(**values)


def _plain(value: Any) -> Any:
    """Undo what JSON does: tuples become lists, and token ids become text."""
    if isinstance(value, list):
        return tuple(value)
    if isinstance(value, dict):
        return {int(k) if k.lstrip("-").isdigit() else k: v for k, v in value.items()}
    return value
