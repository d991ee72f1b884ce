"""How a module is trained: the schedule of learning rates, and which optimiser takes what."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from spade_lens.checks import check_fields, check_number
from spade_lens.training.muon import Muon


@dataclass(frozen=True)
class TrainPlan:
    """How a module is trained.

    Muon takes the matrices between embedding and unembedding, in single precision; see
    :mod:`spade_lens.training.muon`. AdamW takes the rest. Source: Jordan et al., Muon (2024), with
    the scale of Liu et al. (arXiv 2502.16982), by which one learning rate and weight decay fit
    both.

    Example:
        >>> plan = TrainPlan(steps=100, warmup=10)
        >>> plan.factor(0), plan.factor(10), round(plan.factor(99), 2)
        (0.1, 1.0, 0.02)

    Args:
        steps: The number of updates.
        learning_rate: The highest learning rate of AdamW.
        matrix_rate: That of Muon; None gives the matrices to AdamW too.
        betas: AdamW's decay rates.
        weight_decay: Decoupled weight decay, of matrices alone.
        warmup: Over so many steps the learning rate rises linearly.
        final: The fraction of the learning rate at which the cosine ends.
        clip: The largest norm of the gradient.
        row_every: Updates between two rows of the history, and between validations.
        patience: Training stops after so many validations in a row without a lower loss, with the
            weights of the lowest; None trains to the end and keeps its weights.
        seed: The seed of everything that a step draws.

    Raises:
        TypeError: If a number is of a wrong type.
        ValueError: If a number is out of range, or the warm-up does not end before the last step.
    """

    steps: int
    learning_rate: float = 2e-3
    matrix_rate: float | None = 1e-2
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.0
    warmup: int = 100
    final: float = 0.02
    clip: float = 1.0
    row_every: int = 50
    patience: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_fields(self)
        for name, least in (("steps", 1), ("warmup", 0), ("row_every", 1)):
            check_number(name, getattr(self, name), least=least)
        if self.patience is not None:
            check_number("patience", self.patience, least=1)
        for name in ("learning_rate", "matrix_rate", "weight_decay", "final", "clip"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise ValueError(f"{name}={value} was given; expected a finite number, 0 or more.")
        if self.warmup >= self.steps:
            raise ValueError(
                f"warmup={self.warmup} was given for steps={self.steps}; expected fewer steps of "
                "warm-up than of training."
            )

    @property
    def described(self) -> dict[str, Any]:
        """All that decides a run, ready for JSON; what stops nothing is left out."""
        return {k: v for k, v in asdict(self).items() if k != "patience" or v is not None}

    def factor(self, step: int) -> float:
        """Return the fraction of the highest learning rate at a step, counted from 0."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - 1 - self.warmup)
        return self.final + (1 - self.final) * (1 + math.cos(math.pi * done)) / 2


def make_optimisers(
    module: nn.Module, parameters: Mapping[str, nn.Parameter], plan: TrainPlan
) -> list[torch.optim.Optimizer]:
    """Return Muon for the matrices between embedding and unembedding, and AdamW for the rest."""
    ends: list[Any] = [m.weight for m in module.modules() if isinstance(m, nn.Embedding)]
    for name in ("get_input_embeddings", "get_output_embeddings"):
        end = getattr(module, name, lambda: None)()
        ends += [] if end is None else [end.weight]
    of_ends = {id(weight) for weight in ends}
    inner = [p for p in parameters.values() if p.ndim == 2 and id(p) not in of_ends]
    matrices = inner if plan.matrix_rate is not None else []
    taken = {id(p) for p in matrices}
    rest: list[nn.Parameter] = [p for p in parameters.values() if id(p) not in taken]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in rest if p.ndim == 2], "weight_decay": plan.weight_decay},
        {"params": [p for p in rest if p.ndim != 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    made: list[torch.optim.Optimizer] = []
    if groups:
        made.append(torch.optim.AdamW(groups, lr=plan.learning_rate, betas=plan.betas))
    if matrices:
        made.append(Muon(matrices, float(plan.matrix_rate or 0), weight_decay=plan.weight_decay))
    return made
