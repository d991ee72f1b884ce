"""The tables of the findings are what the measurements say, each on one page."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pandas as pd
import pytest


@pytest.fixture(scope="module")
def claims_page() -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks" / "claims_page.py"
    spec = importlib.util.spec_from_file_location("claims_page", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def frames(claims_page: ModuleType) -> dict[str, pd.DataFrame]:
    return {
        name: claims_page.measured(claims_page.HERE / file)
        for name, file in claims_page.FILES.items()
    }


def test_pages_are_what_was_measured(claims_page: ModuleType, frames: dict) -> None:
    texts = [page.read_text(encoding="utf-8") for page in claims_page.PAGES.glob("*.md")]
    claims_page.check_marks(texts)
    for text in texts:
        assert claims_page.filled(text, frames) == text


def test_another_number_is_written_anew(claims_page: ModuleType, frames: dict) -> None:
    text = (claims_page.PAGES / "demonstrations.md").read_text(encoding="utf-8")
    wrong = text.replace("| 0.48 [0.37, 0.60] |", "| 0.99 [0.37, 0.60] |", 1)
    assert wrong != text
    assert claims_page.filled(wrong, frames) == text


def test_a_table_is_neither_lost_nor_twice(claims_page: ModuleType) -> None:
    texts = [page.read_text(encoding="utf-8") for page in claims_page.PAGES.glob("*.md")]
    without = [text.replace("<!-- table cuts -->", "") for text in texts]
    for pages in (without, [*texts, "<!-- table cuts -->"]):
        with pytest.raises(ValueError, match="expected each of .*cuts.* once"):
            claims_page.check_marks(pages)


def test_a_table_without_an_end_is_refused(claims_page: ModuleType, frames: dict) -> None:
    with pytest.raises(ValueError, match="'<!-- end of cuts -->' after it"):
        claims_page.filled("<!-- table cuts -->\n", frames)
