"""What a result was made with, to be written beside it."""

import os
import platform
import shlex
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any, Protocol, runtime_checkable

_PACKAGES = (
    "spade-lens",
    "torch",
    "transformers",
    "transformer-lens",
    "numpy",
    "pandas",
    "safetensors",
)


@runtime_checkable
class Identified(Protocol):
    """What provenance asks of a model: its name and a hash of its parameters."""

    @property
    def name(self) -> str:
        """What tables call it."""
        ...

    @property
    def sha256(self) -> str:
        """A hash of all parameters."""
        ...


def provenance(model: Identified | None = None, **config: Any) -> dict[str, Any]:
    """Versions, platform, command, date, model and configuration, ready for JSON.

    Example:
        >>> about = provenance(model, seed=0, shots=8)
        >>> about["config"]
        {'seed': 0, 'shots': 8}
        >>> len(about["model"]["sha256"])
        64

    Args:
        model: The model that was read.
        config: The arguments that decide the result, the seed among them.

    Returns:
        ``date`` (UTC), ``command``, ``python``, ``platform``, ``processors``, ``packages``
        (versions by name), ``model`` and ``config``. Of a model that are ``name``, ``sha256`` and,
        where it has them, ``dtype``, ``device`` and ``precision``.
    """
    about: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(sys.argv),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processors": os.cpu_count(),
        "packages": versions(),
    }
    if model is not None:
        known = [key for key in ("dtype", "device", "precision") if hasattr(model, key)]
        about["model"] = {"name": model.name, "sha256": model.sha256}
        about["model"] |= {key: str(getattr(model, key)) for key in known}
    return about | {"config": config}


def versions() -> dict[str, str]:
    """The versions of the packages that results depend on, this one first."""
    return {name: version(name) for name in _PACKAGES}
