"""Files that are whole or not there at all, and folders known to be writable before work starts."""

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import pandas as pd


def output_folder(path: str | PathLike[str]) -> Path:
    """Make a folder, and prove that it can be written, before compute is spent.

    Args:
        path: The folder; its parents are made too.

    Returns:
        The folder's path, ``~`` expanded.

    Raises:
        ValueError: If it cannot be made or written; the message says why.
    """
    folder = Path(path).expanduser()
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


def write_csv(path: str | PathLike[str], frame: pd.DataFrame) -> Path:
    """Write a table without its index, atomically."""
    # One line end everywhere, so that the same results give the same bytes.
    return write_atomically(path, lambda p: frame.to_csv(p, index=False, lineterminator="\n"))


def write_json(path: str | PathLike[str], content: Mapping[str, Any]) -> Path:
    """Write a mapping as indented JSON, atomically; what JSON does not know becomes its text."""
    text = json.dumps(content, indent=2, ensure_ascii=False, default=str) + "\n"
    return write_atomically(path, lambda p: p.write_text(text, encoding="utf-8"))
