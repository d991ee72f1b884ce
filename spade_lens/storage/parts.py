"""A long table made in parts, each on disk as soon as it is done.

An interrupted run goes on from the parts that exist. Which run they belong to is decided as for
every checkpoint; see :mod:`spade_lens.storage.checkpoint`.
"""

from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spade_lens.settings import HasSettings, Settings, progress_bar, scoped
from spade_lens.storage.checkpoint import as_read, refuse_another_run
from spade_lens.storage.files import output_folder, read_json, write_json

if TYPE_CHECKING:
    import pandas as pd


@scoped
def in_parts(
    names: Sequence[str],
    make: "Callable[[str], pd.DataFrame]",
    *,
    folder: str | PathLike[str] | None,
    config: Mapping[str, Any],
    desc: str,
    model: HasSettings | None = None,
    settings: Settings | None = None,
) -> "pd.DataFrame":
    """Make the parts of a table and join them; parts that exist in the folder are read instead.

    Example:
        >>> import pandas as pd
        >>> in_parts(
        ...     ["a", "b"],
        ...     lambda name: pd.DataFrame({"part": [name]}),
        ...     folder=None,
        ...     config={},
        ...     desc="parts",
        ... )["part"].tolist()
        ['a', 'b']

    Args:
        names: The parts' names, which are also those of their files.
        make: Makes the part of that name.
        folder: Where parts are kept; None keeps none.
        config: All that decides the table, for JSON.
        desc: The progress bar's title. A single part has the bars of what makes it instead.
        model: The model that runs, whose settings count; see :func:`spade_lens.settings.limits`.
        settings: Memory limit, batch size and progress; see :class:`spade_lens.Settings`.

    Raises:
        ValueError: If the folder holds parts of another run, or cannot be written.
    """
    import pandas as pd

    place = None if folder is None else _opened(output_folder(folder), config)
    frames = []
    bar = progress_bar(names, desc=desc, unit="part", model=model) if len(names) > 1 else names
    for name in bar:
        path = None if place is None else place / f"{name}.json"
        # JSON and not CSV: numbers come back to the bit, and the word "null" stays a word.
        there = path is not None and path.is_file()
        frame = pd.DataFrame(_columns(read_json(path))) if path is not None and there else None
        if frame is None:
            frame = make(name)
            if path is not None:
                columns = {str(key): column.tolist() for key, column in frame.items()}
                # JSON has no word for pandas' missing whole number but null.
                write_json(
                    path, {k: [None if v is pd.NA else v for v in c] for k, c in columns.items()}
                )
        frames.append(frame)
    return pd.concat(frames, ignore_index=True)


def _columns(content: Mapping[str, Any]) -> dict[str, Any]:
    """Make columns of lists; whole numbers stay whole where some are missing."""
    import pandas as pd

    columns: dict[str, Any] = dict(content)
    for name, values in content.items():
        known = [value for value in values if value is not None]
        if 0 < len(known) < len(values) and all(type(value) is int for value in known):
            columns[name] = pd.array(values, dtype="Int64")
    return columns


def _opened(folder: Path, config: Mapping[str, Any]) -> Path:
    path, here = folder / "config.json", as_read(config)
    if path.exists():
        refuse_another_run(folder, there=read_json(path), here=here)
    else:
        write_json(path, here)
    return folder
