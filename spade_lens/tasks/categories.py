"""The rule tasks that come with the library: categories of words, and rules of form.

The words are facts we wrote down ourselves, no word in two categories. Strings and numbers are
made here, with a fixed seed.
"""

import difflib
import json
import string
from collections.abc import Callable
from functools import cache
from importlib.resources import files

import numpy as np

from spade_lens.tasks.rules import RuleTask

_STRINGS = 240
"""Random strings of every class; more than any prompt shows."""


def category_names() -> list[str]:
    """The names of the categories of words, in alphabetical order.

    Example:
        >>> "animal" in category_names()
        True
    """
    found = [file.name for file in (files("spade_lens.tasks") / "words").iterdir()]
    return sorted(name.removesuffix(".json") for name in found if name.endswith(".json"))


@cache
def category(name: str) -> tuple[str, ...]:
    """The words of a category.

    Example:
        >>> "horse" in category("animal")
        True

    Args:
        name: One of :func:`category_names`.

    Raises:
        ValueError: If there is no such category; the message offers the nearest names.
    """
    if name not in category_names():
        raise ValueError(
            f"There is no category {name!r}. {_hint(name, category_names())}The categories are "
            f"{', '.join(category_names())}."
        )
    text = (files("spade_lens.tasks") / "words" / f"{name}.json").read_text(encoding="utf-8")
    return tuple(json.loads(text)["words"])


def rule_task_names() -> list[str]:
    """The rules of form that :func:`rule_task` knows beside pairs of categories.

    Example:
        >>> rule_task_names()
        ['first-letter', 'number-parity', 'number-size', 'string-length', 'vowel-count']
    """
    return sorted(_RULES)


@cache
def rule_task(name: str) -> RuleTask:
    """A rule task that comes with the library.

    Example:
        >>> list(rule_task("animal/country").classes)
        ['animal', 'country']
        >>> max(len(word) for word in rule_task("string-length").classes["short"])
        5

    Args:
        name: Two or more categories with slashes between them, such as ``"animal/country"``
            (:func:`category_names`), or one of :func:`rule_task_names`.

    Raises:
        ValueError: If there is no such task; the message offers the nearest names.
    """
    if "/" in name:
        parts = name.split("/")
        words = {part: category(part) for part in parts}
        return RuleTask(name, words, f"Which of {' and '.join(parts)} a word is.")
    if name not in _RULES:
        raise ValueError(
            f"There is no rule task {name!r}. {_hint(name, rule_task_names())}The rule tasks are "
            f"{', '.join(rule_task_names())}, and two categories with a slash between them, such "
            "as 'animal/country'; your own come from RuleTask, RuleTask.from_rule or from_file."
        )
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
    """All words of all categories in small letters, countries left out."""
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


def _hint(name: str, names: list[str]) -> str:
    near = difflib.get_close_matches(name.lower().replace("_", "-"), names, n=3, cutoff=0.6)
    return f"Did you mean {' or '.join(map(repr, near))}? " if near else ""
