"""A long table made in parts, each on disk as soon as it is done.

An interrupted run goes on from the parts that exist. Which run they belong to is decided as for
every checkpoint; see :mod:`spade_lens.storage.checkpoint`.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spade_lens.settings import HasSettings, Settings, progress_bar, scoped
from spade_lens.storage.checkpoint import as_read, kept_folder, refuse_another_run
from spade_lens.storage.content import content_sha256
from spade_lens.storage.files import (
    file_stem,
    naming_damage,
    read_json,
    sealed,
    set_aside,
    unsealed,
    write_json,
)

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
        names: The parts' names, each once.
        make: Makes the part of that name.
        folder: Where parts are kept; None keeps none. See also
            :func:`spade_lens.storage.checkpoint.kept_folder`.
        config: All that decides the table.
        desc: The progress bar's title. A single part has the bars of what makes it instead.
        model: The model that runs, whose settings count; see :func:`spade_lens.settings.limits`.
        settings: Memory limit, batch size and progress; see :class:`spade_lens.Settings`.

    Raises:
        TypeError: If a part is no data frame.
        ValueError: If the folder holds parts of another run, or cannot be written, or two parts
            have one name.

    Warns:
        UserWarning: If a part on disk is damaged. It is set aside and made again.
    """
    import pandas as pd

    twice = [name for name, n in Counter(names).items() if n > 1]
    if twice:
        raise ValueError(f"Parts {twice} were given more than once; give every part its own name.")
    place, run = kept_folder(folder, model), as_read(config)
    if place is not None:
        _refuse_another(place, run)
    frames = []
    bar = progress_bar(names, desc=desc, unit="part", model=model) if len(names) > 1 else names
    for name in bar:
        path = None if place is None else place / f"{file_stem(name)}.json"
        frame = None if path is None else _read(path, run)
        if frame is None:
            frame = make(name)
            if not isinstance(frame, pd.DataFrame):
                raise TypeError(
                    f"Part {name!r} of {desc!r} is a {type(frame).__name__}; expected a DataFrame."
                )
            if path is not None:
                columns = {str(key): column.tolist() for key, column in frame.items()}
                # JSON has no word for pandas' missing whole number but null.
                plain = {k: [None if v is pd.NA else v for v in c] for k, c in columns.items()}
                write_json(path, sealed({"run": content_sha256(run), "columns": plain}))
        frames.append(frame)
    return pd.concat(frames, ignore_index=True)


def _read(path: Path, run: Mapping[str, Any]) -> "pd.DataFrame | None":
    """Return the part in a file, None if it is not there or damaged."""
    import pandas as pd

    try:
        # JSON and not CSV: numbers come back to the bit, and the word "null" stays a word.
        content = read_json(path)
        with naming_damage(path, again="make it"):
            content = unsealed(path, content, again="make it")
            of, frame = content["run"], pd.DataFrame(_columns(content["columns"]))
    except FileNotFoundError:
        return None
    except ValueError as error:
        set_aside(path, error)
        return None
    refuse_another_run(path, there={"run": of}, here={"run": content_sha256(run)})
    return frame


def _columns(content: Mapping[str, list[Any]]) -> dict[str, Any]:
    """Make columns of lists; whole numbers stay whole where some are missing."""
    import pandas as pd

    columns: dict[str, Any] = dict(content)
    for name, values in content.items():
        known = [value for value in values if value is not None]
        if 0 < len(known) < len(values) and all(type(value) is int for value in known):
            columns[name] = pd.array(values, dtype="Int64")
    return columns


def _refuse_another(folder: Path, run: Mapping[str, Any]) -> None:
    """Raise if a folder is of another run. What it is of stands in ``config.json``."""
    path = folder / "config.json"
    try:
        there = read_json(path)
    except FileNotFoundError:
        write_json(path, run)
    except ValueError as error:
        set_aside(path, error)
        write_json(path, run)
    else:
        refuse_another_run(folder, there=there, here=run)
