"""What a study of early exit will do, checked before a model is loaded."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from os import PathLike
from typing import Any

from spade_lens.checks import check_fields
from spade_lens.exits.choice import prompts_needed
from spade_lens.exits.confidence import Confidence
from spade_lens.exits.families import FamiliesLike, named_families
from spade_lens.exits.keep_search import named_keeps
from spade_lens.lenses.keep import KeepRule
from spade_lens.lenses.lens import Lens
from spade_lens.prompts.prompt import Prompt
from spade_lens.studies.base import Plan
from spade_lens.tasks.decisions.decision_task import DecisionTask
from spade_lens.tasks.resolve import TaskLike, as_decisions

_LAYERS = 8

_ANY = Prompt(tokens=(0,), spans={"query": (), "labels": ()})
"""A prompt with the spans of decision tasks, which say what keep sets there are."""


@dataclass(frozen=True)
class ExitPlan(Plan):
    """Early exit on one task: choose on calibration prompts, measure on others, time it.

    Example:
        >>> plan = ExitPlan("sst2", losses=(0.01,), out="sst2")  # doctest: +SKIP
        >>> sl.study(model, plan).tables["points"]  # doctest: +SKIP

    Args:
        task: A decision task or word pairs, or the name of either.
        checks: What is checked: lenses or confidences, or names of lenses (``"l-spade"``,
            ``"tuned"``, ``"logit"``, the folder of a fitted one). The first stands for the
            paper's, which is the entropy of L-SPADE; it is fitted where there is none yet.
        shots: Demonstrations in every prompt; by default the task's own.
        calibration: Prompts that everything is chosen on; fewer where the split has fewer.
        samples: Other prompts, to measure on; likewise.
        losses: The losses of accuracy allowed; None for best accuracy. By default the two that
            the paper reports.
        keep: Names of keep sets (``"attention N"`` and ``"learned N"`` among them), or keep sets
            by name; ``"auto"`` for all of :func:`~spade_lens.exits.keep_search.keep_family`.
        layers: The candidate layers; by default eight, evenly.
        families: The policies to choose from: names of families, policies of your own, or policies
            by name, as in :func:`spade_lens.calibrate`. By default all families.
        guarantee: A loss to be guaranteed. Half of the calibration prompts choose then, and the
            other half certify.
        risk: The chance that the guarantee fails.
        learn_from: Calibration prompts that keep sets are learned from.
        timed: Prompts of the wall-clock comparison.
        rounds: Rounds of the wall-clock comparison; 0 measures no time.
        max_tokens: Longer prompts are left out.
        seed: Seed of the sampling.
        out: The folder for results.

    Raises:
        ValueError: If a number is out of range, the calibration prompts are too few for the
            guarantee, there is no such task, or ``out`` cannot be written.
        DownloadError: If the task's data cannot be downloaded.
    """

    task: TaskLike
    checks: Sequence[str | Lens | Confidence] = ("l-spade",)
    shots: int | None = None
    calibration: int = 150
    samples: int = 200
    losses: Sequence[float | None] = (None, 0.01)
    keep: str | Sequence[str] | Mapping[str, KeepRule] = "auto"
    families: FamiliesLike | None = None
    guarantee: float | None = None
    risk: float = 0.05
    learn_from: int = 16
    timed: int = 32
    rounds: int = 9
    max_tokens: int | None = None
    out: str | PathLike[str] = field(default="spade-lens-exit", kw_only=True)

    def __post_init__(self) -> None:
        check_fields(self)
        self._check_counts("calibration", "samples", "timed", "learn_from")
        if self.rounds < 0:
            raise ValueError(f"rounds={self.rounds} was given; expected 0 or more.")
        for name in ("guarantee", "risk"):
            value = getattr(self, name)
            if value is not None and not 0 < value < 1:
                raise ValueError(f"{name}={value} was given; expected a number between 0 and 1.")
        if not self.losses or any(loss is not None and not 0 <= loss < 1 for loss in self.losses):
            raise ValueError(
                f"losses={list(self.losses)} was given; expected at least one loss from 0 to 1, "
                "or None for best accuracy."
            )
        if not self.checks:
            raise ValueError("checks=() was given; expected at least one lens to check.")
        wrong = [one for one in self.checks if not isinstance(one, str | Lens | Confidence)]
        if isinstance(self.checks, str) or wrong:
            raise TypeError(
                f"checks={self.checks!r} was given; expected lenses, confidences or names of "
                "lenses, in a list."
            )
        named_families(self.families)  # raises if there is no such family
        named_keeps([_ANY], self.keep)  # likewise
        sizes = self.decisions.split_sizes()
        samples = min(self.samples, sizes["test"])
        self._set(
            shots=self.decisions.shots if self.shots is None else self.shots,
            calibration=min(self.calibration, sizes["calibration"]),
            samples=samples,
            losses=tuple(self.losses),
            keep=self.keep if isinstance(self.keep, str | Mapping) else tuple(self.keep),
            timed=min(self.timed, samples),
        )
        self.check_guarantee(self.calibration)
        super().__post_init__()

    @cached_property
    def decisions(self) -> DecisionTask:
        """The task, in splits that never mix."""
        return as_decisions(self.task, shots=self.shots)

    @property
    def config(self) -> dict[str, Any]:
        """The arguments that decide the results, ready for JSON."""
        names = (
            *("shots", "calibration", "samples", "losses", "guarantee", "risk", "learn_from"),
            *("timed", "rounds", "max_tokens", "seed"),
        )
        return {
            "task": self.decisions.name,
            "source": self.decisions.source,
            "families": list(named_families(self.families)),
            "keep": self.keep if isinstance(self.keep, str) else list(self.keep),
            "layers": self.chosen_layers,
            **{name: getattr(self, name) for name in names},
        }

    def check_guarantee(self, calibration: int) -> None:
        """Check that so many calibration prompts can guarantee the loss asked for."""
        if self.guarantee is None:
            return
        needed = 2 * prompts_needed(loss=self.guarantee, risk=self.risk)
        if calibration < needed:
            raise ValueError(
                f"Task {self.decisions.name!r} has {calibration} calibration prompts here; to "
                f"guarantee a loss of at most {self.guarantee} at risk {self.risk} takes {needed}: "
                "half to choose, half to certify. Give more, or a larger guarantee or risk."
            )

    def candidate_layers(self, n_layers: int) -> tuple[int, ...]:
        """Return the candidate layers of a model with so many blocks."""
        self.check_layers(n_layers)
        return even_layers(n_layers) if self.chosen_layers is None else self.chosen_layers

    def check_layers(self, n_layers: int) -> None:
        """Check the candidate layers against a model's."""
        layers = self.chosen_layers or ()
        if any(layer >= n_layers for layer in layers) or list(layers) != sorted(layers):
            raise ValueError(
                f"Candidate layers {list(layers)} were asked for; expected layers from 0 to "
                f"{n_layers - 1}, ascending; at layer {n_layers} nothing is left to exit from."
            )


def even_layers(n_layers: int) -> tuple[int, ...]:
    """Return the default candidate layers: eight at most, evenly, where early exit saves something.

    Example:
        >>> even_layers(30)
        (6, 9, 12, 15, 18, 21, 24, 27)
    """
    step = max(1, n_layers // (_LAYERS + 2))
    return tuple(sorted(range(n_layers - step, 0, -step)[:_LAYERS]))
