"""What experiments on a task will do, checked as far as that goes before a model is loaded."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from spade_lens import storage
from spade_lens.icl.geometry.dpca import factor_variance
from spade_lens.prompts.few_shot import ARROW, Template
from spade_lens.settings import Settings, scoped
from spade_lens.tasks.episodes import Episode, Task, draw_episodes
from spade_lens.tasks.resolve import TaskLike, as_episodic
from spade_lens.tasks.rules import RuleTask
from spade_lens.tasks.word_pairs import WordPairTask

EXPERIMENTS = (
    "shots",
    "patching",
    "contributions",
    "heads",
    "knockout",
    "saliency",
    "geometry",
    "sufficiency",
    "reading",
)
"""The names of the experiments."""

_OTHERS = {"rule": ("animal/country", "number-size"), "pairs": ("present-past", "country-capital")}


@dataclass(frozen=True)
class IclPlan:
    """Experiments on one task.

    Args:
        task: The task.
        experiments: Their names.
        episodes: The prompts, as words.
        other: As many of another task, for controls; None where there is none.
        shots: Demonstrations in every prompt.
        few: How many of the prompts, the first ones, those experiments get that take longest.
        layers: The layers, ascending; None for each experiment's own.
        template: How a line is written.
        seed: Of the sampling and of all controls.
        out: The folder for results, which exists and can be written.
    """

    task: Task
    experiments: tuple[str, ...]
    episodes: tuple[Episode, ...]
    other: tuple[Episode, ...] | None
    shots: int
    few: int
    layers: tuple[int, ...] | None
    template: Template
    seed: int
    out: Path

    @property
    def config(self) -> dict[str, Any]:
        """What decides the results, ready for JSON."""
        return {
            "task": self.task.name,
            "labels": list(self.episodes[0].labels),
            "other": self.other[0].task if self.other else None,
            "samples": len(self.episodes),
            "few": self.few,
            "shots": self.shots,
            "layers": None if self.layers is None else list(self.layers),
            "template": asdict(self.template),
            "seed": self.seed,
        }

    @property
    def chance(self) -> float:
        """The share of right answers of a model that chooses among the wrong and right ones."""
        return 1 / len(self.episodes[0].choices)

    @property
    def classes(self) -> dict[str, str] | None:
        """The class of every input, where the task has classes."""
        if not isinstance(self.task, RuleTask):
            return None
        return {word: key for key, words in self.task.classes.items() for word in words}

    def check_layers(self, n_layers: int) -> None:
        """Raise if a layer is out of range in a model of so many blocks.

        Raises:
            ValueError: Then.
        """
        outside = [layer for layer in self.layers or () if not 0 <= layer <= n_layers]
        if outside:
            raise ValueError(
                f"Layers {outside} were asked for; expected layers from 0 (the embedding) to "
                f"{n_layers} (the model's output)."
            )


@scoped
def plan_icl(
    task: TaskLike,
    experiments: Sequence[str] = EXPERIMENTS,
    *,
    samples: int = 64,
    shots: int = 16,
    labels: Sequence[str] | None = None,
    other: TaskLike | None = None,
    few: int = 16,
    layers: Sequence[int] | None = None,
    template: Template = ARROW,
    seed: int = 0,
    settings: Settings | None = None,
    out: str | PathLike[str] = "spade-lens-icl",
    n_layers: int | None = None,
) -> IclPlan:
    """Check the arguments of :func:`~spade_lens.studies.icl_study` before compute is spent.

    Args:
        task: As for :func:`spade_lens.task`; word pairs, a rule, or a task of your own.
        experiments: Names of experiments; all by default.
        samples: How many prompts.
        shots: Demonstrations in every prompt.
        labels: The labels of a rule task, one for each class; ``"A"``, ``"B"``, ... by default.
        other: Another task, for controls; by default one that comes with the library, of the
            same kind.
        few: How many of the prompts those experiments get that take longest.
        layers: The layers; by default each experiment's own.
        template: How a line is written.
        seed: Of the sampling and of all controls.
        settings: Memory limit, batch size and progress; see :class:`spade_lens.Settings`.
        out: The folder for results.
        n_layers: The model's number of blocks, where it is known already.

    Raises:
        ValueError: If a number is out of range, there is no such task or experiment, the task
            has too few inputs, the prompts are too few for an experiment, or ``out`` cannot be
            written.
    """
    unknown = [name for name in experiments if name not in EXPERIMENTS]
    if unknown or not experiments:
        raise ValueError(
            f"Experiments {unknown or list(experiments)} were asked for; expected some of "
            f"{', '.join(EXPERIMENTS)}."
        )
    if shots < 1 or few < 1:
        raise ValueError(
            f"shots={shots} and few={few} were given; expected at least 1 of each: without "
            "demonstrations there is no rule."
        )
    if layers is not None and not len(layers):
        raise ValueError("layers=[] was given; name at least one layer, or leave it out for all.")
    found = _labelled(as_episodic(task), labels)
    episodes = tuple(draw_episodes(found, samples, shots=shots, seed=seed))
    plan = IclPlan(
        task=found,
        experiments=tuple(dict.fromkeys(experiments)),
        episodes=episodes,
        other=_other(found, other, len(episodes), shots, seed, labels),
        shots=shots,
        few=min(few, samples),
        layers=None if layers is None else tuple(sorted(set(layers))),
        template=template,
        seed=seed,
        out=storage.output_folder(out),
    )
    plan.check_layers(max(plan.layers or (0,)) if n_layers is None else n_layers)
    if "patching" in plan.experiments:
        _check_patching(plan)
    if "geometry" in plan.experiments:
        _check_geometry(plan)
    if "heads" in plan.experiments:
        _check_heads(plan)
    return plan


def _labelled(found: Task, labels: Sequence[str] | None) -> Task:
    if labels is None:
        return found
    if not isinstance(found, RuleTask):
        raise ValueError(
            f"labels={tuple(labels)} was given, but task {found.name!r} has outputs of its own. "
            "Leave labels out."
        )
    return replace(found, labels=tuple(labels))


def _other(
    found: Task,
    other: TaskLike | None,
    n: int,
    shots: int,
    seed: int,
    labels: Sequence[str] | None,
) -> tuple[Episode, ...] | None:
    """Episodes of another task; of one of ours where none is named and one fits."""
    if other is not None:
        named = as_episodic(other)
        named = _labelled(named, labels) if isinstance(named, RuleTask) else named
        if named.name == found.name:
            raise ValueError(f"other={named.name!r} is the task itself. Name another task.")
        return tuple(draw_episodes(named, n, shots=shots, seed=seed))
    kind = "pairs" if isinstance(found, WordPairTask) else "rule"
    for name in _OTHERS[kind]:
        if name == found.name:
            continue
        try:
            ours = as_episodic(name)
            ours = _labelled(ours, labels) if isinstance(ours, RuleTask) else ours
            return tuple(ours.episodes(n, shots=shots, seed=seed))
        except ValueError:  # too many demonstrations for it, or three classes' labels
            continue
    return None


def _check_patching(plan: IclPlan) -> None:
    alone = _alone(plan.episodes)
    if alone:
        raise ValueError(
            f"samples={len(plan.episodes)} holds a single prompt of the rule {alone[0]!r}; "
            "patching takes means over the other prompts of a rule. Give more samples."
        )


def _check_heads(plan: IclPlan) -> None:
    half = plan.episodes[: len(plan.episodes) // 2]
    alone = _alone(half) or _alone(plan.episodes)
    if alone or not half:
        raise ValueError(
            f"samples={len(plan.episodes)} are too few to choose heads: a rule "
            f"({(alone or ['any'])[0]!r}) needs at least two prompts in the first half, which "
            "chooses, as means are over the other prompts of a rule. Give more samples."
        )


def _alone(episodes: Sequence[Episode]) -> list[str]:
    """The rules of a single prompt."""
    rules = Counter(episode.rule for episode in episodes)
    return [rule for rule, n in rules.items() if n < 2]


def _check_geometry(plan: IclPlan) -> None:
    """Raise if prompts are too few to tell rule, label and demonstration apart."""
    if not plan.episodes[0].labels:
        return
    rule, label = numbered(plan.episodes)
    nothing = torch.rand(1, *label.shape, 1, generator=torch.Generator().manual_seed(0))
    try:
        factor_variance(nothing, rule=rule, label=label, shuffles=0, seed=plan.seed)
    except ValueError as error:
        raise ValueError(
            f"samples={len(plan.episodes)} with shots={plan.shots} are too few for the geometry. "
            f"{error}"
        ) from error


def numbered(episodes: Sequence[Episode]) -> tuple[torch.Tensor, torch.Tensor]:
    """The rule of every episode [batch], and every demonstration's label [batch demo], from 0.

    Args:
        episodes: Of a task with labels.
    """
    rules = {rule: i for i, rule in enumerate(dict.fromkeys(e.rule for e in episodes))}
    labels = {label: i for i, label in enumerate(episodes[0].labels)}
    return (
        torch.tensor([rules[e.rule] for e in episodes]),
        torch.tensor([[labels[output] for _, output in e.demonstrations] for e in episodes]),
    )
