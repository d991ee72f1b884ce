"""Write files whole or not at all, and prove that a folder can be written before work starts."""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file, save_file
from torch import Tensor

if TYPE_CHECKING:
    import pandas as pd


def as_path(path: str | PathLike[str]) -> Path:
    """Return a path with ``~`` expanded.

    Raises:
        TypeError: If it is no path.
    """
    if not isinstance(path, str | PathLike):
        raise TypeError(f"The path {path!r} was given; expected a string or a pathlib.Path.")
    return Path(path).expanduser()


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
            f"The output folder {str(folder)!r} cannot be written ({error.strerror or error}). "
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
    """
    path = Path(path)
    # In the same folder, since a rename is atomic within one file system only; the process id
    # keeps two runs apart.
    part = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        writer(part)
        part.replace(path)
    finally:
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
    text = json.dumps(content, indent=2, ensure_ascii=False, default=str) + "\n"
    return write_atomically(path, lambda p: p.write_text(text, encoding="utf-8"))


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
        ValueError: If it is no JSON object.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"There is no {path.name} in {str(path.parent)!r}. Give the folder that was saved to."
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}); it may be damaged.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}; expected a JSON object.")
    return content


@contextmanager
def naming_damage(path: Path, *, again: str) -> Iterator[None]:
    """Name the JSON that lacks what is looked up in it.

    Args:
        path: The file.
        again: What to do, for the message.

    Raises:
        ValueError: If a key is missing, or a value is of a wrong type.
    """
    try:
        yield
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} does not say what it should ({type(error).__name__}: {error}). It may be "
            f"damaged, or from another version of spade_lens; {again} again."
        ) from error


def file_sha256(path: Path) -> str:
    """The checksum of a file, in lower-case hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def read_tensors(path: Path, sha256: str, *, of: str, again: str) -> dict[str, Tensor]:
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
    if not path.is_file():
        raise FileNotFoundError(
            f"There is no {path.name} in {str(path.parent)!r}. Give the folder that was saved to."
        )
    if file_sha256(path) != sha256:
        raise ValueError(
            f"{path} is not the file that {path.stem}.json beside it was written for. It may be "
            f"damaged, or left over from a {of} that was half replaced; {again} again."
        )
    return load_file(path)
