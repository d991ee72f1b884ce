"""Controls of early exit: fixed layers, random exits, and mixtures of ways to answer.

An exit by confidence is worth its name only where it beats leaving at fixed layers with the same
choice of kept tokens. A mixture answers every prompt by one of several policies at random. Its
figures are expected values, so no random draw adds noise. All of this is ours.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from torch import Tensor

from spade_lens.exits.choice import NEVER
from spade_lens.exits.policies import FixedLayer, Oracle, Policy
from spade_lens.exits.table import ExitTable
from spade_lens.stats.intervals import (
    paired_interval,
    proportion_interval,
    ratio_interval,
    score_interval,
)

_NAN = (float("nan"),) * 3


@dataclass(frozen=True, eq=False)
class Outcomes:
    """What happens to every prompt, or is expected to where answers are mixed at random.

    Args:
        known: Whether the right answer is known.
        full_right: Whether the full model answers right; 0 where that is not known.
        right: The chance of a right answer; likewise.
        agrees: The chance of the full model's answer.
        early: The chance to leave early.
        exit_layer: The layer of the exit.
        full_flops: What the full model spends.
        flops: What is spent.
    """

    known: Float[np.ndarray, " prompt"]
    full_right: Float[np.ndarray, " prompt"]
    right: Float[np.ndarray, " prompt"]
    agrees: Float[np.ndarray, " prompt"]
    early: Float[np.ndarray, " prompt"]
    exit_layer: Float[np.ndarray, " prompt"]
    full_flops: Float[np.ndarray, " prompt"]
    flops: Float[np.ndarray, " prompt"]

    @property
    def accuracy(self) -> float:
        """The fraction of right answers among prompts with a target."""
        return float(self.right.sum() / self.known.sum())

    @property
    def compute(self) -> float:
        """FLOPs over the full model's."""
        return float(self.flops.sum() / self.full_flops.sum())

    def figures(self) -> dict[str, Any]:
        """Return the figures of a sweep's row, with intervals.

        Returns:
            ``n, early, exit_layer, compute``, and with ``_low`` and ``_high`` ``speedup``,
            ``agreement``, ``accuracy``, ``loss``, ``lost`` and ``gained``.
        """
        n, n_known = len(self.known), int(self.known.sum())
        lost, gained = lost_and_gained(self.full_right, self.right)
        values = {
            "speedup": (1 / self.compute, *ratio_interval(self.full_flops, self.flops)),
            "agreement": _proportion(float(self.agrees.sum()), n),
            "accuracy": _proportion(float(self.right.sum()), n_known),
            "loss": _NAN,
            "lost": _proportion(lost, n_known),
            "gained": _proportion(gained, n_known),
        }
        if n_known:
            ends = paired_interval(lost, gained, n_known)
            values["loss"] = ((lost - gained) / n_known, *ends)
        row: dict[str, Any] = {
            "n": n,
            "early": float(self.early.mean()),
            "exit_layer": float(self.exit_layer.mean()),
            "compute": self.compute,
        }
        for name, value in values.items():
            row[name], row[f"{name}_low"], row[f"{name}_high"] = value
        return row


def outcomes(table: ExitTable, policy: Policy | Oracle) -> Outcomes:
    """Return what a policy does to every prompt of a table."""
    trace, known = table.simulate(policy), table.target >= 0

    def right(answer: Tensor) -> Bool[Tensor, " prompt"]:
        return (answer == table.target) & known

    values = {
        "known": known,
        "full_right": right(table.final_answer),
        "right": right(trace.answer),
        "agrees": trace.answer == table.final_answer,
        "early": trace.exit_layer < trace.n_layers,
        "exit_layer": trace.exit_layer,
        "full_flops": trace.full_flops,
        "flops": trace.flops,
    }
    return Outcomes(**{name: value.double().numpy() for name, value in values.items()})


def mixed(parts: Sequence[Outcomes], weights: Sequence[float]) -> Outcomes:
    """Return what to expect if every prompt is answered in one of several ways, at random."""
    return Outcomes(
        **{
            field.name: np.average([getattr(p, field.name) for p in parts], axis=0, weights=weights)
            for field in fields(Outcomes)
        }
    )


