"""Record the arguments that a model prepares for its blocks. Knows nothing of what they mean."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

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
    """Replaces a block, passes the residual on and keeps the other arguments."""

    def __init__(self, block: nn.Module, *, as_tuple: bool) -> None:
        super().__init__()
        # In a list, so that torch does not register the block as a child once more.
        self._block = [block]
        self._as_tuple = as_tuple
        self.resid: Tensor
        self.call = Call()

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
