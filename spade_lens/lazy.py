"""Import names when they are first used (PEP 562), so that ``import spade_lens`` costs nothing.

This module knows nothing of the rooms: a package lists its names in an ``if TYPE_CHECKING:`` block,
which type checkers read, and :func:`attach` reads the same block. There is no second list. Names
are imported there ``as`` themselves, since strict type checkers take no other for public.
"""

import ast
import importlib
import importlib.metadata
from collections.abc import Callable
from pathlib import Path
from typing import Any


def attach(
    package: str, file: str
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """Make a package import the names of its ``if TYPE_CHECKING:`` block when they are first used.

    Return its ``__getattr__``, ``__dir__`` and ``__all__``. The first also knows ``__version__``:
    the version of the installed distribution.

    Example:
        >>> getter, lister, names = attach("spade_lens", sl.__file__)
        >>> "load" in names and getter("load") is sl.load
        True
    """
    homes: dict[str, str] = {}
    for node in ast.parse(Path(file).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.If):
            for line in node.body:
                if isinstance(line, ast.ImportFrom) and line.module:
                    homes |= {alias.name: line.module for alias in line.names}

    def __getattr__(name: str) -> Any:
        if name == "__version__":
            return importlib.metadata.version(package)
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        if homes[name] == package:
            return importlib.import_module(f"{package}.{name}")
        return getattr(importlib.import_module(homes[name]), name)

    names = sorted(homes)
    return __getattr__, lambda: names, names


_VERBS = {
    "read": "spade_lens.lenses.reading",
    "generate": "spade_lens.generation.loop",
    "sample_together": "spade_lens.generation.loop",
    "plot": "spade_lens.plots.registry",
    "save_html": "spade_lens.view.page",
    "notebook_html": "spade_lens.view.page",
    "convergence": "spade_lens.icl.geometry.convergence",
}


def verb(name: str) -> Callable[..., Any]:
    """Return a verb of a higher floor, so that a model can offer it without importing its room."""
    return getattr(importlib.import_module(_VERBS[name]), name)
