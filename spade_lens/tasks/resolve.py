"""Turn a name, a file or what is in memory into a task. Knows tokenizers and nothing of models.

The names of all kinds are distinct (a test holds this), so a name never depends on the kind. Where
a file has the name of a task, the task is meant; write ``"./antonym"`` for the file.
"""

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any, TypeAlias, TypeVar, overload

from spade_lens.checks import as_several, checked
from spade_lens.settings import Settings, scoped
from spade_lens.storage.files import as_path
from spade_lens.tasks.categories import category_names, rule_named, rule_names
from spade_lens.tasks.decisions.data_sets import DATA_SETS
from spade_lens.tasks.decisions.decision_task import DecisionTask
from spade_lens.tasks.decisions.sources import decisions_named
from spade_lens.tasks.decisions.template import Example, default_template
from spade_lens.tasks.episodes import Task
from spade_lens.tasks.files import FILE_SUFFIXES, local_rows, naming, read_content
from spade_lens.tasks.rules import RuleTask
from spade_lens.tasks.word_pairs import WordPairTask, checked_pairs, pair_names, pairs_named

KnownTask: TypeAlias = WordPairTask | RuleTask | DecisionTask

TaskLike: TypeAlias = str | PathLike[str] | Task | DecisionTask | Mapping[str, Any] | Iterable[Any]
"""A task as a user may give it: a name, a file, pairs or classes in memory, or a task."""

T = TypeVar("T", bound=Task | DecisionTask)

_NAMES: dict[str, Callable[[], list[str]]] = {
    "pairs": pair_names,
    "rule": rule_names,
    "decision": lambda: list(DATA_SETS),
    "category": category_names,
}


_HELD = ("pairs", "classes")
"""What a JSON file may hold under a key of this name."""


@checked
def task_names(kind: str | None = None) -> list[str]:
    """Return the names of the tasks that come with the library.

    Example:
        >>> task_names("pairs")[:3]
        ['antonym', 'capitalize', 'country-capital']
        >>> task_names("rule")
        ['first-letter', 'number-parity', 'number-size', 'string-length', 'vowel-count']

    Args:
        kind: ``"pairs"`` for word pairs, ``"rule"`` for rules whose labels the demonstrations
            define, ``"decision"`` for decisions on real data; all of these by default. The names
            of decisions that end in ``-words`` are the same questions without lettered options:
            the answer is the right option's own text. Small models that cannot tell letters apart
            can do these. ``"category"`` lists the categories of words, of which two with a slash
            between them are a rule task (``"animal/country"``).

    Raises:
        ValueError: If there is no such kind.
    """
    if kind is None:
        return [name for k in ("pairs", "rule", "decision") for name in _NAMES[k]()]
    if kind not in _NAMES:
        raise ValueError(f"kind={kind!r} was given; expected one of {', '.join(_NAMES)}, or None.")
    return _NAMES[kind]()


