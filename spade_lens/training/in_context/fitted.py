"""Train a network in context, and keep it where it is found again."""

from dataclasses import asdict, dataclass
from os import PathLike
from typing import TYPE_CHECKING

from spade_lens.checks import checked
from spade_lens.settings import Settings, scoped
from spade_lens.training.in_context.network import InContextNetwork, NetworkSize
from spade_lens.training.in_context.task import InContextTask
from spade_lens.training.loop import train
from spade_lens.training.plan import TrainPlan

if TYPE_CHECKING:
    import pandas as pd

_HELD_OUT = 256
RECIPE = TrainPlan(steps=3600)
"""Muon at 1e-2 and AdamW at 2e-3, a warm-up of 100 steps, a cosine to 2%: ours, for a CPU."""


@dataclass(frozen=True, eq=False)
class TrainedInContext:
    """A network that was trained, as it was before, and how it went.

    Args:
        network: The trained network, in evaluation mode.
        untrained: The same with its first weights, as a control.
        history: Losses, from :func:`spade_lens.training.train`.
    """

    network: InContextNetwork
    untrained: InContextNetwork
    history: "pd.DataFrame"


@scoped
@checked
def train_in_context(
    task: InContextTask,
    *,
    size: NetworkSize | None = None,
    plan: TrainPlan | None = None,
    batch: int = 32,
    checkpoint: str | PathLike[str] | None = None,
    settings: Settings | None = None,
) -> TrainedInContext:
    """Train a transformer on a task, with fresh prompts at every step.

    The default takes some minutes of one processor. A run that was killed goes on from its
    checkpoint.

    Example:
        >>> from spade_lens.training import InContextTask, TrainPlan, train_in_context
        >>> from spade_lens.training.in_context.network import NetworkSize
        >>> task = InContextTask(d_x=2, d_phi=2, examples=4)
        >>> trained = train_in_context(
        ...     task, size=NetworkSize(2, 16, 2), plan=TrainPlan(20, warmup=5, row_every=10)
        ... )
        >>> trained.history["update"].tolist()
        [10, 20]

    Args:
        task: The task.
        size: The size of the network, and the seed of its first weights.
        plan: How it is trained, and the seed of the prompts.
        batch: Prompts of a step.
        checkpoint: A folder to go on from, and in which the trained network is found again.
        settings: Whether progress is shown; see :class:`spade_lens.Settings`.

    Raises:
        TypeError: If an argument is of another type.
        ValueError: If the batch is empty, or the checkpoint is of another configuration.
        FloatingPointError: If a loss is not finite; the checkpoint holds the last good weights.
    """
    plan = RECIPE if plan is None else plan
    network, untrained = InContextNetwork(task, size), InContextNetwork(task, size)
    held_out = task.draw(_HELD_OUT, seed=task.seed + 1_000_003)

    def validate() -> float:
        return float((network(held_out) - held_out.targets).square().mean())

    history = train(
        network,
        lambda step: network.loss(batch),
        plan,
        validate=validate,
        checkpoint=checkpoint,
        about={"task": asdict(task), "size": asdict(network.size), "batch": batch},
    )
    return TrainedInContext(network.eval(), untrained.eval(), history)
