"""Low-rank updates of the linear layers of a model's last blocks, which stay outside the model.

Source: Hu et al., LoRA (arXiv 2106.09685). An update adds ``up @ down`` to a weight, without a
further scale. ``down`` starts random and ``up`` at 0, so that a fresh update changes nothing.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from spade_lens.checks import warn
from spade_lens.models.adapters import adapter_for
from spade_lens.models.errors import UnsupportedModelError
from spade_lens.models.model import Model


class LowRankUpdates(nn.Module):
    """The factors of low-rank updates, one pair for every linear layer of some blocks.

    Args:
        model: The model. It is not changed but inside :meth:`acting` and :meth:`merged`.
        layer: The first block that is updated.
        rank: The rank of every update.
        seed: The seed of the first values.

    Raises:
        UnsupportedModelError: If the model is no Hugging Face model, or these blocks have no
            ``torch.nn.Linear``.
    """

    def __init__(self, model: Model, layer: int, rank: int, seed: int) -> None:
        super().__init__()
        self._linears = dict(linear_layers(model, layer))
        self._model, self._made_for = model, model.sha256
        generator = torch.Generator().manual_seed(seed)
        for name, linear in self._linears.items():
            rows, columns = linear.weight.shape
            down = torch.randn(rank, columns, generator=generator) / columns**0.5
            device = linear.weight.device
            self.register_parameter(f"{name}/down", nn.Parameter(down.to(device)))
            self.register_parameter(
                f"{name}/up", nn.Parameter(torch.zeros(rows, rank, device=device))
            )

    def factors(self) -> dict[str, Tensor]:
        """Return a copy of all factors, by name."""
        return {name: factor.detach().clone() for name, factor in self.named_parameters()}

    def change(self, name: str) -> Float[Tensor, "out in"]:
        """Return what is added to the weight of a linear layer."""
        up, down = self.get_parameter(f"{name}/up"), self.get_parameter(f"{name}/down")
        return up @ down

    @torch.no_grad()
    def drift(self) -> dict[int, float]:
        """Return how far every block is from where it started: the length of all its changes."""
        squares: dict[int, float] = {}
        for name in self._linears:
            block = int(name.partition("/")[0])
            squares[block] = squares.get(block, 0.0) + float(self.change(name).square().sum())
        return {block: total**0.5 for block, total in squares.items()}

    @contextmanager
    def acting(self) -> Iterator[None]:
        """Let the model compute with the updates, so that they get gradients."""
        handles = []
        try:
            for name, linear in self._linears.items():
                handles.append(linear.register_forward_hook(self._hook(name)))
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def merged(self) -> Iterator[None]:
        """Let the model's weights hold the updates; they are what they were afterwards.

        Raises:
            ValueError: If the weights are not those that the updates were made for.
        """
        if self._model.sha256 != self._made_for:
            raise ValueError(
                f"The weights of {self._model.name} are not those that the updates were trained "
                "on; expected these, without updates. Leave applied(), or train anew."
            )
        before = {name: linear.weight.detach().clone() for name, linear in self._linears.items()}
        try:
            with torch.no_grad():
                for name, linear in self._linears.items():
                    linear.weight += self.change(name).to(linear.weight)
            yield
        finally:
            with torch.no_grad():
                for name, linear in self._linears.items():
                    linear.weight.copy_(before[name])

    def _hook(self, name: str) -> Any:
        up, down = self.get_parameter(f"{name}/up"), self.get_parameter(f"{name}/down")

        def hook(linear: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
            return out + (args[0].to(down.dtype) @ down.T @ up.T).to(out.dtype)

        return hook


def linear_layers(model: Model, layer: int) -> Mapping[str, nn.Linear]:
    """Return the linear layers of the blocks from a layer on, by block and name.

    Raises:
        UnsupportedModelError: If there are none, or the model is no Hugging Face model.
    """
    original = model.original
    if not hasattr(original, "get_output_embeddings"):
        raise UnsupportedModelError(
            f"{model.name} is a {type(original).__name__}; expected a Hugging Face model, such as "
            "load() gives."
        )
    blocks = original.get_submodule(adapter_for(original).get_component_mapping()["blocks"].name)
    found = {
        f"{number}/{name.replace('.', '/')}": module
        for number, block in enumerate(blocks)
        for name, module in block.named_modules()
        if number >= layer and isinstance(module, nn.Linear)
    }
    inside = {id(module.weight) for module in found.values()}
    left_out = [
        f"block {number}: {name}"
        for number, block in enumerate(blocks)
        for name, weight in block.named_parameters()
        if number >= layer and weight.ndim > 1 and id(weight) not in inside
    ]
    if found and left_out:
        warn(
            f"{len(left_out)} weights of {model.name} are no torch.nn.Linear, get no updates and "
            f"stay as they are: {left_out[0]} and the like, such as a mixture's experts."
        )
    if not found:
        raise UnsupportedModelError(
            f"The blocks of {model.name} from layer {layer} on have no torch.nn.Linear; expected "
            "blocks with linear layers, as Llama's. Use such a model."
        )
    return found
