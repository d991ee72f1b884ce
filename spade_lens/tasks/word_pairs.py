"""Word-pair tasks: a rule shown by examples, such as countries and their capitals.

Six tasks come with the library, facts we wrote down ourselves; users bring their own as a list,
JSON or CSV. Sampling is seeded per prompt, so that a longer run begins with the shorter one's
prompts and more shots extend the demonstrations of fewer. This module knows tokenizers and nothing
of models.
"""

import json
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from spade_lens.checks import check_fields, checked, is_word, visible
from spade_lens.prompts.few_shot import ARROW, Template, first_tokens, write_prompt
from spade_lens.prompts.prompt import Prompt
from spade_lens.tasks.decisions.decision_task import DecisionTask
from spade_lens.tasks.decisions.pair_options import PAIR_LINES, pair_examples
from spade_lens.tasks.decisions.splitting import FRACTIONS
from spade_lens.tasks.episodes import Episode, check_drawing, check_name

Pair = tuple[str, str]

_FOLDER = Path(__file__).parent / "pairs"


@dataclass(frozen=True)
class WordPairTask:
    """A named list of pairs that follow one rule.

    Example:
        >>> shouting = WordPairTask("shout", (("yes", "YES"), ("no", "NO")))
        >>> len(shouting.pairs)
        2

    Args:
        name: The task's name; it takes part in the seed of its prompts.
        pairs: Pairs of input and output, the inputs all different.
        description: A sentence for people.

    Raises:
        TypeError: If the pairs are not several.
        ValueError: If there are no pairs, a word is empty, not text or has white space around
            it, or an input occurs twice; the message names them.
    """

    name: str
    pairs: tuple[Pair, ...]
    description: str = ""

    def __post_init__(self) -> None:
        check_fields(self)
        check_name(self.name)
        if isinstance(self.pairs, str | bytes) or not isinstance(self.pairs, Iterable):
            raise TypeError(
                f"Task {self.name!r}: pairs of type {type(self.pairs).__name__} were given; "
                "expected several pairs (input, output)."
            )
        # Tuples all through keep the frozen task hashable, even where lists were given.
        pairs = checked_pairs(self.pairs, self.name)
        object.__setattr__(self, "pairs", pairs)
        if not pairs:
            raise ValueError(f"Task {self.name!r} has no pairs. Give at least one.")
        counts = Counter(given for given, _ in pairs)
        repeated = [given for given, count in counts.items() if count > 1]
        if repeated:
            raise ValueError(
                f"Task {self.name!r} has inputs that occur twice: "
                f"{', '.join(map(repr, repeated))}. A query could then stand among its own "
                "demonstrations; keep one pair of each."
            )

    def __repr__(self) -> str:
        first = visible(" -> ".join(self.pairs[0]))
        return f"WordPairTask({self.name!r}, {len(self.pairs)} pairs: {first}, ...)"

    @checked
    def prompts(
        self, tokenizer: Any, n: int, *, shots: int = 8, seed: int = 0, template: Template = ARROW
    ) -> list[Prompt]:
        """Sample few-shot prompts to be read freely, each with its spans and its target.

        Prompt ``i`` depends on the task's name and pairs, ``seed`` and ``i`` alone, not on
        ``n``; and with more ``shots`` it keeps its query and first demonstrations. Every pair is
        the query once before one comes again. Demonstrations are distinct, and never the query.

        Args:
            tokenizer: A fast Hugging Face tokenizer.
            n: How many prompts.
            shots: How many demonstrations in each; 0 gives the query alone.
            seed: Seed of the sampling, 0 or more.
            template: How a line is written, and the start token.

        Returns:
            ``n`` prompts. The spans are those of :func:`spade_lens.prompts.few_shot_prompt`;
            ``target_tokens`` is the answer as it follows the prompt, ``target`` its first token.

        Raises:
            ValueError: If ``n`` is not positive, ``shots`` or ``seed`` is negative, or there are
                fewer than ``shots`` pairs beside the query.

        Warns:
            TokenWarning: As :func:`spade_lens.prompts.few_shot_prompt` does.
        """
        samples = self.sample(n, shots=shots, seed=seed)  # checks before anything is tokenised
        prompts = [
            write_prompt(tokenizer, shown, query, answer=output, template=template)
            for shown, (query, output) in samples
        ]
        first, outputs = first_tokens(tokenizer, template), [output for _, output in self.pairs]
        flagged = [
            first.flag(prompt, *pair, outputs)
            for prompt, (_, pair) in zip(prompts, samples, strict=True)
        ]
        first.warn()
        return flagged

    @checked
    def sample(
        self, n: int, *, shots: int = 8, seed: int = 0
    ) -> list[tuple[tuple[Pair, ...], Pair]]:
        """Return the words behind :meth:`prompts`: the demonstrations and the query of each.

        Example:
            >>> shown, query = task("capitalize").sample(1, shots=2)[0]
            >>> len(shown), query in shown
            (2, False)

        Args:
            n: How many prompts.
            shots: How many demonstrations in each.
            seed: Seed of the sampling, 0 or more.

        Raises:
            ValueError: As :meth:`prompts` does.
        """
        check_drawing(n, shots, seed)
        size = len(self.pairs)
        if shots > size - 1:
            raise ValueError(
                f"shots={shots} needs {shots + 1} pairs with the query, but task {self.name!r} "
                f"has {size}. Ask for at most shots={size - 1}, or give more pairs."
            )
        # crc32 and not hash(): the same in every process.
        key = (seed, zlib.crc32(self.name.encode()))
        samples = []
        for i in range(n):
            cycle, place = divmod(i, size)
            if place == 0:
                order = np.random.default_rng((*key, 0, cycle)).permutation(size)
            query = int(order[place])
            # The whole permutation, cut at shots: more shots extend fewer.
            others = np.random.default_rng((*key, 1, i)).permutation(size - 1)[:shots]
            shown = tuple(self.pairs[int(j) + (int(j) >= query)] for j in others)
            samples.append((shown, self.pairs[query]))
        return samples

    def episodes(self, n: int, *, shots: int = 16, seed: int = 0) -> list[Episode]:
        """Sample the words of prompts, with a wrong answer beside every right one.

        Ours: the wrong answer is another pair's output, not among those shown. It begins with
        another letter, so that its first token differs.

        Example:
            >>> episode = task("country-capital").episodes(1, shots=4)[0]
            >>> episode.foil != episode.answer
            True

        Args:
            n: How many.
            shots: How many demonstrations in each.
            seed: Seed of the sampling, 0 or more.

        Raises:
            ValueError: As :meth:`prompts` does, and if no output is left for a wrong answer.
        """
        samples = self.sample(n, shots=shots, seed=seed)
        # More shots extend fewer, so what comes last is shown last, and stays the foil longest.
        everything = self.sample(n, shots=len(self.pairs) - 1, seed=seed)
        episodes = []
        for (shown, (query, answer)), (others, _) in zip(samples, everything, strict=True):
            taken = {output for _, output in shown}
            foils = [
                output
                for _, output in reversed(others[shots:])
                if output not in taken and _first_byte(output) != _first_byte(answer)
            ]
            if not foils:
                raise ValueError(
                    f"Task {self.name!r} has no output left to set beside {answer!r}. Use fewer "
                    "shots or give more pairs."
                )
            episodes.append(Episode(self.name, shown, query, answer, foil=foils[0], rule=self.name))
        return episodes

    @checked
    def decisions(
        self,
        *,
        n_options: int = 8,
        with_input: bool = True,
        shots: int = 8,
        fractions: tuple[float, float, float] = FRACTIONS,
        seed: int = 0,
        split_seed: int = 0,
    ) -> DecisionTask:
        """Make decisions of the pairs: which of a few outputs belongs to the input.

        This is a decision among ``n_options`` words, not over the vocabulary, and so easier than
        the same prompt read freely: chance is 1 / ``n_options``. That there are options, and
        which, is ours. They are the input itself and outputs of other pairs. All are different,
        also when case is ignored. They are not shown: the prompt has the same tokens as that of
        :meth:`prompts`.

        Two options that begin with the same token cannot be told apart, and
        :meth:`DecisionTask.prompts` skips such questions. To make them few, options whose first
        three letters are no other option's are taken first, and others only where there are not
        enough of these. With SmolLM2's tokenizer none is skipped in five of the six tasks that
        come with the library, and 7 of 100 in english-french.

        Example:
            >>> decisions = task("antonym").decisions()
            >>> decisions
            DecisionTask('antonym', train 17, calibration 25, test 41)
            >>> decisions.rates("test").chance
            0.125

        Args:
            n_options: How many words are decided among, the right one included.
            with_input: One of the wrong options is the input itself, unless it is right. Without
                it likeness decides in many tasks (``cats`` is what looks like ``cat``), and no
                rule is needed.
            shots: How many demonstrations a prompt has by default.
            fractions: The fractions of train (demonstrations), calibration and test.
            seed: Seed of the options and their order, which also depend on the task's name and
                pairs and on the input, and on nothing else.
            split_seed: Seed of the splitting.

        Raises:
            ValueError: If a number is out of range, the task has too few different outputs for
                the options, a split would be empty, or train would be smaller than ``shots``.
        """
        check_drawing(1, shots, seed)
        task = DecisionTask.from_examples(
            self.name,
            pair_examples(self.name, self.pairs, n_options, with_input=with_input, seed=seed),
            template=PAIR_LINES,
            shots=shots,
            fractions=fractions,
            split_seed=split_seed,
            source=f"{len(self.pairs)} word pairs",
        )
        sizes = task.split_sizes()
        if sizes["train"] < shots:
            raise ValueError(
                f"shots={shots}: of the {len(self.pairs)} pairs of task {self.name!r} only "
                f"{sizes['train']} are for demonstrations; the splits hold {sizes}. Give more "
                "pairs, fewer shots or a larger fraction for train (fractions)."
            )
        return task


