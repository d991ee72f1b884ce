"""Episodes: the words of one prompt, and of the baselines and controls made from it.

An episode is demonstrations, a query and its answer, before any tokenizer. From it come the
zero-shot prompt, the dummy prompt, the opposite mapping and the shuffled labels. Ours: all of
these forms; the papers' are not known to us. This module knows tokenizers and nothing of models.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np

from spade_lens.checks import (
    as_several,
    check_fields,
    check_number,
    checked,
    is_word,
    plain_name,
    visible,
    whole_numbers,
)
from spade_lens.prompts.answers import answer_tokens, with_answer
from spade_lens.prompts.few_shot import ARROW, Template, few_shot_prompt, first_tokens
from spade_lens.prompts.prompt import Prompt


@dataclass(frozen=True, repr=False)
class Episode:
    """Demonstrations, a query and its answer, all as words.

    Example:
        >>> shown = (("dog", "A"), ("bus", "B"), ("cat", "A"), ("car", "B"))
        >>> episode = Episode("animal/vehicle", shown, "cow", "A", labels=("A", "B"))
        >>> episode
        Episode('animal/vehicle', 4 shots, cow -> A, not B)
        >>> episode.opposite().demonstrations[:2], episode.opposite().answer
        ((('dog', 'B'), ('bus', 'A')), 'B')
        >>> episode.dummy().demonstrations[0], episode.zero_shot().demonstrations
        (('thing', '?'), ())

    Args:
        task: The name of the task it came from.
        demonstrations: Pairs of input and output.
        query: The input that is asked, never among the demonstrations.
        answer: The right output.
        labels: All labels of the task, if its outputs are labels; none for word pairs.
        foil: A wrong answer to compare with the right one, for a task without labels.
        contrast: A query and its answer for every other class, not among the demonstrations.
        rule: Names the mapping that the demonstrations show. Means over prompts are taken within
            one rule.

    Raises:
        ValueError: If the query stands among the demonstrations, the labels are not distinct or
            do not hold the answer, or there is no wrong answer.
    """

    task: str
    demonstrations: tuple[tuple[str, str], ...]
    query: str
    answer: str
    labels: tuple[str, ...] = ()
    foil: str = ""
    contrast: tuple[tuple[str, str], ...] = ()
    rule: str = ""

    def __post_init__(self) -> None:
        check_fields(self)
        shown = {given for given, _ in self.demonstrations}
        asked = [query for query in (self.query, *(q for q, _ in self.contrast)) if query in shown]
        if asked:
            raise ValueError(
                f"The query {asked[0]!r} of task {self.task!r} stands among its own "
                "demonstrations. Ask for another input."
            )
        if not self.labels:
            if not self.foil or self.foil == self.answer:
                raise ValueError(
                    f"The answer {self.answer!r} of task {self.task!r} needs a wrong answer beside "
                    f"it; foil={self.foil!r} was given. Give labels or another foil."
                )
            return
        object.__setattr__(self, "labels", check_labels(self.labels))
        if self.answer not in self.labels:
            raise ValueError(
                f"The answer {self.answer!r} of task {self.task!r} is none of its labels "
                f"{self.labels}."
            )

    def __repr__(self) -> str:
        wrong = " or ".join(choice for choice in self.choices if choice != self.answer)
        return (
            f"Episode({self.task!r}, {len(self.demonstrations)} shots, "
            f"{visible(f'{self.query} -> {self.answer}, not {wrong}')})"
        )

    @property
    def choices(self) -> tuple[str, ...]:
        """The answers to compare: the labels, or the right answer and the foil."""
        return self.labels or (self.answer, self.foil)

    def every_class(self) -> "tuple[Episode, ...]":
        """Return this episode, and its demonstrations with the query of every other class."""
        return (self, *(replace(self, query=q, answer=a, contrast=()) for q, a in self.contrast))

    def zero_shot(self) -> "Episode":
        """Return the query alone."""
        return replace(self, demonstrations=())

    def first(self, shots: int) -> "Episode":
        """Return the same query after only the first demonstrations.

        Args:
            shots: How many.

        Raises:
            TypeError: If it is no whole number.
            ValueError: If there are fewer.
        """
        n = len(self.demonstrations)
        [shots] = whole_numbers([shots], "shots=", f"0 to {n}, which this episode has", below=n + 1)
        return replace(self, demonstrations=self.demonstrations[:shots])

    @checked
    def dummy(
        self, inputs: Sequence[str] = ("thing",), outputs: Sequence[str] = ("?",)
    ) -> "Episode":
        """Return the same query after as many demonstrations that say nothing.

        Args:
            inputs: Words for the inputs, taken in turn.
            outputs: Words for the outputs, taken in turn.

        Raises:
            ValueError: If there are none of either, or the query is one of the inputs.
        """
        if not inputs or not outputs:
            raise ValueError("A dummy prompt needs at least one input and one output word.")
        pairs = tuple(
            (inputs[i % len(inputs)], outputs[i % len(outputs)])
            for i in range(len(self.demonstrations))
        )
        return replace(self, demonstrations=pairs, rule="dummy")

    def opposite(self) -> "Episode":
        """Return the same inputs under another mapping: every label becomes the next one.

        The answer changes with them.

        Raises:
            ValueError: If the task has no labels.
        """
        if not self.labels:
            raise ValueError(
                f"Task {self.task!r} has no labels, so there is no opposite mapping. Use "
                "shuffled(), or a task with labels."
            )
        following = dict(zip(self.labels, (*self.labels[1:], self.labels[0]), strict=True))
        return replace(
            self,
            demonstrations=tuple((i, following.get(o, o)) for i, o in self.demonstrations),
            answer=following[self.answer],
            contrast=tuple((query, following[answer]) for query, answer in self.contrast),
            rule=f"opposite of {self.rule}",
        )

    @checked
    def shuffled(self, seed: int = 0) -> "Episode":
        """Return the same inputs with outputs that say nothing of the rule.

        With labels: among the demonstrations of every true label, all labels occur equally often,
        as nearly as the numbers allow. Without: no demonstration keeps its own output.

        Args:
            seed: Seed of the shuffling, 0 or more.

        Raises:
            ValueError: If there is a single demonstration without labels.
        """
        rng = np.random.default_rng(seed)
        outputs = [out for _, out in self.demonstrations]
        if self.labels:
            offset = int(rng.integers(len(self.labels)))
            for label in self.labels:
                places = [i for i, (_, output) in enumerate(self.demonstrations) if output == label]
                # The counting goes on from one label to the next, so odd numbers even out.
                for n, i in enumerate(rng.permutation(len(places)), start=offset):
                    outputs[places[i]] = self.labels[n % len(self.labels)]
                offset += len(places)
        elif len(outputs) == 1:
            raise ValueError(
                f"An episode of task {self.task!r} has one demonstration only, so its output has "
                "nothing to be exchanged with. Use at least two."
            )
        else:
            order = rng.permutation(len(outputs))
            for here, there in zip(order, np.roll(order, 1), strict=True):
                outputs[here] = self.demonstrations[there][1]
        pairs = zip((given for given, _ in self.demonstrations), outputs, strict=True)
        return replace(self, demonstrations=tuple(pairs), rule=f"shuffled {self.rule}")

    @checked
    def prompt(self, tokenizer: Any, *, template: Template = ARROW) -> Prompt:
        """Write the prompt, with spans, the answer as target and the choices as candidates.

        The candidates stand in the order of :attr:`choices`.

        Args:
            tokenizer: A fast Hugging Face tokenizer.
            template: How a line is written, and the start token.

        Raises:
            ValueError: As :func:`spade_lens.prompts.few_shot_prompt` does, and if two choices begin
                with the same token, or a label is not a single token as it stands in the prompt.
        """
        return write_episodes(tokenizer, [self], template=template)[0]

    def _written(self, tokenizer: Any, template: Template) -> Prompt:
        """Return the prompt with whole answers."""
        prompt = few_shot_prompt(tokenizer, self.demonstrations, self.query, template=template)
        tokens = [
            answer_tokens(tokenizer, prompt.text, template.answer(choice))
            for choice in self.choices
        ]
        first = tuple(t[0] for t in tokens)
        for choice, ids in zip(self.choices, tokens, strict=True):
            if self.labels and len(ids) > 1:
                raise ValueError(
                    f"The label {choice!r} is not a single token as it follows the arrow but "
                    f"{len(ids)}: {tokenizer.convert_ids_to_tokens(list(ids))}. Choose labels "
                    "that are one token each, for example labels=('A', 'B')."
                )
        if len(set(first)) < len(first):
            words = tokenizer.convert_ids_to_tokens(list(first))
            raise ValueError(
                f"The answers {self.choices} begin with the tokens {words}, which are not "
                "distinct, so the model's choice could not be told. Choose other labels or words."
            )
        for i, (_, output) in enumerate(self.demonstrations):
            written = [prompt.tokens[p] for p in prompt.spans[f"demo{i}/output"]]
            if output in self.labels and written != [first[self.labels.index(output)]]:
                raise ValueError(
                    f"The label {output!r} is written otherwise in demonstration {i} "
                    f"({tokenizer.convert_ids_to_tokens(written)}) than as an answer. Choose other "
                    "labels or another separator."
                )
        return with_answer(prompt, tokens[self.choices.index(self.answer)], tokens)


def write_episodes(
    tokenizer: Any, episodes: Sequence[Episode], *, template: Template = ARROW
) -> list[Prompt]:
    """Return the prompt of every episode; one warning counts first tokens that say little.

    Args:
        tokenizer: A fast Hugging Face tokenizer.
        episodes: The episodes.
        template: How a line is written, and the start token.

    Raises:
        ValueError: As :meth:`Episode.prompt` does.
    """
    first = first_tokens(tokenizer, template)
    prompts = []
    for e in episodes:
        shown = () if e.labels else (output for _, output in e.demonstrations)
        prompt = e._written(tokenizer, template)
        prompts.append(first.flag(prompt, e.query, e.answer, (*e.choices, *shown)))
    first.warn()
    return prompts


@runtime_checkable
class Task(Protocol):
    """The protocol of a task of experiments: a name and episodes. A user's own task needs no more.

    Example:
        >>> class Reverse:
        ...     name = "reverse"
        ...
        ...     def episodes(self, n, *, shots=16, seed=0):
        ...         words = ["stop", "live", "dog", "pin", "tar", "now", "was", "tip"]
        ...         episodes = []
        ...         for i in range(n):
        ...             order = np.random.default_rng((seed, i)).permutation(len(words))
        ...             pairs = [(words[j], words[j][::-1]) for j in order.tolist()]
        ...             (query, answer), *shown = pairs[: shots + 1]
        ...             episodes.append(Episode(self.name, tuple(shown), query, answer, foil="x"))
        ...         return episodes
        >>> draw_episodes(Reverse(), 1, shots=2)
        [Episode('reverse', 2 shots, dog -> god, not x)]
    """

    @property
    def name(self) -> str:
        """The name in tables."""
        ...

    def episodes(self, n: int, *, shots: int = 16, seed: int = 0) -> list[Episode]:
        """Return ``n`` episodes; episode ``i`` depends on ``seed`` and ``i`` alone."""
        ...


def draw_episodes(task: Task, n: int, *, shots: int = 16, seed: int = 0) -> list[Episode]:
    """Return the episodes of a task, checked: a user's own task may return anything."""
    check_drawing(n, shots, seed)
    if not isinstance(task, Task):
        raise TypeError(
            f"{task!r} has no episodes; expected word pairs, a rule, or a task of your own with a "
            "name and episodes(n, shots=..., seed=...)."
        )
    episodes = task.episodes(n, shots=shots, seed=seed)
    if not isinstance(episodes, Sequence) or not all(isinstance(e, Episode) for e in episodes):
        raise TypeError(
            f"Task {task.name!r} returned {episodes!r:.200} from episodes(); expected a list of "
            "Episode."
        )
    if len(episodes) != n:
        raise ValueError(
            f"Task {task.name!r} returned {len(episodes)} episodes; expected the {n} asked for."
        )
    counts = {len(episode.demonstrations) for episode in episodes}
    if counts != {shots}:
        raise ValueError(
            f"Task {task.name!r} returned episodes with {sorted(counts)} demonstrations; expected "
            f"the shots={shots} asked for."
        )
    return list(episodes)


