"""What a visitor opens first: pages at the root, metadata and the wheel."""

import email
import re
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "llms.txt")
MOST_WORDS = 1000


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and MyST write them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_readme_is_short() -> None:
    assert len(text("README.md").split()) <= MOST_WORDS


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name: str) -> None:
    lost = []
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text(name)):
        path, _, anchor = target.partition("#")
        page = ROOT / (path or name)
        if not page.is_file() or (anchor and anchor not in anchors(page)):
            lost.append(target)
    assert not lost


def test_metadata_agree() -> None:
    project = tomllib.loads(text("pyproject.toml"))["project"]
    citation = yaml.safe_load(text("CITATION.cff"))
    assert citation["version"] == project["version"]
    assert citation["license"] == project["license"]
    assert [a["name"] for a in citation["authors"]] == [a["name"] for a in project["authors"]]
    assert f"## {project['version']}" in text("CHANGELOG.md")
    papers = {paper["url"] for paper in citation["references"]}
    assert papers == set(project["urls"].values())
    assert all(paper in text("README.md") for paper in papers)


def test_the_wheel_has_all_that_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build = pytest.importorskip("hatchling.build")
    monkeypatch.chdir(ROOT)
    with zipfile.ZipFile(tmp_path / build.build_wheel(str(tmp_path))) as wheel:
        names = {name for name in wheel.namelist() if not name.endswith("/")}
        [metadata] = [name for name in names if name.endswith(".dist-info/METADATA")]
        about = email.message_from_bytes(wheel.read(metadata))
    needed = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "spade_lens").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert "spade_lens/py.typed" in needed
    assert {name for name in names if ".dist-info/" not in name} == needed
    assert "Typing :: Typed" in about.get_all("Classifier", [])
