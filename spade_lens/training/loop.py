"""Train a module: one loop for everything that this library trains.

The random numbers of a step depend on the seed and the step alone. So a run that was killed goes
on from its checkpoint as if nothing had happened, and no state of a generator is stored.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from spade_lens.checks import visible
from spade_lens.settings import Settings, progress_bar, scoped
from spade_lens.storage.checkpoint import Checkpoint, kept_folder
from spade_lens.training.plan import TrainPlan, make_optimisers

if TYPE_CHECKING:
    import pandas as pd

_STAGE = "training"
_COLUMNS = ("update", "train_loss", "validation_loss", "learning_rate", "seconds")
_FOR_VALIDATION = 2**31  # beyond all steps, so that validation draws numbers of its own


@scoped
def train(
    module: nn.Module,
    loss: Callable[[int], Tensor],
    plan: TrainPlan,
    *,
    validate: Callable[[], float] | None = None,
    checkpoint: str | PathLike[str] | None = None,
    about: Mapping[str, Any] | None = None,
    settings: Settings | None = None,
) -> "pd.DataFrame":
    """Train a module in place, and return the history of its losses.

    Only parameters that require a gradient are trained and stored. The module keeps its device and
    dtype, and has the mode (training or evaluation) afterwards that it had before.

    Example:
        >>> module = torch.nn.Linear(3, 1)
        >>> def loss(step: int) -> torch.Tensor:
        ...     x = torch.randn(8, 3)
        ...     return (module(x) - x.sum(dim=-1, keepdim=True)).square().mean()
        >>> history = train(module, loss, TrainPlan(200, warmup=10, matrix_rate=0.1))
        >>> bool(history.train_loss.iloc[-1] < 0.1 * history.train_loss.iloc[0])
        True

    Args:
        module: What is trained.
        loss: Returns the loss of a step, counted from 0. It draws its batch from torch's own
            generator, which is seeded for the step.
        plan: How it is trained.
        validate: Returns the loss on held-out data. It runs without gradients, in evaluation mode,
            with the same random numbers every time.
        checkpoint: A folder to go on from. A run that is done stays there: run again, it returns
            what it had.
        about: What else decides the result (the data, the loss), ready for JSON. A checkpoint of
            another run is refused.
        settings: Whether progress is shown; see :class:`spade_lens.Settings`.

    Returns:
        Columns ``update`` (the number of updates so far), ``train_loss``, ``validation_loss``,
        ``learning_rate`` and ``seconds``, one row for every ``row_every`` updates and the last.

    Raises:
        TypeError: If an argument is of another type, or the loss is no tensor with a gradient.
        ValueError: If nothing can be trained, or the checkpoint is of another run.
        FloatingPointError: If a loss or gradient is not finite. Such a step changes no weight, and
            the checkpoint holds weights with a finite loss and gradient.
    """
    import pandas as pd

    if not isinstance(module, nn.Module):
        raise TypeError(
            f"module={module!r:.60} was given; expected a torch module. A model of this library "
            "has it as model.original."
        )
    state = _State(module, plan)
    run = {
        **asdict(plan),
        "optimisers": [type(optimiser).__name__ for optimiser in state.optimisers],
        "parameters": {name: list(p.shape) for name, p in state.parameters.items()},
        "about": dict(about or {}),
    }
    folder = kept_folder(checkpoint, None)
    kept = Checkpoint(folder, run)
    saved = kept.load(_STAGE, next(iter(state.parameters.values())).device)
    if saved is not None:
        state.put_back(saved)
    was_training = module.training
    module.train()
    try:
        with progress_bar(total=plan.steps, initial=state.step, desc="train", unit="step") as bar:
            while state.step < plan.steps:
                began = time.perf_counter()
                value = _gradients(state, loss, plan, "nowhere" if folder is None else str(folder))
                # Here the weights are known to be good: their loss and gradient are finite.
                kept.save(_STAGE, state.tensors(), now=state.step == 0)
                state.update(value, time.perf_counter() - began)
                if state.step % plan.row_every == 0 or state.step == plan.steps:
                    state.add_row(_validated(module, validate, plan.seed))
                    bar.set_postfix_str(f"loss {state.rows[-1][1]:.4f}")
                bar.update()
        if saved is None or int(saved["step"]) < plan.steps:
            state.begin()
            kept.save(_STAGE, state.tensors(), now=True)
    finally:
        module.train(was_training)
        module.zero_grad(set_to_none=True)
    return pd.DataFrame(state.rows, columns=list(_COLUMNS)).astype({"update": int})


class _State:
    """All that changes while a module is trained."""

    def __init__(self, module: nn.Module, plan: TrainPlan) -> None:
        self.parameters = {n: p for n, p in module.named_parameters() if p.requires_grad}
        if not self.parameters:
            raise ValueError(
                f"{type(module).__name__} has no parameter that requires a gradient; expected at "
                "least one to train."
            )
        stored = module.state_dict()
        self._buffers = {n: b for n, b in module.named_buffers() if n in stored}
        self._before: dict[str, Tensor] = {}
        self._plan = plan
        self.optimisers = make_optimisers(module, self.parameters, plan)
        self._highest = [group["lr"] for o in self.optimisers for group in o.param_groups]
        self.step, self._sum, self._count, self._seconds = 0, 0.0, 0, 0.0
        self.rows: list[tuple[float, ...]] = []

    def begin(self) -> None:
        """Remember the buffers, which a run in training mode may change (batch norm)."""
        self._before = {name: buffer.clone() for name, buffer in self._buffers.items()}

    @torch.no_grad()
    def take_back(self) -> None:
        """Undo what the step that has begun did to the buffers."""
        for name, buffer in self._before.items():
            self._buffers[name].copy_(buffer)

    def update(self, loss: float, seconds: float) -> None:
        """Change the weights by their gradients."""
        began, factor = time.perf_counter(), self._plan.factor(self.step)
        groups = [group for optimiser in self.optimisers for group in optimiser.param_groups]
        for group, highest in zip(groups, self._highest, strict=True):
            group["lr"] = highest * factor
        for optimiser in self.optimisers:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        self.step += 1
        self._sum, self._count = self._sum + loss, self._count + 1
        self._seconds += seconds + time.perf_counter() - began

    def add_row(self, validation: float) -> None:
        """Add a row to the history."""
        rate = self._plan.learning_rate * self._plan.factor(self.step - 1)
        mean = self._sum / self._count
        self.rows.append((float(self.step), mean, validation, rate, self._seconds))
        self._sum, self._count = 0.0, 0

    def tensors(self) -> dict[str, Tensor]:
        """Return everything by name, as a checkpoint stores it: as it was before the step."""
        found: dict[str, Tensor] = {
            f"parameter/{n}": p.detach() for n, p in self.parameters.items()
        }
        found |= {f"buffer/{n}": b for n, b in self._before.items()}
        for k, optimiser in enumerate(self.optimisers):
            for index, values in optimiser.state_dict()["state"].items():
                for name, value in values.items():
                    found[f"optimiser/{k}/{index}/{name}"] = torch.as_tensor(value)
        sums = [self._sum, self._count, self._seconds]
        return found | {
            "step": torch.tensor(self.step),
            "sums": torch.tensor(sums, dtype=torch.float64),
            "rows": torch.tensor(self.rows, dtype=torch.float64).reshape(-1, len(_COLUMNS)),
        }

    @torch.no_grad()
    def put_back(self, saved: Mapping[str, Tensor]) -> None:
        """Become what was stored."""
        for kind, own in (("parameter", self.parameters), ("buffer", self._buffers)):
            for name, tensor in own.items():
                tensor.copy_(saved[f"{kind}/{name}"])
        for k, optimiser in enumerate(self.optimisers):
            states: dict[int, dict[str, Tensor]] = {}
            for key, value in saved.items():
                if key.startswith(f"optimiser/{k}/"):
                    _, _, index, name = key.split("/")
                    states.setdefault(int(index), {})[name] = value
            groups = optimiser.state_dict()["param_groups"]
            optimiser.load_state_dict({"state": states, "param_groups": groups})
        self.step = int(saved["step"])
        self._sum, count, self._seconds = saved["sums"].tolist()
        self._count = int(count)
        self.rows = [tuple(row) for row in saved["rows"].tolist()]


def _gradients(state: _State, loss: Callable[[int], Tensor], plan: TrainPlan, folder: str) -> float:
    """Compute and clip the gradients of a step; return its loss."""
    state.begin()
    with _seeded(plan.seed, state.step):
        found = loss(state.step)
        if not isinstance(found, Tensor) or found.numel() != 1 or not found.requires_grad:
            raise TypeError(
                f"loss({state.step}) returned {visible(repr(found))[:80]}; expected a tensor of "
                "one number that the parameters have gradients of."
            )
        found.backward()
    norm = nn.utils.clip_grad_norm_(state.parameters.values(), plan.clip)
    value = float(found.detach())
    if not (math.isfinite(value) and bool(norm.isfinite())):
        state.take_back()
        raise FloatingPointError(
            f"At step {state.step} the loss is {value} and the norm of its gradient {float(norm)}; "
            "expected finite numbers. The step changed no weight. Checkpoint with the last good "
            f"weights: {folder}. Lower the learning rate, or look at this step's data."
        )
    return value


def _validated(module: nn.Module, validate: Callable[[], float] | None, seed: int) -> float:
    if validate is None:
        return math.nan
    module.eval()
    try:
        with _seeded(seed, _FOR_VALIDATION), torch.no_grad():
            return float(validate())
    finally:
        module.train()


@contextmanager
def _seeded(seed: int, step: int) -> Iterator[None]:
    """Seed torch's own generator for a step, and give the user's state back afterwards."""
    # torch's generator on the CPU takes 32 bits of a seed, so both numbers are hashed.
    [of_both] = np.random.SeedSequence([seed, step]).generate_state(1)
    with torch.random.fork_rng():
        torch.manual_seed(int(of_both))
        yield
