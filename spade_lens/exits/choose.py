"""Choose a policy on held-out prompts: for a wanted loss, or with a finite-sample guarantee.

Everything here works on lists of policies (a family), most careful first: thresholds common to
all layers, thresholds by layer, patience, fixed layers. A threshold is thus chosen like any other
setting.
"""

import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from scipy.optimize import isotonic_regression
from scipy.stats import binom
from torch import Tensor

from spade_lens.exits.candidates import ExitWarning
from spade_lens.exits.policies import FixedLayer, Patience, Policy, Threshold
from spade_lens.exits.simulate import simulate
from spade_lens.exits.table import ExitTable

LEVELS = tuple(1 / (1 + math.exp(-x / 8)) for x in range(80, -49, -1))
"""Confidences from 0.99995 down to 0.0025, close together where confidences crowd near 1.

Fixed in advance, since a grid made of the calibration prompts would void the guarantee.
"""

_SUPPORT = 10
"""A policy with which fewer calibration prompts leave early is not supported by them."""

NEVER = Threshold(math.inf)
"""Nobody leaves: what is chosen where nothing else is safe."""


def global_thresholds(levels: Iterable[float] = LEVELS) -> list[Threshold]:
    """One threshold for all layers, most careful first.

    Args:
        levels: The thresholds.
    """
    return [Threshold(level) for level in sorted(levels, reverse=True)]


def calibrated_thresholds(table: ExitTable, levels: Iterable[float] = LEVELS) -> list[Threshold]:
    """Thresholds by layer at which leaving is equally safe, most careful first. Ours.

    At every layer, the chance that SPADE's answer is the full model's is fitted as a
    non-decreasing function of the confidence (isotonic regression). At level q a layer's
    threshold is the least confidence at which that chance is q or more; a layer where no
    confidence is that safe is never checked, so it costs nothing.

    Args:
        table: Calibration prompts.
        levels: The chances wanted.
    """
    fits = []
    for confidence, agrees in zip(table.confidence, table.agrees, strict=True):
        order = confidence.argsort()
        fitted = isotonic_regression(agrees[order].double().numpy()).x
        fits.append((confidence[order], torch.from_numpy(fitted)))
    family: dict[tuple[float, ...], Threshold] = {}
    for level in sorted(levels, reverse=True):
        values = tuple(_first_safe(*fit, level) for fit in fits)
        by_layer = dict(zip(table.layers, values, strict=True))
        # Many levels give the same thresholds; the most careful name is kept.
        family.setdefault(values, Threshold(by_layer, label=f"thresholds by layer {level:.4f}"))
    return list(family.values())


def _first_safe(confidence: Tensor, chance: Tensor, level: float) -> float:
    safe = (chance >= level).nonzero()[:, 0]
    if not len(safe):
        return math.inf
    first = int(safe[0])
    if first == 0:
        return float(confidence[0])
    # Half way to the next confidence below, so that rounding decides nobody's exit.
    return float((confidence[first - 1].double() + confidence[first].double()) / 2)


def families(table: ExitTable, *, levels: Iterable[float] = LEVELS) -> dict[str, list[Policy]]:
    """The families of policies to compare, by name, each most careful first.

    Args:
        table: Calibration prompts: their layers are used, and for thresholds by layer also their
            confidences.
        levels: See :func:`global_thresholds` and :func:`calibrated_thresholds`.
    """
    levels = tuple(levels)
    patience = [
        Patience(k, value)
        for k in range(min(6, len(table.layers)), 1, -1)
        for value in (0.9, 0.5, -math.inf)
    ]
    return {
        "fixed layer": [FixedLayer(layer) for layer in reversed(table.layers)],
        "threshold": [*global_thresholds(levels)],
        "thresholds by layer": [*calibrated_thresholds(table, levels)],
        "patience": [*patience],
    }


@dataclass(frozen=True)
class Choice:
    """A policy, and why.

    Args:
        policy: The policy.
        wanted: The loss wanted; None for best accuracy.
        loss: Its loss on the calibration prompts.
        lost: The share of them whose right answer it gave away; gains make up for that in ``loss``.
        speedup: Its speed-up in FLOPs on them.
        early: How many of them left early.
        n: How many they are.
        p_value: Of the hypothesis that its loss is above the one wanted; NaN without a guarantee.
    """

    policy: Policy
    wanted: float | None
    loss: float
    lost: float
    speedup: float
    early: int
    n: int
    p_value: float = math.nan

    @property
    def loss_error(self) -> float:
        """The standard error of ``loss``: a prompt loses an answer, gains one, or neither."""
        gained = self.lost - self.loss
        return math.sqrt(max(self.lost + gained - self.loss**2, 0) / self.n)


