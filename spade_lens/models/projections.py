"""What a block computes before its keys and values are made, found without knowing its kind.

A block's linear layers that read its input, but for a norm, are its *projections*. Keys and values
depend on some of them, by default on two (or on one that is fused). The queries do not matter to
them. So a block whose keys and values alone are wanted may leave out the others; and with other
weights for these, it makes the keys and values of another residual.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from spade_lens.models.backbone import Backbone
from spade_lens.models.recorder import with_submodule


@dataclass(frozen=True)
class Projections:
    """The projections of one block, by name.

    Args:
        needed: Those that keys and values depend on.
        idle: The others that run before keys and values are made, and how wide they are.
    """

    needed: tuple[str, ...]
    idle: Mapping[str, int]

    def alone(
        self, block: nn.Module, changed: Mapping[str, tuple[Tensor, Tensor]] | None = None
    ) -> nn.Module:
        """Copy a block that makes keys and values and nothing else.

        Args:
            block: The block.
            changed: Other weights and biases of needed projections.
        """
        for name, width in self.idle.items():
            block = with_submodule(block, name, _Zeros(width))
        for name, (weight, bias) in (changed or {}).items():
            block = with_submodule(block, name, _Linear(weight, bias))
        return block


class _Zeros(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self._width = width

    def forward(self, x: Tensor) -> Tensor:
        return x.new_zeros(1).expand(*x.shape[:-1], self._width)


class _Linear(nn.Module):
    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self._weight, self._bias = weight, bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self._weight, self._bias)


class _Tap(nn.Module):
    """Runs another module, and keeps what went in and came out."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._inner = [module]  # not a child, so that names stay as they are
        self.went: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self._inner[0](x)
        self.went = (x, out)
        return out


def tapped(
    backbone: Backbone, block: int, resid: Float[Tensor, "batch pos d_model"], names: Sequence[str]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return what goes into named modules of a block, and comes out, until its keys are made.

    Modules that do not run before are left out. The order is that in which they are named.
    """
    taps: dict[str, _Tap] = {}

    def with_taps(number: int, module: nn.Module) -> nn.Module:
        if number == block:
            for name in names:
                taps[name] = _Tap(module.get_submodule(name))
                module = with_submodule(module, name, taps[name])
        return module

    _keys_values(backbone, block, resid, with_taps)
    return {name: tap.went for name, tap in taps.items() if tap.went is not None}


def projections_of(backbone: Backbone, block: int) -> Projections | None:
    """Find the projections of a block; None where no layer reads its input alone.

    Args:
        backbone: The model, whose blocks take a cache.
        block: The number of the block.
    """
    found: dict[str, nn.Module] = {}

    def look(number: int, module: nn.Module) -> nn.Module:
        if number == block:
            found.update(module.named_modules())
        return module

    if backbone.having_blocks(look) is None:
        return None
    names = [name for name, module in found.items() if name and _is_linear(module)]
    draws = torch.Generator().manual_seed(0)
    resid = torch.randn(1, 2, backbone.d_model, generator=draws)
    resid = resid.to(backbone.device, backbone.dtype)
    run = tapped(backbone, block, resid, names)
    first = next((x for x, _ in run.values() if x.shape == resid.shape), None)
    if first is None:
        return None
    # The others that ran read what these give, such as a latent.
    reading = {n: out for n, (x, out) in run.items() if x.shape == first.shape and x.equal(first)}
    whole = _keys_values(backbone, block, resid, lambda _, module: module)
    idle, needed = {}, []
    for name, out in reading.items():
        width = out.shape[-1]

        def without(i: int, module: nn.Module, name: str = name, width: int = width) -> nn.Module:
            return with_submodule(module, name, _Zeros(width)) if i == block else module

        made = _keys_values(backbone, block, resid, without)
        if all(a.equal(b) for a, b in zip(whole, made, strict=True)):
            idle[name] = width
        else:
            needed.append(name)
    return Projections(tuple(needed), idle) if needed else None


def _is_linear(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    no_children = next(module.children(), None) is None
    return no_children and isinstance(weight, Tensor) and weight.ndim == 2


def _keys_values(
    backbone: Backbone,
    block: int,
    resid: Float[Tensor, "batch pos d_model"],
    change: Callable[[int, nn.Module], nn.Module],
) -> tuple[Tensor, Tensor]:
    """Return the keys and values of residuals in a block, of which a part may be changed."""
    other = backbone.having_blocks(change)
    assert other is not None
    positions = torch.arange(resid.shape[1], device=resid.device)[None]
    cached = other.cached_tokens(positions, lambda _: resid)
    assert cached is not None
    return cached.keys_values(block)
