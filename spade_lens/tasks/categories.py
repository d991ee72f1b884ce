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
    return sorted(["string-length", *_OF_FORM])


@cache
def rule_named(name: str) -> RuleTask:
    """Return a rule task that comes with the library.

    The name is of two or more categories with slashes between them, such as ``"animal/country"``
    (:func:`category_names`), or one of :func:`rule_names`.

    Example:
        >>> list(rule_named("animal/country").classes)
        ['animal', 'country']
        >>> max(len(word) for word in rule_named("string-length").classes["short"])
        5
    """
    if "/" in name:
        parts = name.split("/")
        words = {part: category(part) for part in parts}
        return RuleTask(name, words, f"Which of {' and '.join(parts)} a word is.")
    if name == "string-length":
        return _string_length()
    inputs, rule, description = _OF_FORM[name]
    return RuleTask.from_rule(inputs(), rule, name=name, description=description)


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


def _words() -> list[str]:
    """Return all words of all categories in small letters, without countries."""
    return [w for name in category_names() if name != "country" for w in category(name)]


def _vowels(word: str) -> str | None:
    vowels = sum(letter in "aeiou" for letter in word)
    return None if vowels == 2 else "few" if vowels < 2 else "many"


def _numbers(start: int, stop: int, step: int) -> Callable[[], list[str]]:
    return lambda: [str(number) for number in range(start, stop, step)]


_OF_FORM: dict[str, tuple[Callable[[], list[str]], Callable[[str], str | None], str]] = {
    "number-parity": (
        _numbers(10, 510, 1),
        lambda number: "odd" if int(number) % 2 else "even",
        "Whether a number from 10 to 509 is even or odd.",
    ),
    "number-size": (
        _numbers(100, 1000, 2),
        lambda number: "low" if int(number) < 550 else "high",
        "Whether a number from 100 to 998 is below 550.",
    ),
    "first-letter": (
        _words,
        lambda word: "a-m" if word[0] < "n" else "n-z",
        "Whether a word begins with a letter of the alphabet's first half.",
    ),
    "vowel-count": (
        _words,
        _vowels,
        "Whether a word has at most one of the vowels aeiou or at least three.",
    ),
}
"""The inputs, the rule and the description of every rule of form but that of random strings."""