def choose(
    policies: Sequence[Policy],
    table: ExitTable,
    *,
    loss: float | None = 0.01,
    measure: str = "accuracy",
) -> Choice:
    """The cheapest policy whose loss on these prompts is at most the one wanted.

    There is no guarantee for other prompts; for that see :func:`certify`.

    Args:
        policies: What to choose from.
        table: Calibration prompts.
        loss: The loss allowed: of accuracy against the full model's (a gain elsewhere makes up
            for a loss), or of agreement with it. None: the most accurate policy, the cheapest of
            equals.
        measure: ``"accuracy"`` or ``"agreement"``.

    Returns:
        The choice. Never leaving is always among the options; where nothing else will do it is
        taken, with a warning. A choice that rests on fewer than ten early exits gets one too.

    Raises:
        ValueError: If no policies or no prompts are given, accuracy is asked for without targets,
            or the loss is negative.
    """
    best = best_choice(policies, table, loss=loss, measure=measure)
    warn_unless_supported(best, measure)
    return best


def best_choice(
    policies: Sequence[Policy],
    table: ExitTable,
    *,
    loss: float | None,
    measure: str,
    or_never: bool = True,
) -> Choice:
    """What :func:`choose` chooses, without its warnings, and perhaps without its way out."""
    table = _measured(policies, table, measure)
    options = [*policies, NEVER] if or_never else policies
    return best_of([_tried(policy, table, loss, measure) for policy in options], loss=loss)


def tried_policies(
    policies: Sequence[Policy], table: ExitTable, *, measure: str = "accuracy"
) -> list[Choice]:
    """The figures of every policy, and of never leaving, on some prompts.

    Args:
        policies: The policies.
        table: The prompts.
        measure: ``"accuracy"`` or ``"agreement"``.

    Raises:
        ValueError: As for :func:`choose`.
    """
    table = _measured(policies, table, measure)
    return [_tried(policy, table, None, measure) for policy in (*policies, NEVER)]


def best_of(choices: Sequence[Choice], *, loss: float | None, margin: float = 0.0) -> Choice:
    """The cheapest of those whose loss is within the one wanted, or of the most accurate.

    Args:
        choices: What to choose from.
        loss: The loss allowed; None for best accuracy, where the margin has no part.
        margin: So many standard errors must fit between a choice's loss and the one allowed.
            The best of many looks better than it is; this makes up for it.

    Raises:
        ValueError: If the loss or the margin is negative.
    """
    if margin < 0 or (loss is not None and loss < 0):
        raise ValueError(
            f"loss={loss}, margin={margin} were given; expected 0 or more, or loss=None for best "
            "accuracy."
        )
    if loss is None:
        margin, loss = 0.0, min(choice.loss for choice in choices)
    # A billionth of a prompt, for the rounding of means. Never leaving loses nothing for certain.
    within = [c for c in choices if c.loss + margin * c.loss_error <= loss + 1e-9]
    return max(within, key=lambda choice: choice.speedup)


def warn_unless_supported(choice: Choice, measure: str) -> None:
    """Warn if nobody leaves, or too few calibration prompts did to say anything."""
    if choice.policy is NEVER:
        warnings.warn(
            f"Nothing saves compute at the loss of {measure} wanted on these {choice.n} prompts: "
            "the policy chosen never exits.",
            ExitWarning,
            stacklevel=3,
        )
    elif choice.early < _SUPPORT:
        warnings.warn(
            f"The policy {choice.policy.name!r} rests on the {choice.early} of {choice.n} "
            "calibration prompts that leave early with it. Give more prompts.",
            ExitWarning,
            stacklevel=3,
        )


