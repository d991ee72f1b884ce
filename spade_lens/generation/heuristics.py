"""What a search wants of a text: numbers for (prompt, continuation), larger is better.

A heuristic is any function of two texts: the prompt, and the continuation so far with what a
search looks ahead. Those here also say ``maximum``, the largest number that they can give. A search
that reaches it need not look at other candidates. That is exact, and saves most of the cost.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, Literal, TypeAlias

from spade_lens.checks import as_plain, as_several, check_fields, check_number, is_word, visible

Heuristic: TypeAlias = Callable[[str, str], float]
"""A function of (prompt, continuation). It may have ``maximum`` and ``name``."""

_ENDINGS = "(ed|er|ers|ing|ings)"
_WORD = r"[^\W_]+(?:'[^\W_]+)?"


class HeuristicError(ValueError):
    """A heuristic raised an error, or gave something else than a finite number.

    Attributes:
        step: The step of the text that it judged, from 0.
        prompt: The number of the prompt.
        text: The continuation that it judged.
        texts: What was written after every prompt so far.
    """

    def __init__(self, problem: str, step: int, prompt: int, text: str) -> None:
        super().__init__(
            f"{problem}, at step {step} of prompt {prompt}, for the continuation "
            f"{visible(text)!r:.200}; expected a finite number. The attribute texts holds what was "
            "written so far."
        )
        self.step, self.prompt, self.text = step, prompt, text
        self.texts: tuple[str, ...] = ()


def judge(heuristic: Heuristic, prompt: str, text: str, *, step: int, number: int) -> float:
    """Return what a heuristic gives, checked, since any may be a user's own.

    Raises:
        HeuristicError: If it raises an error, or gives no finite number or one above its maximum.
    """
    name = name_of(heuristic)
    try:
        value: Any = as_plain(heuristic(prompt, text))
    except Exception as error:
        problem = f"The heuristic {name!r} raised {type(error).__name__}: {error}"
        raise HeuristicError(problem, step, number, text) from error
    try:
        found = float(value) if isinstance(value, Real) else math.nan
    except OverflowError:  # a whole number beyond all floats
        found = math.inf
    if not math.isfinite(found):
        problem = f"The heuristic {name!r} gave {value!r:.80}"
        raise HeuristicError(problem, step, number, text)
    most = maximum_of(heuristic)
    if found > most:
        problem = f"The heuristic {name!r} gave {value}, more than its maximum {most}"
        raise HeuristicError(problem, step, number, text)
    return found


def name_of(heuristic: Heuristic) -> str:
    """Return a heuristic's name."""
    given = getattr(heuristic, "name", None) or getattr(heuristic, "__name__", None)
    return str(given or type(heuristic).__name__)


def maximum_of(heuristic: Heuristic) -> float:
    """Return the largest number that a heuristic can give; infinity where it does not say."""
    most = getattr(heuristic, "maximum", None)
    if most is None:
        return math.inf
    check_number(f"maximum of the heuristic {name_of(heuristic)!r}: ", most, whole=False)
    return float(most)