@overload
def task(given: T) -> T: ...
@overload
def task(given: TaskLike, *, split_seed: int) -> Task | DecisionTask: ...
@overload
def task(
    given: str | PathLike[str] | Mapping[str, Any] | Iterable[Any],
    *,
    name: str | None = None,
    source: str | PathLike[str] | None = None,
    split_seed: int = 0,
    settings: Settings | None = None,
) -> KnownTask: ...
@scoped
def task(
    given: TaskLike,
    *,
    name: str | None = None,
    source: str | PathLike[str] | None = None,
    split_seed: int = 0,
    settings: Settings | None = None,
) -> Task | DecisionTask:
    """Return a task: by its name, out of a file, or of pairs or classes in memory.

    Word pairs are a :class:`WordPairTask`, classes of inputs a :class:`RuleTask`, questions with
    choices a :class:`DecisionTask`. The data of decisions are downloaded and verified at first
    use, then offline.

    Example:
        >>> task("antonym")
        WordPairTask('antonym', 83 pairs: hot -> cold, ...)
        >>> task("animal/fruit")
        RuleTask('animal/fruit', animal 50, fruit 42, labels A B)
        >>> task({"one": "un", "two": "deux", "three": "trois"}, name="numbers")
        WordPairTask('numbers', 3 pairs: one -> un, ...)
        >>> task("sst2").prompts(model.tokenizer, 40, shots=8)  # doctest: +SKIP

    Args:
        given: One of :func:`task_names`; two or more categories with slashes between them, such as
            ``"animal/country"``; pairs of input and output; a mapping from inputs to outputs or
            from classes to inputs; rows with the columns ``input`` and ``output``, ``input`` and
            ``class``, or those of :meth:`Example.from_row`, or a data frame of such; a file that
            holds one of these (``.csv``, ``.json``, ``.jsonl``, ``.parquet``, ``.arrow``; UTF-8),
            where JSON may add
            a name and a description (``{"name", "description", "pairs" or "classes"}``); a folder
            with a file for every split of a decision; or a task, which is returned as it is.
            Decisions made so show options under letters; without options, the answers are the
            labels.
        name: The task's name, for a file or for what is in memory.
        source: For a decision by name: None for the package registry and, failing that, the
            Hugging Face hub; ``"registry"`` or ``"hub"`` for that alone; or a file or folder of
            your own with the data set's columns, or with those of :meth:`Example.from_row`.
        split_seed: For decisions: seed of the splitting into train, calibration and test.
        settings: Memory limit, batch size and progress; see :class:`spade_lens.Settings`.

    Raises:
        TypeError: If something else is given.
        ValueError: If there is no such task (the message offers the nearest names), or what is
            given is not a task's.
        FileNotFoundError: If there is no such file or folder.
        DownloadError: If no source could give the data of a decision.
    """
    if isinstance(given, Task | DecisionTask):
        return given
    if isinstance(given, str) and given in DATA_SETS:
        return decisions_named(given, source=source, split_seed=split_seed)
    if source is not None:
        raise ValueError(
            f"source={str(source)!r} was given for {given!r}; only decisions have a source: "
            f"{', '.join(DATA_SETS)}. A file of your own is a task by itself: task('my.csv')."
        )
    if isinstance(given, str) and given in pair_names():
        return pairs_named(given)
    if isinstance(given, str) and given in rule_names():
        return rule_named(given)
    if isinstance(given, PathLike) or (isinstance(given, str) and _is_file(given)):
        return _from_file(as_path(given), name, split_seed)
    if isinstance(given, str):
        parts = given.split("/")
        if len(parts) > 1 and set(parts) <= set(category_names()):
            return rule_named(given)
        raise ValueError(_unknown(given))
    content = given if isinstance(given, Mapping) else as_several(given)
    if hasattr(given, "columns") and hasattr(given, "to_dict"):  # a data frame
        content = given.to_dict("records")
    if content is not None:
        if name is None:
            raise ValueError(
                "A task in memory needs a name, which tables show and seeds use: task(pairs, "
                "name='mine')."
            )
        return _from_content(content, name, split_seed)
    raise TypeError(
        f"{given!r} was given; expected a task's name, a file, pairs of words, or a task."
    )


def as_episodic(given: TaskLike) -> Task:
    """Return a task that has episodes, out of whatever :func:`task` takes."""
    chosen = None if isinstance(given, str) and given in DATA_SETS else task(given)
    if not isinstance(chosen, Task):
        raise ValueError(
            f"{given!r} is a decision task and has no episodes; expected word pairs or a rule: "
            f"{', '.join([*pair_names(), *rule_names()])}, or two categories such as "
            "'animal/country'."
        )
    return chosen


def as_decisions(given: TaskLike, *, shots: int | None = None, split_seed: int = 0) -> DecisionTask:
    """Return a task with splits, out of whatever :func:`task` takes; word pairs become such."""
    decisions = task(given, split_seed=split_seed)
    if isinstance(decisions, WordPairTask):
        return decisions.decisions(shots=8 if shots is None else shots, split_seed=split_seed)
    if not isinstance(decisions, DecisionTask):
        raise ValueError(
            f"{decisions!r} has no train, calibration and test split; expected a DecisionTask, "
            f"word pairs, or one of {', '.join([*DATA_SETS, *pair_names()])}."
        )
    return decisions


def _is_file(given: str) -> bool:
    suffix = Path(given).suffix.lower()
    try:
        there = given != "" and Path(given).expanduser().exists()
    except OSError:  # a name that no file can have
        there = False
    return there or suffix in FILE_SUFFIXES