def certify(
    policies: Sequence[Policy],
    table: ExitTable,
    *,
    loss: float = 0.05,
    risk: float = 0.05,
    measure: str = "accuracy",
    p_value: Literal["binomial", "hoeffding-bentkus"] = "binomial",
) -> Choice:
    """The cheapest policy found whose loss is within bounds on *new* prompts, with a guarantee.

    Learn-then-Test with fixed-sequence testing (Angelopoulos et al. 2021; for early exit CALM,
    Schuster et al. 2022): policies are tested in the order given, most careful first, each for
    the hypothesis that its risk is above ``loss``, and testing ends at the first that is not
    rejected at level ``risk``. With probability 1 - ``risk`` over calibration prompts, every
    policy before it has a risk of at most ``loss`` on prompts from the same distribution, however
    few or many policies there are. The cheapest of them is taken.

    A prompt is lost if it leaves with a wrong answer where the full model's is right (gains do
    not count, so this bounds the loss of accuracy from above), or, for agreement, with another
    answer than the full model's. That is yes or no, so the binomial p-value is exact.

    The order and the policies must not depend on these prompts: thresholds by layer have to come
    from others.

    Args:
        policies: The family, most careful first.
        table: Calibration prompts.
        loss: The loss allowed.
        risk: The chance that the guarantee fails.
        measure: ``"accuracy"`` or ``"agreement"``.
        p_value: ``"binomial"``, or the Hoeffding-Bentkus bound, which also holds for graded
            losses and is never sharper here.

    Returns:
        The choice, with its p-value; never leaving, with a warning, where not even the most
        careful policy passes.

    Raises:
        ValueError: If the prompts are too few to certify anything (the message says how many are
            needed), ``loss`` or ``risk`` does not lie between 0 and 1, or as for :func:`choose`.
    """
    table = _measured(policies, table, measure)
    needed = prompts_needed(loss=loss, risk=risk)
    if len(table) < needed:
        raise ValueError(
            f"{len(table)} calibration prompts cannot guarantee a loss of {measure} within {loss} "
            f"at risk {risk}, even if not one of them is lost: that takes at least {needed}. Give "
            f"{needed - len(table)} more prompts, or allow a larger loss or risk."
        )
    test = {"binomial": binomial_p, "hoeffding-bentkus": hoeffding_bentkus_p}[p_value]
    passed = [_tried(NEVER, table, loss, measure)]
    for policy in policies:
        choice = _tried(policy, table, loss, measure)
        p = test(round(choice.lost * len(table)), len(table), loss)
        if p > risk:
            break
        passed.append(replace(choice, p_value=p))
    best = max(passed, key=lambda choice: choice.speedup)
    warn_unless_supported(best, measure)
    return best


def prompts_needed(*, loss: float, risk: float) -> int:
    """How many calibration prompts a guarantee takes if not one of them is lost.

    Example:
        >>> from spade_lens.exits import prompts_needed
        >>> prompts_needed(loss=0.01, risk=0.05), prompts_needed(loss=0.05, risk=0.05)
        (299, 59)

    Args:
        loss: The loss allowed.
        risk: The chance that the guarantee fails.

    Raises:
        ValueError: If one of them does not lie between 0 and 1.
    """
    for name, value in (("loss", loss), ("risk", risk)):
        if not 0 < value < 1:
            raise ValueError(f"{name}={value} was given; expected a number between 0 and 1.")
    return math.ceil(math.log(risk) / math.log1p(-loss))


def binomial_p(lost: int, n: int, loss: float) -> float:
    """The chance of so few lost prompts of ``n`` were the risk ``loss`` or more; exact."""
    return float(binom.cdf(lost, n, loss))


def hoeffding_bentkus_p(lost: int, n: int, loss: float) -> float:
    """The Hoeffding-Bentkus p-value (Bates et al. 2021) for losses between 0 and 1.

    It is the smaller of exp(-n h(mean, loss)), h being the divergence of two Bernoulli
    distributions, and e times the binomial p-value.
    """
    mean = min(lost / n, loss)
    divergence = 0.0
    for share, at_risk in ((mean, loss), (1 - mean, 1 - loss)):
        divergence += share * math.log(share / at_risk) if share > 0 else 0.0
    return min(math.exp(-n * divergence), math.e * binomial_p(lost, n, loss), 1.0)


def _measured(policies: Sequence[Policy], table: ExitTable, measure: str) -> ExitTable:
    """The prompts that can be measured, after checking what was asked for."""
    if measure not in ("accuracy", "agreement"):
        raise ValueError(f"measure={measure!r} was given; expected 'accuracy' or 'agreement'.")
    if not len(policies):
        raise ValueError("No policies were given to choose from.")
    known = table.target >= 0
    if measure == "accuracy" and not known.all():
        table = table.of(known.nonzero()[:, 0])
    if not len(table):
        raise ValueError(
            "There are no calibration prompts with a target; give some, or choose by "
            "measure='agreement'."
        )
    return table


def _tried(policy: Policy, table: ExitTable, loss: float | None, measure: str) -> Choice:
    trace = simulate(table, policy)
    right = table.final_answer if measure == "agreement" else table.target
    full, early = table.final_answer == right, trace.answer == right
    return Choice(
        policy=policy,
        wanted=loss,
        loss=float((full.double() - early.double()).mean()),
        lost=float((full & ~early).double().mean()),
        speedup=trace.speedup,
        early=int((trace.exit_layer < trace.n_layers).sum()),
        n=len(table),
    )
