"""What experiments on a task will do, checked before a model is loaded."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from os import PathLike
from typing import Any

from spade_lens.checks import check_fields
from spade_lens.prompts.few_shot import ARROW, Template
from spade_lens.studies.base import Plan
from spade_lens.studies.icl.registry import experiment_names, find_experiment
from spade_lens.tasks.episodes import Episode, Task, draw_episodes
from spade_lens.tasks.resolve import TaskLike, as_episodic
from spade_lens.tasks.rules import RuleTask
from spade_lens.tasks.word_pairs import WordPairTask

_OTHERS = {"rule": ("animal/country", "number-size"), "pairs": ("present-past", "country-capital")}


@dataclass(frozen=True)
class IclPlan(Plan):
    """Experiments on in-context learning, on one task.

    Example:
        >>> plan = IclPlan("animal/country", ["patching", "knockout"])  # doctest: +SKIP
        >>> sl.study(model, plan).tables["patching-chosen"]  # doctest: +SKIP

    Args:
        task: Two categories with a slash between them (``"animal/country"``), a rule
            (``"string-length"``), word pairs (``"antonym"``), or a task of your own.
        experiments: The name of an experiment, several, or ``"all"``.
        samples: Prompts.
        shots: Demonstrations in every prompt.
        labels: The labels of a rule task, one for each class; ``"A"``, ``"B"``, ... by default.
        other: Another task, for controls; by default one of the library, of the same kind.
        few: Prompts (the first ones) of those experiments that take longest: contributions, the
            effects of heads, the smallest sufficient sets, and reading.
        layers: The layers; by default all, and about seven, evenly, for function vectors, probes,
            the smallest sets and reading, and about five for contributions. Knockout, saliency
            and the effects of heads always take all blocks.
        template: How a line is written.
        heads: Heads of a function vector, at most a quarter of the model's.
        folds: Folds of the cross-validation of probes.
        lead: The fraction of the model's lead that the smallest sets of positions must keep.
        top_k: Top tokens that are read in a rule vector.
        seed: Seed of the sampling and of all controls.
        out: The folder for results.

    Raises:
        ValueError: If a number is out of range, there is no such task or experiment, the task
            has too few inputs, the prompts are too few for an experiment, or ``out`` cannot be
            written.
    """

    task: TaskLike
    experiments: str | Sequence[str] = "patching"
    samples: int = 64
    shots: int = 16
    labels: Sequence[str] | None = None
    other: TaskLike | None = None
    few: int = 16
    template: Template = ARROW
    heads: int = 10
    folds: int = 5
    lead: float = 0.5
    top_k: int = 5
    out: str | PathLike[str] = field(default="spade-lens-icl", kw_only=True)

    def __post_init__(self) -> None:
        check_fields(self)
        asked = self.experiments
        if not isinstance(asked, Sequence):
            raise TypeError(
                f"experiments={asked!r} was given; expected the name of an experiment, or several."
            )
        names = [asked] if isinstance(asked, str) else list(asked)
        chosen = experiment_names() if "all" in names else names
        if not chosen:
            raise ValueError(
                f"experiments={asked!r} was given; expected some of "
                f"{', '.join(experiment_names())}."
            )
        experiments = [find_experiment(name) for name in dict.fromkeys(chosen)]
        if self.shots == 0:
            raise ValueError("shots=0 was given; without demonstrations there is no rule.")
        self._check_counts("shots", "few", "heads", "top_k")
        if not 0 < self.lead <= 1 or self.folds < 2:
            raise ValueError(
                f"lead={self.lead} and folds={self.folds} were given; expected a fraction above "
                "0, and at least 2 folds."
            )
        self._set(
            experiments=tuple(experiment.name for experiment in experiments),
            few=min(self.few, len(self.episodes)),
            labels=None if self.labels is None else tuple(self.labels),
        )
        _ = self.other_episodes  # raises if it cannot be had
        for experiment in experiments:
            if experiment.check is not None:
                experiment.check(self)
        super().__post_init__()

    @cached_property
    def chosen_task(self) -> Task:
        """The task, with the labels asked for."""
        return _labelled(as_episodic(self.task), self.labels)

    @cached_property
    def episodes(self) -> tuple[Episode, ...]:
        """The prompts, as words."""
        task = self.chosen_task
        return tuple(draw_episodes(task, self.samples, shots=self.shots, seed=self.seed))

    @cached_property
    def other_episodes(self) -> tuple[Episode, ...] | None:
        """As many episodes of another task, for controls; None if no task fits."""
        if self.other is not None:
            other = self._other(self.other)
            if other.name == self.chosen_task.name:
                raise ValueError(f"other={other.name!r} is the task itself. Name another task.")
            return self._episodes_of(other)
        kind = "pairs" if isinstance(self.chosen_task, WordPairTask) else "rule"
        for name in _OTHERS[kind]:
            if name == self.chosen_task.name:
                continue
            try:
                return self._episodes_of(self._other(name))
            except ValueError:  # too many demonstrations for it, or three classes' labels
                continue
        return None

    def _other(self, given: TaskLike) -> Task:
        other = as_episodic(given)
        return _labelled(other, self.labels) if isinstance(other, RuleTask) else other

    def _episodes_of(self, task: Task) -> tuple[Episode, ...]:
        n = len(self.episodes)
        return tuple(draw_episodes(task, n, shots=self.shots, seed=self.seed))

    @property
    def config(self) -> dict[str, Any]:
        """The arguments that decide the results, ready for JSON."""
        names = ("few", "shots", "heads", "folds", "lead", "top_k", "seed")
        return {
            "task": self.chosen_task.name,
            "labels": list(self.episodes[0].labels),
            "other": self.other_episodes[0].task if self.other_episodes else None,
            "samples": len(self.episodes),
            "layers": self.chosen_layers,
            "template": asdict(self.template),
            **{name: getattr(self, name) for name in names},
        }

    @property
    def chance(self) -> float:
        """The accuracy of a model that chooses at random among the right and wrong answers."""
        return 1 / len(self.episodes[0].choices)

    @property
    def classes(self) -> dict[str, str] | None:
        """The class of every input, where the task has classes."""
        if not isinstance(self.chosen_task, RuleTask):
            return None
        return {word: key for key, words in self.chosen_task.classes.items() for word in words}


def rules_of_one_prompt(episodes: Sequence[Episode]) -> list[str]:
    """Return the rules that a single episode has: there are no others to take a mean over."""
    counts = Counter(episode.rule for episode in episodes)
    return [rule for rule, n in counts.items() if n < 2]


def _labelled(task: Task, labels: Sequence[str] | None) -> Task:
    if labels is None:
        return task
    if not isinstance(task, RuleTask):
        raise ValueError(
            f"labels={tuple(labels)} was given, but task {task.name!r} has outputs of its own. "
            "Leave labels out."
        )
    return replace(task, labels=tuple(labels))
