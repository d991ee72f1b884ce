"""A cheap check first: for which prompts the expensive one is read.

The policy here says so layer by layer. Engine and simulation ask it through :func:`let_through`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from spade_lens.checks import check_number
from spade_lens.exits.policies import Checks, Policy, check_policy, checked_booleans


def check_screen(policy: Policy, check: str, *, screened: bool) -> None:
    """Raise if a policy screens by a first check, and the check comes after none."""
    if hasattr(policy, "let_through") and not screened:
        raise ValueError(
            f"The policy {policy.name!r} reads a cheaper check first, and the check {check!r} "
            "comes after none; give Confidence(..., after=Confidence(cheaper lens))."
        )


def let_through(
    policy: Policy, screen: Float[Tensor, "check prompt"], layers: Sequence[int]
) -> Bool[Tensor, " prompt"]:
    """Return for which prompts the expensive check is read at the last of these layers.

    A policy says so with a method ``let_through(screen, layers)``; without it, all are.
    """
    chooses = getattr(policy, "let_through", None)
    if chooses is None:
        return torch.ones(screen.shape[1], dtype=torch.bool)
    of = f"let_through() of the policy {policy.name!r}"
    return checked_booleans(chooses(screen, tuple(layers)), screen.shape[1], of)


@dataclass(frozen=True)
class Screened:
    """Read the check only where a cheaper one is sure enough; then decide by another policy.

    Ours. The check must be a confidence with ``after=``: where that first one is less sure than
    ``least``, the prompt stays, and the expensive check is neither run nor charged.

    Example:
        >>> from spade_lens.exits import Confidence, Screened, SpadeExit, Threshold
        >>> check = Confidence(Spade(model), after=Confidence(LogitLens(model)))
        >>> policy = Screened(Threshold(0.5), least=0.2)
        >>> engine = SpadeExit(model, check, policy, layers=[2, 3])

    Args:
        policy: Decides about the prompts that are let through. It must bear that the check was not
            read at some layers, which gates do not.
        least: The least confidence of the first check, one for all layers or by layer; layers
            that are not named let everybody through.
        label: The name in tables; by default made of the values.

    Raises:
        TypeError: If the policy is none, or a confidence no number.
        ValueError: If the policy is a gate, or screens by itself.
    """

    policy: Policy
    least: float | Mapping[int, float]
    label: str = ""
    reads = True

    def __post_init__(self) -> None:
        check_policy(self.policy)
        for of, what in (("let_through", "screens by itself"), ("made_for", "is a fitted gate")):
            if hasattr(self.policy, of):
                raise ValueError(
                    f"The policy {self.policy.name!r} was given, which {what}; expected one that "
                    "decides by the checks that were read, such as Threshold(0.9)."
                )
        by_layer = self.least if isinstance(self.least, Mapping) else {"least": self.least}
        for layer, value in by_layer.items():
            check_number(str(layer), value, whole=False)

    @property
    def name(self) -> str:
        """The name in tables."""
        if self.label:
            return self.label
        by_layer = self.least if isinstance(self.least, Mapping) else {"": self.least}
        least = ", ".join(f"{k}: {v:.4g}" if k != "" else f"{v:.4g}" for k, v in by_layer.items())
        return f"{self.policy.name}, screened at {least}"

    def stops(self, layers: Sequence[int]) -> tuple[int, ...]:
        """Return where the other policy wants a check.

        Raises:
            ValueError: If there is a least confidence for a layer that is not a candidate.
        """
        if isinstance(self.least, Mapping) and not set(self.least) <= set(layers):
            raise ValueError(
                f"There are least confidences for layers {sorted(set(self.least) - set(layers))}; "
                f"the candidate layers are {list(layers)}."
            )
        return self.policy.stops(layers)

    def let_through(
        self, screen: Float[Tensor, "check prompt"], layers: tuple[int, ...]
    ) -> Bool[Tensor, " prompt"]:
        """Return which prompts the first check is sure enough of."""
        least = self.least
        if isinstance(least, Mapping):
            least = least.get(layers[-1], -math.inf)
        return screen[-1] >= least

    def leaves(self, checks: Checks) -> Bool[Tensor, " prompt"]:
        """Return which prompts the other policy lets leave."""
        return self.policy.leaves(checks)
