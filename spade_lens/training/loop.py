"""Train a module: one loop for everything that this library trains.

The random numbers of a step depend on the seed and the step alone. So a run that was killed goes
on from its checkpoint as if nothing had happened, and no state of a generator is stored.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from spade_lens.checks import visible
from spade_lens.settings import Settings, progress_bar, scoped
from spade_lens.storage.checkpoint import Checkpoint, kept_folder
from spade_lens.training.plan import TrainPlan
from spade_lens.training.state import COLUMNS, State

if TYPE_CHECKING:
    import pandas as pd

_STAGE = "training"
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
        TypeError: If an argument is of another type, the loss is no tensor with a gradient, or
            ``validate`` returns no number.
        ValueError: If nothing can be trained, the checkpoint is of another run, or the plan has
            patience and nothing is validated.
        FloatingPointError: If a loss or gradient is not finite. Such a step changes no weight, and
            the checkpoint holds weights with a finite loss and gradient. Also if the plan has
            patience and the validation loss is not finite.
    """
    import pandas as pd

    if not isinstance(module, nn.Module):
        raise TypeError(
            f"module={module!r:.60} was given; expected a torch module. A model of this library "
            "has it as model.original."
        )
    if plan.patience is not None and validate is None:
        raise ValueError(
            f"patience={plan.patience} was given without validate=; expected a function that "
            "returns the loss on held-out data, which decides when to stop."
        )
    state = State(module, plan)
    run = {
        **plan.described,
        "optimisers": [type(optimiser).__name__ for optimiser in state.optimisers],
        "parameters": {name: list(p.shape) for name, p in state.parameters.items()},
        "about": dict(about or {}),
    }
    folder = kept_folder(checkpoint, None)
    kept = Checkpoint(folder, run)
    saved = kept.load(_STAGE, next(iter(state.parameters.values())).device)
    if saved is not None:
        state.put_back(saved)
    modes = {part: part.training for part in module.modules()}
    if not module.training:  # else parts that are in evaluation mode stay so
        module.train()
    try:
        with progress_bar(total=plan.steps, initial=state.step, desc="train", unit="step") as bar:
            while state.step < plan.steps and not state.stopped:
                began = time.perf_counter()
                value = _gradients(state, loss, plan, "nowhere" if folder is None else str(folder))
                # Here the weights are known to be good: their loss and gradient are finite.
                kept.save(_STAGE, state.tensors(), now=state.step == 0)
                state.update(value, time.perf_counter() - began)
                if state.step % plan.row_every == 0 or state.step == plan.steps:
                    validated = _validated(module, validate, plan.seed)
                    if plan.patience is not None and not math.isfinite(validated):
                        kept.save(_STAGE, state.tensors(), now=True)
                        state.take_best()
                        raise FloatingPointError(
                            f"After step {state.step} validate() gave {validated}, and "
                            f"patience={plan.patience} waits for it to fall. It must be finite. "
                            "The module has the weights of the lowest loss before."
                        )
                    state.add_row(validated)
                    bar.set_postfix_str(f"loss {state.rows[-1][1]:.4f}")
                bar.update()
        if saved is None or int(saved["step"]) < state.step:
            state.begin()
            kept.save(_STAGE, state.tensors(), now=True)
        state.take_best()
    finally:
        _restore(modes)
        module.zero_grad(set_to_none=True)
    return pd.DataFrame(state.rows, columns=list(COLUMNS)).astype({"update": int})


def _gradients(state: State, loss: Callable[[int], Tensor], plan: TrainPlan, folder: str) -> float:
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
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        with _seeded(seed, _FOR_VALIDATION), torch.no_grad():
            found: Any = validate()
    finally:
        _restore(modes)
    is_number = isinstance(found, int | float) or (isinstance(found, Tensor) and found.numel() == 1)
    if not is_number:
        raise TypeError(
            f"validate() returned {visible(repr(found))[:80]}; expected one number, the loss on "
            "held-out data."
        )
    return float(found)


def _restore(modes: Mapping[nn.Module, bool]) -> None:
    for part, training in modes.items():
        part.training = training


@contextmanager
def _seeded(seed: int, step: int) -> Iterator[None]:
    """Seed torch's own generator for a step, and give the user's state back afterwards."""
    # torch's generator on the CPU takes 32 bits of a seed, so both numbers are hashed.
    [of_both] = np.random.SeedSequence([seed, step]).generate_state(1)
    with torch.random.fork_rng():
        torch.manual_seed(int(of_both))
        yield
