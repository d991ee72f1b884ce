"""Which tokens SPADE keeps: the family of keep sets around the paper's pair.

A keep rule is any function of (prompt, answer position) that gives positions; the reading is
taken at the last of them. Tables call it by its ``name`` or, where it has none, by its
``__name__``. :class:`Keep` writes down the useful rules. The paper keeps the start token and the
answer token, ``Keep()``. Our versions of its ablations are ``Keep(start=False)`` and
``Keep(last=0, positions=(p,))``: start token and another token ``p``, read there. This module
knows prompts and nothing of models.
"""

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from numbers import Integral

import numpy as np

from spade_lens.checks import check_fields, check_number
from spade_lens.prompts.prompt import Prompt

KeepRule = Callable[[Prompt, int], Sequence[int]]
"""From a prompt and the answer position to the positions that are kept."""

Place = tuple[str, int | None]
"""A token by its place: a span's name and an index into it, or None for the whole span.

The span ``""`` is the prompt up to the answer token, so ``("", -2)`` is the token before that.
"""


def name_of(rule: KeepRule) -> str:
    """Return what tables call a keep rule."""
    return getattr(rule, "name", "") or getattr(rule, "__name__", "own rule")


_EXAMPLES = {
    "spans": 'spans=("labels",)',
    "positions": "positions=(3, -2)",
    "places": 'places=(("labels", -1),)',
}


@dataclass(frozen=True)
class Keep:
    """Start token, last tokens, named spans and single positions, whichever are asked for.

    Example:
        >>> prompt = Prompt(tokens=tuple(range(10)), spans={"labels": (3, 6)})
        >>> Keep()(prompt, 9)
        (0, 9)
        >>> Keep(last=3, spans=("labels",))(prompt, 9)
        (0, 3, 6, 7, 8, 9)
        >>> Keep(places=(("labels", -1), ("", -2), ("labels", -5)))
        Keep(places=(('labels', -1), ('', -2), ('labels', -5)))
        >>> Keep(places=(("labels", -1), ("", -2), ("labels", -5)))(prompt, 9)
        (0, 6, 8, 9)

    Args:
        start: Keep the start token, position 0.
        last: Keep this many tokens that end with the answer token; 1 is the answer token alone.
        spans: Name or names of the prompt's spans to keep as well.
        positions: Further position or positions; negative ones count back from the answer token,
            which is -1.
        places: Further tokens by their place in spans, which means the same in every prompt. An
            index that a prompt's span is too short for is skipped.
        name: What tables and figures call it; by default made of the other arguments.

    Raises:
        TypeError: If an argument is of a wrong type.
        ValueError: If ``last`` is negative, or nothing is kept.
    """

    start: bool = True
    last: int = 1
    spans: str | Sequence[str] = ()
    positions: Sequence[int] | int = ()
    places: tuple[Place, ...] = ()
    name: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        check_fields(self)
        check_number("last", self.last, least=0)
        for field_name, is_one in (
            ("spans", lambda given: isinstance(given, str)),
            ("positions", lambda given: isinstance(given, Integral)),
            ("places", _is_place),
        ):
            given = getattr(self, field_name)
            several = (given,) if is_one(given) and field_name != "places" else given
            if not isinstance(several, Sequence) or not all(is_one(x) for x in several):
                raise TypeError(
                    f"{field_name}={given!r} was given; expected a tuple, for example "
                    f"{_EXAMPLES[field_name]}."
                )
            object.__setattr__(self, field_name, tuple(several))
        if not (self.start or self.last or self.spans or self.positions or self.places):
            raise ValueError("This keep set is empty. Keep at least one token to read at.")
        if not self.name:
            object.__setattr__(self, "name", self._described())

    def __call__(self, prompt: Prompt, answer: int) -> tuple[int, ...]:
        """Return the positions kept, ascending, none beyond the answer token."""
        wanted = (*self.spans, *(span for span, _ in self.places if span))
        missing = [name for name in wanted if name not in prompt.spans]
        if missing:
            raise ValueError(
                f"The keep set names spans {missing}; this prompt has {sorted(prompt.spans)}. "
                "Prompts of a task have spans; Prompt(spans={...}) names your own."
            )
        kept = {0} if self.start else set()
        kept.update(range(max(0, answer + 1 - self.last), answer + 1))
        kept.update(p for name in self.spans for p in prompt.spans[name])
        for position in _several(self.positions):
            absolute = position if position >= 0 else answer + 1 + position
            if not 0 <= absolute <= answer:
                raise ValueError(
                    f"The keep set's position {position} does not lie between the prompt's start "
                    f"and its answer token at {answer}."
                )
            kept.add(absolute)
        for span, index in self.places:
            tokens = prompt.spans[span] if span else range(answer + 1)
            if index is None:
                kept.update(tokens)
            elif -len(tokens) <= index < len(tokens):
                kept.add(tokens[index])
        return tuple(sorted(p for p in kept if p <= answer))

    def __repr__(self) -> str:
        given = {f.name: getattr(self, f.name) for f in fields(self)}
        defaults = {f.name: f.default for f in fields(self)} | {"name": self._described()}
        arguments = [f"{key}={value!r}" for key, value in given.items() if value != defaults[key]]
        return f"Keep({', '.join(arguments)})"

    def _described(self) -> str:
        parts = ["start"] if self.start else []
        if self.last:
            parts.append("answer" if self.last == 1 else f"last {self.last}")
        parts += [*self.spans, *(str(p) for p in _several(self.positions))]
        parts += [
            (span or "prompt") + ("" if index is None else f"[{index}]")
            for span, index in self.places
        ]
        return "+".join(parts)


