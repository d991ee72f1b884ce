"""The gate: a policy that weighs what a check says, layer by layer.

It knows neither how its weights were fitted nor on which prompts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from spade_lens.checks import spelled
from spade_lens.exits.gates.features import history_inputs
from spade_lens.exits.policies import Checks


@dataclass(frozen=True, eq=False, repr=False)
class Gate:
    """Let a prompt leave by a weighted sum of what its checks say.

    With the rule ``"hazard"`` the sum is over the features of one check and gives an exit
    probability; see :func:`hazard`. With the rule ``"stopping"`` it is over the numbers of
    :func:`~spade_lens.exits.gates.features.history_inputs` and predicts how much more leaving
    costs than going on.

    Args:
        name: The name in tables.
        rule: ``"hazard"`` or ``"stopping"``.
        layers: The layers that are checked, ascending; none if nobody leaves.
        weights: The weights at every check.
        bias: What is added to each sum.
        made_for: The ``model``, ``check`` and ``keep`` of the table that it was fitted on.
        reads: Whether it needs checks. If not, every prompt leaves at its only layer.
    """

    name: str
    rule: str
    layers: tuple[int, ...]
    weights: Float[Tensor, "check input"]
    bias: Float[Tensor, " check"]
    made_for: Mapping[str, str] = field(default_factory=dict)
    reads: bool = True

    def __repr__(self) -> str:
        return f"Gate({self.name!r}, layers {list(self.layers)})"

    def stops(self, layers: Sequence[int]) -> tuple[int, ...]:
        """Return the layers that it checks.

        Raises:
            ValueError: If one of them is not among the candidates.
        """
        if not set(self.layers) <= set(layers):
            raise ValueError(
                f"The gate {self.name!r} was fitted at layers {spelled(self.layers)}; the "
                f"candidate layers are {spelled(layers)}. Give candidates that hold its layers, or "
                "fit it at these."
            )
        return self.layers

    def leaves(self, checks: Checks) -> Bool[Tensor, " prompt"]:
        """Return which prompts leave at the last of the checks.

        Raises:
            ValueError: If the checks are at other layers, or their features are not as many as
                those that it was fitted on.
        """
        n, made = checks.answer.shape[1], len(checks.layers)
        if checks.layers != self.layers[:made]:
            raise ValueError(
                f"Checks at layers {spelled(checks.layers)} were given to the gate {self.name!r}; "
                f"expected the first of {spelled(self.layers)}."
            )
        if not self.reads:
            return torch.ones(n, dtype=torch.bool)
        if self.rule == "hazard":
            self._refuse_width(checks.features.shape[-1], self.weights.shape[1])
            weighed = (checks.features.double() * self.weights[:made, None]).sum(dim=-1)
            gates = (weighed + self.bias[:made, None]).sigmoid()
            return hazard(gates)[-1] >= 0.5
        inputs = history_inputs(checks)
        self._refuse_width(checks.features.shape[-1], (self.weights.shape[1] - 4) // 2)
        return (inputs * self.weights[made - 1]).sum(dim=-1) + self.bias[made - 1] <= 0

    def _refuse_width(self, given: int, expected: int) -> None:
        if given != expected:
            raise ValueError(
                f"Checks with {given} features were given to the gate {self.name!r}; expected "
                f"{expected}, as in the table that it was fitted on. Give the same "
                "Confidence(features=...)."
            )


def hazard(gates: Float[Tensor, "check prompt"]) -> Float[Tensor, "check prompt"]:
    """Return the chance to leave at each check for a prompt that is still there.

    A prompt leaves at check l with probability ``P_l = max(0, min(g_l, 1 - sum of g before))``.
    The chance given that it has not left yet is P_l over what the checks before it leave of 1; it
    is 1 where they leave nothing. Source: JEI-DNN, where a prompt leaves at the first check at
    which this is .5 or more.

    Example:
        >>> hazard(torch.tensor([[0.25], [0.375], [0.9]]))[:, 0].tolist()
        [0.25, 0.5, 1.0]
    """
    left = (1 - (gates.cumsum(dim=0) - gates)).clamp(min=0)
    leaves = torch.minimum(gates, left)
    return torch.where(left > 0, leaves / left.where(left > 0, torch.ones(())), 1.0).clamp(0, 1)
