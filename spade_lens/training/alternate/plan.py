"""How fine-tuning and preference training take turns, and what one keeps of the other."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from spade_lens.checks import check_fields, check_number
from spade_lens.training.plan import TrainPlan

Objective = Literal["sft", "preference", "joint"]


@dataclass(frozen=True)
class Phase:
    """One phase: its number from 1, what it trains, and on which split of the data."""

    number: int
    objective: Objective
    split: int


@dataclass(frozen=True)
class AlternatePlan:
    """How fine-tuning and preference training take turns.

    Whatever the schedule, both kinds of data get as many steps. A guard acts from the second phase
    on, and needs phases of one objective each.

    Example:
        >>> from spade_lens.training import AlternatePlan
        >>> [(phase.objective, phase.split) for phase in AlternatePlan(rounds=2).phases()]
        [('sft', 0), ('preference', 0), ('sft', 1), ('preference', 1)]

    Args:
        schedule: ``"alternating"`` phases, one of each for every split; ``"sequential"``, the same
            phases with all fine-tuning before all preferences; or ``"joint"``, phases of the sum
            of both losses, half as many.
        guard: What a phase keeps of the one before. ``"ewc"``: a penalty on the change since the
            phase's start, by importance; ``"l2"``: one of equal total strength, the same for all
            tensors; ``"freeze"``: the most important tensors stay as they are.
        strength: How strong the penalty is: the sum over tensors of its weights.
        temperature: Importances are a softmax of mean squared changes over this; None divides them
            by their sum instead. The released code has
            :data:`~spade_lens.training.alternate.importance.RELEASED_TEMPERATURE`.
        frozen: The fraction of tensors that ``"freeze"`` keeps.
        rounds: The number of splits.
        steps: Updates of a phase.
        batch: Items that a step trains on, of each kind of data.
        layer: The layer from which blocks are trained; four below the last by default.
        rank: The rank of the updates.
        beta: How strongly DPO holds to its reference: small is loosely.
        preference_weight: A factor of the joint schedule's preference loss. In the others it
            multiplies the learning rate of preference phases, as AdamW ignores a factor of a loss.
        learning_rate: The highest learning rate.
        seed: The seed of the updates' first values and of all batches.

    Raises:
        TypeError: If a value is of a wrong type.
        ValueError: If one is out of range, or a guard is given to the joint schedule.
    """

    schedule: Literal["alternating", "sequential", "joint"] = "alternating"
    guard: Literal["none", "ewc", "l2", "freeze"] = "none"
    strength: float = 100.0
    temperature: float | None = None
    frozen: float = 0.2
    rounds: int = 3
    steps: int = 10
    batch: int = 8
    layer: int | None = None
    rank: int = 8
    beta: float = 0.1
    preference_weight: float = 1.0
    learning_rate: float = 2e-3
    seed: int = 0

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("rounds", "steps", "batch", "rank"):
            check_number(name, getattr(self, name), least=1)
        for name in ("temperature", "beta", "learning_rate"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name}={value} was given; expected a finite number above 0.")
        for name in ("strength", "preference_weight"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise ValueError(f"{name}={value} was given; expected a finite number, 0 or more.")
        if not 0 <= self.frozen < 1:
            raise ValueError(
                f"frozen={self.frozen} was given; expected a fraction from 0 to below 1."
            )
        if self.schedule == "joint" and self.guard != "none":
            raise ValueError(
                f"guard={self.guard!r} was given for schedule='joint'; expected 'none', since "
                "nothing is trained before that could be kept."
            )

    def phases(self) -> Iterator[Phase]:
        """Go through the phases in their order."""
        every = range(self.rounds)
        order: list[tuple[Objective, int]] = [
            (objective, split) for split in every for objective in ("sft", "preference")
        ]
        if self.schedule == "sequential":
            order.sort(key=lambda phase: phase[0], reverse=True)
        elif self.schedule == "joint":
            order = [("joint", split) for split in every]
        for number, (objective, split) in enumerate(order, start=1):
            yield Phase(number, objective, split)

    def training(self, phase: Phase) -> TrainPlan:
        """Return how a phase is trained: AdamW, two steps of warm-up, a cosine to 2%."""
        [seed] = np.random.SeedSequence([self.seed, phase.number]).generate_state(1)
        of_preference = phase.objective == "preference"
        return TrainPlan(
            self.steps,
            learning_rate=self.learning_rate * (self.preference_weight if of_preference else 1.0),
            matrix_rate=None,
            betas=(0.9, 0.95),
            warmup=min(2, self.steps - 1),
            row_every=self.steps,
            seed=int(seed),
        )
