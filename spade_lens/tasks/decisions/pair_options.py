"""Options for word pairs, so that early exit can be measured on them: the right output and others.

This module knows pairs of words; it knows nothing of tasks that hold them, and no tokenizer.
"""

import zlib
from collections.abc import Sequence

import numpy as np

from spade_lens.prompts.few_shot import ARROW
from spade_lens.tasks.decisions.template import DecisionTemplate, Example

PAIR_LINES = DecisionTemplate(
    example=ARROW.query.format(input="{question}"), separator=ARROW.separator
)
"""The lines of every word-pair prompt."""

_LETTERS = 3
"""Words that differ in these seldom begin with the same token."""


def pair_examples(
    name: str,
    pairs: Sequence[tuple[str, str]],
    n_options: int,
    *,
    with_input: bool = True,
    seed: int = 0,
) -> list[Example]:
    """Return every pair as an example with options, of which its output is the right one.

    See :meth:`spade_lens.tasks.WordPairTask.decisions`; the name takes part in the seed.
    """
    if n_options < 2:
        raise ValueError(f"n_options={n_options}: a decision takes at least two.")
    # Each output once however it is written, and sorted, so that the order of pairs is no matter.
    outputs = {o.casefold(): o for o in sorted((o for _, o in pairs), reverse=True)}
    # Inputs that differ in case alone ask the same thing.
    answers: dict[str, set[str]] = {}
    spellings: dict[str, set[str]] = {}
    for given, right in pairs:
        answers.setdefault(given.casefold(), set()).add(right.casefold())
        spellings.setdefault(given.casefold(), set()).add(right)
    examples = []
    for given, right in pairs:
        wrong = sorted(outputs.keys() - answers[given.casefold()])
        # The input may differ from the right answer in case alone, where that is the rule.
        lure = [given] if with_input and given not in spellings[given.casefold()] else []
        wrong = [word for word in wrong if not lure or word != given.casefold()]
        if len(wrong) < n_options - 1 - len(lure):
            raise ValueError(
                f"n_options={n_options}: task {name!r} has {len(wrong)} other outputs for "
                f"{given!r}. Ask for at most {len(wrong) + 1 + len(lure)} options, or give more "
                "pairs."
            )
        # crc32 and not hash(): the same in every process.
        key = (seed, zlib.crc32(name.encode()), zlib.crc32(given.encode()))
        rng = np.random.default_rng(key)
        shuffled = [wrong[i] for i in rng.permutation(len(wrong)).tolist()]
        others = _dissimilar_first(right.casefold(), shuffled)[: n_options - 1 - len(lure)]
        options = [right, *lure, *(outputs[word] for word in others)]
        order = rng.permutation(n_options).tolist()
        examples.append(Example(given, order.index(0), options=tuple(options[i] for i in order)))
    return examples


def _dissimilar_first(right: str, words: Sequence[str]) -> list[str]:
    """Put words that begin unlike the right one and all words before them first."""
    seen = {right[:_LETTERS]}
    different: list[str] = []
    similar: list[str] = []
    for word in words:
        (similar if word[:_LETTERS] in seen else different).append(word)
        seen.add(word[:_LETTERS])
    return different + similar
