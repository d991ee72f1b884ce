"""Read a user's files: rows with named columns, in splits if there are any, or JSON of any form.

This module knows nothing of tasks. `datasets` reads its own layouts; it is imported when needed.
"""

import csv
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from io import StringIO
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


_NEEDED = {"input", "output", "class", "question", "answer"}
"""Columns whose cells are words that a prompt is made of, so none is blank."""

_DAMAGE = {"\0": "a NUL", "\ufeff": "a byte-order mark", "\ufffd": "a replacement character"}


def read_content(path: str | PathLike[str]) -> Any:
    """Return the rows of a file, or what a JSON file holds. Text is UTF-8.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is another kind of file or cannot be read as its kind, a row has more or
            fewer cells than columns or nothing where a word is needed, or a name comes twice. The
            message says in which line.
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
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path}: line {line} is not UTF-8 text ({error.reason}). Save it as UTF-8."
        ) from None
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
    text = path.read_bytes().decode("utf-8-sig")
    for sign, name in _DAMAGE.items():
        if sign in text:
            raise ValueError(
                f"line {_line(text, text.index(sign))} holds {name}; was it saved as UTF-8?"
            )
    return text


def _line(text: str, place: int) -> int:
    """Return the number of the line of a place, from 1, as editors count."""
    return text.count("\n", 0, place) + 1


def _read_csv(path: Path) -> list[Row]:
    # Spaces around cells are how people line columns up, never part of a word.
    reader = csv.reader(StringIO(_text(path), newline=""), skipinitialspace=True, strict=True)
    rows: list[Row] = []
    columns: list[str] = []
    for given in _cells(reader):
        cells = [cell.strip() for cell in given]
        if cells in ([], [""]):
            continue
        if not columns:
            columns = cells
            if "" in columns or len(set(columns)) < len(columns):
                raise ValueError(
                    f"line {reader.line_num} names the columns {columns}; expected names, each once"
                )
            continue
        if len(cells) != len(columns):
            raise ValueError(
                f"line {reader.line_num} has {'more' if len(cells) > len(columns) else 'fewer'} "
                f"cells than the {len(columns)} columns: {cells}; quote cells with commas"
            )
        row: dict[str, Any] = dict(zip(columns, cells, strict=True))
        for column in _LISTS & row.keys():
            row[column] = _json(row[column], reader.line_num) if row[column] else None
        rows.append(_complete(row, f"line {reader.line_num}"))
    return rows


def _cells(reader: Any) -> Iterator[list[str]]:
    try:
        yield from reader
    except csv.Error as error:
        raise ValueError(f"line {reader.line_num}: {error}") from None


def _complete(row: Any, where: str) -> Any:
    """Return a row, unless a cell that a task needs is blank."""
    blank = [
        column
        for column in sorted(_NEEDED & row.keys() if isinstance(row, Mapping) else ())
        if row[column] is None or not str(row[column]).strip()
    ]
    if blank:
        raise ValueError(f"{where} has nothing in {', '.join(map(repr, blank))}: {dict(row)}")
    return row


def _json(text: str, line: int | None = None) -> Any:
    """Return what JSON holds; a key that comes twice would silently replace the first."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content = dict(pairs)
        if len(content) < len(pairs):
            key = next(k for k, count in Counter(k for k, _ in pairs).items() if count > 1)
            value = json.dumps(content[key], ensure_ascii=False)
            again = re.compile(rf"{re.escape(json.dumps(key, ensure_ascii=False))}\s*:\s*")
            found = list(again.finditer(text))
            place = [m for m in found if text.startswith(value, m.end())] or found
            at = line or (_line(text, place[-1].start()) if place else "?")
            raise ValueError(f"the key {key!r} occurs twice, in line {at}")
        return content

    try:
        return json.loads(text, object_pairs_hook=once)
    except json.JSONDecodeError as error:
        raise ValueError(str(error) if line is None else f"line {line}: {error}") from None


def _read_json(path: Path) -> Any:
    return _checked(_json(_text(path)))


def _read_lines(path: Path) -> list[Any]:
    lines = enumerate(_text(path).split("\n"), start=1)
    return [_complete(_json(line, n), f"line {n}") for n, line in lines if line.strip()]


def _checked(content: Any) -> Any:
    """Return what a file holds, after a look at the rows in it, if there are such."""
    for n, row in enumerate(content if isinstance(content, list) else (), start=1):
        _complete(row, f"row {n}")
    return content


def _read_parquet(path: Path) -> list[Row]:
    from pyarrow import parquet

    table = parquet.read_table(path)
    if len(set(table.column_names)) < len(table.column_names):
        raise ValueError(f"the columns are {table.column_names}; expected names, each once")
    return list(_checked(table.to_pylist()))


def _read_arrow(path: Path) -> list[Row]:
    from datasets import Dataset

    return list(_checked(Dataset.from_file(str(path)).to_list()))


_READERS: dict[str, Callable[[Path], Any]] = {
    ".json": _read_json,
    ".jsonl": _read_lines,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
}

FILE_SUFFIXES = tuple(_READERS)
