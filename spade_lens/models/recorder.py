"""Record the arguments that a model prepares for its blocks, in copies of its modules.

Knows nothing of what the arguments mean.
"""

import copy
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from spade_lens.models.placed import class_of, is_moved, move_copy

Slot = int | str
"""A place in a call: an index among the positional arguments, or a name."""


@dataclass(frozen=True)
class Call:
    """The arguments of a block, the residual aside."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    def get(self, slot: Slot) -> Any:
        """Return the argument in a slot."""
        return self.args[slot] if isinstance(slot, int) else self.kwargs[slot]

    def having(self, slot: Slot, value: Any) -> "Call":
        """Return the same call with another value in a slot."""
        if isinstance(slot, int):
            return Call((*self.args[:slot], value, *self.args[slot + 1 :]), self.kwargs)
        return Call(self.args, {**self.kwargs, slot: value})

    def slot_of(self, value: Any) -> Slot | None:
        """Return the slot of a value; None if it is not in the call."""
        for i, arg in enumerate(self.args):
            if arg is value:
                return i
        return next((name for name, arg in self.kwargs.items() if arg is value), None)


class Recorder(nn.Module):
    """Replaces a block, passes the residual on and keeps the other arguments.

    ``inputs`` are those of the last recording, if a run with equal inputs may use it again. They
    stand here because copies of a backbone share its recorders.
    """

    def __init__(self, block: nn.Module, *, as_tuple: bool) -> None:
        super().__init__()
        # In a list, so that torch does not register the block as a child once more.
        self._block = [block]
        self._as_tuple = as_tuple
        self.resid: Tensor
        self.call = Call()
        self.inputs: tuple[Any, ...] | None = None

    def __getattr__(self, name: str) -> Any:
        # A model may ask a block for its kind (``layer.attention_type``).
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_block"][0], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Record and do nothing else."""
        if "hidden_states" in kwargs:
            self.resid, rest = kwargs.pop("hidden_states"), args
        else:
            self.resid, rest = args[0], args[1:]
        self.call = Call(rest, kwargs)
        return (self.resid,) if self._as_tuple else self.resid


def shallow_copy(
    module: nn.Module, children: dict[str, nn.Module] | None = None, *, hooks: bool = True
) -> nn.Module:
    """Copy a module with other children, with its hooks or without."""
    kind = class_of(module)
    if kind is type(module):
        twin = copy.copy(module)
    else:  # FSDP's own class cannot be copied
        twin = kind.__new__(kind)
        vars(twin).update(vars(module))
    twin._modules = {**module._modules, **(children or {})}
    move_copy(twin, module)
    if not hooks:
        twin._forward_hooks, twin._forward_pre_hooks = OrderedDict(), OrderedDict()
    return twin


def without_hooks(module: nn.Module) -> nn.Module:
    """Copy a tree of modules, but neither its parameters nor its hooks."""
    children = {n: without_hooks(m) for n, m in module.named_children()}
    return shallow_copy(module, children, hooks=False)


def with_submodule(root: nn.Module, path: str, module: nn.Module) -> nn.Module:
    """Copy the modules on the way down ``path`` and put another module at its end."""
    twin = shallow_copy(root)
    name, _, rest = path.partition(".")
    child = twin._modules[name]
    assert child is not None
    twin._modules[name] = with_submodule(child, rest, module) if rest else module
    return twin


def tree_copy(module: nn.Module) -> nn.Module:
    """Copy a tree of modules; its tensors (parameters, buffers, plain attributes) are shared."""
    held = [t for m in module.modules() for t in vars(m).values()]
    tensors = (*module.parameters(), *module.buffers(), *held)
    # Accelerate's hooks hold weights that are in no module.
    hooks = {id(m._hf_hook): m._hf_hook for m in module.modules() if is_moved(m)}
    return copy.deepcopy(module, hooks | {id(t): t for t in tensors if isinstance(t, Tensor)})
