"""Read a user's files: rows with named columns, in splits if there are any, or JSON of any form.

This module knows nothing of tasks. `datasets` reads its own layouts; it is imported when needed.
"""

import csv
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

from spade_lens.storage.files import as_path, naming_damage

Row = Mapping[str, Any]

Rows = dict[str, list[Row]]

_SPLIT_NAMES = {
    "train": "train",
    "validation": "validation",
    "valid": "validation",
    "dev": "validation",
    "calibration": "calibration",
    "test": "test",
}

_LISTS = {"options", "choices", "answers"}
"""Columns whose cells are lists, which a CSV file writes as JSON."""


def read_content(path: str | PathLike[str]) -> Any:
    """Return the rows of a file, or what a JSON file holds. Text is UTF-8.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is another kind of file, or cannot be read as its kind.
    """
    path = as_path(path)
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise ValueError(
            f"{path}: {path.suffix!r} cannot be read; expected one of {', '.join(_READERS)}."
        )
    try:
        return reader(path)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error}). Save it as UTF-8.") from None
    except FileNotFoundError:
        raise
    except Exception as error:  # csv's, JSON's, pyarrow's and the system's have nothing in common
        raise ValueError(f"{path}: not a valid {path.suffix} file ({error}).") from None


@contextmanager
def naming(path: str | PathLike[str]) -> Iterator[None]:
    """Name the file whose content is wrong: a wrong type in a file is a wrong value."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None


def local_rows(path: str | PathLike[str]) -> Rows:
    """Return the rows of a user's file or folder, by split.

    Args:
        path: A folder that ``datasets`` saved (one split or several, or a subfolder for each); a
            folder of files named after their splits, such as ``train.jsonl``; or one such file,
            which is split at random unless its name is that of a split. Files are those of
            :func:`read_content`; in a CSV file lists are written as JSON.

    Raises:
        FileNotFoundError: If there is nothing at the path.
        ValueError: If nothing there can be read.
    """
    path = as_path(path)
    if not path.exists():
        raise FileNotFoundError(f"There is no file or folder {path}.")
    if path.is_file():
        return {_SPLIT_NAMES.get(path.stem, "validation"): _read_rows(path)}
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return _saved(path)
    rows: Rows = {}
    for entry in sorted(path.iterdir()):
        split = _SPLIT_NAMES.get(entry.stem if entry.is_file() else entry.name)
        readable = entry.suffix in _READERS if entry.is_file() else (entry / "state.json").is_file()
        if split is None or not readable:
            continue
        if split in rows:
            raise ValueError(f"{path} has more than one {split} split; one is {entry.name}.")
        rows[split] = _read_rows(entry) if entry.is_file() else _saved(entry)["validation"]
    if not rows:
        raise ValueError(
            f"Nothing in {path} is a split: expected a folder saved by datasets, or files named "
            f"{', '.join(_SPLIT_NAMES)} with one of the endings {', '.join(_READERS)}. Found: "
            f"{', '.join(sorted(entry.name for entry in path.iterdir())) or 'nothing'}."
        )
    return rows


def rows_by_split(loaded: Any) -> Rows:
    """Return the rows of a ``DatasetDict``, by the names that splits have here."""
    return {_SPLIT_NAMES[s]: data.to_list() for s, data in loaded.items() if s in _SPLIT_NAMES}


def _saved(folder: Path) -> Rows:
    from datasets import DatasetDict, load_from_disk

    with naming_damage(folder, again="save the data set"):
        loaded = load_from_disk(str(folder))
    return (
        rows_by_split(loaded)
        if isinstance(loaded, DatasetDict)
        else {"validation": loaded.to_list()}
    )


def _read_rows(path: Path) -> list[Row]:
    rows = read_content(path)
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path}: expected a list of rows, each with named columns.")
    return rows


def _text(path: Path) -> str:
    # A spreadsheet's UTF-8 opens with a byte-order mark; it is no part of a column name.
    return path.read_text(encoding="utf-8-sig")


def _read_csv(path: Path) -> list[Row]:
    # Spaces around cells are how people line columns up, never part of a word.
    reader = csv.DictReader(
        _text(path).splitlines(keepends=True), skipinitialspace=True, strict=True
    )
    reader.fieldnames = [column.strip() for column in reader.fieldnames or []]
    rows: list[Row] = []
    for cells in reader:
        if None in cells:
            raise ValueError(
                f"line {reader.line_num} has more cells than the {len(reader.fieldnames)} "
                "columns; quote cells with commas"
            )
        row: dict[str, Any] = {column: (cell or "").strip() for column, cell in cells.items()}
        for column in _LISTS & row.keys():
            row[column] = json.loads(row[column]) if row[column] else None
        rows.append(row)
    return rows


def _read_parquet(path: Path) -> list[Row]:
    from pyarrow import parquet

    return list(parquet.read_table(path).to_pylist())


def _read_arrow(path: Path) -> list[Row]:
    from datasets import Dataset

    return list(Dataset.from_file(str(path)).to_list())


_READERS: dict[str, Callable[[Path], Any]] = {
    ".json": lambda path: json.loads(_text(path)),
    ".jsonl": lambda path: list(map(json.loads, filter(str.strip, _text(path).splitlines()))),
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
}

FILE_SUFFIXES = tuple(_READERS)
