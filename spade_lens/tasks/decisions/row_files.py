"""Read the rows of a data set from a user's files, by split. Knows nothing of tasks.

`datasets` reads its own layouts. It is imported only when it is needed.
"""

import csv
import json
from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

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


def local_rows(path: str | PathLike[str]) -> Rows:
    """Return the rows of a user's file or folder, by split.

    Args:
        path: A folder that ``datasets`` saved (one split or several, or a subfolder for each); a
            folder of files named after their splits, such as ``train.jsonl``; or one such file,
            which is split at random unless its name is that of a split. Files are ``.json`` (a
            list of rows), ``.jsonl``, ``.csv`` (lists in a cell are written as JSON),
            ``.parquet`` or ``.arrow``.

    Raises:
        FileNotFoundError: If there is nothing at the path.
        ValueError: If nothing there can be read.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"There is no file or folder {path}.")
    if path.is_file():
        return {_SPLIT_NAMES.get(path.stem, "validation"): _read_file(path)}
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
        rows[split] = _read_file(entry) if entry.is_file() else _saved(entry)["validation"]
    if not rows:
        raise ValueError(
            f"Nothing in {path} is a split: expected a folder saved by datasets, or files named "
            f"{', '.join(_SPLIT_NAMES)} with one of the endings {', '.join(_READERS)}. Found: "
            f"{', '.join(sorted(entry.name for entry in path.iterdir())) or 'nothing'}."
        )
    return rows


def _saved(folder: Path) -> Rows:
    from datasets import DatasetDict, load_from_disk

    loaded = load_from_disk(str(folder))
    if isinstance(loaded, DatasetDict):
        return rows_by_split(loaded)
    return {"validation": loaded.to_list()}


def rows_by_split(loaded: Any) -> Rows:
    """Return the rows of a ``DatasetDict``, by the names that splits have here."""
    return {_SPLIT_NAMES[s]: data.to_list() for s, data in loaded.items() if s in _SPLIT_NAMES}


def _read_file(path: Path) -> list[Row]:
    reader = _READERS.get(path.suffix)
    if reader is None:
        raise ValueError(f"{path}: cannot be read; expected one of {', '.join(_READERS)}.")
    try:
        rows = reader(path)
    except (ValueError, csv.Error) as error:  # JSON's and pyarrow's errors, and bad UTF-8, too
        raise ValueError(f"{path}: not a valid {path.suffix} file ({error}).") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path}: expected a list of rows, each with named columns.")
    return rows


def _lines(path: Path) -> list[str]:
    return path.read_text("utf-8").splitlines()


def _read_csv(path: Path) -> list[Row]:
    with path.open(encoding="utf-8-sig", newline="") as stream:
        rows: list[dict[str, Any]] = list(csv.DictReader(stream, strict=True))
    for row in rows:
        for column in _LISTS & row.keys():
            row[column] = json.loads(row[column]) if row[column] else None
    return list(rows)


def _read_parquet(path: Path) -> list[Row]:
    from pyarrow import parquet

    return list(parquet.read_table(path).to_pylist())


def _read_arrow(path: Path) -> list[Row]:
    from datasets import Dataset

    return list(Dataset.from_file(str(path)).to_list())


_READERS: dict[str, Callable[[Path], list[Row]]] = {
    ".json": lambda path: json.loads(path.read_text("utf-8")),
    ".jsonl": lambda path: list(map(json.loads, filter(str.strip, _lines(path)))),
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
}
