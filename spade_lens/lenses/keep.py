"""Which tokens SPADE keeps: the family of keep sets around the paper's pair.

A keep set is any function of (prompt, answer position) that gives positions; the reading is
taken at the last of them. :class:`Keep` writes down the useful ones. The paper keeps the start
token and the answer token, ``Keep()``. Our versions of its ablations are ``Keep(start=False)``
and ``Keep(last=0, positions=(p,))``: start token and another token ``p``, read there.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from spade_lens.prompts import Prompt

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
