"""Decision tasks: questions answered by one token among a few, in splits that never mix.

A task knows tokenizers and no models. Demonstrations come from its train split; thresholds are
chosen on calibration, and results reported on test.
"""

import warnings
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from spade_lens.prompts.few_shot import answer_tokens, few_shot_prompt
from spade_lens.prompts.prompt import Prompt
from spade_lens.tasks.decision_template import DecisionTemplate, Example

Split = Literal["train", "calibration", "test"]

SPLITS: tuple[Split, ...] = get_args(Split)


class SkippedExamplesWarning(UserWarning):
    """Some examples were passed over while prompts were drawn; the message says which and why."""


class Rates(NamedTuple):
    """What can be had without looking at the question.

    Args:
        chance: The mean accuracy of guessing evenly among the choices.
        majority: The accuracy of always giving the place (the label) that is right most often.
    """

    chance: float
    majority: float


@dataclass(frozen=True, repr=False)
class DecisionTask:
    """A named decision task: its examples by split, and how they are written.

    To change how it is written: ``dataclasses.replace(task, template=...)``.

    Example:
        >>> template = DecisionTemplate(example="{question}?", labels=("no", "yes"))
        >>> rows = [{"question": f"is {i} even", "answer": 1 - i % 2} for i in range(50)]
        >>> task = DecisionTask.from_examples("even", rows, template=template)
        >>> task
        DecisionTask('even', train 10, calibration 15, test 25)
        >>> task.rates("test").chance
        0.5

    Args:
        name: The task's name; it takes part in the seed of its prompts.
        splits: The examples of ``train`` (demonstrations), ``calibration`` and ``test``.
        template: How an example is written.
        shots: How many demonstrations a prompt has where nothing else is asked for.
        source: Where the examples came from.
        dropped: How many examples were left out because they occur twice.

    Raises:
        ValueError: If a split is absent or empty, an example is in two splits, or the template
            cannot write an example.
    """

    name: str
    splits: Mapping[Split, tuple[Example, ...]]
    template: DecisionTemplate
    shots: int = 4
    source: str = ""
    dropped: int = 0

    def __post_init__(self) -> None:
        if set(self.splits) != set(SPLITS) or not all(self.splits.values()):
            raise ValueError(
                f"Task {self.name!r} needs examples in each of the splits {', '.join(SPLITS)}, got "
                f"{ {split: len(examples) for split, examples in self.splits.items()} }."
            )
        held = MappingProxyType({split: tuple(self.splits[split]) for split in SPLITS})
        object.__setattr__(self, "splits", held)
        for one, other in combinations(SPLITS, 2):
            shared = {_content(e) for e in held[one]} & {_content(e) for e in held[other]}
            if shared:
                raise ValueError(
                    f"Task {self.name!r} has {len(shared)} examples in both {one} and {other}, for "
                    f"instance {next(iter(shared))[0]!r}. Splits must not mix; "
                    "DecisionTask.from_examples keeps one of each."
                )
        shows_options = "{options}" in self.template.example
        for split, examples in held.items():
            for example in examples:
                n = len(self.template.choices(example))  # refuses what it cannot write
                if example.answer >= n:
                    raise ValueError(
                        f"Task {self.name!r}, split {split}: {example.question!r} has answer "
                        f"{example.answer}, but its choices are {self.template.choices(example)}."
                    )
                if example.options and self.template.labels and not shows_options:
                    raise ValueError(
                        f"Task {self.name!r} answers with the labels of options, but its template "
                        f"{self.template.example!r} does not show {{options}}."
                    )

    def __repr__(self) -> str:
        sizes = ", ".join(f"{split} {size}" for split, size in self.split_sizes().items())
        return f"DecisionTask({self.name!r}, {sizes})"

    @classmethod
    def from_examples(
        cls,
        name: str,
        examples: Sequence[Example | Mapping[str, Any]]
        | Mapping[str, Sequence[Example | Mapping[str, Any]]],
        *,
        template: DecisionTemplate,
        shots: int = 4,
        fractions: tuple[float, float, float] = (0.2, 0.3, 0.5),
        split_seed: int = 0,
        source: str = "",
    ) -> "DecisionTask":
        """A task from examples in memory, split by chance where they are not split already.

        An example that occurs more than once is kept once, in test rather than in calibration, and
        there rather than in train; ``dropped`` counts the others.

        Args:
            name: The task's name.
            examples: :class:`Example` objects or rows as :meth:`Example.from_row` takes them; or a
                mapping from ``train``, ``calibration``, ``test`` and ``validation`` to such, any of
                which may be absent. Validation is what the absent splits are made of; without it
                they are made of train, or else of calibration or test, which keeps its own share.
            template: How an example is written.
            shots: How many demonstrations a prompt has by default.
            fractions: The shares of train, calibration and test; among absent splits alone, in
                proportion.
            split_seed: Seed of the splitting.
            source: Where the examples came from.

        Raises:
            ValueError: If a split has another name or would be empty, the fractions are not
                positive, or an example is not one; the message says which.
        """
        given = examples if isinstance(examples, Mapping) else {"validation": examples}
        unknown = [split for split in given if split not in (*SPLITS, "validation")]
        if unknown:
            raise ValueError(
                f"Task {name!r} has splits {unknown}; expected {', '.join(SPLITS)} or validation."
            )
        if min(fractions) <= 0:
            raise ValueError(f"fractions={fractions}: give three positive shares.")
        seen: set[tuple[str, ...]] = set()
        kept: dict[str, list[Example]] = {}
        dropped = 0
        for split in ("test", "validation", "calibration", "train"):
            for i, row in enumerate(given.get(split) or ()):
                try:
                    example = (
                        row
                        if isinstance(row, Example)
                        else Example.from_row(row, labels=template.labels)
                    )
                except ValueError as error:
                    raise ValueError(f"Task {name!r}, {split} {i}: {error}") from None
                if _content(example) in seen:
                    dropped += 1
                else:
                    seen.add(_content(example))
                    kept.setdefault(split, []).append(example)
        # Not seeded by the name: the same questions written in two ways are split in one.
        rng = np.random.default_rng(split_seed)
        splits = _fill(kept, dict(zip(SPLITS, fractions, strict=True)), rng)
        return cls(name, splits, template, shots=shots, source=source, dropped=dropped)

    def split_sizes(self) -> dict[Split, int]:
        """How many examples each split holds."""
        return {split: len(examples) for split, examples in self.splits.items()}

    def rates(self, split: str = "test") -> Rates:
        """The chance and the majority rate of a split.

        Raises:
            ValueError: If there is no such split.
        """
        examples = self._split(split)
        chance = float(np.mean([1 / len(self.template.choices(e)) for e in examples]))
        most = max(Counter(example.answer for example in examples).values())
        return Rates(chance, most / len(examples))

    def prompts(
        self,
        tokenizer: Any,
        n: int,
        *,
        shots: int | None = None,
        seed: int = 0,
        split: str = "test",
        balanced: bool = True,
        max_tokens: int | None = None,
        fewer: bool = False,
    ) -> list[Prompt]:
        """Draw few-shot prompts, each with its candidates, its target and its spans.

        Queries are drawn without repetition, in an order that depends on the seed alone, so that a
        longer run begins with the shorter one's prompts. Demonstrations come from train, are
        drawn anew for each query, are distinct and never the query; with more shots a prompt keeps
        its first ones.

        Args:
            tokenizer: A fast Hugging Face tokenizer.
            n: How many prompts.
            shots: How many demonstrations in each, by default the task's own; 0 gives the query
                alone.
            seed: Seed of the sampling, 0 or more.
            split: Where the queries are from.
            balanced: Give every right answer the same number of demonstrations, as nearly as it
                goes; otherwise draw them as they come.
            max_tokens: Prompts of more tokens are passed over, never cut; a warning counts them.
            fewer: Be content with what is left where too many examples are passed over.

        Returns:
            ``n`` prompts. ``candidates`` are the tokens of the choices in their order, ``target``
            the right one. The spans are those of :func:`spade_lens.prompts.few_shot.few_shot_prompt`:
            ``query`` is the whole query up to the cue, its passage and options included.

        Raises:
            ValueError: If ``n`` is not positive or more than the split holds (or holds of prompts
                that are not passed over), ``shots`` or ``seed`` is negative, train has too few
                examples, or a label is not a single token.

        Warns:
            SkippedExamplesWarning: If examples were passed over: too long, or, where the answer is
                an option's own text, with options that begin with the same token.
        """
        shots = self.shots if shots is None else shots
        queries = self._split(split)
        self._check(n, shots, seed, split)
        order = np.random.default_rng(self._key(seed, split, 0)).permutation(len(queries))
        fixed = self._label_tokens(tokenizer) if self.template.labels else ()
        drawn: list[Prompt] = []
        too_long = alike = 0
        for place in order.tolist():
            if len(drawn) == n:
                break
            query = queries[place]
            candidates = fixed or tuple(
                self._after_cue(tokenizer, option)[0] for option in query.options
            )
            candidates = candidates[: len(self.template.choices(query))]
            if len(set(candidates)) < len(candidates):
                alike += 1
                continue
            shown = self._demonstrations(split, place, shots, seed, balanced)
            prompt = few_shot_prompt(
                tokenizer,
                [(self.template.given(e), self.template.right(e)) for e in shown],
                self.template.given(query),
                template=self.template.line,
            )
            if max_tokens is not None and len(prompt) > max_tokens:
                too_long += 1
                continue
            drawn.append(
                Prompt(
                    tokens=prompt.tokens,
                    target=candidates[query.answer],
                    candidates=candidates,
                    spans=prompt.spans,
                    text=prompt.text,
                )
            )
        reasons = {
            f"prompts longer than max_tokens={max_tokens}": too_long,
            "questions with options that begin with the same token": alike,
        }
        passed = " and ".join(f"{count} {why}" for why, count in reasons.items() if count)
        if len(drawn) < (1 if fewer else n):
            raise ValueError(
                f"n={n}: split {split!r} of task {self.name!r} gives only {len(drawn)} prompts; "
                f"passed over: {passed}. Ask for fewer prompts or shots, or raise max_tokens."
            )
        if passed:
            left = "others are there" if len(drawn) == n else f"{len(drawn)} are left"
            text = f"Task {self.name!r}, split {split!r}: passed over {passed}; {left}."
            warnings.warn(text, SkippedExamplesWarning, stacklevel=2)
        return drawn

    def _split(self, split: str) -> tuple[Example, ...]:
        for name, examples in self.splits.items():
            if name == split:
                return examples
        raise ValueError(f"There is no split {split!r}; the splits are {', '.join(SPLITS)}.")

    def _key(self, seed: int, split: str, *more: int) -> tuple[int, ...]:
        # crc32 and not hash(): the same in every process.
        return (seed, zlib.crc32(self.name.encode()), zlib.crc32(split.encode()), *more)

    def _check(self, n: int, shots: int, seed: int, split: str) -> None:
        """Refuse what cannot be drawn, before anything is tokenised."""
        size = len(self._split(split))
        if n <= 0:
            raise ValueError(f"n={n}: ask for at least one prompt.")
        if n > size:
            raise ValueError(
                f"n={n}: split {split!r} of task {self.name!r} holds {size} examples, and none is "
                f"asked twice. Ask for at most {size}; the splits hold {self.split_sizes()}."
            )
        if shots < 0 or seed < 0:
            raise ValueError(f"shots={shots}, seed={seed}: both are 0 or more.")

    def _after_cue(self, tokenizer: Any, word: str) -> tuple[int, ...]:
        return answer_tokens(tokenizer, self.template.cue, f" {word}")

    def _label_tokens(self, tokenizer: Any) -> tuple[int, ...]:
        """The tokens of the label words as they follow the cue: one each, all different."""
        found = []
        for label in self.template.labels:
            ids = self._after_cue(tokenizer, label)
            if len(ids) != 1:
                raise ValueError(
                    f"Task {self.name!r}: the label {label!r} is not a single token but {len(ids)}:"
                    f" {tokenizer.convert_ids_to_tokens(list(ids))}. Choose other labels: "
                    "dataclasses.replace(task.template, labels=...)."
                )
            found.append(ids[0])
        if len(set(found)) < len(found):
            raise ValueError(
                f"Task {self.name!r}: this tokenizer writes two of the labels "
                f"{self.template.labels} as the same token. Choose others."
            )
        return tuple(found)

    def _demonstrations(
        self, split: str, place: int, shots: int, seed: int, balanced: bool
    ) -> list[Example]:
        """The demonstrations of one query; more shots extend fewer."""
        rng = np.random.default_rng(self._key(seed, split, 1, place))
        pool = self.splits["train"]
        n_choices = len(self.template.choices(self._split(split)[place]))
        order = [
            i
            for i in rng.permutation(len(pool)).tolist()
            # The odd question with five options does not teach an E to those with four.
            if (split != "train" or i != place) and pool[i].answer < n_choices
        ]
        if len(order) < shots:
            raise ValueError(
                f"shots={shots}: the train split of task {self.name!r} has {len(order)} examples "
                "for demonstrations. Ask for fewer shots."
            )
        if not balanced:
            return [pool[i] for i in order[:shots]]
        by_answer: dict[int, list[int]] = {}
        for i in order:
            by_answer.setdefault(pool[i].answer, []).append(i)
        shown: list[Example] = []
        while len(shown) < shots:  # each round shows every answer that is left once
            for answer in rng.permutation(sorted(by_answer)).tolist():
                shown.append(pool[by_answer[answer].pop()])
                if not by_answer[answer]:
                    del by_answer[answer]
        return shown[:shots]


def _content(example: Example) -> tuple[str, ...]:
    """What makes two examples the same, whatever their answers."""
    return (example.question, example.passage, *sorted(example.options))


def _fill(
    given: Mapping[str, Sequence[Example]], shares: Mapping[Split, float], rng: np.random.Generator
) -> dict[Split, tuple[Example, ...]]:
    """Make the absent splits of what there is."""
    splits: dict[Split, tuple[Example, ...]] = {s: tuple(given[s]) for s in SPLITS if s in given}
    absent = [split for split in SPLITS if split not in splits]
    pool = tuple(given.get("validation", ()))
    if pool and not absent:
        absent = ["calibration"]  # there to be tuned on, as calibration is
        pool += splits["calibration"]
    elif not pool and absent and splits:
        pool = splits[next(iter(splits))]
        absent.append(next(iter(splits)))
    if not absent:
        return splits
    order = rng.permutation(len(pool)).tolist()
    total = sum(shares[split] for split in absent)
    start, edge = 0, 0.0
    for split in absent:
        edge += shares[split] / total
        stop = round(edge * len(pool))
        splits[split] = tuple(pool[i] for i in order[start:stop])
        start = stop
    return {split: splits[split] for split in SPLITS}
