"""Read word pairs and classes from JSON and CSV files in UTF-8. Knows nothing of tasks."""

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def read_json(path: Path, what: str) -> Any:
    """Return the content of a JSON file.

    Args:
        path: The file.
        what: What is read, for messages, such as ``"word pairs"``.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no JSON in UTF-8.
    """
    try:
        return json.loads(_read_text(path, what))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not valid JSON ({error}).") from None


def read_csv(path: Path, what: str, columns: Sequence[str]) -> list[tuple[str, dict[str, str]]]:
    """Return the rows of a CSV file, each with its place for messages.

    Args:
        path: The file.
        what: What is read, for messages.
        columns: Columns that must be there. Others are kept too.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no CSV in UTF-8, or a column is absent; the message names those found.
    """
    reader, header = _open_csv(path, what)
    try:
        rows = [(f"{path}, line {reader.line_num}", row) for row in reader]
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: not valid CSV ({error}).") from None
    if not set(columns) <= set(header):
        raise ValueError(
            f"{path}: needs the columns {' and '.join(map(repr, columns))}, found "
            f"{', '.join(map(repr, header)) or 'none'}."
        )
    for where, row in rows:
        if None in row:
            raise ValueError(
                f"{where}: more cells than the {len(header)} columns. Quote cells with commas."
            )
    return [(where, {k: (cell or "").strip() for k, cell in row.items()}) for where, row in rows]


def csv_header(path: Path, what: str) -> list[str]:
    """Return the names of the columns of a CSV file.

    Args:
        path: The file.
        what: What is read, for messages.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no CSV in UTF-8.
    """
    return _open_csv(path, what)[1]


def _open_csv(path: Path, what: str) -> tuple["csv.DictReader[str]", list[str]]:
    text = _read_text(path, what)
    # Spaces around cells are how people line columns up, never part of a word.
    reader = csv.DictReader(io.StringIO(text, newline=""), skipinitialspace=True, strict=True)
    try:
        header = [column.strip() for column in reader.fieldnames or []]
    except csv.Error as error:
        raise ValueError(f"{path}: not valid CSV ({error}).") from None
    reader.fieldnames = header
    return reader, header


def _read_text(path: Path, what: str) -> str:
    kind = path.suffix.lower()
    if kind not in (".json", ".csv"):
        raise ValueError(f"{path}: {what} are read from .json or .csv, not {kind!r}.")
    try:
        # A spreadsheet's UTF-8 opens with a byte-order mark; it is no part of a column name.
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error}). Save it as UTF-8.") from None
