"""Docstrings, comments and messages use the field's words; pages are not written in a dialect."""

import ast
import io
import re
import tokenize

import house
import pytest

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


def _source(module: str) -> str:
    return house.files()[module].read_text(encoding="utf-8")
