"""Where a model's weights are: moved by accelerate, sharded by torch, or wrapped by peft.

A model over several devices, or larger than memory, is run by other libraries. They put hooks on
modules, which move inputs and weights when a module runs. Blocks run with these hooks. Outside the
blocks all tensors are on one device, the *home* device. This module finds it, copies modules
together with such hooks, and looks up weights that are not in the modules themselves.
"""

import functools
from collections.abc import Callable
from types import FunctionType as Function
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

_OF_SPLITTING = "transformers.distributed."
"""Where functions come from that gather inputs and outputs of weights split by a ``tp_plan``."""


def class_of(module: nn.Module) -> type[nn.Module]:
    """Return the class of a module as it was before FSDP gave it one of its own."""
    kinds = type(module).__mro__
    names = [kind.__name__ for kind in kinds]
    return kinds[names.index("FSDPModule") + 1] if "FSDPModule" in names else type(module)


def unshard(*modules: nn.Module) -> None:
    """Let FSDP gather the weights that modules hold themselves, since their copies run."""
    for module in modules:
        if class_of(module) is not type(module):
            module.unshard()  # type: ignore[operator]


def home_of(hf_model: Any) -> torch.device:
    """Return the device on which a model embeds tokens: the one for all that blocks do not hold."""
    embedding = hf_model.get_input_embeddings()
    weight: Tensor = embedding.weight
    on = [h.execution_device for h in _aligning(embedding) if h.execution_device is not None]
    return torch.device(on[0]) if weight.is_meta and on else weight.device


def is_moved(module: nn.Module) -> bool:
    """Return whether accelerate runs a module, with hooks of its own in place of ``forward``."""
    return "_hf_hook" in vars(module)


def has_own_forward(module: nn.Module) -> bool:
    """Return whether somebody else than accelerate has replaced the ``forward`` of a module."""
    own = own_forward(module)
    if is_moved(module):
        return getattr(own, "__func__", own) is not type(module).forward
    return own is not None and not str(own.__module__).startswith(_OF_SPLITTING)


def own_forward(module: nn.Module) -> Any:
    """Return the function that stands in a module as its ``forward``, below accelerate's."""
    return vars(module).get("_old_forward" if is_moved(module) else "forward")


def only_moves(module: nn.Module, name: str) -> bool:
    """Return whether a function in an attribute of a module moves numbers and changes none.

    Beside ``forward`` a model over several devices has functions that refuse to move it.
    """
    if name == "forward":
        return not has_own_forward(module)
    return hasattr(module, "hf_device_map") and isinstance(getattr(nn.Module, name, 0), Function)


def move_copy(twin: nn.Module, module: nn.Module) -> None:
    """Let accelerate move the inputs and weights of a shallow copy as those of its module.

    Its hooks stand in an attribute ``forward`` that runs the module, whatever children a copy has.
    """
    if not is_moved(module):
        return
    # Its own function reads the hook and the former ``forward`` off the module that it is given.
    forward, before = vars(module)["forward"], vars(module)["_old_forward"]
    vars(twin)["forward"] = functools.partial(forward.func, twin)
    if getattr(before, "__self__", None) is module:
        vars(twin)["_old_forward"] = MethodType(before.__func__, twin)


def let_go(module: nn.Module) -> None:
    """Move weights back where accelerate keeps them, after a run that ended inside a module."""
    for part in module.modules():
        for hook in _aligning(part):
            if hook.offload and hasattr(hook, "tied_pointers_to_remove"):
                hook.post_forward(part, ())


def offloaded(module: nn.Module) -> dict[str, Callable[[], Tensor]]:
    """Return functions that look up the weights that accelerate keeps in memory or on disk."""
    values: dict[str, Callable[[], Tensor]] = {}
    for path, part in module.named_modules(remove_duplicate=False):
        for hook in _aligning(part):
            deep = hook.place_submodules
            held = (*part.named_parameters(recurse=deep, remove_duplicate=False),)
            held += (*part.named_buffers(recurse=deep, remove_duplicate=False),)
            for name, weight in held:
                if hook.offload and weight.is_meta and name in hook.weights_map:
                    look_up = functools.partial(hook.weights_map.__getitem__, name)
                    values[f"{path}.{name}" if path else name] = look_up
    return values


def whole(module: nn.Module, name: str = "weight") -> Tensor | None:
    """Return a weight of a module with its values, wherever they are; None if it has none.

    Of a sharded one this is a collective operation: every process must ask for it.
    """
    weight: Tensor | None = getattr(module, name)
    if weight is None:
        return None
    if weight.is_meta:
        return offloaded(module)[name]()
    return gathered(weight)


def gathered(weight: Tensor) -> Tensor:
    """Return a tensor whole, where torch has sharded it over processes (a ``DTensor``)."""
    full = getattr(weight, "full_tensor", None)
    return weight if full is None else full()


def _aligning(module: nn.Module) -> list[Any]:
    """Return the hooks with which accelerate moves the weights of a module."""
    hook = vars(module).get("_hf_hook")
    hooks = getattr(hook, "hooks", [hook])
    return [each for each in hooks if hasattr(each, "execution_device")]
