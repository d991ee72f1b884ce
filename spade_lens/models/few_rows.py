"""Matrix products of a few rows in fp32 on a CPU, where the kernel decides the speed.

A step of decoding reads every weight for one or a few tokens, so that memory is what it waits for.
``torch.nn.functional.linear`` takes a kernel made for many rows. Asked for as ``W @ x.T`` on two
rows, or with weights in oneDNN's own layout for more, the same product comes at the speed of
memory: ``benchmarks/speculation.py --costs`` measures it. The blocks that run are shallow copies
of the user's, which are not changed.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spade_lens.models.recorder import shallow_copy

_MOST = 12
"""Up to so many rows oneDNN's layout wins."""
_LEAST = 2**16
"""Entries of a weight, from which it pays to choose."""
_PAYS = 6
"""Packing a weight takes as long as is lost in about so many products without it."""


def fast_copy(module: nn.Module, *, packed: bool) -> nn.Module:
    """Copy a tree of modules, in which linear layers have the kernels of few rows.

    Args:
        module: The modules. Layers with hooks, of a subclass or of another dtype stay as they are.
        packed: Whether to store weights a second time, in oneDNN's layout, once 3 to 12 rows have
            run a few times. Made of the values of weights, so that it serves one call.
    """
    if _may_be_fast(module):
        return _FewRows(module, packed=packed)
    children = {name: fast_copy(child, packed=packed) for name, child in module.named_children()}
    changed = any(children[name] is not child for name, child in module.named_children())
    return shallow_copy(module, children) if changed else module


def _may_be_fast(module: nn.Module) -> bool:
    if type(module) is not nn.Linear or "forward" in vars(module):
        return False
    hooks = (module._forward_hooks, module._forward_pre_hooks)
    weight = module._parameters.get("weight")
    plain = type(weight) is nn.Parameter and weight.dtype == torch.float32
    on_cpu = plain and weight is not None and weight.device.type == "cpu"
    return on_cpu and not any(hooks) and weight is not None and weight.numel() >= _LEAST


class _FewRows(nn.Module):
    """A linear layer that shares the parameters of another one."""

    def __init__(self, linear: Any, *, packed: bool) -> None:
        super().__init__()
        self._parameters = linear._parameters
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._packed: Any = None
        self._until_packed = _PAYS if packed and _can_pack() else None

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x @ W.T + b``."""
        n_rows = x.numel() // self.in_features
        weight, bias = self._parameters["weight"], self._parameters["bias"]
        assert weight is not None
        if 2 < n_rows <= _MOST and self._is_packed(weight):
            return _run_packed(x, self._packed, bias)
        if n_rows > 4:
            return F.linear(x, weight, bias)
        rows = x.reshape(n_rows, self.in_features)
        if n_rows == 1:  # the kernel of two rows is the fast one
            rows = F.pad(rows, (0, 0, 0, 1))
        out = torch.mm(weight, rows.t())[:, :n_rows].t().contiguous()
        return (out if bias is None else out + bias).view(*x.shape[:-1], self.out_features)

    def _is_packed(self, weight: Tensor) -> bool:
        if self._packed is None and self._until_packed is not None:
            self._until_packed -= 1
            if self._until_packed < 0:
                self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), 4)
        return self._packed is not None


def _can_pack() -> bool:
    """Whether torch has oneDNN's layout: its compiler uses operators without a public name."""
    has = hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    return has and torch.backends.mkldnn.is_available()


def _run_packed(x: Tensor, packed: Any, bias: Tensor | None) -> Tensor:
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return out
