"""Write files whole or not at all, and say in our own words what is wrong with one that is read."""

import hashlib
import json
import os
import re
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from spade_lens.checks import has_control_characters, visible, warn

if TYPE_CHECKING:
    import pandas as pd

_LONGEST = 255
"""Bytes in the name of a file, on all file systems in use."""


def as_path(path: str | PathLike[str]) -> Path:
    """Return a path with ``~`` expanded.

    Raises:
        TypeError: If it is no path.
        ValueError: If no file can have that name, or a terminal could not show it.
    """
    if not isinstance(path, str | PathLike) or not isinstance(os.fspath(path), str):
        raise TypeError(f"The path {path!r} was given; expected a string or a pathlib.Path.")
    name = os.fspath(path)
    if (
        not name.strip()
        or has_control_characters(name)
        or any(len(os.fsencode(part)) > _LONGEST for part in Path(name).parts)
    ):
        raise ValueError(
            f"The path {name!r:.300} was given; expected names of at most {_LONGEST} bytes, not "
            "blank and without control characters. The folder you are in is '.'."
        )
    try:
        return Path(path).expanduser()
    except RuntimeError as error:  # no such user
        raise ValueError(f"The path {str(path)!r} was given; {error}. Give it in full.") from error


def file_stem(name: str) -> str:
    """Return a file's name for a name, so that no two names share a file.

    A file system may not tell ``A`` from ``a``, and does not take every letter. So names that are
    not short, lower-case and plain get a hash.

    Example:
        >>> file_stem("layer-003"), file_stem("Layer 3")
        ('layer-003', 'layer_3-fae4c3c8')
    """
    if re.fullmatch(r"[a-z0-9_][a-z0-9_.-]{0,99}", name) and name not in _RESERVED:
        return name
    plain = "".join(c if c.isascii() and (c.isalnum() or c in "-._") else "_" for c in name)
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()
    return f"{plain[:80].lower().lstrip('.')}-{digest[:8]}"


_RESERVED = {"config", "con", "prn", "aux", "nul"}
"""The file that stands beside the parts, and names that Windows keeps for devices."""


def output_folder(path: str | PathLike[str]) -> Path:
    """Make a folder, and prove that it can be written, before compute is spent.

    Args:
        path: The folder; its parents are made too.

    Returns:
        The folder's path, ``~`` expanded.

    Raises:
        TypeError: If it is no path.
        ValueError: If it cannot be made or written; the message says why.
    """
    folder = as_path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(
            f"The output folder {str(folder)!r} cannot be written ({_reason(error)}). "
            "Choose another folder, or change its permissions."
        ) from error
    return folder


def write_atomically(path: str | PathLike[str], writer: Callable[[Path], Any]) -> Path:
    """Write a file so that nobody ever sees half of it.

    Args:
        path: The file; an old one of that name is replaced once the new one is whole.
        writer: Writes the path it is given, a file of the same suffix in the same folder.

    Returns:
        ``path``.

    Raises:
        ValueError: If it cannot be written, for example because the disk is full.
    """
    path = as_path(path)
    # In the same folder, since a rename is atomic within one file system only; the ids of process
    # and thread keep two runs apart.
    ids = f"{os.getpid()}-{threading.get_ident()}"
    part = path.with_name(f".{path.stem[:40]}.{ids}{path.suffix}")
    try:
        writer(part)
        part.replace(path)
    except (OSError, SafetensorError, UnicodeError) as error:
        raise ValueError(
            f"{str(path)!r} cannot be written ({_reason(error)}). Choose another place, make room, "
            "or change permissions; nothing half-written is left."
        ) from error
    finally:
        with suppress(OSError):  # a parent that is no folder
            part.unlink(missing_ok=True)
    return path


def write_csv(path: str | PathLike[str], frame: "pd.DataFrame") -> Path:
    """Write a table without its index, atomically.

    ``pandas.read_csv`` takes a token ``NA`` for a missing value; ``keep_default_na=False`` and
    ``na_values=[""]`` keep it as text.

    Raises:
        TypeError: If ``frame`` is not a table.
    """
    if not hasattr(frame, "to_csv"):
        raise TypeError(
            f"frame is of type {type(frame).__name__}; expected write_csv(path, data_frame)."
        )
    # One line end everywhere, so that the same results give the same bytes.
    return write_atomically(path, lambda p: frame.to_csv(p, index=False, lineterminator="\n"))


