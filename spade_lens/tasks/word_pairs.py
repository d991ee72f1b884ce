"""Word-pair tasks: a rule shown by examples, such as countries and their capitals.

Six tasks come with the library, facts we wrote down ourselves; users bring their own as a list,
JSON or CSV. Sampling is seeded per prompt, so that a longer run begins with the shorter one's
prompts and more shots extend the demonstrations of fewer.
"""

import csv
import difflib
import io
import json
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from spade_lens.prompts.few_shot import ARROW, Template, few_shot_prompt
from spade_lens.prompts.prompt import Prompt

_FORMS = 'a list of {"input", "output"}, a list of [input, output], or {"name", "pairs": [...]}'


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
        ValueError: If there are no pairs, a word is empty, not text or has white space around
            it, or an input occurs twice; the message names them.
    """

    name: str
    pairs: tuple[tuple[str, str], ...]
    description: str = ""

    def __post_init__(self) -> None:
        # Tuples all through keep the frozen task hashable, even where lists were given.
        pairs = tuple(_pair(p, f"Task {self.name!r}, pair {i}") for i, p in enumerate(self.pairs))
        object.__setattr__(self, "pairs", pairs)
        if not pairs:
            raise ValueError(f"Task {self.name!r} has no pairs.")
        twice = [i for i, times in Counter(given for given, _ in pairs).items() if times > 1]
        if twice:
            raise ValueError(
                f"Task {self.name!r} has inputs that occur twice: {', '.join(map(repr, twice))}. "
                "A query could then stand among its own demonstrations; keep one pair of each."
            )

    @classmethod
    def from_pairs(
        cls,
        pairs: Iterable[Sequence[str] | Mapping[str, str]],
        *,
        name: str,
        description: str = "",
    ) -> "WordPairTask":
        """A task from pairs in memory.

        Example:
            >>> WordPairTask.from_pairs([["one", "un"], {"input": "two", "output": "deux"}],
            ...                         name="numbers").pairs
            (('one', 'un'), ('two', 'deux'))

        Args:
            pairs: Each one ``(input, output)`` or a mapping with these two keys.
            name: The task's name.
            description: A sentence for people.

        Raises:
            ValueError: As the class does, and if a pair has another form.
        """
        found = tuple(_pair(p, f"Task {name!r}, pair {i}") for i, p in enumerate(pairs))
        return cls(name, found, description)

    @classmethod
    def from_file(cls, path: str | PathLike[str], *, name: str | None = None) -> "WordPairTask":
        """A task from a JSON file or a CSV file, UTF-8.

        Args:
            path: A ``.json`` file with a list of ``{"input": ..., "output": ...}``, a list of
                ``[input, output]``, or our own form ``{"name", "description", "pairs"}``; or a
                ``.csv`` file with the columns ``input`` and ``output``, others ignored.
            name: The task's name; by default the one in the file, else the file's own.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is neither kind of file, cannot be read as one, has not the columns
                (the message names those found), or its pairs are not a task's.
        """
        path = Path(path)
        kind = path.suffix.lower()
        if kind not in (".json", ".csv"):
            raise ValueError(f"{path}: word pairs are read from .json or .csv, not {kind!r}.")
        try:
            # A spreadsheet's UTF-8 opens with a byte-order mark; it is no part of a column name.
            text = path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not UTF-8 text ({error}). Save it as UTF-8.") from None
        if kind == ".csv":
            return cls(name or path.stem, _csv_pairs(text, str(path)))
        return _from_json(text, str(path), name=name, fallback=path.stem)

    def prompts(
        self,
        tokenizer: Any,
        n: int,
        *,
        shots: int = 8,
        seed: int = 0,
        template: Template = ARROW,
    ) -> list[Prompt]:
        """Sample k-shot prompts, each with its spans and its target.

        Prompt ``i`` depends on the task's name and pairs, ``seed`` and ``i`` alone, not on
        ``n``; and with more ``shots`` it keeps its query and first demonstrations. Queries go
        through all the pairs before one comes again. Demonstrations are distinct, and never the
        query.

        Args:
            tokenizer: A fast Hugging Face tokenizer.
            n: How many prompts.
            shots: How many demonstrations in each; 0 gives the query alone.
            seed: Seed of the sampling, 0 or more.
            template: How a line is written.

        Returns:
            ``n`` prompts. The spans are those of :func:`spade_lens.prompts.prompt.few_shot_prompt`;
            ``target`` is the first token of the answer as it follows the prompt.

        Raises:
            ValueError: If ``n`` is not positive, ``shots`` or ``seed`` is negative, or there are
                fewer than ``shots`` pairs beside the query.
        """
        drawn = self.sample(n, shots=shots, seed=seed)  # checks before anything is tokenised
        return [
            few_shot_prompt(tokenizer, shown, given, answer=output, template=template)
            for shown, (given, output) in drawn
        ]

    def sample(
        self, n: int, *, shots: int = 8, seed: int = 0
    ) -> list[tuple[tuple[tuple[str, str], ...], tuple[str, str]]]:
        """The words behind :meth:`prompts`: demonstrations and query of each, no tokenizer yet.

        Example:
            >>> shown, query = task("capitalize").sample(1, shots=2)[0]
            >>> len(shown), query in shown
            (2, False)

        Raises:
            ValueError: As :meth:`prompts` does.
        """
        size = len(self.pairs)
        if n <= 0:
            raise ValueError(f"n={n}: ask for at least one prompt.")
        if shots < 0:
            raise ValueError(f"shots={shots}: the number of demonstrations is 0 or more.")
        if seed < 0:
            raise ValueError(f"seed={seed}: a seed is 0 or more.")
        if shots > size - 1:
            raise ValueError(
                f"shots={shots} needs {shots + 1} pairs with the query, but task {self.name!r} "
                f"has {size}. Ask for at most {size - 1} shots or give more pairs."
            )
        # crc32 and not hash(): the same in every process.
        key = (seed, zlib.crc32(self.name.encode()))
        drawn = []
        for i in range(n):
            cycle, place = divmod(i, size)
            if place == 0:
                order = np.random.default_rng((*key, 0, cycle)).permutation(size)
            query = int(order[place])
            # The whole permutation, cut at shots: more shots extend fewer.
            others = np.random.default_rng((*key, 1, i)).permutation(size - 1)[:shots]
            shown = tuple(self.pairs[int(j) + (int(j) >= query)] for j in others)
            drawn.append((shown, self.pairs[query]))
        return drawn


def task_names() -> list[str]:
    """The names of the tasks that come with the library, in alphabetical order.

    Example:
        >>> "country-capital" in task_names()
        True
    """
    found = [file.name for file in (files("spade_lens.tasks") / "pairs").iterdir()]
    return sorted(name.removesuffix(".json") for name in found if name.endswith(".json"))


@cache
def task(name: str) -> WordPairTask:
    """A task that comes with the library.

    Example:
        >>> dict(task("country-capital").pairs)["France"]
        'Paris'

    Args:
        name: One of :func:`task_names`.

    Raises:
        ValueError: If there is no such task; the message offers the nearest names.
    """
    names = task_names()
    if name not in names:
        near = difflib.get_close_matches(name.lower().replace("_", "-"), names, n=3, cutoff=0.6)
        hint = f"Did you mean {' or '.join(map(repr, near))}? " if near else ""
        raise ValueError(
            f"There is no task {name!r}. {hint}The tasks are {', '.join(names)}; your own pairs "
            "come from WordPairTask.from_file or from_pairs."
        )
    source = f"pairs/{name}.json"
    text = (files("spade_lens.tasks") / "pairs" / f"{name}.json").read_text(encoding="utf-8")
    return _from_json(text, source, fallback=name)


def _pair(pair: Any, where: str) -> tuple[str, str]:
    """One checked pair out of what a user or a file may give for it."""
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
    return words[0], words[1]


def _from_json(text: str, source: str, *, fallback: str, name: str | None = None) -> WordPairTask:
    """A task from the text of a JSON file; ``fallback`` names it where nothing else does."""
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{source}: not valid JSON ({error}).") from None
    about = content if isinstance(content, dict) else {}
    pairs = about.get("pairs") if about else content
    if not isinstance(pairs, list) or not pairs:
        raise ValueError(f"{source}: expected pairs as {_FORMS}.")
    found = tuple(_pair(p, f"{source}, pair {i}") for i, p in enumerate(pairs))
    return WordPairTask(
        name or str(about.get("name") or fallback), found, str(about.get("description") or "")
    )


def _csv_pairs(text: str, source: str) -> tuple[tuple[str, str], ...]:
    """The pairs of a CSV file's text."""
    # Spaces around cells are how people line columns up, never part of a word.
    reader = csv.DictReader(io.StringIO(text, newline=""), skipinitialspace=True, strict=True)
    try:
        columns = [column.strip() for column in reader.fieldnames or []]
        reader.fieldnames = columns
        rows = [(reader.line_num, row) for row in reader]
    except csv.Error as error:
        raise ValueError(f"{source}, line {reader.line_num}: not valid CSV ({error}).") from None
    if "input" not in columns or "output" not in columns:
        raise ValueError(
            f"{source}: needs the columns 'input' and 'output', found "
            f"{', '.join(map(repr, columns)) or 'none'}."
        )
    pairs = []
    for line, row in rows:
        where = f"{source}, line {line}"
        if None in row:
            raise ValueError(
                f"{where}: more cells than the {len(columns)} columns. Quote cells with commas."
            )
        pairs.append(_pair({k: (v or "").strip() for k, v in row.items()}, where))
    return tuple(pairs)
