"""What a study of early exit will do, checked as far as that goes before a model is loaded."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from spade_lens import storage
from spade_lens.exits.choose import prompts_needed
from spade_lens.exits.keep_search import keep_family
from spade_lens.lenses.keep import KeepRule
from spade_lens.prompts.prompt import Prompt
from spade_lens.tasks.decisions.decision_task import DecisionTask
from spade_lens.tasks.resolve import TaskLike, as_decisions

LOSSES: tuple[float | None, ...] = (None, 0.01)
"""Best accuracy, and a loss of at most one point: the two that the paper reports."""

_LAYERS = 8

_ANY = Prompt(tokens=(0,), spans={"query": (), "labels": ()})
"""Decision tasks' prompts have these spans, which tell what keep sets there are."""

LEARNED = re.compile(r"(attention|learned) ([1-9]\d*)")
"""Names of keep sets that are ranked or learned on calibration prompts."""


@dataclass(frozen=True)
class ExitPlan:
    """A study of one task.

    Args:
        task: The task, in splits that never mix.
        shots: Demonstrations in every prompt.
        calibration: How many prompts everything is chosen on.
        samples: How many other prompts it is measured on.
        losses: The losses of accuracy wanted; None for best accuracy.
        keep: The keep sets to choose from, by name or as a mapping; None for all of
            :func:`~spade_lens.exits.keep_family`.
        layers: The candidate layers; None for eight, evenly.
        guarantee: The loss to be guaranteed; None for no guarantee.
        risk: The chance that the guarantee fails.
        race: How many of the prompts are run against the clock.
        rounds: How many times; 0 measures no time.
        max_tokens: Prompts of more tokens are passed over.
        seed: Of the sampling and the bootstrap.
        out: The folder for results, which exists and can be written.
    """

    task: DecisionTask
    shots: int
    calibration: int
    samples: int
    losses: tuple[float | None, ...]
    keep: tuple[str, ...] | Mapping[str, KeepRule] | None
    layers: tuple[int, ...] | None
    guarantee: float | None
    risk: float
    race: int
    rounds: int
    max_tokens: int | None
    seed: int
    out: Path

    @property
    def config(self) -> dict[str, Any]:
        """What decides the results, ready for JSON."""
        return {
            "task": self.task.name,
            "source": self.task.source,
            "shots": self.shots,
            "calibration": self.calibration,
            "samples": self.samples,
            "losses": list(self.losses),
            "keep": "auto" if self.keep is None else list(self.keep),
            "layers": None if self.layers is None else list(self.layers),
            "guarantee": self.guarantee,
            "risk": self.risk,
            "race": self.race,
            "rounds": self.rounds,
            "max_tokens": self.max_tokens,
            "seed": self.seed,
        }

    def check_guarantee(self, calibration: int) -> None:
        """Raise if so many calibration prompts cannot guarantee what is wanted.

        Raises:
            ValueError: Then, with the number that is needed.
        """
        if self.guarantee is None:
            return
        needed = 2 * prompts_needed(loss=self.guarantee, risk=self.risk)
        if calibration < needed:
            raise ValueError(
                f"Task {self.task.name!r} has {calibration} calibration prompts here; to guarantee "
                f"a loss of at most {self.guarantee} at risk {self.risk} takes {needed}: half to "
                "choose, half to certify. Give more, or a larger guarantee or risk."
            )

    def candidate_layers(self, n_layers: int) -> tuple[int, ...]:
        """The candidate layers of a model with so many blocks.

        Raises:
            ValueError: If one that was asked for is out of range.
        """
        if self.layers is None:
            return even_layers(n_layers)
        outside = [layer for layer in self.layers if not 0 <= layer < n_layers]
        if outside:
            raise ValueError(
                f"Candidate layers {list(self.layers)} were asked for; expected layers from 0 to "
                f"{n_layers - 1}: at layer {n_layers} there is nothing left to exit from."
            )
        return self.layers


