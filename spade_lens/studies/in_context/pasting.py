"""Pasting: do the upper blocks alone learn linear tasks in context?

The blocks below the cut are dropped. In their place stands a small input layer, trained on linear
tasks (Phi is the identity) while the upper blocks stay as they are. Source: Guo et al. (arXiv
2310.10616). Ours are the controls: random upper blocks, and one trainable block alone.
"""

import copy
from collections.abc import Mapping
from os import PathLike
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from spade_lens.stats.intervals import mean_interval
from spade_lens.training.in_context.baselines import baselines
from spade_lens.training.in_context.network import InContextNetwork, NetworkSize
from spade_lens.training.in_context.task import Drawn, InContextTask
from spade_lens.training.loop import train
from spade_lens.training.plan import TrainPlan

UPPERS = ("trained", "random", "one trainable block")


def linear_task(task: InContextTask) -> InContextTask:
    """Return the task without a representation, of inputs that upper blocks can take for Phi."""
    return InContextTask(
        d_x=task.d_phi,
        d_phi=task.d_phi,
        examples=task.examples,
        depth=0,
        noise=task.noise,
        seed=task.seed,
    )


class PastedNetwork(nn.Module):
    """Upper blocks behind a linear map of tokens and learned positions.

    Args:
        network: What the blocks are of. A copy is made; its blocks and head are not trained.
        task: The linear task.
        cut: The layer at which the upper blocks begin.
        copied: Whether a y-token also gets the input of the x-token before it.
    """

    def __init__(
        self, network: InContextNetwork, task: InContextTask, cut: int, *, copied: bool
    ) -> None:
        super().__init__()
        self.task, self.cut, self.copied = task, cut, copied
        width, generator = network.size.d_model, torch.Generator().manual_seed(network.size.seed)
        self.read_in = nn.Linear(task.d_token, width, bias=False)
        weight = torch.randn(width, task.d_token, generator=generator)
        self.read_in.weight = nn.Parameter(weight * task.d_token**-0.5)
        self.positions = nn.Parameter(torch.zeros(task.n_tokens, width))
        self.upper = copy.deepcopy(network).requires_grad_(False)

    def get_input_embeddings(self) -> nn.Module:
        """Return the map of tokens, which AdamW trains."""
        return self.read_in

    def tokens(self, drawn: Drawn) -> Float[Tensor, "prompt pos d_token"]:
        """Return tokens: (x, 0, 0) and (x or 0, y, 1)."""
        tokens = self.task.tokens(drawn)
        if self.copied:
            tokens[:, 1::2, : self.task.d_x] = drawn.inputs
        return tokens

    def forward(self, drawn: Drawn) -> Float[Tensor, "prompt example d_y"]:
        """Return the prediction at every input."""
        resid = self.read_in(self.tokens(drawn)) + self.positions
        resid = self.upper.run_blocks(resid, self.cut, self.upper.size.n_layers)
        return self.upper.predict(resid[:, ::2])

    @torch.no_grad()
    def start_like(self, task: InContextTask, drawn: Drawn) -> None:
        """Set the input layer to the regression of the residuals at the cut on Phi(x) and y.

        So inputs of the linear task take the place of Phi(x). Ours.

        Args:
            task: The task that the network was made for.
            drawn: Prompts of it.
        """
        resid = self.upper.residuals(drawn)[self.cut]
        as_phi = Drawn(task.features(drawn), drawn.targets, drawn.weights, drawn.which)
        tokens = self.tokens(as_phi)
        places = F.one_hot(torch.arange(tokens.shape[1])).expand(len(tokens), -1, -1)
        # The last number of a token says which kind it is, as the position does.
        known = torch.cat([tokens[..., :-1], places.to(tokens)], dim=-1).flatten(0, 1).double()
        gram = known.T @ known + 1e-3 * len(known) * torch.eye(known.shape[1]).double()
        weight = torch.linalg.solve(gram, known.T @ resid.flatten(0, 1).double()).float()
        d = tokens.shape[-1] - 1
        self.read_in.weight[:, :d], self.read_in.weight[:, d] = weight[:d].T, 0.0
        self.positions.copy_(weight[d:])


