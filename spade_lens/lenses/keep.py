"""Which tokens SPADE keeps: the family of keep sets around the paper's pair.

A keep set is any function of (prompt, answer position) that gives positions; the reading is
taken at the last of them. :class:`Keep` writes down the useful ones. The paper keeps the start
token and the answer token, ``Keep()``. Our versions of its ablations are ``Keep(start=False)``
and ``Keep(last=0, positions=(p,))``: start token and another token ``p``, read there.
"""

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from spade_lens.prompts.prompt import Prompt

KeepRule = Callable[[Prompt, int], Sequence[int]]
"""From a prompt and the answer position to the positions that are kept."""


@dataclass(frozen=True)
class Keep:
    """Start token, last tokens, named spans and single positions, whichever are asked for.

    Example:
        >>> prompt = Prompt(tokens=tuple(range(10)), spans={"labels": (3, 6)})
        >>> Keep()(prompt, 9)
        (0, 9)
        >>> Keep(last=3, spans=("labels",))(prompt, 9)
        (0, 3, 6, 7, 8, 9)

    Args:
        start: Keep the start token, position 0.
        last: Keep this many tokens that end with the answer token; 1 is the answer token alone.
        spans: Names of the prompt's spans to keep as well.
        positions: Further positions; negative ones count back from the answer token, which
            is -1.
        name: What tables and figures call it; by default made of the other arguments.
    """

    start: bool = True
    last: int = 1
    spans: tuple[str, ...] = ()
    positions: tuple[int, ...] = ()
    name: str = ""

    def __post_init__(self) -> None:
        if self.last < 0:
            raise ValueError(f"last={self.last} was given; expected 0 or more tokens.")
        if not (self.start or self.last or self.spans or self.positions):
            raise ValueError("This keep set is empty. Keep at least one token to read at.")

    def __call__(self, prompt: Prompt, answer: int) -> tuple[int, ...]:
        """The positions kept, ascending, none beyond the answer token.

        Raises:
            ValueError: If a span is not the prompt's or a position lies beyond the answer.
        """
        missing = [name for name in self.spans if name not in prompt.spans]
        if missing:
            raise ValueError(
                f"The keep set names spans {missing}; this prompt has {sorted(prompt.spans)}."
            )
        kept = {0} if self.start else set()
        kept.update(range(max(0, answer + 1 - self.last), answer + 1))
        kept.update(p for name in self.spans for p in prompt.spans[name] if p <= answer)
        for position in self.positions:
            absolute = position if position >= 0 else answer + 1 + position
            if not 0 <= absolute <= answer:
                raise ValueError(
                    f"The keep set's position {position} does not lie between the prompt's start "
                    f"and its answer token at {answer}."
                )
            kept.add(absolute)
        return tuple(sorted(kept))

    def __str__(self) -> str:
        if self.name:
            return self.name
        parts = ["start"] if self.start else []
        if self.last:
            parts.append("answer" if self.last == 1 else f"last {self.last}")
        parts += [*self.spans, *(str(p) for p in self.positions)]
        return "+".join(parts)


Place = tuple[str, int | None]
"""A token by its place: a span's name and an index into it, or None for the whole span.

The span ``""`` is the prompt up to the answer token, so ``("", -2)`` is the token before that.
"""


@dataclass(frozen=True)
class Tokens:
    """Keep the start token, the answer token, and tokens named by their place in spans.

    Example:
        >>> from spade_lens.lenses import Tokens
        >>> prompt = Prompt(tokens=tuple(range(9)), spans={"labels": (2, 4), "query": (5, 6)})
        >>> Tokens((("query", None), ("labels", -1), ("labels", -5)))(prompt, 8)
        (0, 4, 5, 6, 8)

    Args:
        places: The further tokens. An index that a prompt's span is too short for is skipped.
        name: What tables call it; by default made of the places.
    """

    places: tuple[Place, ...] = ()
    name: str = ""

    def __call__(self, prompt: Prompt, answer: int) -> tuple[int, ...]:
        """The positions kept, ascending, none beyond the answer token.

        Raises:
            ValueError: If a span is not the prompt's.
        """
        kept = {0, answer}
        for span, index in self.places:
            if span and span not in prompt.spans:
                raise ValueError(
                    f"The keep set names the span {span!r}; this prompt has {sorted(prompt.spans)}."
                )
            held = prompt.spans[span] if span else range(answer + 1)
            if index is None:
                kept.update(held)
            elif -len(held) <= index < len(held):
                kept.add(held[index])
        return tuple(sorted(p for p in kept if p <= answer))

    @property
    def __name__(self) -> str:
        """What :class:`Spade` calls a lens with this rule."""
        if self.name:
            return self.name
        names = [
            (span or "prompt") + ("" if index is None else f"[{index}]")
            for span, index in self.places
        ]
        return "+".join(["start+answer", *names])