def random_exits(table: ExitTable, policy: Policy) -> Outcomes:
    """Return what to expect if as many prompts leave at every layer, but at random.

    Nothing is checked, so no check is charged.
    """
    layers, counts = np.unique(table.simulate(policy).exit_layer.numpy(), return_counts=True)
    ways = [NEVER if x == table.n_layers else FixedLayer(x) for x in layers.tolist()]
    return mixed([outcomes(table, way) for way in ways], (counts / counts.sum()).tolist())


@dataclass(frozen=True)
class FixedMatch:
    """Fixed layers that are as accurate as a policy on the calibration prompts, for the least.

    Args:
        ways: One or two pairs of a keep set's name and a policy that checks nothing.
        weights: How often each is taken, at random.
        price: FLOPs that a whole unit of accuracy costs at fixed layers there, over the full
            model's. It is the slope between two of them, and their own error is in it.
        span: FLOPs of the cheapest and of the most accurate fixed layers there, likewise.
        reached: Whether fixed layers are as accurate as the policy there. If not, this is the most
            accurate one.
    """

    ways: tuple[tuple[str, Policy], ...]
    weights: tuple[float, ...]
    price: float
    span: tuple[float, float]
    reached: bool

    @property
    def name(self) -> str:
        """The name in tables."""
        parts = zip(self.weights, self.ways, strict=True)
        return " or ".join(f"{w:.0%} {keep}, {policy.name}" for w, (keep, policy) in parts)

    def outcomes(self, tables: Sequence[ExitTable]) -> Outcomes:
        """Return what to expect on the prompts of tables, which must hold the keep sets."""
        by_keep = {table.keep: table for table in tables}
        parts = [outcomes(by_keep[keep], policy) for keep, policy in self.ways]
        return mixed(parts, self.weights)


def match_fixed(tables: Sequence[ExitTable], accuracy: float) -> FixedMatch:
    """Return the cheapest fixed layers of an accuracy, among all keep sets of calibration tables.

    Two of them are mixed at random to meet the accuracy. If no fixed layer reaches it, this is
    the most accurate one.

    Raises:
        ValueError: If no prompt has a target.
    """
    if not (tables[0].target >= 0).any():
        raise ValueError("No prompt has a target, so fixed layers have no accuracy to match.")
    by_keep = {table.keep: table for table in tables}
    ways: dict[tuple[str, Policy], Outcomes] = {}
    for keep, table in by_keep.items():
        ways |= {(keep, way): outcomes(table, way) for way in map(FixedLayer, table.layers)}
        ways[keep, NEVER] = outcomes(table, NEVER)
    return match_ways(ways, accuracy)


def match_ways(ways: Mapping[tuple[str, Policy], Outcomes], accuracy: float) -> FixedMatch:
    """Return the cheapest mixture of ways of an accuracy; see :func:`match_fixed`."""
    points = [(one.compute, one.accuracy, way) for way, one in ways.items()]
    hull: list[Any] = []
    for point in sorted(points, key=lambda p: (p[0], -p[1])):
        if hull and point[1] <= hull[-1][1]:
            continue
        # A corner that lies below the line of its neighbours is no corner.
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) <= _slope(hull[-2], point):
            hull.pop()
        hull.append(point)
    span = hull[0][0], hull[-1][0]
    # 1e-9 for the rounding of means.
    reached = bool(accuracy <= hull[-1][1] + 1e-9)
    if len(hull) == 1:
        return FixedMatch((hull[0][2],), (1.0,), 0.0, span, reached)
    last = hull[-2], hull[-1]
    below, above = next((pair for pair in pairwise(hull) if accuracy <= pair[1][1]), last)
    weight = float(np.clip((accuracy - below[1]) / (above[1] - below[1]), 0, 1))
    price = 1 / _slope(below, above)
    if weight in (0, 1):
        return FixedMatch(((above if weight else below)[2],), (1.0,), price, span, reached)
    return FixedMatch((below[2], above[2]), (1 - weight, weight), price, span, reached)


