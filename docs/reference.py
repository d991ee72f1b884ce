"""The pages of the reference: one for each public object, one for each room.

``conf.py`` has them written at every build, from the ``__all__`` of the package and of its rooms. A
new public name has its page without an edit here. An object stands under the shortest path that
users type: ``sl.Keep``, not ``sl.lenses.Keep``. Types that public functions take or give have pages
too, under their full path. So has what a page or a docstring refers to.

    python docs/reference.py      # prints how many names have an example, a source, shapes
"""

import importlib
import inspect
import re
import shutil
import typing
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

import spade_lens as sl

DOCS = Path(__file__).parent
BUILT = ("_build", "api")
ROLE = re.compile(
    r"(?:\{|:)(?:py:)?(?:func|class|meth|attr|exc)(?:\}|:)`(?:[^`<]*<)?~?((?:sl|spade_lens)\.[\w.]+)"
)

SOURCE = re.compile(r"arXiv|doi|paper|\b(?:is|are) ours\b|\bOurs\b|\(\d{4}\)|et al")


def rooms() -> list[ModuleType]:
    """The package, then its rooms by name."""
    inside = [getattr(sl, name) for name in sl.__all__]
    return [sl, *(room for room in inside if inspect.ismodule(room))]


def typed(path: str) -> str:
    """A path as users type it."""
    return re.sub(r"^spade_lens\b", "sl", path)


def page(path: str) -> str:
    """The name of an object's page. ``Patch`` and ``patch`` differ also where case is ignored."""
    twin = any(other.lower() == path.lower() and other > path for other in documented())
    return typed(path) + "-class" * twin


@cache
def public() -> dict[str, Any]:
    """Every public object by its path, ``spade_lens.Keep``; each object once."""
    first: dict[int, tuple[str, Any]] = {}
    for room in rooms():
        for path, found in _exported(room):
            first.setdefault(id(found), (path, found))
    return dict(first.values())


@cache
def documented() -> dict[str, Any]:
    """The public objects, then the types they take or give and what the text refers to."""
    found = dict(public())
    known = {id(each) for each in found.values()}
    more = [each for one in public().values() for each in _types(one)]
    for text in _texts():
        for target in ROLE.findall(text):
            more += [
                each for each in _along(target) if inspect.isclass(each) or inspect.isfunction(each)
            ][:1]
    for each in sorted(more, key=lambda one: (one.__module__, one.__qualname__)):
        if id(each) not in known and not each.__name__.startswith("_"):
            known.add(id(each))
            found[f"{each.__module__}.{each.__qualname__}"] = each
    return found


def find(target: str) -> tuple[str, str] | None:
    """The documented object that a path leads to, and the rest of the path; None if there is none.

    ``spade_lens.lenses.readout.Readout.save`` gives ``("spade_lens.Readout", ".save")``.
    """
    names = re.sub(r"^sl\b", "spade_lens", target).split(".")
    for n, each in enumerate(_along(target), start=1):
        if id(each) in _paths():
            rest = names[n:]
            fields = getattr(each, "__dataclass_fields__", {})
            if rest and rest[0] not in fields and not hasattr(each, rest[0]):
                return None
            return _paths()[id(each)], "".join(f".{name}" for name in rest)
    return None


def lacking() -> dict[str, tuple[list[str], int]]:
    """What public objects lack, and how many were asked: examples, sources, shapes of tensors."""
    examples, sources, shapes, asked = [], [], [], 0
    for path, each in public().items():
        text = "\n".join(inspect.getdoc(part) or "" for part in _parts(each))
        if ">>>" not in text:
            examples.append(path)
        if not SOURCE.search(text):
            sources.append(path)
        annotations = _annotations(each)
        bare = any(one is torch.Tensor for one in annotations)
        asked += bare or any(hasattr(one, "array_type") for one in annotations)
        if bare:
            shapes.append(path)
    n = len(public())
    return {"examples": (examples, n), "sources": (sources, n), "shapes": (shapes, asked)}


def write() -> None:
    """Write all pages anew, in ``docs/api``, and the list of rooms that ``api.md`` includes."""
    folder = DOCS / "api"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    members: dict[str, list[str]] = {room.__name__: [] for room in rooms()}
    for path, each in documented().items():
        home = path.rpartition(".")[0]
        while home not in members:
            home = home.rpartition(".")[0]
        members[home].append(path)
        (folder / f"{page(path)}.md").write_text(_page(path, each, home), encoding="utf-8")
    overview = ["| room | what it does |", "|---|---|"]
    for room in rooms():
        name = room.__name__
        (folder / f"{typed(name)}.md").write_text(_room(room, members[name]), encoding="utf-8")
        overview.append(f"| [{typed(name)}](api/{typed(name)}.md) | {_summary(room)} |")
    toctree = [
        "",
        "```{toctree}",
        ":hidden:",
        "",
        *(f"api/{typed(r.__name__)}" for r in rooms()),
        "```",
        "",
    ]
    (folder / "rooms.txt").write_text("\n".join(overview + toctree), encoding="utf-8")