@dataclass(frozen=True)
class LastLabels:
    """Keep the start token, the answer token and the last labels.

    Example:
        >>> prompt = Prompt(tokens=tuple(range(9)), spans={"labels": (2, 4, 6), "query": (7,)})
        >>> lenses.LastLabels(2)(prompt, 8)
        (0, 4, 6, 8)

    Args:
        n: How many of the prompt's labels.
        query: Keep the query as well.
    """

    n: int
    query: bool = False

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ValueError(f"n={self.n} was given; expected at least one label.")

    def __call__(self, prompt: Prompt, answer: int) -> tuple[int, ...]:
        """The positions kept, ascending.

        Raises:
            ValueError: If the prompt lacks the spans.
        """
        needed = ("labels", "query") if self.query else ("labels",)
        Keep(spans=needed)(prompt, answer)  # says what is missing
        kept = {0, answer, *sorted(prompt.spans["labels"])[-self.n :]}
        kept.update(prompt.spans["query"] if self.query else ())
        return tuple(sorted(p for p in kept if p <= answer))

    @property
    def __name__(self) -> str:
        """What tables call it."""
        labels = "last label" if self.n == 1 else f"last {self.n} labels"
        return f"query+{labels}" if self.query else labels


@dataclass(frozen=True)
class ClassLabels:
    """Keep the start token, the answer token, the query and the labels of some classes.

    Where the labels of the right answer's class are kept alone, that answer may have been copied
    from them. Where the labels of the other classes are, it cannot have been: then those carry
    the mapping, or rule out what they stand for. That the right answer is meant, not the model's
    own, matters where the model errs: ask for ``correct`` rather than for ``agrees``.

    Example:
        >>> spans = {"labels": (2, 4, 6), "query": (7,)}
        >>> prompt = Prompt(tokens=(1, 5, 60, 5, 61, 5, 60, 5, 9), target=60, spans=spans)
        >>> lenses.ClassLabels(same=True)(prompt, 8), lenses.ClassLabels(same=False)(prompt, 8)
        ((0, 2, 6, 7, 8), (0, 4, 7, 8))

    Args:
        same: Keep the labels that are the right answer; otherwise all others.
        query: Keep the query as well.
    """

    same: bool
    query: bool = True

    def __call__(self, prompt: Prompt, answer: int) -> tuple[int, ...]:
        """The positions kept, ascending.

        Raises:
            ValueError: If the prompt lacks the spans or a target.
        """
        spans = ("query",) if self.query else ()
        Keep(spans=(*spans, "labels"))(prompt, answer)  # says what is missing
        if prompt.target is None:
            raise ValueError(
                "The labels of the answer's class were asked for, but this prompt has no target. "
                "Give the right answer: Prompt(target=...)."
            )
        some = [
            p for p in prompt.spans["labels"] if (prompt.tokens[p] == prompt.target) == self.same
        ]
        return tuple(sorted({*Keep(spans=spans)(prompt, answer), *(p for p in some if p < answer)}))

    @property
    def __name__(self) -> str:
        """What tables call it."""
        labels = "same labels" if self.same else "other labels"
        return f"query+{labels}" if self.query else labels


@dataclass(frozen=True)
class RandomSet:
    """Keep as many positions as another rule, drawn at random: its control.

    The start token and the answer token stay, and so does the span ``fixed`` as far as the other
    rule keeps it. What is drawn depends on the prompt's tokens, the rule, ``seed`` and ``draw``
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
        """The positions kept, ascending."""
        kept = set(self.of(prompt, answer))
        stay = {0, answer, *prompt.spans.get(self.fixed, ())} & kept
        free = sorted(set(range(1, answer)) - stay)
        # crc32 and not hash(): the same in every process.
        key = [self.seed, self.draw, zlib.crc32(name_of(self.of).encode())]
        rng = np.random.default_rng([*key, *prompt.tokens])
        order = rng.permutation(len(free))[: len(kept - stay)]
        return tuple(sorted({*stay, *(free[int(i)] for i in order)}))

    @property
    def __name__(self) -> str:
        """What tables call it."""
        kept = f"{self.fixed}+random" if self.fixed else "random"
        return f"{kept}, as many as {name_of(self.of)}"


def name_of(rule: KeepRule) -> str:
    """What tables call a rule."""
    return str(rule) if isinstance(rule, Keep) else getattr(rule, "__name__", "own rule")
