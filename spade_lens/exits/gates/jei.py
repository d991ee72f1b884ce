"""JEI-DNN's gates on cached readouts, as published and cross-fitted.

Source: Regol, Chataoui and Coates, "Jointly-Learned Exit and Inference for a Dynamic Neural
Network" (ICLR 2024, arXiv 2310.09163). A gate at every exit is a linear function of four features
of the readout. Its target is 1 from the stop on where loss + cost weight x FLOPs is least. The
gates learn by stochastic gradient descent.

Ours departs in what the paper alternates with this. Its exits are heads trained in turns with the
gates, and here they are the lenses that answer, which stay as they are. A run has 2000 steps of
64 prompts, since the paper's epochs are of tens of thousands of images. Checks are charged.
"""

from collections.abc import Sequence

import torch
from einops import einsum, rearrange
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from spade_lens.exits.gates.rows import GateRows

_STEPS, _BATCH = 2000, 64
_RATE, _LAST_RATE, _MOMENTUM, _DECAY = 0.01, 2e-4, 0.9, 5e-4
_MOST_WEIGHT = 5.0
_LOOK_EVERY = 50
_SEEDS = 2

Weights = tuple[Float[Tensor, "cost layer feature"], Float[Tensor, "cost layer"]]


def gate_targets(rows: GateRows, costs: Sequence[float]) -> Float[Tensor, "cost layer prompt"]:
    """Return 1 from the stop on where loss + cost x FLOPs is least, and 0 before it."""
    no_check = torch.zeros_like(rows.check[:1])
    checks = torch.cat([rows.check, no_check]).cumsum(dim=0)
    flops = rows.trunk + rows.answer + checks
    weighed = rows.loss + torch.tensor(costs, dtype=torch.double)[:, None, None] * flops
    best = rearrange(weighed.argmin(dim=1), "cost prompt -> cost 1 prompt")
    layer = rearrange(torch.arange(len(rows.check)), "layer -> 1 layer 1")
    return (layer >= best).double()


def published(rows: GateRows, costs: Sequence[float], seed: int) -> Weights:
    """Return gates that learn from all rows, one set for every cost; the last step's weights."""
    every = torch.ones(1, len(rows), dtype=torch.bool)
    generator = torch.Generator().manual_seed(seed)
    weights, bias, _ = _descend(rows, gate_targets(rows, costs), every, generator)
    return weights[-1, 0], bias[-1, 0]


def cross_fitted(rows: GateRows, costs: Sequence[float], folds: int, seed: int) -> Weights:
    """Return the mean of gates that each learned without one fold of the rows. Ours.

    The rows left out decide when each gate stops learning, and the weights of positives, as the
    paper's validation images do. The folds are drawn twice.
    """
    targets = gate_targets(rows, costs)
    found = []
    for draw in range(_SEEDS):
        generator = torch.Generator().manual_seed(_SEEDS * seed + draw)
        fold = rows.folds(folds, generator)
        seen = fold != torch.arange(folds)[:, None]
        weights, bias, held_out = _descend(rows, targets, seen, generator)
        # The best look of every gate, by the mean over folds.
        look = rearrange(held_out.mean(dim=1).argmin(dim=0), "cost layer -> 1 cost layer")
        means = weights.mean(dim=1), bias.mean(dim=1)
        index = look[..., None].expand(-1, -1, -1, weights.shape[-1])
        found.append((means[0].gather(0, index)[0], means[1].gather(0, look)[0]))
    return torch.stack([w for w, _ in found]).mean(0), torch.stack([b for _, b in found]).mean(0)


def _descend(
    rows: GateRows,
    targets: Float[Tensor, "cost layer prompt"],
    seen: Bool[Tensor, "run prompt"],
    generator: torch.Generator,
) -> tuple[
    Float[Tensor, "look run cost layer feature"],
    Float[Tensor, "look run cost layer"],
    Float[Tensor, "look run cost layer"],
]:
    """Train gates for every cost on the rows that each run sees, all side by side.

    Return weights, biases and the loss on the rows that a run does not see (on all, if it sees
    all), at looks 50 steps apart.
    """
    features = rows.table.features.double()  # [layer prompt feature]
    n_layers, n, width = features.shape
    shape = len(seen), len(targets), n_layers
    held_out = seen if seen.all() else ~seen
    positive = _positive_weights(targets, held_out)
    # As torch begins a linear layer.
    weights, bias = (
        ((2 * torch.rand(*size, generator=generator, dtype=torch.double) - 1) / width**0.5)
        for size in ((*shape, width), shape)
    )
    parameters = [weights.requires_grad_(), bias.requires_grad_()]
    optimiser = torch.optim.SGD(parameters, lr=_RATE, momentum=_MOMENTUM, weight_decay=_DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, _STEPS, eta_min=_LAST_RATE)

    def losses(index: Tensor, counted: Bool[Tensor, "run prompt"]) -> Tensor:
        logits = einsum(
            weights, features[:, index], "run cost layer f, layer prompt f -> run cost layer prompt"
        )
        of_rows = binary_cross_entropy_with_logits(
            logits + bias[..., None],
            targets[:, :, index].expand(len(seen), -1, -1, -1),
            pos_weight=positive[..., None],
            reduction="none",
        )
        part = rearrange(counted[:, index].double(), "run prompt -> run 1 1 prompt")
        return (of_rows * part).sum(dim=-1) / part.sum(dim=-1).clamp(min=1)

    looks = []
    order = torch.empty(0, dtype=torch.long)
    with torch.enable_grad():
        for step in range(1, _STEPS + 1):
            if len(order) < min(_BATCH, n):
                order = torch.cat([order, torch.randperm(n, generator=generator)])
            batch, order = order[:_BATCH], order[_BATCH:]
            optimiser.zero_grad()
            losses(batch, seen).sum().backward()
            optimiser.step()
            schedule.step()
            if step % _LOOK_EVERY == 0:
                with torch.no_grad():
                    loss = losses(torch.arange(n), held_out)
                looks.append((weights.detach().clone(), bias.detach().clone(), loss))
    stacked = [torch.stack(values) for values in zip(*looks, strict=True)]
    return stacked[0], stacked[1], stacked[2]


def _positive_weights(
    targets: Float[Tensor, "cost layer prompt"], counted: Bool[Tensor, "run prompt"]
) -> Float[Tensor, "run cost layer"]:
    """Return how much positives count: negatives over positives, at most 5."""
    part = rearrange(counted.double(), "run prompt -> run 1 1 prompt")
    positives = (targets * part).sum(dim=-1)
    negatives = ((1 - targets) * part).sum(dim=-1)
    weights = (negatives / positives.clamp(min=1)).clamp(max=_MOST_WEIGHT)
    # Where no target is 0, a weight of 0 would leave a gate as it was drawn.
    return weights.where(negatives > 0, torch.ones(()).double())