def _from_file(path: Path, name: str | None, split_seed: int) -> KnownTask:
    if not path.exists():
        raise FileNotFoundError(f"There is no file {str(path)!r}. Give the path of one.")
    content = local_rows(path) if path.is_dir() else read_content(path)
    with naming(path):
        about, _ = _opened(content)
        found = _from_content(content, name or about.get("name") or path.stem, split_seed)
    return replace(found, source=f"files at {path}") if isinstance(found, DecisionTask) else found


def _from_content(content: Any, name: str, split_seed: int) -> KnownTask:
    """Make the kind of task that pairs, classes or rows are."""
    about, content = _opened(content)
    description = about.get("description") or ""
    rows = content
    if isinstance(content, Mapping):
        values = list(content.values())
        if not values or isinstance(values[0], str | int | float):
            return WordPairTask(name, checked_pairs(content, name), description)
        # The splits of a folder are lists of rows, classes are lists of words.
        if not all(isinstance(value, list) and _columns(value) for value in values):
            return RuleTask(name, content, description)
        rows = [row for value in values for row in value]
    if not isinstance(rows, list):
        raise ValueError(f"expected pairs, classes or rows with named columns, got {content!r:.80}")
    columns = _columns(rows)
    if "question" in columns:
        template = default_template(rows)
        return DecisionTask.from_examples(name, content, template=template, split_seed=split_seed)
    if {"input", "class"} <= columns and "output" not in columns:
        classes: dict[str | int, list[str]] = {}
        for n, row in enumerate(rows, start=1):
            of = row.get("class") if isinstance(row, Mapping) else None
            if not isinstance(of, str | int) or "input" not in row:
                raise ValueError(f"row {n} is {row!r:.80}; expected an 'input' and its 'class'.")
            if type(of) is not type(next(iter(classes), of)):
                raise ValueError(
                    f"row {n} has the class {of!r}; expected all texts or all numbers."
                )
            classes.setdefault(of, []).append(row["input"])
        return RuleTask(name, {str(of): words for of, words in classes.items()}, description)
    if columns and not {"input", "output"} <= columns:
        raise ValueError(
            f"found the columns {', '.join(map(repr, sorted(columns)))}; expected 'input' and "
            "'output' for word pairs, 'input' and 'class' for a rule, or 'question' and 'answer' "
            "for decisions. In a CSV file the first line names the columns, separated by commas."
        )
    return WordPairTask(name, checked_pairs(rows, name), description)


def _opened(content: Any) -> tuple[Mapping[str, Any], Any]:
    """Return the name and description that stand beside pairs or classes, and these alone."""
    if not isinstance(content, Mapping) or not content:
        return {}, content
    held = [key for key in _HELD if key in content]
    other = content.keys() - {"name", "description", *held}
    # Words may be called so as well: a dictionary from "pairs" to "paires".
    if other and all(isinstance(content[key], str) for key in held):
        return {}, content
    if other or len(held) != 1:
        raise ValueError(
            f"the keys are {', '.join(map(repr, content))}; expected 'pairs' or 'classes', and "
            "perhaps 'name' and 'description'. Labels are given in code: "
            "dataclasses.replace(task, labels=...)."
        )
    return content, content[held[0]]


def _columns(rows: Sequence[Any]) -> set[str]:
    if rows and isinstance(rows[0], Example):
        return {"question"}
    return set(rows[0]) if rows and isinstance(rows[0], Mapping) else set()


def _unknown(name: str) -> str:
    """Say that there is no such task, and what is near."""
    *others, last = name.split("/")
    if others:
        wrong = next(part for part in (*others, last) if part not in category_names())
        near = _near(wrong, category_names())
        return (
            f"There is no category {wrong!r}. {near}The categories are "
            f"{', '.join(category_names())}; {name!r} is no file either."
        )
    return (
        f"There is no task {name!r}. {_near(name, [*task_names(), *category_names()])}"
        f"The tasks are {', '.join(task_names())}, and two categories with a slash between them, "
        f"such as 'animal/country' ({', '.join(category_names())}). Your own: task('my.csv'), "
        "task(pairs, name='mine')."
    )


def _near(name: str, names: list[str]) -> str:
    near = difflib.get_close_matches(name.lower().replace("_", "-"), names, n=3, cutoff=0.6)
    return f"Did you mean {' or '.join(map(repr, near))}? " if near else ""