def pair_names() -> list[str]:
    """Return the names of the word-pair tasks that come with the library, in order."""
    return sorted(path.stem for path in _FOLDER.glob("*.json"))


@cache
def pairs_named(name: str) -> WordPairTask:
    """Return the word-pair task of this name, one of :func:`pair_names`."""
    content = json.loads((_FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    return WordPairTask(name, checked_pairs(content["pairs"], name), content["description"])


def checked_pairs(pairs: Any, name: str) -> tuple[Pair, ...]:
    """Return pairs of words, checked: a list of pairs or rows, or a mapping from inputs."""
    items = pairs.items() if isinstance(pairs, Mapping) else pairs
    return tuple(_pair(pair, f"Task {name!r}, pair {i}") for i, pair in enumerate(items))


def _pair(pair: Any, where: str) -> Pair:
    """Check one pair as a user or a file may give it."""
    if isinstance(pair, Mapping):
        absent = [key for key in ("input", "output") if key not in pair]
        if absent:
            raise ValueError(f"{where}: no {' and no '.join(map(repr, absent))} in {dict(pair)}.")
        words = [pair["input"], pair["output"]]
    elif isinstance(pair, Sequence) and not isinstance(pair, str) and len(pair) == 2:
        words = list(pair)
    else:
        raise ValueError(f"{where}: expected (input, output) or a mapping, got {pair!r}.")
    for kind, word in zip(("input", "output"), words, strict=True):
        if not isinstance(word, str) or not word.strip():
            raise ValueError(f"{where}: the {kind} must be a text that is not empty, got {word!r}.")
        if word != word.strip():
            raise ValueError(
                f"{where}: the {kind} {word!r} has white space around it. Remove it; the "
                "template writes the spaces."
            )
        if not is_word(word):
            raise ValueError(
                f"{where}: the {kind} {word!r} has control characters, or nothing to see. Give "
                "the word alone."
            )
    return words[0], words[1]


def _first_byte(word: str) -> int:
    # The first byte and not the first letter, since tokens may be bytes.
    return word.casefold().encode()[0]
