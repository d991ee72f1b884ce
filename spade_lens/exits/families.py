"""Families of policies to choose from, each most careful first, by name.

A threshold is chosen like any other setting: by trying policies. Add a family of your own in
:data:`FAMILIES`, or give policies to ``calibrate(families=...)``.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import combinations
from typing import TypeAlias

import torch
from scipy.optimize import isotonic_regression
from torch import Tensor

from spade_lens.exits.policies import FixedLayer, Patience, Policy, Threshold, check_policy
from spade_lens.exits.screened import Screened
from spade_lens.exits.table import ExitTable

LEVELS = tuple(1 / (1 + math.exp(-x / 8)) for x in range(80, -49, -1))
"""Confidences from 0.99995 down to 0.0025, close together where confidences crowd near 1.

Fixed in advance, since a grid made of the calibration prompts would void the guarantee.
"""

CHANCES = (0.98, 0.95, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5)
"""Chances of agreement at which :func:`few_checks` sets its thresholds; few, for speed."""

MOST_LAYERS = 8
"""Of more candidate layers :func:`few_checks` takes so many, spread evenly: choices multiply."""

LET_THROUGH = (0.25, 0.5, 0.75)
"""Fractions of the calibration prompts that :func:`cascades` let through, at every layer."""

Family: TypeAlias = Callable[[ExitTable], Sequence[Policy]]
"""Makes the policies of a family from a table of calibration prompts."""

FamiliesLike: TypeAlias = (
    str | Policy | Sequence[str | Policy] | Mapping[str, Policy | Sequence[Policy] | Family]
)
"""Names of families and policies of your own; or policies, or what makes them, by name."""


def global_thresholds(levels: Iterable[float] = LEVELS) -> list[Threshold]:
    """Return one threshold for all layers, most careful first."""
    return [Threshold(level) for level in sorted(levels, reverse=True)]


def calibrated_thresholds(table: ExitTable, levels: Iterable[float] = LEVELS) -> list[Threshold]:
    """Return thresholds by layer at which leaving is equally safe, most careful first. Ours.

    At every layer, the chance that SPADE's answer is the full model's is fitted as a
    non-decreasing function of the confidence (isotonic regression). At level q a layer's
    threshold is the least confidence at which that chance is q or more; a layer where no
    confidence is that safe is never checked, so it costs nothing.
    """
    fits = _fitted_chances(table)
    family: dict[tuple[float, ...], Threshold] = {}
    for level in sorted(levels, reverse=True):
        values = tuple(_first_safe(*fit, level) for fit in fits)
        by_layer = dict(zip(table.layers, values, strict=True))
        # Many levels give the same thresholds; the most careful name is kept.
        family.setdefault(values, Threshold(by_layer, label=f"thresholds by layer {level:.4f}"))
    return list(family.values())


def few_checks(table: ExitTable, most: int = 2) -> list[Threshold]:
    """Return thresholds at one layer or two only, most careful first. Ours.

    An expensive check, such as SPADE's own readout, is then paid for rarely. Thresholds are those
    of :func:`calibrated_thresholds`, at one chance for all the layers that are checked. Each is
    tried twice: with a threshold at the last of its layers, and with everybody leaving there.

    Args:
        table: The calibration prompts.
        most: How many layers are checked at most.
    """
    fits = _fitted_chances(table)
    places: Sequence[int] = range(len(fits))
    if len(fits) > MOST_LAYERS:
        places = [round(i * (len(fits) - 1) / (MOST_LAYERS - 1)) for i in range(MOST_LAYERS)]
    family: dict[tuple[tuple[int, float], ...], Threshold] = {}
    rows = [r for n in range(1, most + 1) for r in combinations(places, n)]
    for chance in CHANCES:
        safe = [_first_safe(*fit, chance) for fit in fits]
        for chosen in rows:
            if any(safe[row] == math.inf for row in chosen):
                continue  # the same as with fewer layers
            by_layer = {table.layers[row]: safe[row] for row in chosen}
            label = f"checks at {', '.join(map(str, by_layer))}, chance {chance:g}"
            family.setdefault(tuple(by_layer.items()), Threshold(by_layer, label=label))
            if len(chosen) > 1:  # with one layer, leaving it is a fixed layer
                *first, last = by_layer
                label = f"checks at {', '.join(map(str, first))}, chance {chance:g}, else {last}"
                by_layer |= {last: -math.inf}
                family.setdefault(tuple(by_layer.items()), Threshold(by_layer, label=label))
    return list(family.values())


def cascades(table: ExitTable) -> list[Screened]:
    """Return thresholds by layer behind a cheaper check; none where no such check comes first.

    Ours. The first check lets through the surest of the calibration prompts at every layer, one
    of :data:`LET_THROUGH` of them. Thresholds are those of :func:`calibrated_thresholds`.
    """
    if table.screen is None:
        return []
    family, policies = [], calibrated_thresholds(table)
    screen = table.screen.double()
    for fraction in LET_THROUGH:
        least = screen.quantile(1 - fraction, dim=1)
        # Between infinite confidences nothing can be interpolated.
        above = screen.quantile(1 - fraction, dim=1, interpolation="higher")
        least = least.where(least.isfinite(), above)
        by_layer = dict(zip(table.layers, least.tolist(), strict=True))
        family += [
            Screened(policy, by_layer, label=f"{policy.name}, the surest {fraction:g} checked")
            for policy in policies
        ]
    return family


def _fitted_chances(table: ExitTable) -> list[tuple[Tensor, Tensor]]:
    """Return every layer's confidences, ascending, and the chance of agreement fitted to them."""
    fits = []
    for confidence, agrees in zip(table.confidence, table.agrees, strict=True):
        order = confidence.argsort()
        fitted = isotonic_regression(agrees[order].double().numpy()).x
        fits.append((confidence[order], torch.from_numpy(fitted)))
    return fits


