"""Optimal stopping by backward regression: when the predicted gain of going on is spent.

Going down from the last layer, the regression at each layer predicts how much more it costs to
leave there than to go on and leave later as decided so far. Cost is loss + cost weight x FLOPs,
with all checks charged. No gradient descent is needed. That the value of going on is regressed,
backwards, is Longstaff and Schwartz's (2001, Review of Financial Studies 14, 113-147) for options;
its use for early exit, what is predicted from and the choice of layers are ours.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from spade_lens.exits.gates.regression import Line, Regressions
from spade_lens.exits.gates.rows import GateRows


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


def stopping_rules(
    rows: GateRows, costs: Sequence[float], fold: Int[Tensor, " prompt"]
) -> list[Stopping]:
    """Return when to stop, for every cost weight.

    Every row's decisions, and so the values that lower layers learn from, come from regressions
    that were fitted without the row's fold. By the mean of these values it is chosen which layers
    are checked, and whether those who stay to the last of them leave there or go to the end.
    Nothing is checked at all if one fixed layer, or never leaving, is as good.
    """
    regressions = Regressions(rows.inputs, fold)
    return [_rule(_Costs(rows, cost, regressions)) for cost in costs]


def _rule(costs: "_Costs") -> Stopping:
    n_layers = len(costs.check)
    blind = costs.blind.mean(dim=1)
    layer = int(blind.argmin())
    best = _Plan((), layer, float(blind[layer]))
    for last in range(1, n_layers + 1):
        plan = _planned(costs, last)
        if plan.checked and plan.value < best.value:
            best = plan
    at_last = (best.last,) if best.last < n_layers else ()
    layers = (*best.checked, *at_last)
    weights = torch.zeros(len(layers), costs.width, dtype=torch.double)
    bias = -torch.ones(len(layers), dtype=torch.double)  # all leave
    for i in range(len(best.checked)):
        weights[i], bias[i] = best.lines[best.checked[i]]
    return Stopping(layers, weights, bias, bool(best.checked) or not layers, best.value)


@dataclass(frozen=True, eq=False)
class _Plan:
    """Layers where some leave, and the stop where all others do; with the value of left-out rows.

    Layers are given by index, and so is the stop; the last stop is the end.
    """

    checked: tuple[int, ...]
    last: int
    value: float
    lines: dict[int, Line] = field(default_factory=dict)


class _Costs:
    """Loss + cost weight x FLOPs of every stop, prompt by prompt.

    ``stop`` is that of leaving after a check, ``blind`` that of leaving where nothing is checked.
    """

    def __init__(self, rows: GateRows, cost: float, regressions: Regressions) -> None:
        self.stop = rows.loss + cost * (rows.trunk + rows.answer)
        self.blind = rows.loss + cost * (rows.trunk + rows.blind)
        self.check = cost * rows.check
        self.regressions = regressions
        self.width = rows.inputs([0]).shape[1]

    def after_all(self, last: int) -> Float[Tensor, " prompt"]:
        """Return the cost of leaving at the last stop."""
        checked = self.check[last] if last < len(self.check) else 0
        return self.stop[last] + checked

    def after(
        self, layer: int, leaves: Bool[Tensor, " prompt"], going_on: Float[Tensor, " prompt"]
    ) -> Float[Tensor, " prompt"]:
        """Return the cost of a check at a layer, where some leave and others go on."""
        return self.check[layer] + torch.where(leaves, self.stop[layer], going_on)


def _planned(costs: _Costs, last: int) -> _Plan:
    """Return the checks below a stop at which all leave."""
    checked = tuple(range(last))
    while True:
        plan = _backwards(costs, checked, last)
        if plan.checked in (checked, ()):
            return plan
        # What a gate sees depends on the checks before it, so it is fitted again without those.
        checked = plan.checked


def _backwards(costs: _Costs, checked: tuple[int, ...], last: int) -> _Plan:
    """Go backwards once over the layers that may be checked, and drop those that do not pay."""
    going_on = costs.after_all(last)
    leaves: dict[int, Bool[Tensor, " prompt"]] = {}
    lines: dict[int, Line] = {}
    for at in reversed(range(len(checked))):
        layer, seen = checked[at], checked[: at + 1]
        excess = costs.stop[layer] - going_on
        decided = costs.regressions.left_out(seen, excess) <= 0
        with_check = costs.after(layer, decided, going_on)
        if float(with_check.mean()) < float(going_on.mean()):
            leaves[layer] = decided
            lines[layer] = costs.regressions.line(seen, excess)
            going_on = with_check

    def value(some: Sequence[int]) -> float:
        after = costs.after_all(last)
        for layer in reversed(some):
            after = costs.after(layer, leaves[layer], after)
        return float(after.mean())

    kept = sorted(leaves)
    best = value(kept)
    while kept:
        # A check may pay for all prompts, and not for those that the checks before it let through.
        without = [[one for one in kept if one != layer] for layer in kept]
        values = [value(some) for some in without]
        if min(values) >= best:
            break
        best = min(values)
        kept = without[values.index(best)]
    return _Plan(tuple(kept), last, best, lines)