def paste(
    trained: InContextNetwork,
    untrained: InContextNetwork,
    cut: int,
    steps: int,
    *,
    n: int = 1000,
    seed: int = 0,
    checkpoint: str | PathLike[str] | None = None,
) -> pd.DataFrame:
    """Return errors on linear tasks of upper blocks behind trained input layers.

    Args:
        trained: The trained network.
        untrained: The same with its first weights: the control.
        cut: The layer at which the upper blocks begin.
        steps: Steps of training of every input layer.
        n: Prompts to measure on.
        seed: Their seed.
        checkpoint: A folder to go on from.

    Returns:
        The columns ``upper`` (what the upper blocks are), ``read_in`` (the input layer),
        ``parameters`` (how many are trained), ``prompt`` and ``squared_error``, the mean over all
        numbers of examples.

    Raises:
        ValueError: If the cut is no layer below the last.
    """
    task = trained.task
    if not 0 < cut < trained.size.n_layers:
        raise ValueError(
            f"cut={cut} was given; expected a layer from 1 to {trained.size.n_layers - 1}."
        )
    linear = linear_task(task)
    drawn, basis = linear.draw(n, seed=seed), task.draw(512, seed=seed + 1)
    made: dict[tuple[str, str], nn.Module] = {}
    for upper, network in (("trained", trained), ("random", untrained)):
        for read_in, copied in (("linear", False), ("linear, x copied", True)):
            pasted = PastedNetwork(network, linear, cut, copied=copied)
            pasted.start_like(task, basis)
            made[upper, f"{read_in}, not trained"] = pasted
            made[upper, read_in] = pasted
    alone = InContextNetwork(linear, NetworkSize(1, **_width(trained)))
    made["one trainable block", "linear"] = alone
    frames = []
    for (upper, read_in), module in made.items():
        if not read_in.endswith("not trained"):
            _train(module, linear, steps, seed, checkpoint, f"{upper}-{read_in}-{cut}")
        frames.append(_errors(module, drawn, upper=upper, read_in=read_in))
    for name, predictions in baselines(linear, drawn, seed=seed).items():
        errors = (predictions - drawn.targets).square().mean(dim=(1, 2))
        frames.append(_frame(errors, upper="none", read_in=name, parameters=0))
    return pd.concat(frames, ignore_index=True)


def paired_differences(pasted: pd.DataFrame) -> pd.DataFrame:
    """Return how much lower errors behind trained blocks are than behind each control.

    Columns ``read_in``, ``control`` (the upper blocks compared with), ``difference`` (the control's
    error minus that of trained blocks, paired by prompt), the ends of its interval, and ``n``.
    """
    by = {
        key: rows["squared_error"].to_numpy() for key, rows in pasted.groupby(["upper", "read_in"])
    }
    rows = []
    for (upper, read_in), errors in by.items():
        if upper != "trained":
            continue
        for control, key in (("random", read_in), ("one trainable block", "linear")):
            values: np.ndarray[tuple[int], np.dtype[np.float64]] = by[control, key] - errors
            low, high = mean_interval(values)
            rows.append(
                {"read_in": read_in, "upper": control, "difference": float(values.mean())}
                | {"difference_low": low, "difference_high": high, "n": len(values)}
            )
    return pd.DataFrame(rows)


def _width(network: InContextNetwork) -> Mapping[str, int]:
    size = network.size
    return {"d_model": size.d_model, "n_heads": size.n_heads, "seed": size.seed}


def _train(
    module: nn.Module,
    task: InContextTask,
    steps: int,
    seed: int,
    checkpoint: str | PathLike[str] | None,
    name: str,
) -> None:
    def loss(step: int) -> Tensor:
        drawn = task.draw(32)
        return (module(drawn) - drawn.targets).square().mean()

    plan = TrainPlan(steps, warmup=min(50, steps // 4), row_every=max(1, steps // 4), seed=seed)
    folder = None if checkpoint is None else Path(checkpoint) / name.replace(", ", "-")
    train(module, loss, plan, checkpoint=folder, about={"pasted": name, "seed": task.seed})


@torch.no_grad()
def _errors(module: nn.Module, drawn: Drawn, *, upper: str, read_in: str) -> pd.DataFrame:
    errors = (module(drawn).double() - drawn.targets).square().mean(dim=(1, 2))
    n = sum(p.numel() for p in module.parameters() if p.requires_grad)
    return _frame(errors, upper=upper, read_in=read_in, parameters=n)


def _frame(errors: Tensor, **about: object) -> pd.DataFrame:
    rows = {"prompt": range(len(errors)), "squared_error": errors.double().numpy()}
    return pd.DataFrame({**about, **rows})