def beyond_fixed(rule: Outcomes, fixed: Outcomes, match: FixedMatch) -> dict[str, Any]:
    """Compare a policy with fixed layers on the same prompts: FLOPs at equal accuracy.

    The two are as accurate on the calibration prompts. On others they need not be, so a
    difference in accuracy is turned into FLOPs at the price that fixed layers pay for it, up to
    the most accurate of them and down to the cheapest: accuracy beyond these is not for sale. If no
    fixed layers reach the policy's accuracy on the calibration prompts, the most accurate ones are
    compared with, and an accuracy above theirs counts for nothing.

    The interval is given the fixed layers and the price: their own error, of the calibration
    prompts, is not in it. It combines Student's of the FLOPs and the score interval of the
    accuracies by the method of variance estimates recovery (Zou and Donner 2008, Statistics in
    Medicine 27, 1693-1702), with their correlation over prompts.

    Args:
        rule: The policy's outcomes.
        fixed: Those of the fixed layers, on the same prompts.
        match: What gave the fixed layers, with the price of accuracy.

    Returns:
        Each with ``_low`` and ``_high``: ``saved``, the FLOPs that fixed layers spend more, over
        the policy's; ``more_right``, the policy's accuracy minus theirs; and ``beyond_fixed``,
        the FLOPs that they would spend more at the policy's accuracy. ``reached_by_fixed`` is
        whether they reach it on the calibration prompts, and ``beats_fixed`` whether the interval
        of ``beyond_fixed`` lies above 0.
    """
    difference = _difference(rule, fixed)
    saved = float(fixed.flops.sum() / rule.flops.sum())
    flops = tuple(x - 1 for x in (saved, *ratio_interval(fixed.flops, rule.flops)))
    scale = match.price / rule.compute
    priced = tuple(scale * x for x in difference)
    both = flops[0] + priced[0]
    paired = fixed.flops - saved * rule.flops, rule.right - fixed.right
    varies = all(values.std() > 0 for values in paired)
    correlation = float(np.corrcoef(*paired)[0, 1]) if varies else 0.0
    low, high = (
        np.sqrt(max(a**2 + b**2 + 2 * correlation * a * b, 0.0))
        for a, b in [(flops[0] - flops[1], priced[0] - priced[1])]
        + [(flops[2] - flops[0], priced[2] - priced[0])]
    )
    # No fixed layers cost less than the cheapest or more than the most accurate. How much that is
    # over the policy's FLOPs is as uncertain as these.
    cheapest, costliest = (
        [choose(end / fixed.compute, 1.0) * (1 + x) - 1 for x in flops]
        for choose, end in zip((min, max), match.span, strict=True)
    )
    priced_flops = np.clip((both, both - float(low), both + float(high)), cheapest, costliest)
    row: dict[str, Any] = {}
    for name, ends in (
        ("saved", flops),
        ("more_right", difference),
        ("beyond_fixed", tuple(priced_flops.tolist())),
    ):
        row[name], row[f"{name}_low"], row[f"{name}_high"] = ends
    beats = row["beyond_fixed_low"] > 0
    return row | {"reached_by_fixed": match.reached, "beats_fixed": beats}


def lost_and_gained(
    one: Float[np.ndarray, " prompt"], other: Float[np.ndarray, " prompt"]
) -> tuple[float, float]:
    """Return how many prompts only the first answers right, and how many only the other."""
    return float((one * (1 - other)).sum()), float((other * (1 - one)).sum())


def _difference(one: Outcomes, other: Outcomes) -> tuple[float, float, float]:
    """Return the difference of two accuracies, with the score interval at the effective number.

    Where one of the two is a mixture of two ways, a prompt's chances vary less than answers do,
    so that prompts count up to twice.
    """
    n = int(one.known.sum())
    lost, gained = lost_and_gained(one.right, other.right)
    difference = (lost - gained) / n
    variance = float((one.right - other.right)[one.known > 0].var())
    binary = (lost + gained) / n - difference**2
    times = float(np.clip(binary / variance, 1, 2)) if variance > 0 else 1.0
    return (difference, *score_interval(times * lost, times * gained, times * n, 0.95))


def _proportion(count: float, n: int) -> tuple[float, float, float]:
    return (count / n, *proportion_interval(min(count, n), n)) if n else _NAN


def _slope(one: Sequence[Any], other: Sequence[Any]) -> float:
    """Return the accuracy gained by FLOPs from one point to another."""
    return float((other[1] - one[1]) / (other[0] - one[0]))