def check_name(name: str) -> None:
    """Raise if a task's name is not a text that can be shown, or empty."""
    if not plain_name(name, "a task"):
        raise ValueError("name='' was given; expected a text that names the task.")


def check_drawing(n: int, shots: int, seed: int) -> None:
    """Raise if so many prompts cannot be asked of any task."""
    check_number("n", n, least=1)
    check_number("shots", shots, least=0)
    check_number("seed", seed, least=0)


def check_labels(labels: Any) -> tuple[str, ...]:
    """Return labels, if they can tell classes apart."""
    several = as_several(labels)
    if several is None or not all(isinstance(label, str) for label in several):
        raise TypeError(f"labels={labels!r} was given; expected texts, such as ('A', 'B').")
    labels = tuple(several)
    if len(labels) < 2 or len(set(labels)) < len(labels):
        raise ValueError(f"labels={labels} was given; expected at least two, all distinct.")
    wrong = [label for label in labels if not is_word(label)]
    if wrong:
        raise ValueError(
            f"The labels {wrong} are empty, have white space around them or control characters. "
            "Give the word alone; the template writes the spaces."
        )
    return labels


def check_episodes(episodes: Sequence[Episode]) -> int:
    """Return how many demonstrations each of the episodes of one task has."""
    given: Any = episodes
    advice = "expected episodes, as task.episodes(64, shots=16) gives them"
    if not isinstance(given, Sequence) or isinstance(given, str):
        raise TypeError(f"episodes is of type {type(given).__name__}; {advice}.")
    for i, episode in enumerate(given):
        if not isinstance(episode, Episode):
            raise TypeError(f"Episode {i} is of type {type(episode).__name__}; {advice}.")
    if not given:
        raise ValueError(f"No episodes were given; {advice}.")
    counts = {len(episode.demonstrations) for episode in episodes}
    tasks = {episode.task for episode in episodes}
    if len(tasks) != 1 or len(counts) != 1 or not min(counts):
        raise ValueError(
            f"Episodes of tasks {sorted(tasks)} with {sorted(counts)} demonstrations were given; "
            "expected at least one episode, all of one task, with as many demonstrations each."
        )
    return counts.pop()
