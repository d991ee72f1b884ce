"""A long table made in parts, each on disk as soon as it is done.

An interrupted run goes on from the parts that exist. Which run they belong to is decided as for
every checkpoint; see :mod:`spade_lens.storage.checkpoint`.

Several processes may share a folder, on one machine or on several. Each locks the part that it
makes, by a lock of the operating system, which ends with its process. So a part is made once, and
that of a process that died is made by another.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from spade_lens.checks import warn
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


_POLL = 0.5
"""Seconds between two looks at the parts that other processes make."""


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

    Processes that are given the same folder share the work, and each returns the whole table.

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
        ValueError: If the folder holds parts of another run, or cannot be written or locked, or
            two parts have one name.

    Warns:
        UserWarning: If a part on disk is damaged; it is set aside and made again. If the folder
            cannot be locked; then two processes may make the same part.
    """
    import pandas as pd

    twice = [name for name, n in Counter(names).items() if n > 1]
    if twice:
        raise ValueError(f"Parts {twice} were given more than once; give every part its own name.")
    place, run = kept_folder(folder, model), as_read(config)
    if place is not None:
        _refuse_another(place, run)

    def made(name: str) -> "pd.DataFrame":
        frame = make(name)
        if not isinstance(frame, pd.DataFrame):
            raise TypeError(
                f"Part {name!r} of {desc!r} is a {type(frame).__name__}; expected a DataFrame."
            )
        return frame

    def shared(name: str, path: Path) -> "pd.DataFrame | None":
        """Return a part that is there or that nobody else makes; None for others."""
        if (frame := _read(path, run)) is not None:
            return frame
        with _claimed(path) as mine:
            if not mine:
                return None
            # Another process may have made it since it was looked for.
            if (frame := _read(path, run)) is None:
                frame = made(name)
                _write(path, run, frame)
            return frame

    frames: dict[str, pd.DataFrame] = {}
    with ExitStack() as stack:
        bar = None
        if len(names) > 1:
            bar = progress_bar(total=len(names), desc=desc, unit="part", model=model)
            stack.enter_context(bar)
        while absent := [name for name in names if name not in frames]:
            before = len(frames)
            for name in absent:
                path = None if place is None else place / f"{file_stem(name)}.json"
                frame = made(name) if path is None else shared(name, path)
                if frame is not None:
                    frames[name] = frame
                    if bar is not None:
                        bar.update()
            if len(frames) == before:
                time.sleep(_POLL)
    return pd.concat([frames[name] for name in names], ignore_index=True)


@contextmanager
def _claimed(path: Path) -> Iterator[bool]:
    """Lock a part for this process; yield whether nobody else has."""
    lock = FileLock(path.with_name(f".{path.stem}.lock"), timeout=0)
    try:
        lock.acquire()
    except Timeout:
        yield False
        return
    except (PermissionError, IsADirectoryError, FileNotFoundError) as error:
        raise ValueError(
            f"{lock.lock_file} cannot be locked ({error.strerror}). Another user may hold it, or "
            "have left it: remove it once that run has ended, or give another folder."
        ) from error
    except (NotImplementedError, OSError) as error:  # filelock raises either, by its version
        warn(
            f"The folder {str(path.parent)!r} cannot be locked ({error}), so processes that share "
            "it may make the same parts. Nothing is lost; give them a folder on another disk."
        )
        yield True
        return
    try:
        yield True
    finally:
        # While it is held: afterwards another process may have locked the file, and a third one
        # would lock a new file of this name. Windows removes no file that is open.
        with suppress(OSError):
            Path(lock.lock_file).unlink()
        lock.release()


def _write(path: Path, run: Mapping[str, Any], frame: "pd.DataFrame") -> None:
    import pandas as pd

    columns = {str(key): column.tolist() for key, column in frame.items()}
    # JSON has no word for pandas' missing whole number but null.
    plain = {k: [None if v is pd.NA else v for v in c] for k, c in columns.items()}
    write_json(path, sealed({"run": content_sha256(run), "columns": plain}))


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
