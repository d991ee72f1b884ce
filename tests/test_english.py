"""Docstrings, comments and messages use the field's words; pages are not written in a dialect."""

import ast
import importlib.util
import io
import re
import sys
import tokenize
from pathlib import Path
from types import ModuleType

import house
import pytest

DOCS = Path(__file__).parents[1] / "docs"

HOMELY = {
    r"\bdear(er|est)?\b": "expensive",
    r"\bpasts\b": "cached keys and values",
    r"\bstretch(es)?\b": "shared prefix, segment",
    r"\bunfinished\b": "checkpoint, partial results",
    r"\bby a hair\b|\ba hair\b": "slightly, about 1e-6",
    r"\btold from\b": "differs from",
    r"\bas named\b": "own vectors",
    r"\blabels up\b": "label positions, from layer l to the top",
    r"\braces?\b": "wall-clock comparison",
    r"\bin favour of being sure\b": "conservatively",
    r"\bmeanings\b": "decoded tokens",
    r"\bconcentration\b": "effective number of demonstrations",
    r"\bways? to exit\b": "configuration, strategy",
}


def prose(module: str) -> list[tuple[int, str]]:
    """Docstrings, comments and the text of messages, with their lines."""
    source = house.files()[module].read_text(encoding="utf-8")
    texts = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
            texts.append((node.lineno, node.value))
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            texts.append((token.start[0], token.string))
    return texts


def documented(module: str) -> list[tuple[str, str]]:
    """Every docstring of a module, with the name of what it documents."""
    tree = ast.parse(house.files()[module].read_text(encoding="utf-8"))
    nodes = [
        n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.ClassDef | ast.Module)
    ]
    named = [(getattr(node, "name", module), ast.get_docstring(node)) for node in nodes]
    return [(name, text) for name, text in named if text]


def test_no_homely_words():
    rows = [
        f"{module}:{line}: {match.group(0)!r}: write {better!r}"
        for module in house.files()
        for line, text in prose(module)
        for pattern, better in HOMELY.items()
        if (match := re.search(pattern, text, flags=re.IGNORECASE))
    ]
    assert not rows, "\n".join(rows)


def test_every_module_says_what_it_is_for():
    assert not [m for m in house.files() if not ast.get_docstring(ast.parse(_source(m)))]


def test_raises_says_the_condition():
    rows = []
    for module in house.files():
        for name, text in documented(module):
            section = re.search(r"\nRaises:\n((?:[ ]+.*\n?|\n)+)", text)
            if section and re.search(r":\s*(Then|Likewise|See)\.?\s*$", section.group(1), re.M):
                rows.append(f"{module}.{name}: {section.group(1).strip()}")
    assert not rows, "\n".join(rows)


@pytest.mark.parametrize("most", [16.0])
def test_sentences_are_short(most):
    lengths = []
    for module in house.files():
        for _, text in documented(module):
            body = re.split(r"\n(?:Args|Example|Raises|Returns|Attributes|Warns):\n", text)[0]
            body = re.sub(r"``[^`]*``|:\w+:`[^`]*`", "name", body)
            for sentence in re.split(r"(?<=[.?!:])\s+|\n\n", body):
                n = len(sentence.split())
                if n > 2:
                    lengths.append(n)
    assert sum(lengths) / len(lengths) <= most


@pytest.fixture(scope="module")
def english() -> ModuleType:
    """The script that measures the pages."""
    spec = importlib.util.spec_from_file_location("english", DOCS / "english.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_pages_are_plain(english):
    failing = [
        f"{page}: {measured}"
        for page in english.pages()
        if not (measured := english.measure(page.read_text(encoding="utf-8"))).passes(
            results=english.has_results(page)
        )
    ]
    assert not failing, "\n".join(failing)


SHORT = "One idea stands in a sentence of so many words. "
LONG = " ".join(["word"] * 33) + ". "


@pytest.mark.parametrize(
    ("text", "passes"),
    [
        (SHORT * 10, True),
        (SHORT * 8 + LONG * 2, False),  # the longest tenth
        (" ".join(["word"] * 19) + ". " + SHORT, True),
        ((" ".join(["word"] * 19) + ". ") * 3 + SHORT, False),  # the median
        (SHORT + "It rose by .5 [.4, .6] here. ", True),
        ("It rose by .5 [.4, .6] here. " * 2, False),  # three numbers each
        ("| " + "1 2 3 4 " * 50 + "|\n\n" + SHORT, True),  # a table
        ("```python\n" + "x = 1 + 2 + 3 " * 50 + "\n```\n" + SHORT, True),
        ("# " + "word " * 50 + "\n\n" + SHORT, True),
    ],
)
def test_a_page_can_fail(english, text, passes):
    assert english.measure(text).passes(results=True) is passes


def test_sentences_of_a_page(english):
    text = """# A heading

First it says *this* by `code.with.dots()`, see [a link](x.md). Then
Wang et al. say that 0.5 of it is lost!

- An item ends without a full stop
- As does the next one

| a | table |
|---|---|
"""
    assert english.sentences(text) == [
        "First it says this by Name, see a link.",
        "Then Wang et al. say that 0.5 of it is lost!",
        "An item ends without a full stop",
        "As does the next one",
    ]


def _source(module: str) -> str:
    return house.files()[module].read_text(encoding="utf-8")
