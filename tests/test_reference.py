"""The reference: each public name has its page, and references in the text lead to pages."""

import importlib.util
import inspect
import sys
from pathlib import Path
from types import ModuleType

import pytest

import spade_lens as sl

PAGE = Path(__file__).parents[1] / "docs" / "reference.py"


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    spec = importlib.util.spec_from_file_location("reference", PAGE)
    module = importlib.util.module_from_spec(spec)
    sys.modules["reference"] = module
    spec.loader.exec_module(module)
    return module


def test_every_exported_name_has_one_page(reference):
    paths = reference.public()
    assert "spade_lens.Keep" in paths and "spade_lens.lenses.Keep" not in paths
    for room in reference.rooms():
        for name in getattr(room, "__all__", []):
            target = f"{room.__name__}.{name}"
            assert inspect.ismodule(getattr(room, name)) or reference.find(target), target
    pages = [reference.page(path).lower() for path in reference.documented()]
    assert len(set(pages)) == len(pages)


def test_paths_lead_to_objects(reference):
    assert reference.find("sl.lenses.readout.Readout.save") == ("spade_lens.Readout", ".save")
    assert reference.find("spade_lens.exits.Treshold") is None
    assert reference.find("sl.Readout.sav") is None
    assert reference.public()["spade_lens.Keep"] is sl.Keep


def test_references_in_the_text_lead_to_pages(reference):
    targets = {each for text in reference._texts() for each in reference.ROLE.findall(text)}
    assert len(targets) > 20
    assert sorted(target for target in targets if not reference.find(target)) == []


@pytest.mark.parametrize("what, at_least", [("examples", 77), ("sources", 28), ("shapes", 85)])
def test_docstrings_say_as_much_as_they_did(reference, what, at_least):
    lacking, asked = reference.lacking()[what]
    percent = 100 * (asked - len(lacking)) / asked
    assert percent >= at_least, f"{percent:.1f}% have {what}; lacking: {', '.join(lacking)}"