def _first_safe(confidence: Tensor, chance: Tensor, level: float) -> float:
    safe = (chance >= level).nonzero()[:, 0]
    if not len(safe):
        return math.inf
    first = int(safe[0])
    if first == 0:
        return float(confidence[0])
    # Half way to the next confidence below, so that rounding decides nobody's exit.
    return float((confidence[first - 1].double() + confidence[first].double()) / 2)


def fixed_layers(table: ExitTable) -> list[Policy]:
    """Return one policy for each candidate layer, the highest first."""
    return [FixedLayer(layer) for layer in reversed(table.layers)]


def patiences(table: ExitTable) -> list[Policy]:
    """Return patience of several lengths and least confidences."""
    return [
        Patience(k, value)
        for k in range(min(6, len(table.layers)), 1, -1)
        for value in (0.9, 0.5, -math.inf)
    ]


FAMILIES: dict[str, Family] = {
    "fixed layer": fixed_layers,
    "threshold": lambda table: global_thresholds(),
    "thresholds by layer": calibrated_thresholds,
    "patience": patiences,
    "few checks": few_checks,
    "cascade": cascades,
}
"""The families tried by default. Add your own: ``FAMILIES["mine"] = function``."""


def families(table: ExitTable, given: FamiliesLike | None = None) -> dict[str, list[Policy]]:
    """Return the policies to compare on a table of calibration prompts, by family.

    Families that have none are left out: a cascade without a first check, patience at one layer.
    """
    every = {name: list(make(table)) for name, make in named_families(given).items()}
    return {name: policies for name, policies in every.items() if policies}


def named_families(given: FamiliesLike | None) -> dict[str, Family]:
    """Return families by name, whatever they were given as; all of :data:`FAMILIES` for None."""
    if given is None:
        return dict(FAMILIES)
    if isinstance(given, Mapping):
        makers = {name: _maker(one) for name, one in given.items()}
    else:
        makers = {}
        for one in given if isinstance(given, Sequence) and not isinstance(given, str) else [given]:
            if not isinstance(one, str):
                check_policy(one)
                makers[one.name] = _maker(one)
            elif one in FAMILIES:
                makers[one] = FAMILIES[one]
            else:
                known = ", ".join(map(repr, FAMILIES))
                raise ValueError(f"There is no family {one!r}; expected {known}, or policies.")
    if not makers:
        raise ValueError("families was empty; expected at least one family or policy.")
    return makers


def _maker(given: Policy | Sequence[Policy] | Family) -> Family:
    if callable(given) and not isinstance(given, Policy):
        return given
    policies = list(given) if isinstance(given, Sequence) else [given]
    for policy in policies:
        check_policy(policy)
    return lambda table: policies
