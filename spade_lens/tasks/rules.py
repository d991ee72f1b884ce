"""Rule tasks: inputs in classes, and labels whose meaning only the demonstrations define.

Which label stands for which class is drawn anew for every prompt. Episodes are drawn with a seed
per prompt, so that a longer run begins with the shorter one's episodes.
"""

import csv
import io
import json
import string
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from spade_lens.prompts.few_shot import ARROW, Template
from spade_lens.prompts.prompt import Prompt
from spade_lens.tasks.episodes import Episode, check_labels

MAPPINGS = ("shuffled", "fixed")


@runtime_checkable
class Task(Protocol):
    """What experiments ask of a task: a name and episodes."""

    @property
    def name(self) -> str:
        """What tables call it."""
        ...

    def episodes(self, n: int, *, shots: int = 16, seed: int = 0) -> list[Episode]:
        """``n`` episodes; episode ``i`` depends on ``seed`` and ``i`` alone."""
        ...


@dataclass(frozen=True)
class RuleTask:
    """Inputs in classes, and labels that the demonstrations of each prompt give to the classes.

    Example:
        >>> rule = RuleTask("vowels", {"vowel": tuple("aeiou"), "other": tuple("bcdfg")})
        >>> episode = rule.episodes(1, shots=4)[0]
        >>> sorted(output for _, output in episode.demonstrations)
        ['A', 'A', 'B', 'B']

    Args:
        name: The task's name; it takes part in the seed of its prompts.
        classes: The inputs of every class, by the name of the class.
        description: A sentence for people.

    Raises:
        ValueError: If there are fewer than two classes, one is empty, or an input is empty, has
            white space around it or occurs twice.
    """

    name: str
    classes: Mapping[str, tuple[str, ...]]
    description: str = ""

    def __post_init__(self) -> None:
        classes = {str(key): tuple(words) for key, words in self.classes.items()}
        object.__setattr__(self, "classes", classes)
        if len(classes) < 2:
            raise ValueError(
                f"Task {self.name!r} has the classes {list(classes)}; a rule needs two at least."
            )
        owner: dict[str, str] = {}
        for key, words in classes.items():
            if not words:
                raise ValueError(f"Class {key!r} of task {self.name!r} has no inputs.")
            for word in words:
                if not isinstance(word, str) or not word or word != word.strip():
                    raise ValueError(
                        f"Class {key!r} of task {self.name!r} has the input {word!r}; expected a "
                        "text that is not empty, without white space around it."
                    )
                if word in owner:
                    raise ValueError(
                        f"Task {self.name!r} has the input {word!r} twice, in {owner[word]!r} and "
                        f"{key!r}. Keep one: a query must not stand among its demonstrations."
                    )
                owner[word] = key

    def __hash__(self) -> int:
        return hash((self.name, tuple(self.classes.items()), self.description))

    @classmethod
    def from_rule(
        cls,
        inputs: Iterable[str],
        rule: Callable[[str], object],
        *,
        name: str,
        description: str = "",
    ) -> "RuleTask":
        """A task from inputs and a function that tells their class.

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
        for word in inputs:
            found = rule(word)
            if found is not None:
                classes[str(found)] = (*classes.get(str(found), ()), word)
        return cls(name, classes, description)

    @classmethod
    def from_file(cls, path: str | PathLike[str], *, name: str | None = None) -> "RuleTask":
        """A task from a JSON file or a CSV file, UTF-8.

        Args:
            path: A ``.json`` file ``{"name", "description", "classes": {"class": ["input", ...]}}``
                (or the classes alone), or a ``.csv`` file with the columns ``input`` and
                ``class``, others ignored.
            name: The task's name; by default the one in the file, else the file's own.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is neither kind of file, has another content, or its classes are not
                a task's.
        """
        path = Path(path)
        kind = path.suffix.lower()
        if kind not in (".json", ".csv"):
            raise ValueError(f"{path}: rule tasks are read from .json or .csv, not {kind!r}.")
        try:
            text = path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not UTF-8 text ({error}). Save it as UTF-8.") from None
        if kind == ".csv":
            return cls(name or path.stem, _csv_classes(text, str(path)))
        try:
            content = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}: not valid JSON ({error}).") from None
        about = content if isinstance(content, dict) and "classes" in content else {}
        classes = about.get("classes") if about else content
        if not isinstance(classes, dict) or not all(isinstance(w, list) for w in classes.values()):
            raise ValueError(f'{path}: expected {{"classes": {{"class": ["input", ...], ...}}}}.')
        return cls(
            name or str(about.get("name") or path.stem),
            {key: tuple(words) for key, words in classes.items()},
            str(about.get("description") or ""),
        )

    def episodes(
        self,
        n: int,
        *,
        shots: int = 16,
        seed: int = 0,
        labels: Sequence[str] | None = None,
        mapping: str = "shuffled",
        balance: bool = True,
    ) -> list[Episode]:
        """Draw demonstrations, labels and a query for each of ``n`` prompts.

        Episode ``i`` depends on the task, the arguments below and ``i`` alone, not on ``n``; and
        with more ``shots`` it keeps its query, labels and first demonstrations. Every class is
        asked, under every mapping, equally often.

        Args:
            n: How many.
            shots: How many demonstrations in each; 0 gives the query alone.
            seed: Seed of the drawing, 0 or more.
            labels: One for each class, the word alone; ``"A"``, ``"B"``, ... by default. Ours:
                digits left the model that comes with the library at chance.
            mapping: ``"shuffled"`` gives the labels to the classes anew for every prompt;
                ``"fixed"`` in their order. Ours: the default is ``"shuffled"``.
            balance: Every run of as many demonstrations as there are classes holds each class
                once. Otherwise every demonstration's class is drawn by itself.

        Raises:
            ValueError: If ``n`` is not positive, ``shots`` or ``seed`` is negative, the labels do
                not fit the classes, or a class has too few inputs.
        """
        _check_drawing(n, shots, seed)
        keys = list(self.classes)
        labels = tuple(string.ascii_uppercase[: len(keys)] if labels is None else labels)
        check_labels(labels)
        if len(labels) != len(keys):
            raise ValueError(
                f"labels={labels} was given for the {len(keys)} classes {keys} of task "
                f"{self.name!r}; give one label for each."
            )
        if mapping not in MAPPINGS:
            raise ValueError(f"mapping={mapping!r} was given; expected one of {MAPPINGS}.")
        most = -(-shots // len(keys)) if balance else shots
        small = {k: len(words) for k, words in self.classes.items() if len(words) < most + 1}
        if small:
            raise ValueError(
                f"shots={shots} may need {most + 1} inputs of a class with the query, but task "
                f"{self.name!r} has {small}. Ask for fewer shots or give more inputs."
            )
        key = (seed, zlib.crc32(self.name.encode()))
        n_labels = len(labels)
        drawn = []
        for i in range(n):
            # Every class is asked, with every answer, once in so many episodes.
            cycle, place = divmod(i, n_labels**2)
            if place == 0:
                order = np.random.default_rng((*key, 0, cycle)).permutation(n_labels**2)
            asked, answer = divmod(int(order[place]), n_labels)
            rng = np.random.default_rng((*key, 1, i))
            of_class = self._mapping(rng, labels, mapping, asked, answer)
            drawn.append(self._episode(rng, labels, of_class, asked, shots, balance))
        return drawn

    def prompts(
        self,
        tokenizer: Any,
        n: int,
        *,
        shots: int = 16,
        seed: int = 0,
        labels: Sequence[str] | None = None,
        mapping: str = "shuffled",
        balance: bool = True,
        template: Template = ARROW,
    ) -> list[Prompt]:
        """The episodes as prompts, with spans, target and the labels as candidates.

        Args:
            tokenizer: A fast Hugging Face tokenizer.
            n: As in :meth:`episodes`, like all up to ``balance``.
            shots: How many demonstrations.
            seed: Seed of the drawing.
            labels: One for each class.
            mapping: ``"shuffled"`` or ``"fixed"``.
            balance: Classes equally often among the demonstrations.
            template: How a line is written.

        Raises:
            ValueError: As :meth:`episodes` and :meth:`spade_lens.tasks.Episode.prompt` do.
        """
        drawn = self.episodes(
            n, shots=shots, seed=seed, labels=labels, mapping=mapping, balance=balance
        )
        return [episode.prompt(tokenizer, template=template) for episode in drawn]

    def _mapping(
        self,
        rng: np.random.Generator,
        labels: tuple[str, ...],
        mapping: str,
        asked: int,
        answer: int,
    ) -> list[str]:
        """The label of every class; shuffled ones give ``labels[answer]`` to the class asked."""
        if mapping == "fixed":
            return list(labels)
        others = [label for i, label in enumerate(labels) if i != answer]
        shuffled = [others[i] for i in rng.permutation(len(others))]
        shuffled.insert(asked, labels[answer])
        return shuffled

    def _episode(
        self,
        rng: np.random.Generator,
        labels: tuple[str, ...],
        of_class: list[str],
        asked: int,
        shots: int,
        balance: bool,
    ) -> Episode:
        keys = list(self.classes)
        pools = [rng.permutation(len(self.classes[key])).tolist() for key in keys]
        query = self.classes[keys[asked]][pools[asked].pop()]
        contrast = tuple(
            (self.classes[key][pools[c].pop()], of_class[c])
            for c, key in enumerate(keys)
            if c != asked
        )
        shown: list[tuple[str, str]] = []
        while len(shown) < shots:
            block = rng.permutation(len(keys)) if balance else rng.integers(len(keys), size=1)
            for c in block.tolist():
                shown.append((self.classes[keys[c]][pools[c].pop()], of_class[c]))
        rule = ", ".join(f"{k}: {label}" for k, label in zip(keys, of_class, strict=True))
        return Episode(
            task=self.name,
            demonstrations=tuple(shown[:shots]),
            query=query,
            answer=of_class[asked],
            labels=labels,
            contrast=contrast,
            rule=rule,
        )


def _check_drawing(n: int, shots: int, seed: int) -> None:
    if n <= 0:
        raise ValueError(f"n={n}: ask for at least one prompt.")
    if shots < 0:
        raise ValueError(f"shots={shots}: the number of demonstrations is 0 or more.")
    if seed < 0:
        raise ValueError(f"seed={seed}: a seed is 0 or more.")


def _csv_classes(text: str, source: str) -> dict[str, tuple[str, ...]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), skipinitialspace=True)
    columns = [column.strip() for column in reader.fieldnames or []]
    reader.fieldnames = columns
    if not {"input", "class"} <= set(columns):
        raise ValueError(
            f"{source}: needs the columns 'input' and 'class', found "
            f"{', '.join(map(repr, columns)) or 'none'}."
        )
    classes: dict[str, tuple[str, ...]] = {}
    for row in reader:
        key = (row["class"] or "").strip()
        classes[key] = (*classes.get(key, ()), (row["input"] or "").strip())
    return classes
