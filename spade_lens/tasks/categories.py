"""The rule tasks that come with the library: categories of words, and rules of form.

The words are facts we wrote down ourselves, no word in two categories. Strings and numbers are
generated here, with a fixed seed.
"""

import json
import string
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np

from spade_lens.tasks.rules import RuleTask

_FOLDER = Path(__file__).parent / "words"
_STRINGS = 240
"""Random strings of every class; more than any prompt shows."""


def category_names() -> list[str]:
    """Return the names of the categories of words, in alphabetical order."""
    return sorted(path.stem for path in _FOLDER.glob("*.json"))


@cache
def category(name: str) -> tuple[str, ...]:
    """Return the words of a category, one of :func:`category_names`."""
    text = (_FOLDER / f"{name}.json").read_text(encoding="utf-8")
    return tuple(json.loads(text)["words"])


def rule_names() -> list[str]:
    """Return the names of the rules of form, in alphabetical order."""
    return sorted(_RULES)


@cache
def rule_named(name: str) -> RuleTask:
    """Return a rule task that comes with the library.

    Example:
        >>> list(rule_named("animal/country").classes)
        ['animal', 'country']
        >>> max(len(word) for word in rule_named("string-length").classes["short"])
        5

    Args:
        name: Two or more categories with slashes between them, such as ``"animal/country"``
            (:func:`category_names`), or one of :func:`rule_names`.
    """
    if "/" in name:
        parts = name.split("/")
        words = {part: category(part) for part in parts}
        return RuleTask(name, words, f"Which of {' and '.join(parts)} a word is.")
    return _RULES[name]()


def _string_length() -> RuleTask:
    rng = np.random.default_rng(6)
    letters = list(string.ascii_lowercase)
    classes: dict[str, list[str]] = {"short": [], "long": []}
    for kind, (low, high) in {"short": (1, 6), "long": (6, 11)}.items():
        while len(classes[kind]) < _STRINGS:
            word = "".join(rng.choice(letters, size=int(rng.integers(low, high))))
            if word not in classes[kind]:
                classes[kind].append(word)
    return RuleTask(
        "string-length",
        {kind: tuple(words) for kind, words in classes.items()},
        "Whether a random string has fewer than six letters; ours: one to ten letters.",
    )


def _number_parity() -> RuleTask:
    return RuleTask.from_rule(
        [str(number) for number in range(10, 510)],
        lambda number: "odd" if int(number) % 2 else "even",
        name="number-parity",
        description="Whether a number from 10 to 509 is even or odd.",
    )


def _number_size() -> RuleTask:
    return RuleTask.from_rule(
        [str(number) for number in range(100, 1000, 2)],
        lambda number: "low" if int(number) < 550 else "high",
        name="number-size",
        description="Whether a number from 100 to 998 is below 550.",
    )


def _words() -> list[str]:
    """Return all words of all categories in small letters, without countries."""
    return [w for name in category_names() if name != "country" for w in category(name)]


def _first_letter() -> RuleTask:
    return RuleTask.from_rule(
        _words(),
        lambda word: "a-m" if word[0] < "n" else "n-z",
        name="first-letter",
        description="Whether a word begins with a letter of the alphabet's first half.",
    )


def _vowel_count() -> RuleTask:
    def rule(word: str) -> str | None:
        vowels = sum(letter in "aeiou" for letter in word)
        return None if vowels == 2 else "few" if vowels < 2 else "many"

    return RuleTask.from_rule(
        _words(),
        rule,
        name="vowel-count",
        description="Whether a word has at most one of the vowels aeiou or at least three.",
    )


_RULES: dict[str, Callable[[], RuleTask]] = {
    "string-length": _string_length,
    "number-parity": _number_parity,
    "number-size": _number_size,
    "first-letter": _first_letter,
    "vowel-count": _vowel_count,
}
