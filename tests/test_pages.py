"""What the README, the pages and the notebooks name is there, and public."""

import ast
import json
import re
from pathlib import Path

import pytest

import spade_lens as sl

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted(
        page
        for page in (ROOT / "docs").rglob("*.md")
        if page.relative_to(ROOT / "docs").parts[0] not in ("_build", "api")
    ),
    *sorted((ROOT / "notebooks").glob("*.ipynb")),
]
ROOMS = (
    "exits generation icl lenses models plots prompts replay report stats storage studies tasks "
    "tensors training view"
)
NAMED = re.compile(rf"(?<![\w./-])(sl|spade_lens|{'|'.join(ROOMS.split())})((?:\.[A-Za-z_]\w*)+)")


def code(page: Path) -> list[str]:
    """Everything on a page that is written as code."""
    if page.suffix == ".ipynb":
        cells = json.loads(page.read_text(encoding="utf-8"))["cells"]
        return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"```(?:python|pycon)\n(.*?)```", text, flags=re.S)
    rest = re.sub(r"```.*?```", "", text, flags=re.S)
    return blocks + re.findall(r"`([^`\n]+)`", rest)


def exists(root: str, names: list[str]) -> bool:
    """Whether a dotted name can be reached from the package or one of its rooms."""
    found = sl if root in ("sl", "spade_lens") else getattr(sl, root)
    for name in names:
        if not hasattr(found, name):
            return name in getattr(found, "__dataclass_fields__", {})
        found = getattr(found, name)
        if not (
            isinstance(found, type) or hasattr(found, "__path__") or hasattr(found, "__file__")
        ):
            return True  # a function or an object: what follows is its result's business
    return True


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_names_exist(page: Path) -> None:
    missing = {
        match.group(0)
        for piece in code(page)
        for match in NAMED.finditer(piece)
        if not re.search(r"\.(py|md|csv|json|png|ipynb|html)$", match.group(0))
        and not exists(match.group(1), match.group(2).strip(".").split("."))
    }
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_imports_are_public(page: Path) -> None:
    """Names are imported from the package or from a room, never from a file inside one."""
    private = []
    for piece in code(page):
        try:
            tree = ast.parse(
                "\n".join(line for line in piece.splitlines() if line[:1] not in "%!$")
            )
        except SyntaxError:
            continue
        for node in ast.walk(tree):
            module = (node.module or "") if isinstance(node, ast.ImportFrom) else ""
            if module.startswith("spade_lens") and module.count(".") > 1:
                private.append(f"from {module} import ...")
    assert not private