@dataclass(frozen=True)
class _OfWords:
    """What looks for some words in their forms."""

    words: Sequence[str]
    _patterns: tuple[re.Pattern[str], ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        words = _words(self.words)
        object.__setattr__(self, "words", words)
        object.__setattr__(self, "_patterns", tuple(map(_forms, words)))


@dataclass(frozen=True)
class KeywordCoverage(_OfWords):
    """The fraction of some words that a continuation holds.

    A word is found in its forms with the endings -s, -es, -ed, -er, -ers, -ing and -'s: after the
    word, after a doubled last letter, and in place of a final ``e`` or after ``i`` for ``y``.
    Irregular forms are not found. Source: the hard coverage of DeAL; the endings are ours.

    Example:
        >>> from spade_lens.generation.heuristics import KeywordCoverage
        >>> coverage = KeywordCoverage(["carry", "bake", "car"])
        >>> round(coverage("", "He carries cakes, carpets and a baker."), 3)
        0.667

    Args:
        words: The words, each of letters and digits.

    Raises:
        TypeError: If words are no texts.
        ValueError: If there are none, or one is not a single word.
    """

    name = "keyword coverage"
    maximum = 1.0

    def found(self, continuation: str) -> list[bool]:
        """Return which of the words a text holds."""
        text = _split(continuation)
        return [any(map(pattern.fullmatch, text)) for pattern in self._patterns]

    def __call__(self, prompt: str, continuation: str) -> float:
        """Return the fraction."""
        return sum(self.found(continuation)) / len(self.words)


@dataclass(frozen=True)
class BannedWords(_OfWords):
    """Minus the number of times that a continuation uses any of some words, in the same forms.

    Example:
        >>> from spade_lens.generation.heuristics import BannedWords
        >>> BannedWords(["good"])("", "Good goods are better than good.")
        -3.0

    Args:
        words: The words.

    Raises:
        TypeError: If words are no texts.
        ValueError: If there are none, or one is not a single word.
    """

    name = "banned words"
    maximum = 0.0

    def __call__(self, prompt: str, continuation: str) -> float:
        """Return minus the number."""
        text = _split(continuation)
        return -float(sum(any(p.fullmatch(word) for p in self._patterns) for word in text))


@dataclass(frozen=True)
class TextLength:
    """Minus the relative distance of a length from a range; 0 inside it.

    A text that goes on is too short at first. All candidates are so alike, but for those that end.

    Example:
        >>> from spade_lens.generation.heuristics import TextLength
        >>> length = TextLength(2, 4)
        >>> [length("", text) for text in ("one", "one two", "1 2 3 4 5 6")]
        [-0.5, 0.0, -0.5]

    Args:
        least: The fewest that are right.
        most: The most that are right; None for any number.
        unit: What is counted.

    Raises:
        TypeError: If a number is no whole number, or the unit no text.
        ValueError: If the range is empty, or the unit is another one.
    """

    least: int = 0
    most: int | None = None
    unit: Literal["words", "characters"] = "words"
    name = "length"
    maximum = 0.0

    def __post_init__(self) -> None:
        check_fields(self)
        check_number("least", self.least, least=0)
        if self.most is not None:
            check_number("most", self.most, least=max(1, self.least))

    def __call__(self, prompt: str, continuation: str) -> float:
        """Return minus the distance, in units of the nearer end of the range."""
        n = len(continuation) if self.unit == "characters" else len(_split(continuation))
        if n < self.least:
            return n / self.least - 1
        return 0.0 if self.most is None else -max(0, n - self.most) / self.most


@dataclass(frozen=True)
class Repetition:
    """Minus the fraction of a continuation's word n-grams that occurred in it before.

    Example:
        >>> from spade_lens.generation.heuristics import Repetition
        >>> Repetition(2)("", "a b a b c"), Repetition(2)("", "a b c")
        (-0.25, 0.0)

    Args:
        n: How many words are compared at once.

    Raises:
        TypeError: If it is no whole number.
        ValueError: If it is below 1.
    """

    n: int = 3
    name = "repetition"
    maximum = 0.0

    def __post_init__(self) -> None:
        check_number("n", self.n, least=1)

    def __call__(self, prompt: str, continuation: str) -> float:
        """Return minus the fraction."""
        text = _split(continuation)
        grams = Counter(zip(*(text[at:] for at in range(self.n)), strict=False))
        total = grams.total()
        return (len(grams) - total) / total if total else 0.0


@dataclass
class WeightedSum:
    """Several heuristics, each times its weight. Weights may be changed while text is written.

    Example:
        >>> from spade_lens.generation.heuristics import BannedWords, KeywordCoverage, WeightedSum
        >>> both = WeightedSum([KeywordCoverage(["sun"]), BannedWords(["rain"])], [1.0, 0.5])
        >>> both("", "Sun after rain."), both.maximum
        (0.5, 1.0)
        >>> both.weights[1] = 2.0
        >>> both("", "Sun after rain.")
        -1.0

    Args:
        parts: The heuristics.
        weights: Their weights, 0 or more; all 1 by default.

    Raises:
        TypeError: If a part is no function or a weight no number.
        ValueError: If there is not one weight for every part, or one is negative.
    """

    parts: Sequence[Heuristic]
    weights: list[float] = field(default_factory=list)
    name = "weighted sum"

    def __post_init__(self) -> None:
        parts = as_several(self.parts)
        if not parts or not all(map(callable, parts)):
            raise TypeError(f"parts={self.parts!r:.80} was given; expected several functions.")
        weights = as_several(self.weights)
        self.parts = parts
        self.weights = [1.0] * len(parts) if weights == [] else weights  # type: ignore[assignment]
        self._check()

    @property
    def maximum(self) -> float | None:
        """The largest sum with the present weights; None where a part does not say."""
        most = [w * maximum_of(p) if w else 0.0 for p, w in self._pairs()]
        return sum(most) if math.isfinite(sum(most)) else None

    def __call__(self, prompt: str, continuation: str) -> float:
        """Return the sum with the present weights."""
        return sum(w * part(prompt, continuation) for part, w in self._pairs() if w)

    def _pairs(self) -> list[tuple[Heuristic, float]]:
        self._check()
        return list(zip(self.parts, self.weights, strict=True))

    def _check(self) -> None:
        if not isinstance(self.weights, list) or len(self.weights) != len(self.parts):
            raise ValueError(
                f"weights={self.weights!r:.80} was given for {len(self.parts)} parts; expected a "
                "list of one number for each."
            )
        for n, weight in enumerate(self.weights):
            check_number(f"weights[{n}]", weight, least=0, whole=False)


def _words(given: Any) -> tuple[str, ...]:
    """Return single words in lower case."""
    several = [given] if isinstance(given, str) else as_several(given)
    if several is None or not all(isinstance(word, str) for word in several):
        raise TypeError(f"words={given!r:.80} was given; expected words in a list.")
    wrong = [word for word in several if not is_word(word) or _split(word) != [word.lower()]]
    if wrong or not several:
        raise ValueError(
            f"words={several!r:.80} was given{f', and {wrong} are none' if wrong else ''}; "
            "expected at least one, each a single word of letters and digits."
        )
    return tuple(word.lower() for word in several)


def _split(text: str) -> list[str]:
    return re.findall(_WORD, text.lower().replace("\u2019", "'"))


def _forms(word: str) -> re.Pattern[str]:
    """Return what matches a word's forms."""
    stem, last = re.escape(word[:-1]), re.escape(word[-1])
    forms = f"{stem}{last}(s|es|{_ENDINGS})?|{stem}{last}{last}{_ENDINGS}"
    if word[-1] == "e":
        forms = f"{stem}es?|{stem}{_ENDINGS}"
    elif word[-1] == "y":
        forms += f"|{stem}i(es|{_ENDINGS})"
    return re.compile(f"({forms})('s)?")
