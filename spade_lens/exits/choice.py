"""Choose a policy on held-out prompts: for an allowed loss, or with a finite-sample guarantee.

This module tries lists of policies on tables. It knows neither models nor keep sets.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from scipy.stats import binom

from spade_lens.checks import warn
from spade_lens.exits.policies import Policy, Threshold
from spade_lens.exits.setup import ExitWarning
from spade_lens.exits.table import ExitTable

_SUPPORT = 10
"""A policy with which fewer calibration prompts leave early is not supported by them."""

NEVER = Threshold(math.inf)
"""Nobody leaves: what is chosen where nothing else is safe."""


@dataclass(frozen=True)
class Choice:
    """A policy, and its figures on the calibration prompts.

    Args:
        policy: The policy.
        wanted: The loss allowed; None for best accuracy.
        loss: The full model's accuracy (or agreement) minus the policy's.
        lost: The fraction of prompts whose right answer it gave up; in ``loss``, prompts that
            gain an answer make up for these.
        speedup: The speed-up in FLOPs.
        early: How many prompts left early.
        n: The number of prompts.
        p_value: Of the hypothesis that the loss is above the one allowed; NaN without a guarantee.
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
    def gained(self) -> float:
        """The fraction of prompts whose wrong answer it mended."""
        return self.lost - self.loss

    @property
    def loss_error(self) -> float:
        """The standard error of ``loss``: a prompt loses an answer, gains one, or neither."""
        return math.sqrt(max(self.lost + self.gained - self.loss**2, 0) / self.n)


def tried_policies(
    policies: Sequence[Policy], table: ExitTable, *, measure: str = "accuracy"
) -> list[Choice]:
    """Return the figures of every policy, and of never leaving, by accuracy or agreement."""
    table = _measured(policies, table, measure)
    return [_tried(policy, table, None, measure) for policy in (*policies, NEVER)]


def best_of(choices: Sequence[Choice], *, loss: float | None, margin: float = 0.0) -> Choice:
    """Return the cheapest choice whose loss is within the one allowed; None for best accuracy.

    ``margin`` standard errors must fit between a choice's loss and the one allowed. The best of
    many looks better than it is; this makes up for it. At best accuracy the margin is not used.
    """
    if not 0 <= margin < math.inf or (loss is not None and not loss >= 0):
        raise ValueError(
            f"loss={loss}, margin={margin} were given; expected 0 or more, or loss=None for best "
            "accuracy."
        )
    if loss is None:
        margin, loss = 0.0, min(choice.loss for choice in choices)
    # 1e-9 for the rounding of means. There is always a choice: never leaving loses nothing.
    within = [c for c in choices if c.loss + margin * c.loss_error <= loss + 1e-9]
    return max(within, key=lambda choice: choice.speedup)


def warn_unless_supported(choice: Choice, measure: str) -> None:
    """Warn if nobody leaves early, or too few calibration prompts to say anything."""
    if choice.policy is NEVER:
        warn(
            f"Nothing saves compute at the loss of {measure} wanted on these {choice.n} prompts: "
            "the policy chosen never exits.",
            ExitWarning,
        )
    elif choice.early < _SUPPORT:
        warn(
            f"The policy {choice.policy.name!r} rests on the {choice.early} of {choice.n} "
            "calibration prompts that leave early with it. Give more prompts.",
            ExitWarning,
        )


def certify(
    policies: Sequence[Policy],
    table: ExitTable,
    *,
    loss: float = 0.05,
    risk: float = 0.05,
    measure: str = "accuracy",
) -> Choice:
    """Return the cheapest policy whose loss on *new* prompts is bounded, with a guarantee.

    Source: Learn-then-Test with fixed-sequence testing (Angelopoulos et al. 2021; for early exit
    CALM, Schuster et al. 2022). Policies are tested in the order given, most careful first, each
    for the hypothesis that its risk is above ``loss``. Testing ends at the first that is not
    rejected at level ``risk``. With probability 1 - ``risk`` over calibration prompts, every
    policy before it has a risk of at most ``loss`` on prompts from the same distribution, however
    few or many policies there are. The cheapest of them is taken.

    A prompt is lost if it leaves with a wrong answer where the full model's is right; for
    agreement, if it leaves with another answer than the full model's. Gains do not count, so this
    bounds the loss of accuracy from above. The outcome is yes or no, so the binomial p-value is
    exact.

    The order and the policies must not depend on these prompts: thresholds by layer have to come
    from others.

    Returns:
        The choice, with its p-value; never leaving, with a warning, where not even the most
        careful policy passes.
    """
    table = _measured(policies, table, measure)
    needed = prompts_needed(loss=loss, risk=risk)
    if len(table) < needed:
        raise ValueError(
            f"{len(table)} calibration prompts cannot guarantee a loss of {measure} within {loss} "
            f"at risk {risk}, even if not one of them is lost: that takes at least {needed}. Give "
            f"{needed - len(table)} more prompts, or allow a larger loss or risk."
        )
    passed = [_tried(NEVER, table, loss, measure)]
    for policy in policies:
        choice = _tried(policy, table, loss, measure)
        p_value = binomial_p(round(choice.lost * len(table)), len(table), loss)
        if p_value > risk:
            break
        passed.append(replace(choice, p_value=p_value))
    best = max(passed, key=lambda choice: choice.speedup)
    warn_unless_supported(best, measure)
    return best


def prompts_needed(*, loss: float, risk: float) -> int:
    """Return how many calibration prompts a guarantee takes if not one of them is lost.

    Example:
        >>> prompts_needed(loss=0.01, risk=0.05), prompts_needed(loss=0.05, risk=0.05)
        (299, 59)
    """
    for name, value in (("loss", loss), ("risk", risk)):
        if not 0 < value < 1:
            raise ValueError(f"{name}={value} was given; expected a number between 0 and 1.")
    return math.ceil(math.log(risk) / math.log1p(-loss))


def binomial_p(lost: int, n: int, loss: float) -> float:
    """Return the probability of so few lost prompts of ``n`` if the risk were ``loss``; exact."""
    return float(binom.cdf(lost, n, loss))


def _measured(policies: Sequence[Policy], table: ExitTable, measure: str) -> ExitTable:
    """Return the prompts that can be measured, after checking what was asked for."""
    if measure not in ("accuracy", "agreement"):
        raise ValueError(f"measure={measure!r} was given; expected 'accuracy' or 'agreement'.")
    if not len(policies):
        raise ValueError("No policies were given to choose from.")
    has_target = table.target >= 0
    if measure == "accuracy" and not has_target.any():
        raise ValueError(
            "There are no calibration prompts with a target, so no accuracy can be lost. Give "
            "some, or choose by measure='agreement'."
        )
    return table.of(has_target.nonzero()[:, 0]) if measure == "accuracy" else table


def _tried(policy: Policy, table: ExitTable, loss: float | None, measure: str) -> Choice:
    trace = table.simulate(policy)
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