def _is_place(given: object) -> bool:
    match given:
        case (str(), int() | None):
            return True
    return False


def _several(positions: Sequence[int] | int) -> Sequence[int]:
    return (positions,) if isinstance(positions, int) else positions


def last_labels(n: int, *, query: bool = False) -> Keep:
    """Return the rule that keeps the start token, the answer token and the last ``n`` labels.

    Example:
        >>> from spade_lens.lenses.keep import last_labels
        >>> prompt = Prompt(tokens=tuple(range(9)), spans={"labels": (2, 4, 6), "query": (7,)})
        >>> last_labels(2)(prompt, 8), last_labels(2, query=True).name
        ((0, 4, 6, 8), 'query+last 2 labels')
    """
    if n < 1:
        raise ValueError(f"n={n} was given; expected at least one label.")
    labels = "last label" if n == 1 else f"last {n} labels"
    return Keep(
        spans=("query",) if query else (),
        places=tuple(("labels", -i) for i in range(1, n + 1)),
        name=f"query+{labels}" if query else labels,
    )


@dataclass(frozen=True)
class ClassLabels:
    """Keep the start token, the answer token, the query and the labels of some classes.

    If the labels of the right answer's class are kept alone, that answer may have been copied
    from them. If the labels of the other classes are, it cannot have been: then those carry the
    mapping, or rule out what they stand for. The right answer is meant, not the model's own. That
    matters where the model errs: ask for ``correct`` rather than for ``agrees``.

    Example:
        >>> from spade_lens.lenses.keep import ClassLabels
        >>> spans = {"labels": (2, 4, 6), "query": (7,)}
        >>> prompt = Prompt(tokens=(1, 5, 60, 5, 61, 5, 60, 5, 9), target=60, spans=spans)
        >>> ClassLabels(same=True)(prompt, 8), ClassLabels(same=False)(prompt, 8)
        ((0, 2, 6, 7, 8), (0, 4, 7, 8))

    Args:
        same: Keep the labels that are the right answer; otherwise all others.
        query: Keep the query as well.
    """

    same: bool
    query: bool = True

    def __call__(self, prompt: Prompt, answer: int) -> tuple[int, ...]:
        """Return the positions kept, ascending."""
        spans = ("query",) if self.query else ()
        Keep(spans=(*spans, "labels"))(prompt, answer)  # says what is missing
        if prompt.target is None:
            raise ValueError(
                "The labels of the answer's class were asked for, but this prompt has no target. "
                "Give the right answer: Prompt(target=...)."
            )
        labels = [
            p
            for p in prompt.spans["labels"]
            if p < answer and (prompt.tokens[p] == prompt.target) == self.same
        ]
        return tuple(sorted({*Keep(spans=spans)(prompt, answer), *labels}))

    @property
    def name(self) -> str:
        """What tables call it."""
        labels = "same labels" if self.same else "other labels"
        return f"query+{labels}" if self.query else labels


@dataclass(frozen=True)
class RandomSet:
    """Keep as many positions as another rule, drawn at random: its control.

    The start token and the answer token stay, and so does the span ``fixed`` as far as the other
    rule keeps it. The draw depends on the prompt's tokens, the rule's name, ``seed`` and ``draw``
    alone.

    Example:
        >>> prompt = Prompt(tokens=tuple(range(9)), spans={"labels": (2, 4), "query": (6, 7)})
        >>> kept = lenses.RandomSet(Keep(spans=("labels",)))(prompt, 8)
        >>> len(kept), kept[0], kept[-1]
        (4, 0, 8)

    Args:
        of: The rule.
        fixed: A span that is not drawn but kept, such as the query.
        draw: Which of several draws.
        seed: Seed of the drawing.
    """

    of: KeepRule
    fixed: str = ""
    draw: int = 0
    seed: int = 0

    def __call__(self, prompt: Prompt, answer: int) -> tuple[int, ...]:
        """Return the positions kept, ascending."""
        kept = set(self.of(prompt, answer))
        stay = {0, answer, *prompt.spans.get(self.fixed, ())} & kept
        free = sorted(set(range(1, answer)) - stay)
        # crc32 and not hash(): the same in every process.
        key = [self.seed, self.draw, zlib.crc32(name_of(self.of).encode())]
        rng = np.random.default_rng([*key, *prompt.tokens])
        order = rng.permutation(len(free))[: len(kept - stay)]
        return tuple(sorted({*stay, *(free[int(i)] for i in order)}))

    @property
    def name(self) -> str:
        """What tables call it."""
        kept = f"{self.fixed}+random" if self.fixed else "random"
        return f"{kept}, as many as {name_of(self.of)}"