def even_layers(n_layers: int) -> tuple[int, ...]:
    """The default candidate layers: eight at most, evenly, where early exit saves something.

    Example:
        >>> even_layers(30)
        (6, 9, 12, 15, 18, 21, 24, 27)

    Args:
        n_layers: The number of the model's blocks.
    """
    step = max(1, n_layers // (_LAYERS + 2))
    return tuple(sorted(range(n_layers - step, 0, -step)[:_LAYERS]))


def _keep(
    keep: str | Sequence[str] | Mapping[str, KeepRule],
) -> tuple[str, ...] | Mapping[str, KeepRule] | None:
    """The keep sets asked for; None for all of the family.

    Raises:
        ValueError: If there is none of a name.
    """
    if isinstance(keep, Mapping):
        return keep
    names = (keep,) if isinstance(keep, str) else tuple(keep)
    if names == ("auto",):
        return None
    known = [*keep_family([_ANY])]
    unknown = [n for n in names if n not in known and not LEARNED.fullmatch(n)]
    if unknown or not names:
        raise ValueError(
            f"There is no keep set {unknown}. Expected 'auto' or some of {known}, 'attention N' "
            "and 'learned N'."
        )
    return names


def plan_exit(
    task: TaskLike,
    *,
    shots: int | None = None,
    calibration: int = 150,
    samples: int = 200,
    losses: Sequence[float | None] = LOSSES,
    keep: str | Sequence[str] | Mapping[str, KeepRule] = "auto",
    layers: Sequence[int] | None = None,
    guarantee: float | None = None,
    risk: float = 0.05,
    race: int = 32,
    rounds: int = 9,
    max_tokens: int | None = None,
    seed: int = 0,
    out: str | PathLike[str] = "spade-lens-exit",
) -> ExitPlan:
    """Check the arguments of :func:`~spade_lens.studies.exit_study` before compute is spent.

    Args:
        task: As for :func:`spade_lens.task`; decisions or word pairs.
        shots: Demonstrations in every prompt; by default the task's own.
        calibration: How many prompts everything is chosen on; fewer where the split has fewer.
        samples: How many other prompts it is measured on; likewise.
        losses: The losses of accuracy wanted; None for best accuracy.
        keep: Names of keep sets (``"attention N"`` and ``"learned N"`` among them), or keep sets
            by name; ``"auto"`` for all of :func:`~spade_lens.exits.keep_family`.
        layers: The candidate layers; by default eight, evenly.
        guarantee: A loss to be guaranteed; half of the calibration prompts choose then, and the
            other half certify. None by default.
        risk: The chance that the guarantee fails.
        race: How many of the prompts are run against the clock.
        rounds: How many times; 0 measures no time.
        max_tokens: Prompts of more tokens are passed over.
        seed: Of the sampling and the bootstrap.
        out: The folder for results.

    Raises:
        ValueError: If a number is out of range, the calibration prompts are too few for the
            guarantee, there is no such task, or ``out`` cannot be written.
        DownloadError: If the task's data could not be had.
    """
    found = as_decisions(task, shots=shots)
    sizes = found.split_sizes()
    for name, value in {"calibration": calibration, "samples": samples, "race": race}.items():
        if value < 1:
            raise ValueError(f"{name}={value} was given; expected at least 1.")
    if rounds < 0 or seed < 0:
        raise ValueError(f"rounds={rounds}, seed={seed} were given; both are 0 or more.")
    for name, share in {"guarantee": guarantee, "risk": risk}.items():
        if share is not None and not 0 < share < 1:
            raise ValueError(f"{name}={share} was given; expected a number between 0 and 1.")
    if not losses or any(loss is not None and not 0 <= loss < 1 for loss in losses):
        raise ValueError(
            f"losses={list(losses)} was given; expected at least one loss from 0 to 1, or None for "
            "best accuracy."
        )
    calibration = min(calibration, sizes["calibration"])
    samples = min(samples, sizes["test"])
    plan = ExitPlan(
        task=found,
        shots=found.shots if shots is None else shots,
        calibration=calibration,
        samples=samples,
        losses=tuple(losses),
        keep=_keep(keep),
        layers=None if layers is None else tuple(sorted(set(layers))),
        guarantee=guarantee,
        risk=risk,
        race=min(race, samples),
        rounds=rounds,
        max_tokens=max_tokens,
        seed=seed,
        out=storage.output_folder(out),
    )
    plan.check_guarantee(calibration)
    return plan
