"""A long table made in parts, each on disk as soon as it is done.

An interrupted run goes on from what is there. A folder that was made with another configuration
is refused, so that two experiments never end up in one table.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spade_lens.settings import Settings, progress_bar, scoped
from spade_lens.storage.files import read_json, write_json

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
    settings: Settings | None = None,
) -> "pd.DataFrame":
    """The parts of a table put together; those already in the folder are read, not made.

    Args:
        names: The parts' names, which are also those of their files.
        make: Makes the part of that name.
        folder: Where parts are kept; None keeps none.
        config: Everything that decides the table, for JSON.
        desc: The progress bar's title.
        settings: Memory limit, batch size and progress; see :class:`spade_lens.Settings`.

    Raises:
        ValueError: If the folder holds parts of another configuration.
    """
    import pandas as pd

    place = None if folder is None else _opened(Path(folder).expanduser(), config)
    frames = []
    for name in progress_bar(names, desc=desc, unit="part"):
        frame = None if place is None else _read(place / f"{name}.json")
        if frame is None:
            frame = make(name)
            if place is not None:
                write_json(
                    place / f"{name}.json",
                    {str(key): column.tolist() for key, column in frame.items()},
                )
        frames.append(frame)
    return pd.concat(frames, ignore_index=True)


def _opened(folder: Path, config: Mapping[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.json"
    plain = json.loads(json.dumps(config))  # as it will be read: tuples become lists
    if not path.exists():
        write_json(path, plain)
        return folder
    known = read_json(path)
    differ = sorted(k for k in known.keys() | plain.keys() if known.get(k) != plain.get(k))
    if differ:
        raise ValueError(
            f"{str(folder)!r} holds parts of another run; {', '.join(differ)} differ (see its "
            "config.json). Choose another folder, or give the same arguments to go on."
        )
    return folder


def _read(path: Path) -> "pd.DataFrame | None":
    import pandas as pd

    # JSON and not CSV: numbers come back to the bit, and the word "null" stays a word.
    return pd.DataFrame(read_json(path)) if path.is_file() else None
