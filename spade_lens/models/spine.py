"""What stands in for the base model where only the unembedding runs, and how blocks answer."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from spade_lens.models.placed import home_of


class Passage(nn.Module):
    """Replaces everything before the unembedding and changes nothing."""

    def forward(self, *_: Any, inputs_embeds: Tensor, **__: Any) -> BaseModelOutputWithPast:
        """Return the residuals that are given."""
        return _Passed(last_hidden_state=inputs_embeds)


class _Passed(BaseModelOutputWithPast):
    """The output of a base model, in which whatever else a family puts there is None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


def blocks_return_tuples(hf_model: nn.Module, block: nn.Module) -> bool:
    """Return whether a block gives its residual in a tuple, as a run of the model shows."""
    seen: list[bool] = []
    handle = block.register_forward_hook(lambda _m, _a, out: seen.append(isinstance(out, tuple)))
    try:
        with torch.no_grad():
            one = torch.zeros(1, 1, dtype=torch.long, device=home_of(hf_model))
            hf_model(one, use_cache=False)
    finally:
        handle.remove()
    return seen[0]
