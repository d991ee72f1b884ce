"""When to stop: from the checks made so far to a yes or no, prompt by prompt.

A policy sees, for every prompt still running, the confidence and the answer of the readout at
each layer it was checked at. It knows neither models nor tokens, so the engine and the
simulation run the very same object. Every policy here decides each prompt by itself.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Checks:
    """What the readouts said so far.

    Args:
        layers: The layers checked, ascending; the last one is where the decision falls.
        confidence: By check and prompt; larger is surer. NaN for a policy that reads no lens.
        answer: What the readout would answer, a token id; -1 for a policy that reads no lens.
    """

    layers: tuple[int, ...]
    confidence: Float[Tensor, "check prompt"]
    answer: Int[Tensor, "check prompt"]


@runtime_checkable
class Policy(Protocol):
    """Decides which prompts leave.

    A policy of your own needs these four. ``reads`` says whether it looks at the lens at all
    (if not, no readout is computed or charged).
    """

    @property
    def name(self) -> str:
        """What tables call it."""
        ...

    @property
    def reads(self) -> bool:
        """Whether a readout is needed at its checks."""
        ...

    def stops(self, layers: Sequence[int]) -> tuple[int, ...]:
        """Those of the candidate layers at which it wants a check; none if it never exits.

        Raises:
            ValueError: If the policy does not fit the candidate layers.
        """
        ...

    def leaves(self, checks: Checks) -> Bool[Tensor, " prompt"]:
        """Which prompts leave at the last of these checks."""
        ...


@dataclass(frozen=True)
class FixedLayer:
    """Every prompt leaves at one layer; nothing is checked.

    Args:
        layer: The layer.
    """

    layer: int

    @property
    def name(self) -> str:
        """What tables call it."""
        return f"layer {self.layer}"

    @property
    def reads(self) -> bool:
        """No."""
        return False

    def stops(self, layers: Sequence[int]) -> tuple[int, ...]:
        """The layer.

        Raises:
            ValueError: If it is not among the candidates.
        """
        if self.layer not in layers:
            raise ValueError(
                f"FixedLayer({self.layer}) was asked for; the candidate layers are {list(layers)}."
            )
        return (self.layer,)

    def leaves(self, checks: Checks) -> Bool[Tensor, " prompt"]:
        """All of them."""
        return torch.ones(checks.answer.shape[1], dtype=torch.bool)


@dataclass(frozen=True)
class Threshold:
    """A prompt leaves at the first layer where the readout is sure enough.

    Example:
        >>> from spade_lens.exits import Threshold
        >>> Threshold({2: 0.9, 3: math.inf}).stops([1, 2, 3])
        (2,)

    Args:
        value: The least confidence to leave with, one for all layers or by layer; layers
            that are not named, and those with an infinite value, are not checked (nor charged).
        label: What tables call it; by default made of the values.
    """

    value: float | Mapping[int, float]
    label: str = ""

    @property
    def name(self) -> str:
        """What tables call it."""
        if self.label:
            return self.label
        if isinstance(self.value, Mapping):
            finite = [f"{layer}: {v:.4g}" for layer, v in self.value.items() if v < math.inf]
            return f"thresholds {{{', '.join(finite)}}}"
        return "never" if self.value == math.inf else f"threshold {self.value:.6g}"

    @property
    def reads(self) -> bool:
        """Yes."""
        return True

    def at(self, layer: int) -> float:
        """The least confidence to leave with at a layer."""
        return self.value.get(layer, math.inf) if isinstance(self.value, Mapping) else self.value

    def stops(self, layers: Sequence[int]) -> tuple[int, ...]:
        """The candidate layers with a finite threshold.

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
        """Those at least as sure as the threshold of the layer."""
        return checks.confidence[-1] >= self.at(checks.layers[-1])


@dataclass(frozen=True)
class Patience:
    """A prompt leaves once ``checks`` readouts in a row gave the same answer.

    Source: Zhou et al., "BERT Loses Patience" (NeurIPS 2020), where the count starts anew with
    every change of the answer. That the last readout must also reach a confidence is ours, and
    off by default.

    Args:
        checks: How many checks in a row must agree, the present one included; at least 1.
        value: The least confidence of the present one.
    """

    checks: int = 2
    value: float = -math.inf

    def __post_init__(self) -> None:
        if self.checks < 1:
            raise ValueError(f"Patience({self.checks}) was asked for; expected 1 check or more.")

    @property
    def name(self) -> str:
        """What tables call it."""
        sure = "" if self.value == -math.inf else f", confidence {self.value:.6g}"
        return f"patience {self.checks}{sure}"

    @property
    def reads(self) -> bool:
        """Yes."""
        return True

    def stops(self, layers: Sequence[int]) -> tuple[int, ...]:
        """All candidates; none where they are fewer than the checks that must agree."""
        return tuple(layers) if len(layers) >= self.checks and self.value < math.inf else ()

    def leaves(self, checks: Checks) -> Bool[Tensor, " prompt"]:
        """Those whose last checks agree."""
        if len(checks.layers) < self.checks:
            return torch.zeros(checks.answer.shape[1], dtype=torch.bool)
        same = (checks.answer[-self.checks :] == checks.answer[-1]).all(dim=0)
        return same & (checks.confidence[-1] >= self.value)


@dataclass(frozen=True)
class Oracle:
    """The bound no policy can know: leave where the answer is already the final one.

    With ``stable=False`` a prompt leaves at the earliest candidate layer at which SPADE's answer
    is the full model's. With ``stable=True`` it leaves at the earliest candidate layer from which
    on that holds at every later candidate too. Where there is none it runs to the end. No checks
    are charged; the answering of the exit is. It needs the final answer, so it can be simulated
    and never run.

    Args:
        stable: Whether the answer must be the final one from there on.
    """

    stable: bool = False

    @property
    def name(self) -> str:
        """What tables call it."""
        return "oracle, stable" if self.stable else "oracle"

    def first(self, agrees: Bool[Tensor, "layer prompt"]) -> Int[Tensor, " prompt"]:
        """The index of the layer where each prompt leaves; the number of layers for none.

        Args:
            agrees: Whether SPADE's answer at every candidate layer is the final one.
        """
        if self.stable:
            # Whether it holds from a layer on is a product from the end.
            agrees = agrees.flip(0).long().cumprod(dim=0).flip(0).bool()
        none = torch.ones(1, agrees.shape[1], dtype=torch.bool)
        return torch.cat([agrees, none]).long().argmax(dim=0)
