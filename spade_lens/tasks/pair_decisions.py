"""Word-pair tasks as decision tasks: the right output among those of other pairs.

Early exit is measured on decisions, with demonstrations, calibration and test kept apart; what it
takes is ``pair_decisions("antonym").prompts(...)``. The lines are those of every word-pair prompt.
"""

import zlib
from collections.abc import Sequence

import numpy as np

from spade_lens.prompts.few_shot import ARROW
from spade_lens.tasks.decision_template import DecisionTemplate, Example
from spade_lens.tasks.decisions import DecisionTask
from spade_lens.tasks.word_pairs import WordPairTask
from spade_lens.tasks.word_pairs import task as task_named

_LINES = DecisionTemplate(example=ARROW.query.format(input="{question}"), separator=ARROW.separator)

_LETTERS = 3
"""Words that differ in these seldom begin with the same token."""


def pair_decisions(
    task: WordPairTask | str,
    *,
    n_options: int = 8,
    with_input: bool = True,
    shots: int = 8,
    fractions: tuple[float, float, float] = (0.2, 0.3, 0.5),
    seed: int = 0,
    split_seed: int = 0,
) -> DecisionTask:
    """A word-pair task as a decision task: which of a few outputs belongs to the input.

    This is a decision among ``n_options`` words, not over the vocabulary, and so easier than the
    same prompt read freely: chance is 1 / ``n_options``. That there are options, and which, is
    ours. They are the input itself and outputs of other pairs, all different, those in upper and
    lower case too. They are not shown; the prompt is that of the word-pair task to the token.

    Two options that begin with the same token cannot be told apart, and
    :meth:`DecisionTask.prompts` passes over such questions. To make them few, options whose first
    three letters are no other option's are taken first, and others only where there are not
    enough of these. With SmolLM2's tokenizer none is passed over in five of the six tasks that
    come with the library, and 7 of 100 in english-french.

    Example:
        >>> task = tasks.pair_decisions("antonym")
        >>> task
        DecisionTask('antonym', train 17, calibration 25, test 41)
        >>> task.rates("test").chance
        0.125

    Args:
        task: The task, or the name of one that comes with the library.
        n_options: How many words are decided among, the right one included.
        with_input: One of the wrong options is the input itself, where it is not right. Without
            it likeness decides in many tasks (``cats`` is what looks like ``cat``), and no rule
            is needed.
        shots: How many demonstrations a prompt has by default.
        fractions: The shares of train (demonstrations), calibration and test.
        seed: Seed of the options and their order. With the task's name and pairs, it and the
            input alone decide on them.
        split_seed: Seed of the splitting.

    Raises:
        ValueError: If there is no such task, a number is out of range, the task has too few
            different outputs for the options, or a split would be empty or train smaller than
            ``shots``.
    """
    pairs = task_named(task) if isinstance(task, str) else task
    if n_options < 2:
        raise ValueError(f"n_options={n_options}: a decision takes at least two.")
    if min(shots, seed, split_seed) < 0:
        raise ValueError(
            f"shots={shots}, seed={seed}, split_seed={split_seed}: all three are 0 or more."
        )
    found = DecisionTask.from_examples(
        pairs.name,
        _examples(pairs, n_options, with_input, seed),
        template=_LINES,
        shots=shots,
        fractions=fractions,
        split_seed=split_seed,
        source=f"{len(pairs.pairs)} word pairs",
    )
    sizes = found.split_sizes()
    if sizes["train"] < shots:
        raise ValueError(
            f"shots={shots}: of the {len(pairs.pairs)} pairs of task {pairs.name!r} only "
            f"{sizes['train']} are for demonstrations; the splits hold {sizes}. Give more pairs, "
            "fewer shots or a larger share for train (fractions)."
        )
    return found


def _examples(task: WordPairTask, n_options: int, with_input: bool, seed: int) -> list[Example]:
    """Every pair with its options."""
    # Each output once however it is written, and sorted, so that the order of pairs is no matter.
    outputs = {o.casefold(): o for o in sorted((o for _, o in task.pairs), reverse=True)}
    # Inputs that differ in case alone ask the same thing.
    answers: dict[str, set[str]] = {}
    right_for: dict[str, set[str]] = {}
    for given, right in task.pairs:
        answers.setdefault(given.casefold(), set()).add(right.casefold())
        right_for.setdefault(given.casefold(), set()).add(right)
    found = []
    for given, right in task.pairs:
        wrong = sorted(outputs.keys() - answers[given.casefold()])
        # The input may differ from the right answer in case alone, where that is the rule.
        own = [given] if with_input and given not in right_for[given.casefold()] else []
        wrong = [word for word in wrong if not own or word != given.casefold()]
        if len(wrong) < n_options - 1 - len(own):
            raise ValueError(
                f"n_options={n_options}: task {task.name!r} has {len(wrong)} other outputs for "
                f"{given!r}. Ask for at most {len(wrong) + 1 + len(own)} options, or give more "
                "pairs."
            )
        # crc32 and not hash(): the same in every process.
        key = (seed, zlib.crc32(task.name.encode()), zlib.crc32(given.encode()))
        rng = np.random.default_rng(key)
        drawn = _unlike(right.casefold(), [wrong[i] for i in rng.permutation(len(wrong)).tolist()])
        others = [outputs[word] for word in drawn[: n_options - 1 - len(own)]]
        options = [right, *own, *others]
        order = rng.permutation(n_options).tolist()
        found.append(Example(given, order.index(0), options=tuple(options[i] for i in order)))
    return found


def _unlike(right: str, words: Sequence[str]) -> list[str]:
    """First the words that begin unlike the right one and all before them, then the others."""
    seen = {right[:_LETTERS]}
    unlike: list[str] = []
    alike: list[str] = []
    for word in words:
        (alike if word[:_LETTERS] in seen else unlike).append(word)
        seen.add(word[:_LETTERS])
    return unlike + alike
