"""Optimal stopping by backward regression: when the predicted gain of going on is spent.

Going down from the last layer, the regression at each layer predicts how much more it costs to
leave there than to go on and leave later as decided so far. Cost is loss + cost weight x FLOPs,
with all checks charged. No gradient descent is needed. That the value of going on is regressed,
backwards, is Longstaff and Schwartz's (2001, Review of Financial Studies 14, 113-147) for options;
its use for early exit, what is predicted from and the choice of layers are ours.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from spade_lens.exits.gates.rows import GateRows

_RIDGES = np.logspace(-1, 4, 11)


@dataclass(frozen=True, eq=False)
class Stopping:
    """When to stop.

    Args:
        checked: The layers that are checked, by index, ascending. Without ``reads``, the only one,
            at which all leave; or none, if nobody leaves.
        weights: At each check, the weights of what a gate sees.
        bias: What is added; the sum predicts how much more leaving costs than going on.
        reads: Whether anything is checked.
        value: The mean of loss + cost weight x FLOPs, of decisions for rows that were left out.
    """

    checked: tuple[int, ...]
    weights: Float[Tensor, "check input"]
    bias: Float[Tensor, " check"]
    reads: bool
    value: float


def stopping(rows: GateRows, cost: float, fold: Int[Tensor, " prompt"]) -> Stopping:
    """Return when to stop for one cost weight.

    Every row's decisions, and so the values that lower layers learn from, come from regressions
    that were fitted without the row's fold. A layer is checked only if that lowers the mean of
    these values. Nothing is checked at all if one fixed layer, or never leaving, is as good.
    """
    checked: tuple[int, ...] = tuple(range(len(rows.check)))
    while True:
        best = _backwards(rows, cost, fold, checked)
        if best.checked == checked or not best.checked:
            break
        # What a gate sees depends on the checks before it, so it is fitted again without those.
        checked = best.checked
    blind = (rows.loss + cost * (rows.trunk + rows.blind)).mean(dim=1)
    stop = int(blind.argmin())
    if float(blind[stop]) > best.value:
        return best
    at = (stop,) if stop < len(rows.check) else ()
    n, width = len(at), rows.inputs([0]).shape[1]
    zeros = torch.zeros(n, width, dtype=torch.double), torch.zeros(n, dtype=torch.double)
    return Stopping(at, *zeros, reads=not at, value=float(blind[stop]))


def _backwards(
    rows: GateRows, cost: float, fold: Int[Tensor, " prompt"], checked: tuple[int, ...]
) -> Stopping:
    """Go backwards once over the layers that may be checked, and drop those that do not pay."""
    stops = rows.loss + cost * (rows.trunk + rows.answer)
    going_on = stops[-1]
    leaves: dict[int, Bool[Tensor, " prompt"]] = {}
    lines: dict[int, tuple[Float[Tensor, " input"], Float[Tensor, ""]]] = {}
    for at in reversed(range(len(checked))):
        layer = checked[at]
        inputs = rows.inputs(checked[: at + 1])
        excess = stops[layer] - going_on
        leaves[layer] = _left_out(inputs, excess, fold) <= 0
        lines[layer] = _line(inputs, excess)
        with_check = _after(rows, cost, stops, leaves, layer, going_on)
        if float(with_check.mean()) < float(going_on.mean()):
            going_on = with_check
        else:
            del leaves[layer], lines[layer]
    kept = sorted(leaves)
    value = float(going_on.mean())
    while kept:
        # A check may pay for all prompts, and not for those that the checks before it let through.
        without = [[one for one in kept if one != layer] for layer in kept]
        values = [_value(rows, cost, stops, leaves, some) for some in without]
        if min(values) >= value:
            break
        value = min(values)
        kept = without[values.index(value)]
    width = rows.inputs([0]).shape[1]
    weights = [lines[layer][0] for layer in kept] or [torch.empty(0, width, dtype=torch.double)]
    biases = [lines[layer][1] for layer in kept] or [torch.empty(0, dtype=torch.double)]
    join = torch.stack if kept else torch.cat
    return Stopping(tuple(kept), join(weights), join(biases), reads=True, value=value)


def _value(
    rows: GateRows,
    cost: float,
    stops: Float[Tensor, "stop prompt"],
    leaves: Mapping[int, Bool[Tensor, " prompt"]],
    checked: Sequence[int],
) -> float:
    """Return the mean of loss and cost if these layers are checked."""
    value = stops[-1]
    for layer in reversed(checked):
        value = _after(rows, cost, stops, leaves, layer, value)
    return float(value.mean())


def _after(
    rows: GateRows,
    cost: float,
    stops: Float[Tensor, "stop prompt"],
    leaves: Mapping[int, Bool[Tensor, " prompt"]],
    layer: int,
    going_on: Float[Tensor, " prompt"],
) -> Float[Tensor, " prompt"]:
    """Return what prompts cost that are checked at a layer, and leave there or go on."""
    return cost * rows.check[layer] + torch.where(leaves[layer], stops[layer], going_on)


def _left_out(
    inputs: Float[Tensor, "prompt input"],
    target: Float[Tensor, " prompt"],
    fold: Int[Tensor, " prompt"],
) -> Float[Tensor, " prompt"]:
    """Return a prediction for each row, from the rows of other folds."""
    predicted = torch.empty_like(target)
    for one in fold.unique():
        left_out = fold == one
        weights, bias = _line(inputs[~left_out], target[~left_out])
        predicted[left_out] = inputs[left_out] @ weights + bias
    return predicted


def _line(
    inputs: Float[Tensor, "prompt input"], target: Float[Tensor, " prompt"]
) -> tuple[Float[Tensor, " input"], Float[Tensor, ""]]:
    """Return weights and bias of a ridge regression, its strength by leave-one-out."""
    # Here, so that importing the library does not wait for scikit-learn.
    from sklearn.linear_model import RidgeCV

    mean, scale = inputs.mean(dim=0), inputs.std(dim=0)
    scale = scale.where(scale > 1e-9, torch.ones_like(scale))  # at the first check some are 0
    fitted = RidgeCV(_RIDGES).fit(((inputs - mean) / scale).numpy(), target.numpy())
    weights = torch.from_numpy(np.asarray(fitted.coef_, dtype=np.float64)) / scale
    return weights, torch.tensor(float(fitted.intercept_)).double() - weights @ mean
