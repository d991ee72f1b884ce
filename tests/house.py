"""The import graph of the package, drawn from the code with ``ast``: who imports whom, by file."""

import ast
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1] / "spade_lens"
PACKAGE = "spade_lens"

FLOORS = (
    ("lazy", "checks", "settings", "columns", "tensors", "prompts", "storage", "stats"),
    ("models", "tasks"),
    ("replay", "lenses"),
    ("exits", "generation", "icl", "training"),
    ("plots", "report", "view"),
    ("studies",),
    ("cli",),
)
"""The rooms from the ground up. A room may import from its own floor and from those below it."""


@cache
def files() -> dict[str, Path]:
    """Every module of the package, by dotted name."""
    return {_module(path): path for path in sorted(ROOT.rglob("*.py"))}


def room(module: str) -> str:
    """The room of a module; the package's own ``__init__`` and ``__main__`` are the roof."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] != "__main__" else "the roof"


def floor(name: str) -> int:
    """The floor of a room, counted from 1; the roof stands on top of all."""
    for number, rooms in enumerate(FLOORS, start=1):
        if name in rooms:
            return number
    return len(FLOORS) + 1


@cache
def arrows() -> frozenset[tuple[str, str]]:
    """Pairs of modules of which the first imports the second, at its top or inside a function."""
    found = set()
    for module, path in files().items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            for name in names:
                while name and name not in files():
                    name = name.rpartition(".")[0]
                if name and name != module:
                    found.add((module, name))
    return frozenset(found)


def room_arrows() -> dict[tuple[str, str], list[tuple[str, str]]]:
    """The arrows between rooms, with the files that draw each."""
    found: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for source, target in sorted(arrows()):
        if room(source) != room(target):
            found.setdefault((room(source), room(target)), []).append((source, target))
    return found


def circles(pairs: set[tuple[str, str]]) -> list[list[str]]:
    """Groups of nodes that reach each other."""
    reach: dict[str, set[str]] = {}
    nodes = {node for pair in pairs for node in pair}
    for node in nodes:
        seen: set[str] = set()
        todo = [node]
        while todo:
            here = todo.pop()
            new = {b for a, b in pairs if a == here} - seen
            seen |= new
            todo += new
        reach[node] = seen
    groups = {
        frozenset({a} | {b for b in reach[a] if a in reach[b]}) for a in nodes if a in reach[a]
    }
    return sorted(sorted(group) for group in groups)


def lines(module: str) -> int:
    """Lines of a module."""
    return len(files()[module].read_text(encoding="utf-8").splitlines())


def parameters(at_least: int) -> list[tuple[int, str, str]]:
    """Functions with so many parameters, ``self`` and ``cls`` aside."""
    found = []
    for module, path in files().items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                every = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                n = len([a for a in every if a.arg not in ("self", "cls")])
                if n >= at_least:
                    found.append((n, module, node.name))
    return sorted(found, reverse=True)


def exports(module: str) -> list[str]:
    """What a package's ``__init__`` hands on."""
    tree = ast.parse(files()[module].read_text(encoding="utf-8"))
    names: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith(PACKAGE):
            if node.module == f"{PACKAGE}.lazy":
                continue
            names += [alias.asname or alias.name for alias in node.names]
    return names


def _module(path: Path) -> str:
    parts = [PACKAGE, *path.relative_to(ROOT).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def summary() -> str:
    """The house in words: what the closing note of a change reports."""
    rooms: dict[str, int] = {}
    for module in files():
        rooms[room(module)] = rooms.get(room(module), 0) + lines(module)
    total = sum(rooms.values())
    packages = [m for m, path in files().items() if path.name == "__init__.py" and m != PACKAGE]
    counts = {m: len(exports(m)) for m in packages}
    top = [name for name in exports(PACKAGE) if f"{PACKAGE}.{name}" not in files()]
    text = [
        f"lines {total}; files over 300 lines {sum(lines(m) > 300 for m in files())}, "
        f"over 400 {sum(lines(m) > 400 for m in files())}",
        f"names at the top {len(top)}; in all rooms {sum(counts.values())}: "
        + ", ".join(f"{m.removeprefix(PACKAGE + '.')} {n}" for m, n in counts.items() if n),
        f"functions with 8 parameters or more {len(parameters(8))}, "
        f"12 or more {len(parameters(12))}",
        f"floors {len(FLOORS)}, rooms {len(rooms)}, arrows between rooms {len(room_arrows())}, "
        f"that run up {sum(floor(a) < floor(b) for a, b in room_arrows())}, "
        f"circles of rooms {len(circles(set(room_arrows())))}, "
        f"of files {len(circles(set(arrows())))}",
    ]
    for number, names in reversed(list(enumerate(FLOORS, start=1))):
        text.append(
            f"floor {number}: "
            + ", ".join(
                f"{name} {rooms.get(name, 0)} ({rooms.get(name, 0) / total:.0%})" for name in names
            )
        )
    return "\n".join(text)


if __name__ == "__main__":
    print(summary())