def _exported(module: ModuleType) -> Iterator[tuple[str, Any]]:
    names = getattr(module, "__all__", None)
    if names is None:  # a module that is a room: all that it defines
        names = [
            n
            for n, one in vars(module).items()
            if getattr(one, "__module__", "") == module.__name__
        ]
    for name in names:
        found = getattr(module, name)
        if inspect.ismodule(found) and module is not sl:
            yield from _exported(found)
        elif (inspect.isclass(found) or callable(found)) and not name.startswith("_"):
            yield f"{module.__name__}.{name}", found


def _parts(found: Any) -> list[Any]:
    """A function; or a class and its public methods and properties."""
    if not inspect.isclass(found):
        return [found]
    methods = [
        each.fget if isinstance(each, property) else getattr(each, "__func__", each)
        for name, each in vars(found).items()
        if not name.startswith("_") or name in ("__init__", "__call__", "__getitem__")
    ]
    return [found, *(each for each in methods if inspect.isfunction(each))]


def _annotations(found: Any) -> list[Any]:
    """All that the annotations of an object are made of."""
    mentioned: list[Any] = []
    for owner in _parts(found):
        try:
            todo = list(typing.get_type_hints(owner).values())
        except (TypeError, NameError):  # names that only type checkers know
            continue
        while todo:
            one = todo.pop()
            todo += typing.get_args(one)
            mentioned.append(one)
    return mentioned


def _types(found: Any) -> set[type]:
    return {
        one
        for one in _annotations(found)
        if inspect.isclass(one) and one.__module__.startswith("spade_lens")
    }


@cache
def _texts() -> tuple[str, ...]:
    """The pages written by hand, and the docstrings of public objects."""
    written = (p for p in DOCS.rglob("*.md") if p.relative_to(DOCS).parts[0] not in BUILT)
    parts = (part for each in public().values() for part in _parts(each))
    return (
        *(page.read_text(encoding="utf-8") for page in written),
        *(inspect.getdoc(part) or "" for part in parts),
    )


@cache
def _paths() -> dict[int, str]:
    return {id(each): path for path, each in documented().items()}


@cache
def _along(target: str) -> tuple[Any, ...]:
    """What a dotted path passes, as far as it leads."""
    names = re.sub(r"^sl\b", "spade_lens", target).split(".")
    passed: list[Any] = []
    for n, name in enumerate(names):
        try:
            if n and hasattr(passed[-1], name):
                passed.append(getattr(passed[-1], name))
            else:
                passed.append(importlib.import_module(".".join(names[: n + 1])))
        except ImportError:
            break
    return tuple(passed)


def _summary(found: Any) -> str:
    text = (inspect.getdoc(found) or "").split("\n\n")[0].replace("\n", " ")
    text = re.sub(r":\w+:`~?([^`]*)`", r"``\1``", text)
    return text.replace("|", "\\|")


def _page(path: str, found: Any, home: str) -> str:
    lines = ["---", "orphan: true", "---", "", f"# {typed(path)}", ""]
    lines += [f"In the room [{typed(home)}]({typed(home)}.md).", "", "```{eval-rst}"]
    if inspect.isclass(found):
        # What our own bases give is shown; what others' give, such as torch's, is not.
        others = {
            one.__name__ for one in found.__mro__ if not one.__module__.startswith("spade_lens")
        }
        lines += [f".. autoclass:: {path}", "   :members:"]
        lines += [f"   :inherited-members: {','.join(sorted(others))}"]
    else:
        lines += [f".. autofunction:: {path}"]
    return "\n".join([*lines, "```", ""])


def _room(room: ModuleType, paths: list[str]) -> str:
    title = typed(room.__name__)
    lines = [f"# {title}", "", "```{eval-rst}", inspect.getdoc(room) or "", "```", ""]
    parts = {"": [p for p in paths if p in public()], "## Types and helpers": []}
    parts["## Types and helpers"] = [p for p in paths if p not in public()]
    for heading, inside in parts.items():
        if inside:
            rows = [
                f"| [`{typed(p)}`]({page(p)}.md) | {_summary(documented()[p])} |" for p in inside
            ]
            lines += [heading, "", "| name | what it is |", "|---|---|", *rows, ""]
    return "\n".join(lines)


if __name__ == "__main__":
    for what, (names, asked) in lacking().items():
        print(f"{what}: {asked - len(names)} of {asked}; lacking: {', '.join(names)}")
