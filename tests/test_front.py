"""What a visitor of the repository opens first: README, CONTRIBUTING, metadata and the wheel."""

import email
import re
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml

import spade_lens as sl

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "llms.txt")
MOST_WORDS = 1000


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def run_snippets(page: str, names: dict[str, Any]) -> dict[str, Any]:
    """Run a page's Python in order, with the given model in the place of the built-in one."""
    for snippet in re.findall(r"```python\n(.*?)```", text(page), flags=re.S):
        exec(re.sub(r"^model = sl\.load\(\).*$", "", snippet, flags=re.M), names)
    return names


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


# The tiny tokenizer lacks many letters, so that answers begin alike.
@pytest.mark.filterwarnings("ignore::spade_lens.prompts.TokenWarning")
def test_ten_lines_of_the_readme_run(tiny_llama: sl.Model) -> None:
    names = run_snippets("README.md", {"model": tiny_llama})
    assert set(names["frame"]["lens"]) == {"logit lens", "SPADE"}
    assert names["figure"].axes
    assert names["written"].texts[0]
    assert names["vectors"].tensor.shape == (1, 4, 8, tiny_llama.d_model)


@pytest.mark.filterwarnings("ignore::spade_lens.prompts.TokenWarning")
def test_snippets_of_contributing_run(
    tiny_llama: sl.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names = run_snippets("CONTRIBUTING.md", {"model": tiny_llama})
    assert set(names["frame"]["lens"]) == {"logit lens", "mean of two"}
    assert len(names["trace"]) == 1
    assert [len(p.target) for p in names["few_shot"]] and len(names["episodes"]) == 4
    assert (names["result"].tables["lengths"]["length"] > 0).all()
    assert names["mine"].n_layers == 4


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
