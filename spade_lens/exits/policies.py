"""When to stop: from the checks made so far to a yes or no for every prompt.

A policy sees, for every prompt that still runs, the confidence and the answer of the readout at
each layer that was checked. It knows neither models nor tokens, so the engine and the simulation
run the very same object. Every policy here decides each prompt by itself.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from spade_lens.checks import check_number, plain_name, spelled, whole_numbers


@dataclass(frozen=True, eq=False)
class Checks:
    """What the readouts said so far.

    Args:
        layers: The layers checked, ascending; the decision is about the last one.
        confidence: By check and prompt; larger is surer. NaN for a policy that reads no lens.
        answer: The token id that the readout answers; -1 for a policy that reads no lens.
        features: What ``Confidence(features=...)`` made of the readout; of width 0 without it.
        screen: The confidence of the check that comes first; None without ``after=``. Where the
            policy lets a prompt not through, its ``confidence`` is -inf, its ``answer`` that of
            the first check, and its ``features`` are NaN.
    """

    layers: tuple[int, ...]
    confidence: Float[Tensor, "check prompt"]
    answer: Int[Tensor, "check prompt"]
    features: Float[Tensor, "check prompt feature"]
    screen: Float[Tensor, "check prompt"] | None = None


@runtime_checkable
class Policy(Protocol):
    """Decides which prompts leave. A policy of your own needs these four.

    Example:
        >>> from spade_lens.exits import Checks, Policy, SpadeExit
        >>> class SureTwice:
        ...     name, reads = "sure twice", True
        ...     def stops(self, layers):
        ...         return tuple(layers)
        ...     def leaves(self, checks: Checks):
        ...         return (checks.confidence > 0.5).sum(dim=0) >= 2
        >>> isinstance(SureTwice(), Policy)
        True
        >>> engine = SpadeExit(model, LogitLens(model), SureTwice(), layers=[1, 2, 3])
    """

    @property
    def name(self) -> str:
        """The name in tables."""
        ...

    @property
    def reads(self) -> bool:
        """Whether it needs a readout at its checks; if not, none is computed or charged."""
        ...

    def stops(self, layers: Sequence[int]) -> tuple[int, ...]:
        """Return the candidate layers at which it wants a check; none if it never exits.

        Raises:
            ValueError: If the policy does not fit the candidate layers.
        """
        ...

    def leaves(self, checks: Checks) -> Bool[Tensor, " prompt"]:
        """Return which prompts leave at the last of these checks."""
        ...


def check_policy(policy: Any) -> None:
    """Raise if something is no policy, or its name cannot be shown."""
    if not isinstance(policy, Policy):
        lacking = [m for m in ("name", "reads", "stops", "leaves") if not hasattr(policy, m)]
        raise TypeError(
            f"policy={policy!r} was given, which lacks {', '.join(lacking)}; expected a policy "
            "such as Threshold(0.9)."
        )
    plain_name(policy.name, "a policy")


def check_made_for(policy: Policy, **used_with: str | None) -> None:
    """Raise if a policy says what it was ``made_for``, and is used with something else.

    Args:
        policy: The policy. Gates say the names of ``model``, ``check`` and ``keep``; other
            policies need not say anything.
        used_with: The same of what it is used with; None where there is none.
    """
    made_for = getattr(policy, "made_for", {})
    differ = [n for n, v in used_with.items() if v is not None and made_for.get(n, v) != v]
    if differ:
        wanted, given = ({n: of[n] for n in differ} for of in (made_for, used_with))
        raise ValueError(
            f"The policy {policy.name!r} was fitted for {wanted}, and is used with {given}. Use it "
            "with what it was fitted for, or fit one for this."
        )


def stops_of(policy: Policy, layers: Sequence[int]) -> tuple[int, ...]:
    """Return the layers at which a policy wants a check, ascending."""
    name = f"stops() of the policy {policy.name!r}: "
    expected = f"some of the candidate layers {spelled(layers)}, each once"
    stops = whole_numbers(policy.stops(layers), name, expected, empty=True)
    if not set(stops) <= set(layers):
        raise ValueError(f"{name}{stops} was returned; expected {expected}.")
    return tuple(sorted(stops))


def decisions(policy: Policy, checks: Checks) -> Bool[Tensor, " prompt"]:
    """Return which prompts leave, after a check of what the policy returned."""
    of = f"leaves() of the policy {policy.name!r}"
    return checked_booleans(policy.leaves(checks), checks.answer.shape[1], of)


def checked_booleans(leaves: Any, n: int, of: str) -> Bool[Tensor, " prompt"]:
    """Return what ``of`` gave, if it is one boolean for each of ``n`` prompts."""
    if not isinstance(leaves, Tensor) or leaves.dtype != torch.bool:
        kind = str(leaves.dtype) if isinstance(leaves, Tensor) else type(leaves).__name__
        raise TypeError(f"{of} returned {kind}; expected a tensor of booleans of shape [{n}].")
    if leaves.shape != (n,):
        raise ValueError(f"{of} returned shape {list(leaves.shape)}; expected [{n}].")
    return leaves.cpu()


@dataclass(frozen=True)
class FixedLayer:
    """Let every prompt leave at one layer; nothing is checked.

    Args:
        layer: The layer.
    """

    layer: int
    reads = False

    def __post_init__(self) -> None:
        check_number("layer", self.layer, least=0)

    @property
    def name(self) -> str:
        """The name in tables."""
        return f"layer {self.layer}"

    def stops(self, layers: Sequence[int]) -> tuple[int, ...]:
        """Return the layer.

        Raises:
            ValueError: If it is not among the candidates.
        """
        if self.layer not in layers:
            raise ValueError(
                f"FixedLayer({self.layer}) was given; expected one of the candidate layers "
                f"{list(layers)}."
            )
        return (self.layer,)

    def leaves(self, checks: Checks) -> Bool[Tensor, " prompt"]:
        """Return True for every prompt."""
        return torch.ones(checks.answer.shape[1], dtype=torch.bool)


@dataclass(frozen=True)
class Threshold:
    """Let a prompt leave at the first layer where the readout is sure enough.

    Example:
        >>> from spade_lens.exits import Threshold
        >>> Threshold({2: 0.9, 3: math.inf}).stops([1, 2, 3])
        (2,)

    Args:
        value: The least confidence to leave with, one for all layers or by layer; layers
            that are not named, and those with an infinite value, are not checked (nor charged).
        label: The name in tables; by default made of the values.
    """

    value: float | Mapping[int, float]
    label: str = ""
    reads = True

    def __post_init__(self) -> None:
        by_layer = self.value if isinstance(self.value, Mapping) else {"value": self.value}
        for layer, value in by_layer.items():
            check_number(str(layer), value, whole=False)

    @property
    def name(self) -> str:
        """The name in tables."""
        if self.label:
            return self.label
        if isinstance(self.value, Mapping):
            finite = [f"{layer}: {v:.4g}" for layer, v in self.value.items() if v < math.inf]
            return f"thresholds {{{', '.join(finite)}}}"
        return "never" if self.value == math.inf else f"threshold {self.value:.6g}"

    def at(self, layer: int) -> float:
        """Return the least confidence to leave with at a layer."""
        return self.value.get(layer, math.inf) if isinstance(self.value, Mapping) else self.value

    def stops(self, layers: Sequence[int]) -> tuple[int, ...]:
        """Return the candidate layers with a finite threshold.

        Raises:
            ValueError: If a finite threshold is for a layer that is not a candidate.
        """
        if isinstance(self.value, Mapping):
            finite = {layer for layer, v in self.value.items() if v < math.inf}
            if not finite <= set(layers):
                raise ValueError(
                    f"There are thresholds for layers {sorted(finite - set(layers))}; the "
                    f"candidate layers are {list(layers)}."
                )
        return tuple(layer for layer in layers if self.at(layer) < math.inf)

    def leaves(self, checks: Checks) -> Bool[Tensor, " prompt"]:
        """Return which prompts are at least as sure as the threshold of the layer."""
        return checks.confidence[-1] >= self.at(checks.layers[-1])


@dataclass(frozen=True)
class Patience:
    """Let a prompt leave once ``checks`` readouts in a row gave the same answer.

    Source: Zhou et al., "BERT Loses Patience" (NeurIPS 2020), where the count starts anew with
    every change of the answer. That the last readout must also reach a confidence is ours, and
    off by default.

    Args:
        checks: How many checks in a row must agree, the present one included; at least 1.
        value: The least confidence of the present one.
    """

    checks: int = 2
    value: float = -math.inf
    reads = True

    def __post_init__(self) -> None:
        check_number("checks", self.checks, least=1)
        check_number("value", self.value, whole=False)

    @property
    def name(self) -> str:
        """The name in tables."""
        sure = "" if self.value == -math.inf else f", confidence {self.value:.6g}"
        return f"patience {self.checks}{sure}"

    def stops(self, layers: Sequence[int]) -> tuple[int, ...]:
        """Return all candidates; none where they are fewer than the checks that must agree."""
        return tuple(layers) if len(layers) >= self.checks and self.value < math.inf else ()

    def leaves(self, checks: Checks) -> Bool[Tensor, " prompt"]:
        """Return whose last checks agree."""
        if len(checks.layers) < self.checks:
            return torch.zeros(checks.answer.shape[1], dtype=torch.bool)
        same = (checks.answer[-self.checks :] == checks.answer[-1]).all(dim=0)
        return same & (checks.confidence[-1] >= self.value)


@dataclass(frozen=True)
class Oracle:
    """The bound that no policy can know: leave where the answer is already the final one.

    With ``stable=False`` a prompt leaves at the earliest candidate layer at which SPADE's answer
    is the full model's. With ``stable=True`` it leaves at the earliest candidate layer from which
    on that holds at every later candidate too. A prompt without such a layer runs to the end. No
    checks are charged, only the answer. The oracle needs the final answer, so it can be simulated
    but not run.

    Args:
        stable: Whether the answer must be the final one from there on.
    """

    stable: bool = False

    @property
    def name(self) -> str:
        """The name in tables."""
        return "oracle, stable" if self.stable else "oracle"

    def first(self, agrees: Bool[Tensor, "layer prompt"]) -> Int[Tensor, " prompt"]:
        """Return the index of the layer where each prompt leaves; the number of layers for none."""
        if self.stable:
            # Whether it holds from a layer on is a product from the end.
            agrees = agrees.flip(0).long().cumprod(dim=0).flip(0).bool()
        none = torch.ones(1, agrees.shape[1], dtype=torch.bool)
        return torch.cat([agrees, none]).long().argmax(dim=0)