def write_json(path: str | PathLike[str], content: Mapping[str, Any]) -> Path:
    """Write a mapping as indented JSON, atomically; what JSON does not know becomes its text."""
    text = json.dumps(content, indent=2, ensure_ascii=False, default=_plain) + "\n"
    return write_atomically(path, lambda p: p.write_text(text, encoding="utf-8"))


def _plain(value: Any) -> Any:
    """Return what stands for a value in JSON: numbers of numpy are numbers, the rest is text."""
    return value.item() if isinstance(value, np.generic) else str(value)


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return a mapping as JSON gives it back, with a hash that :func:`unsealed` asks for."""
    plain: dict[str, Any] = json.loads(json.dumps(content, default=_plain))
    return plain | {"sha256": _json_sha256(plain)}


def unsealed(path: Path, content: Mapping[str, Any], *, again: str) -> dict[str, Any]:
    """Return what :func:`sealed` was given, as a file has it.

    Args:
        path: The file, for messages.
        content: What it holds.
        again: What to do where it is damaged, likewise.

    Raises:
        ValueError: If a single character is another one.
    """
    plain = {key: value for key, value in content.items() if key != "sha256"}
    if content.get("sha256") != _json_sha256(plain):
        raise ValueError(
            f"{path} is not what was written: it is damaged, or somebody has edited it; "
            f"{again} again."
        )
    return plain


def _json_sha256(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], *, metadata: dict[str, str] | None = None
) -> str:
    """Write tensors as safetensors, atomically.

    Args:
        path: The file.
        tensors: Tensors by name.
        metadata: Text for the file's header.

    Returns:
        The file's sha256, by which a JSON beside it can tell that the two belong together.
    """
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    digest = ""

    def writer(part: Path) -> None:
        nonlocal digest
        save_file(whole, part, metadata=metadata)
        digest = file_sha256(part)

    write_atomically(path, writer)
    return digest


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it cannot be read, or is no JSON object.
    """
    refuse_missing(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON ({_reason(error)}); it may be damaged.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}; expected a JSON object.")
    return content


def refuse_missing(path: Path) -> None:
    """Raise a FileNotFoundError if there is no such file, or a ValueError if that is not known."""
    try:
        there = path.is_file()
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({_reason(error)}). Give another path.") from error
    if not there:
        raise FileNotFoundError(
            f"There is no {path.name} in {str(path.parent)!r}. Give the folder that was saved to."
        )


@contextmanager
def naming_damage(path: Path, *, again: str) -> Iterator[None]:
    """Name the file whose content cannot be taken for what it should be.

    Args:
        path: The file.
        again: What to do, for the message.

    Raises:
        ValueError: If anything is raised inside, such as the KeyError of what is missing.
    """
    try:
        yield
    except Exception as error:
        raise ValueError(
            f"{path} does not say what it should ({type(error).__name__}: {_reason(error)}). It "
            f"may be damaged, or from another version of spade_lens; {again} again."
        ) from error


def set_aside(path: Path, error: Exception) -> None:
    """Rename a damaged file, so that what it held is computed again, and warn.

    Args:
        path: The file.
        error: What is wrong with it.

    Raises:
        ValueError: If it cannot be renamed.

    Warns:
        UserWarning: Unless another process has set it aside.
    """
    damaged = path.with_name(f"{path.name}.damaged")
    try:
        path.replace(damaged)
    except FileNotFoundError:  # another process has done it
        return
    except OSError as failed:
        raise ValueError(
            f"{path} is damaged and cannot be renamed ({_reason(failed)}). Remove it by hand."
        ) from failed
    warn(
        f"{path} is damaged ({_reason(error)}). It is set aside as {damaged.name!r}, and what it "
        "held is computed again."
    )


def file_sha256(path: Path) -> str:
    """The checksum of a file, in lower-case hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def read_tensors(path: Path, sha256: Any, *, of: str, again: str) -> dict[str, Tensor]:
    """The tensors that were written together with a JSON beside them.

    Args:
        path: The safetensors file.
        sha256: Its hash, as the JSON has it.
        of: What it holds, for messages.
        again: What to do where it is damaged, likewise.

    Raises:
        FileNotFoundError: If it is not there.
        ValueError: If it is another file than the one that was written.
    """
    refuse_missing(path)
    with naming_damage(path, again=again):
        if file_sha256(path) == sha256:
            return load_file(path)
    raise ValueError(
        f"{path} is not the file that {path.stem}.json beside it was written for. It may be "
        f"damaged, or left over from a {of} that was half replaced; {again} again."
    )


def _reason(error: Exception) -> str:
    """What went wrong, on one line that a terminal can show."""
    text = str(getattr(error, "strerror", None) or error)
    return visible(" ".join(text.split()))[:300]
