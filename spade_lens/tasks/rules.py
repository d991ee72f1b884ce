"""Rule tasks: inputs in classes, and labels whose meaning only the demonstrations define.

The assignment of labels to classes is drawn anew for every prompt. Episodes are drawn with a seed
per prompt, so that a longer run begins with the shorter one's episodes. This module knows
tokenizers and nothing of models.
"""

import string
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from spade_lens.checks import as_several, check_fields, checked, is_word, visible
from spade_lens.prompts.few_shot import ARROW, Template
from spade_lens.prompts.prompt import Prompt
from spade_lens.tasks.episodes import (
    Episode,
    check_drawing,
    check_labels,
    check_name,
    write_episodes,
)

MAPPINGS = ("shuffled", "fixed")


@dataclass(frozen=True)
class RuleTask:
    """Inputs in classes, and labels that the demonstrations of each prompt give to the classes.

    To change the labels: ``dataclasses.replace(task, labels=("yes", "no"))``.

    Example:
        >>> rule = RuleTask("vowels", {"vowel": tuple("aeiou"), "other": tuple("bcdfg")})
        >>> rule
        RuleTask('vowels', vowel 5, other 5, labels A B)
        >>> episode = rule.episodes(1, shots=4)[0]
        >>> sorted(output for _, output in episode.demonstrations)
        ['A', 'A', 'B', 'B']

    Args:
        name: The task's name; it takes part in the seed of its prompts.
        classes: The inputs of every class, by the name of the class.
        description: A sentence for people.
        labels: One for each class, the word alone; ``"A"``, ``"B"``, ... by default. Ours:
            with digits the model that comes with the library stayed at chance.
        mapping: ``"shuffled"`` gives the labels to the classes anew for every prompt;
            ``"fixed"`` in their order. Ours: the default is ``"shuffled"``.
        balance: Every run of as many demonstrations as there are classes holds each class
            once. Otherwise every demonstration's class is drawn by itself.

    Raises:
        ValueError: If there are fewer than two classes, one is empty, an input is empty, has
            white space around it or occurs twice, or the labels do not fit the classes.
    """

    name: str
    classes: Mapping[str, Sequence[str]]
    description: str = ""
    labels: tuple[str, ...] = ()
    mapping: str = "shuffled"
    balance: bool = True

    def __post_init__(self) -> None:
        check_fields(self)
        check_name(self.name)
        if not isinstance(self.classes, Mapping):
            raise TypeError(
                f"Task {self.name!r}: classes of type {type(self.classes).__name__} were given; "
                'expected a mapping such as {"animal": words, "country": other_words}.'
            )
        classes = {str(key): self._inputs(key, words) for key, words in self.classes.items()}
        if len(classes) < len(self.classes) or not all(map(str.strip, classes)):
            raise ValueError(
                f"Task {self.name!r} has the classes {list(self.classes)}; expected names that are "
                "not empty, and differ as text."
            )
        object.__setattr__(self, "classes", classes)
        if len(classes) < 2:
            raise ValueError(
                f"Task {self.name!r} has the classes {list(classes)}; a rule needs two at least."
            )
        owner: dict[str, str] = {}
        for key, words in classes.items():
            for word in words:
                if word in owner:
                    raise ValueError(
                        f"Task {self.name!r} has the input {word!r} twice, in {owner[word]!r} and "
                        f"{key!r}. Keep one: a query must not stand among its demonstrations."
                    )
                owner[word] = key
        labels = self.labels or tuple(string.ascii_uppercase[: len(classes)])
        labels = check_labels(labels)
        object.__setattr__(self, "labels", labels)
        if len(labels) != len(classes):
            raise ValueError(
                f"labels={labels} was given for the {len(classes)} classes {list(classes)} of task "
                f"{self.name!r}; give one label for each."
            )
        if self.mapping not in MAPPINGS:
            raise ValueError(f"mapping={self.mapping!r} was given; expected one of {MAPPINGS}.")

    def _inputs(self, key: str, words: Any) -> tuple[str, ...]:
        if isinstance(words, str | Mapping) or not isinstance(words, Iterable):
            raise TypeError(
                f"Class {key!r} of task {self.name!r} is {words!r}; expected several inputs."
            )
        inputs = tuple(words)
        if not inputs:
            raise ValueError(f"Class {key!r} of task {self.name!r} has no inputs. Give it some.")
        for word in inputs:
            if not is_word(word):
                raise ValueError(
                    f"Class {key!r} of task {self.name!r} has the input {word!r}; expected a "
                    "text that is not empty, without white space around it or control characters."
                )
        return inputs

    def __hash__(self) -> int:
        fields = (self.name, self.description, self.labels, self.mapping, self.balance)
        return hash((*fields, tuple(self.classes.items())))

    def __repr__(self) -> str:
        sizes = ", ".join(f"{key} {len(words)}" for key, words in self.classes.items())
        shown = visible(f"{sizes}, labels {' '.join(self.labels)}")
        return f"RuleTask({self.name!r}, {shown})"

    @classmethod
    @checked
    def from_rule(
        cls,
        inputs: Iterable[str],
        rule: Callable[[str], object],
        *,
        name: str,
        description: str = "",
    ) -> "RuleTask":
        """Make a task of inputs and a function that returns their class.

        Example:
            >>> words = ["a", "to", "banana"]
            >>> short = RuleTask.from_rule(words, lambda word: len(word) < 3, name="short")
            >>> dict(short.classes)
            {'True': ('a', 'to'), 'False': ('banana',)}

        Args:
            inputs: The inputs.
            rule: From an input to its class, of any kind; None leaves the input out.
            name: The task's name.
            description: A sentence for people.

        Raises:
            ValueError: As the class does.
        """
        classes: dict[str, tuple[str, ...]] = {}
        several = as_several(inputs)
        if several is None or not all(map(is_word, several)):
            raise TypeError(f"inputs={inputs!r:.60} was given; expected words.")
        for word in several:
            key = rule(word)
            if key is not None:
                classes[str(key)] = (*classes.get(str(key), ()), word)
        return cls(name, classes, description)

    @checked
    def episodes(self, n: int, *, shots: int = 16, seed: int = 0) -> list[Episode]:
        """Draw demonstrations, the labels of the classes and a query for each of ``n`` prompts.

        Episode ``i`` depends on the task, ``seed`` and ``i`` alone, not on ``n``; and with more
        ``shots`` it keeps its query, labels and first demonstrations. Every class is asked, under
        every mapping, equally often.

        Args:
            n: How many.
            shots: How many demonstrations in each; 0 gives the query alone.
            seed: Seed of the drawing, 0 or more.

        Raises:
            ValueError: If ``n`` is not positive, ``shots`` or ``seed`` is negative, or a class has
                too few inputs.
        """
        check_drawing(n, shots, seed)
        n_classes = len(self.classes)
        most = -(-shots // n_classes) if self.balance else shots
        small = {k: len(words) for k, words in self.classes.items() if len(words) < most + 1}
        if small:
            raise ValueError(
                f"shots={shots} may need {most + 1} inputs of a class with the query, but task "
                f"{self.name!r} has {small}. Ask for fewer shots or give more inputs."
            )
        # crc32 and not hash(): the same in every process.
        key = (seed, zlib.crc32(self.name.encode()))
        episodes = []
        for i in range(n):
            # Every class is asked, with every answer, once in so many episodes.
            cycle, place = divmod(i, n_classes**2)
            if place == 0:
                order = np.random.default_rng((*key, 0, cycle)).permutation(n_classes**2)
            asked, answer = divmod(int(order[place]), n_classes)
            rng = np.random.default_rng((*key, 1, i))
            label_of_class = self._draw_labels(rng, asked, answer)
            episodes.append(self._draw_episode(rng, label_of_class, asked, shots))
        return episodes

    @checked
    def prompts(
        self, tokenizer: Any, n: int, *, shots: int = 16, seed: int = 0, template: Template = ARROW
    ) -> list[Prompt]:
        """Write the episodes as prompts, with spans, target and the labels as candidates.

        Args:
            tokenizer: A fast Hugging Face tokenizer.
            n: How many.
            shots: How many demonstrations in each.
            seed: Seed of the drawing.
            template: How a line is written, and the start token.

        Raises:
            ValueError: As :meth:`episodes` and :meth:`spade_lens.tasks.Episode.prompt` do.
        """
        episodes = self.episodes(n, shots=shots, seed=seed)
        return write_episodes(tokenizer, episodes, template=template)

    def _draw_labels(self, rng: np.random.Generator, asked: int, answer: int) -> list[str]:
        """Draw the label of every class; shuffled ones give label ``answer`` to class ``asked``."""
        if self.mapping == "fixed":
            return list(self.labels)
        others = [label for i, label in enumerate(self.labels) if i != answer]
        shuffled = [others[i] for i in rng.permutation(len(others))]
        shuffled.insert(asked, self.labels[answer])
        return shuffled

    def _draw_episode(
        self, rng: np.random.Generator, label_of_class: list[str], asked: int, shots: int
    ) -> Episode:
        """Draw the query, a query of every other class, and the demonstrations, in this order."""
        inputs = list(self.classes.values())
        pools = [rng.permutation(len(words)).tolist() for words in inputs]
        pairs = [
            [(words[i], label) for i in pool]
            for words, pool, label in zip(inputs, pools, label_of_class, strict=True)
        ]
        query, answer = pairs[asked].pop()
        contrast = tuple(pairs[c].pop() for c in range(len(pairs)) if c != asked)
        shown: list[tuple[str, str]] = []
        while len(shown) < shots:
            block = (
                rng.permutation(len(pairs)) if self.balance else rng.integers(len(pairs), size=1)
            )
            shown += [pairs[c].pop() for c in block.tolist()]
        rule = ", ".join(
            f"{key}: {label}" for key, label in zip(self.classes, label_of_class, strict=True)
        )
        return Episode(
            task=self.name,
            demonstrations=tuple(shown[:shots]),
            query=query,
            answer=answer,
            labels=self.labels,
            contrast=contrast,
            rule=rule,
        )
