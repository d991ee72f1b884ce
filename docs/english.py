"""How long the sentences of the pages are, and how many numbers they hold.

A page passes if half of its sentences have at most 18 words, nine of ten at most 32, and, on a page
of results, if its sentences hold at most 2 numbers on average. Both ends of an interval count as
numbers. Tables, headings, code, pictures and what has fewer than four words are left out; the end
of a list item ends a sentence.

    python docs/english.py [PAGE ...]      # prints every page, and fails if one does not pass
"""

import argparse
import re
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"

MEDIAN = 18
NINE_OF_TEN = 32
NUMBERS = 2.0

RESULTS = {
    "README",
    "what-we-found",
    "early-exit",
    "exit-and-go-on",
    "generation",
    "deal",
    "alternate",
    "in-context",
}
"""Pages of results, beside all in ``findings/``."""

NOT_SENTENCES = (
    r"<!--.*?-->",
    r"^[ ]*(`{3,}|:{3,}).*?^[ ]*\1[ ]*$",  # code, directives
    r"^#[^\n]*$",
    r"^[ ]*\|[^\n]*$",  # rows of tables
    r"^[ ]*!\[[^\n]*\]\([^\n]*\)[ ]*$",
)
NAMES = (
    (r"\{\w+\}`([^`<]*)(?:<[^`]*>)?`", "Name"),  # {func}`text <target>`
    (r"``[^`]*``|`[^`\n]*`", "Name"),
    (r"\$[^$\n]+\$", "Formula"),
    (r"!?\[\]\([^)]*\)", "Title"),
    (r"!?\[([^\]]*)\]\([^)]*\)", r"\1"),
    (r"arXiv \d+\.\d+", "arXiv"),
    (r"[*_]{1,3}(?=\S)|(?<=\S)[*_]{1,3}", ""),
)
ABBREVIATIONS = r"(?<!\bal)(?<!\be\.g)(?<!\bi\.e)(?<!\bvs)"
SENTENCE_ENDS = re.compile(rf"(?<=[.?!]){ABBREVIATIONS}[\"')\]]*\s+(?=[^a-z\s])")
NUMBER = re.compile(r"(?<![\w.-])[-+]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?![\w-])")


@dataclass(frozen=True)
class English:
    """What is measured of a page: words a sentence, and numbers a sentence."""

    words: int
    sentences: int
    median: float
    nine_of_ten: float
    numbers: float

    def passes(self, *, results: bool) -> bool:
        """Whether a page is as plain as asked for; a page of results has few numbers too."""
        plain = self.median <= MEDIAN and self.nine_of_ten <= NINE_OF_TEN
        return plain and (not results or self.numbers <= NUMBERS)


def sentences(text: str) -> list[str]:
    """The sentences of a Markdown page, without what is no prose."""
    for pattern in NOT_SENTENCES:
        text = re.sub(pattern, "\n", text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"^\s*(?:[-+]|\d+\.)\s+", "\n\n", text, flags=re.MULTILINE)
    found = []
    for paragraph in re.split(r"\n\s*\n", text):
        paragraph = " ".join(paragraph.split())
        for pattern, name in NAMES:
            paragraph = re.sub(pattern, name, paragraph)
        found += SENTENCE_ENDS.split(paragraph)
    return [sentence for sentence in found if len(sentence.split()) > 3]


def measure(text: str) -> English:
    """The English of a Markdown page; zeros where it has no sentence."""
    found = sentences(text)
    lengths = sorted(len(sentence.split()) for sentence in found)
    if not lengths:
        return English(len(text.split()), 0, 0.0, 0.0, 0.0)
    return English(
        words=len(text.split()),
        sentences=len(found),
        median=statistics.median(lengths),
        nine_of_ten=float(lengths[min(len(lengths) - 1, int(0.9 * len(lengths)))]),
        numbers=sum(len(NUMBER.findall(sentence)) for sentence in found) / len(found),
    )


def pages() -> list[Path]:
    """The README and every page that is written by hand."""
    generated = ("_build", "api")
    written = (p for p in DOCS.rglob("*.md") if p.relative_to(DOCS).parts[0] not in generated)
    return [ROOT / "README.md", *sorted(written)]


def has_results(page: Path) -> bool:
    """Whether a page gives numbers that were measured."""
    return page.stem in RESULTS or page.parent.name == "findings"


def main(names: Sequence[str]) -> int:
    """Print a row per page; return how many do not pass."""
    failing = 0
    print(f"{'page':34}  words  sentences  median  90th  numbers")
    for page in [Path(name).resolve() for name in names] or pages():
        english = measure(page.read_text(encoding="utf-8"))
        bad = not english.passes(results=has_results(page))
        failing += bad
        print(
            f"{page.relative_to(ROOT).as_posix():34} {english.words:6} {english.sentences:10} "
            f"{english.median:7.1f} {english.nine_of_ten:5.0f} {english.numbers:8.1f}"
            + ("  too long, or too many numbers" if bad else "")
        )
    return failing


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("pages", nargs="*", help="all of them if none is named")
    sys.exit(main(parser.parse_args().pages) and 1)
