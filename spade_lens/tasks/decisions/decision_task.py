"""Decision tasks: questions answered by one token among a few, in splits that never mix.

A task knows tokenizers and no models. Demonstrations come from its train split; thresholds are
chosen on calibration, and results reported on test.
"""

import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from spade_lens.checks import check_fields, checked, warn
from spade_lens.prompts.answers import FirstTokens, answer_tokens, with_answer
from spade_lens.prompts.few_shot import few_shot_prompt
from spade_lens.prompts.prompt import Prompt
from spade_lens.tasks.decisions.splitting import (
    FRACTIONS,
    SPLITS,
    Split,
    Splits,
    checked_splits,
    make_splits,
)
from spade_lens.tasks.decisions.template import DecisionTemplate, Example
from spade_lens.tasks.episodes import check_drawing, check_name

Rows = Sequence[Example | Mapping[str, Any]]


class SkippedExamplesWarning(UserWarning):
    """Some examples were skipped while prompts were drawn; the message says which and why."""


class Rates(NamedTuple):
    """What can be reached without looking at the question.

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
        shots: How many demonstrations a prompt has by default.
        source: Where the examples came from.
        dropped: How many examples were left out because they occur twice.
        balance: Show every right answer in the same number of demonstrations, as nearly as the
            numbers allow. Otherwise demonstrations are drawn at random.

    Raises:
        ValueError: If a split is absent or empty, an example is in two splits, or the template
            cannot write an example.
    """

    name: str
    splits: Splits
    template: DecisionTemplate
    shots: int = 4
    source: str = ""
    dropped: int = 0
    balance: bool = True

    def __post_init__(self) -> None:
        check_fields(self)
        check_name(self.name)
        object.__setattr__(self, "splits", checked_splits(self.name, self.splits))
        shows_options = "{options}" in self.template.example
        for split, examples in self.splits.items():
            for example in examples:
                choices = self.template.choices(example)  # refuses what it cannot write
                if example.answer >= len(choices):
                    raise ValueError(
                        f"Task {self.name!r}, split {split}: {example.question!r} has answer "
                        f"{example.answer}, but its choices are {choices}."
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
    @checked
    def from_examples(
        cls,
        name: str,
        examples: Rows | Mapping[str, Rows],
        *,
        template: DecisionTemplate,
        shots: int = 4,
        fractions: tuple[float, float, float] = FRACTIONS,
        split_seed: int = 0,
        source: str = "",
    ) -> "DecisionTask":
        """Make a task of examples in memory, split at random where they are not split already.

        An example that occurs more than once is kept once, in test rather than in calibration, and
        there rather than in train; ``dropped`` counts the others.

        Args:
            name: The task's name.
            examples: :class:`Example` objects or rows as :meth:`Example.from_row` takes them; or a
                mapping from ``train``, ``calibration``, ``test`` and ``validation`` to such, any of
                which may be absent. Absent splits are made of validation; without it they are made
                of train, or else of calibration or test, which keeps its own fraction.
            template: How an example is written.
            shots: How many demonstrations a prompt has by default.
            fractions: The fractions of train, calibration and test; among absent splits alone, in
                proportion.
            split_seed: Seed of the splitting.
            source: Where the examples came from.

        Raises:
            ValueError: If a split has another name or would be empty, the fractions are not
                positive, or an example is not one; the message says which.
        """
        check_name(name)
        given = examples if isinstance(examples, Mapping) else {"validation": examples}
        unknown = [split for split in given if split not in (*SPLITS, "validation")]
        if unknown:
            raise ValueError(
                f"Task {name!r} has splits {unknown}; expected {', '.join(SPLITS)} or validation."
            )
        if min(fractions) <= 0:
            raise ValueError(f"fractions={fractions}: give three positive numbers.")
        if split_seed < 0:
            raise ValueError(f"split_seed={split_seed}: a seed is 0 or more.")
        by_split: dict[str, list[Example]] = {}
        for split, rows in given.items():
            for i, row in enumerate(rows or ()):
                try:
                    example = row
                    if not isinstance(example, Example):
                        example = Example.from_row(example, labels=template.labels)
                except (TypeError, ValueError) as error:
                    raise type(error)(f"Task {name!r}, {split} {i}: {error}") from None
                by_split.setdefault(split, []).append(example)
        splits, dropped = make_splits(by_split, fractions, split_seed)
        return cls(name, splits, template, shots=shots, source=source, dropped=dropped)

    def split_sizes(self) -> dict[Split, int]:
        """Return how many examples each split holds."""
        return {split: len(examples) for split, examples in self.splits.items()}

    @checked
    def rates(self, split: str = "test") -> Rates:
        """Return the chance and the majority rate of a split.

        Args:
            split: ``"train"``, ``"calibration"`` or ``"test"``.

        Raises:
            ValueError: If there is no such split.
        """
        examples = self._split(split)
        chance = float(np.mean([1 / len(self.template.choices(e)) for e in examples]))
        most = max(Counter(example.answer for example in examples).values())
        return Rates(chance, most / len(examples))

    @checked
    def prompts(
        self,
        tokenizer: Any,
        n: int,
        *,
        shots: int | None = None,
        seed: int = 0,
        split: str = "test",
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
            max_tokens: Prompts of more tokens are skipped, never cut; a warning counts them.
            fewer: Return fewer than ``n`` prompts where too many examples are skipped.

        Returns:
            ``n`` prompts. ``candidates`` are the first tokens of the choices in their order,
            ``target`` that of the right one; ``candidate_tokens`` and ``target_tokens`` are all of
            them. The spans are those of :func:`spade_lens.prompts.few_shot_prompt`:
            ``query`` is the whole query up to the cue, its passage and options included.

        Raises:
            ValueError: If ``n`` is not positive or more than the split holds (or holds of prompts
                that are not skipped), ``shots`` or ``seed`` is negative, train has too few
                examples, or a label is not a single token.

        Warns:
            SkippedExamplesWarning: If examples were skipped: too long, or, where the answer is
                an option's own text, with options that begin with the same token.
            TokenWarning: If a question begins with the same token as its answer.
        """
        shots = self.shots if shots is None else shots
        check_drawing(n, shots, seed)
        queries = self._split(split)
        if n > len(queries):
            raise ValueError(
                f"n={n}: split {split!r} of task {self.name!r} holds {len(queries)} examples, and "
                f"none is asked twice. Ask for at most {len(queries)}; the splits hold "
                f"{self.split_sizes()}."
            )
        order = np.random.default_rng(self._key(seed, split, 0)).permutation(len(queries))
        labels = self._label_tokens(tokenizer) if self.template.labels else ()
        first = FirstTokens(tokenizer, self.template.cue, " {}".format)
        prompts: list[Prompt] = []
        skipped: Counter[str] = Counter()
        for place in order.tolist():
            if len(prompts) == n:
                break
            query = queries[place]
            choices = labels or tuple(
                self._after_cue(tokenizer, option) for option in query.options
            )
            choices = choices[: len(self.template.choices(query))]
            if len({choice[0] for choice in choices}) < len(choices):
                skipped["questions with options that begin with the same token"] += 1
                continue
            shown = self._demonstrations(split, place, shots, seed)
            prompt = few_shot_prompt(
                tokenizer,
                [(self.template.given(e), self.template.right(e)) for e in shown],
                self.template.given(query),
                template=self.template.line,
            )
            if max_tokens is not None and len(prompt) > max_tokens:
                skipped[f"prompts longer than max_tokens={max_tokens}"] += 1
                continue
            prompt = with_answer(prompt, choices[query.answer], choices)
            if not labels:
                prompt = first.flag(prompt, query.question, query.options[query.answer], ())
            prompts.append(prompt)
        counts = " and ".join(f"{count} {reason}" for reason, count in skipped.items())
        if len(prompts) < (1 if fewer else n):
            raise ValueError(
                f"n={n}: split {split!r} of task {self.name!r} gives only {len(prompts)} prompts; "
                f"skipped: {counts}. Ask for fewer prompts or shots, or raise max_tokens."
            )
        if counts:
            rest = "others took their place" if len(prompts) == n else f"{len(prompts)} are left"
            text = f"Task {self.name!r}, split {split!r}: skipped {counts}; {rest}."
            warn(text, SkippedExamplesWarning)
        first.warn()
        return prompts

    def _split(self, split: str) -> tuple[Example, ...]:
        for name, examples in self.splits.items():
            if isinstance(split, str) and name == split:
                return examples
        raise ValueError(f"There is no split {split!r}; the splits are {', '.join(SPLITS)}.")

    def _key(self, seed: int, split: str, *more: int) -> tuple[int, ...]:
        # crc32 and not hash(): the same in every process.
        return (seed, zlib.crc32(self.name.encode()), zlib.crc32(split.encode()), *more)

    def _after_cue(self, tokenizer: Any, word: str) -> tuple[int, ...]:
        return answer_tokens(tokenizer, self.template.cue, f" {word}")

    def _label_tokens(self, tokenizer: Any) -> tuple[tuple[int, ...], ...]:
        """Return the tokens of the label words as they follow the cue: one each, all different."""
        tokens = []
        for label in self.template.labels:
            ids = self._after_cue(tokenizer, label)
            if len(ids) != 1:
                raise ValueError(
                    f"Task {self.name!r}: the label {label!r} is not a single token but {len(ids)}:"
                    f" {tokenizer.convert_ids_to_tokens(list(ids))}. Choose other labels: "
                    "dataclasses.replace(task.template, labels=...)."
                )
            tokens.append(ids)
        if len(set(tokens)) < len(tokens):
            raise ValueError(
                f"Task {self.name!r}: this tokenizer writes two of the labels "
                f"{self.template.labels} as the same token. Choose others."
            )
        return tuple(tokens)

    def _demonstrations(self, split: str, place: int, shots: int, seed: int) -> list[Example]:
        """Draw the demonstrations of one query; more shots extend fewer."""
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
        if not self.balance:
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
