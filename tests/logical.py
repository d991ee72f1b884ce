"""Logical devices: tensors on the CPU that say they are elsewhere, and mix with no other device.

No second device is needed to see that no operation takes tensors of two, as a GPU would refuse.
They are called ``lazy:0`` and ``lazy:1``, of which torch asks nothing but the name.
"""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map

CPU = torch.device("cpu")
_MOVES = {"aten::copy_", "aten::_to_copy"}
_BY_NUMBERS = {"aten::index.Tensor", "aten::index_put_", "aten::_index_put_impl_"}
"""A GPU takes places in lists of the CPU."""


class There(torch.Tensor):
    """A tensor that says that it is on a logical device."""

    @staticmethod
    def __new__(cls, here: torch.Tensor, device: torch.device) -> "There":
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            here.shape,
            strides=here.stride(),
            storage_offset=here.storage_offset(),
            dtype=here.dtype,
            device=device,
            requires_grad=here.requires_grad,
        )
        made.here = here.detach()
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})

    def tolist(self) -> Any:
        return self.here.tolist()

    def __deepcopy__(self, memo: Any) -> "There":
        return self


class LogicalDevices(TorchDispatchMode):
    """Inside it tensors are made and moved on logical devices."""

    def __enter__(self) -> Any:
        # Numbers of a list become a tensor of the CPU first, and that is then moved.
        self._before = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        torch._C._set_only_lift_cpu_tensors(self._before)
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operation on the CPU; refuse one that takes tensors of two devices."""
    tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
    name = func._schema.name
    full = f"{name}.{func._overloadname}" if func._overloadname != "default" else name
    mixes = full in _BY_NUMBERS or name in _BY_NUMBERS
    devices = {x.device for x in tensors if x.device != CPU or (x.ndim and not mixes)}
    asked = kwargs.get("device")
    if name in _MOVES:
        at = asked or tensors[0].device
    elif len(devices) > 1:
        raise RuntimeError(f"{full} takes tensors of several devices: {sorted(map(str, devices))}")
    else:
        at = torch.device(asked) if asked else next(iter(devices), CPU)
    plain = lambda x: x.here if isinstance(x, There) else x  # noqa: E731
    inner = {k: v for k, v in tree_map(plain, kwargs).items()}
    if asked is not None:
        inner["device"] = CPU
    out = func(*tree_map(plain, args), **inner)
    if at.type == "cpu" and not any(isinstance(x, There) for x in tensors):
        return out
    if at.type != "cpu":
        wrap = lambda x: There(x, at) if isinstance(x, torch.Tensor) else x  # noqa: E731
        out = tree_map(wrap, out)
    return return_and_correct_aliasing(func, args, kwargs, out)
