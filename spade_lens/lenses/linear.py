"""Linear lenses: the tuned lens and L-SPADE, which differ only in what they are fitted to.

Both replace the remaining layers by one affine map, ``h -> h + A h + b``, one for every layer. The
tuned lens (Belrose et al. 2023, arXiv 2303.08112) is fitted to the model's own output
distribution. L-SPADE (Zheng, Ma, Lin, Yang 2025, arXiv 2507.17618) is "a linear
approximation of SPADE"; the paper's abstract says no more. That the map is affine, where it
starts (at the answer token's residual) and what it is fitted to are our choices; see
:func:`spade_lens.fit`.

A map is written as the identity and what is added to it, so that a ridge or an early stop shrinks
it towards the logit lens and not towards nothing. This module does not know how maps are fitted.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, TypeAlias

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from spade_lens.checks import checked, plain_name
from spade_lens.lenses.lens import Reading
from spade_lens.models.identity import identity_of, refuse_unnamed
from spade_lens.models.model import Model
from spade_lens.models.residuals import Residuals
from spade_lens.prompts.prompt import Prompt
from spade_lens.storage.files import as_path
from spade_lens.storage.records import write_pair


@dataclass(frozen=True, eq=False)
class AffineMaps:
    """``h -> h + A h + b`` for several layers, with ``A`` whole or as a product of low rank.

    Example:
        >>> maps = AffineMaps.identity(range(4), d_model=8)
        >>> h = torch.randn(3, 8)
        >>> torch.equal(maps(h, 2), h)
        True

    Args:
        layers: The layer of every entry of the first axis, ascending.
        up: ``A``, or its left factor where there is a right one.
        bias: ``b``.
        down: The right factor: ``A = up @ down``.

    Raises:
        ValueError: If the layers are not ascending or the shapes do not fit each other.
    """

    layers: tuple[int, ...]
    up: Float[Tensor, "layer d_model rank"]
    bias: Float[Tensor, "layer d_model"]
    down: Float[Tensor, "layer rank d_model"] | None = None

    def __post_init__(self) -> None:
        if list(self.layers) != sorted(set(self.layers)):
            raise ValueError(f"Layers {list(self.layers)} were given; expected them ascending.")
        n, d_model, rank = self.up.shape
        down = (n, rank, d_model) if self.down is None else tuple(self.down.shape)
        whole = self.down is not None or rank == d_model
        fits = n == len(self.layers) and tuple(self.bias.shape) == (n, d_model)
        if not (fits and whole and down == (n, rank, d_model)):
            raise ValueError(
                f"Maps of {len(self.layers)} layers have up {tuple(self.up.shape)}, bias "
                f"{tuple(self.bias.shape)} and down "
                f"{None if self.down is None else tuple(self.down.shape)}; expected "
                "[layer d_model rank], [layer d_model] and [layer rank d_model], or no down and "
                "rank = d_model."
            )

    @classmethod
    def identity(cls, layers: Iterable[int], d_model: int) -> "AffineMaps":
        """Return maps that change nothing, with which every lens is the logit lens."""
        layers = tuple(layers)
        n = len(layers)
        return cls(layers, torch.zeros(n, d_model, d_model), torch.zeros(n, d_model))

    @property
    def d_model(self) -> int:
        """The width of the residual stream."""
        return self.up.shape[1]

    @property
    def rank(self) -> int | None:
        """The rank of ``A``'s factors; None where ``A`` is kept whole."""
        return None if self.down is None else self.up.shape[2]

    @property
    def described(self) -> str:
        """The layers and the rank, in words."""
        n, rank = len(self.layers), "full rank" if self.rank is None else f"rank {self.rank}"
        return f"{n} layers from {self.layers[0]} to {self.layers[-1]}, {rank}" if n else "no layer"

    def __repr__(self) -> str:
        return f"AffineMaps({self.described}, d_model={self.d_model})"

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name."""
        named = {"up": self.up, "bias": self.bias}
        return named if self.down is None else named | {"down": self.down}

    def to(self, device: torch.device) -> "AffineMaps":
        """Return the same maps on another device."""
        return self.having({name: tensor.to(device) for name, tensor in self.tensors.items()})

    def having(self, tensors: Mapping[str, Tensor]) -> "AffineMaps":
        """Return maps of the same layers with other ``tensors``."""
        return AffineMaps(self.layers, tensors["up"], tensors["bias"], tensors.get("down"))

    def __call__(
        self, resid: Float[Tensor, "*rows d_model"], layer: int
    ) -> Float[Tensor, "*rows d_model"]:
        """Map the residuals of one layer, in the dtype that they have."""
        if layer not in self.layers:
            raise ValueError(
                f"There is no map for layer {layer}, only for layers {list(self.layers)}."
            )
        i = self.layers.index(layer)
        # In float32 at least: what is added can nearly cancel the residual.
        wide = resid.to(torch.promote_types(resid.dtype, self.up.dtype))
        inner = wide if self.down is None else wide @ self.down[i].to(wide.dtype).T
        added = inner @ self.up[i].to(wide.dtype).T + self.bias[i]
        return (wide + added).to(resid.dtype)


class LinearLens:
    """What the two linear lenses share; use :class:`TunedLens` or :class:`LinearSpade`.

    At the last layer there is nothing to map: the lens is the model there.

    Args:
        model: The model to read.
        maps: The maps, for some or all of its layers below the last.
        name: What tables and figures call it.
        about: How the maps were fitted, ready for JSON.

    Attributes:
        folder: Where it was last saved or loaded from; None for a lens that is in memory only.

    Raises:
        ValueError: If the maps do not fit the model, or hold NaN or infinite numbers.
    """

    kind = "linear"

    @checked
    def __init__(
        self,
        model: Model,
        maps: AffineMaps,
        *,
        name: str | None = None,
        about: Mapping[str, Any] | None = None,
    ) -> None:
        _check(model, maps)
        self.model = model
        self.maps = maps.to(model.device)
        self.name = plain_name(name or self.kind, "a lens")
        self.about: Mapping[str, Any] = {} if about is None else about
        self.folder: Path | None = None

    def __repr__(self) -> str:
        name = "" if self.name == self.kind else f", name={self.name!r}"
        made = f"{type(self).__name__}(model, maps{name})"
        if self.folder is not None:
            made = f"load_lens({str(self.folder)!r}, model)"
        return f"{made}  # {self.kind} of {self.model.name}, {self.maps.described}"

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that it reads at: those of its maps, and the last.

        Raises:
            ValueError: If the model has fewer blocks than when the lens was made.
        """
        _check_layers(self.model, self.maps)
        return (*self.maps.layers, self.model.n_layers)

    @property
    def held_out(self) -> pd.DataFrame:
        """How good it is on documents it was not fitted on; empty where it was not fitted here.

        Returns:
            One row per layer and lens (this one, the logit lens and SPADE): ``layer``, ``lens``,
            ``kl_to_model``, ``agrees_with_model``, ``kl_to_spade``, ``agrees_with_spade`` and
            ``n``, the number of positions. Divergences are KL(reference || lens) in nats.
        """
        return pd.DataFrame(self.about.get("held_out", []))

    def deciding(self) -> list[Any]:
        """Return what decides its readings, beside the model."""
        return [self.name, self.maps]

    def keep(self, prompt: Prompt, answer: int) -> Sequence[int]:
        """Return the answer position alone."""
        return (answer,)

    @torch.no_grad()
    def final_residuals(
        self, residuals: Residuals, readings: Sequence[Reading], layers: Sequence[int]
    ) -> Float[Tensor, "layer reading d_model"]:
        """Map the answer positions' residuals."""
        slots = [residuals.slots(r.prompt, [r.answer])[0] for r in readings]
        return torch.stack([self.at(residuals.layer(layer)[slots], layer) for layer in layers])

    def at(
        self, resid: Float[Tensor, "*rows d_model"], layer: int
    ) -> Float[Tensor, "*rows d_model"]:
        """Map residuals of one layer to what goes through final norm and unembedding."""
        if layer == self.model.n_layers:
            return resid
        if layer not in self.maps.layers:
            raise ValueError(
                f"The {self.name} has no map for layer {layer}; it was fitted at layers "
                f"{list(self.maps.layers)}. Read at those or at {self.model.n_layers}, or fit it "
                "with layers=."
            )
        return self.maps(resid, layer)

    def save(self, folder: str | PathLike[str]) -> Path:
        """Write ``lens.safetensors``, and ``lens.json`` with the record of the fit.

        Args:
            folder: The folder, made if it does not exist; a lens in it is replaced.

        Returns:
            The folder.

        Raises:
            ValueError: If it was fitted inside hooks without a name, or cannot be written.
        """
        identity = self.about.get("model") or identity_of(self.model)
        refuse_unnamed(identity, f"The {self.name}")
        content = {
            "name": self.name,
            "model": identity,
            "layers": list(self.maps.layers),
            "fit": dict(self.about),
        }
        path = as_path(folder) / "lens.safetensors"
        self.folder = write_pair(path, self.kind, self.maps.tensors, content).parent
        return self.folder


class TunedLens(LinearLens):
    """The tuned lens: maps fitted so that the lens reads what the model says in the end.

    Source: Belrose et al. 2023 (arXiv 2303.08112). Made by ``spade_lens.fit("tuned", model)``, or
    loaded.

    Example:
        >>> start = TunedLens(model, AffineMaps.identity(range(model.n_layers), model.d_model))
        >>> readout = read(prompts, [start, LogitLens(model)])
        >>> torch.equal(readout.entropy[0], readout.entropy[1])
        True
    """

    kind = "tuned lens"


class LinearSpade(LinearLens):
    """L-SPADE: maps fitted so that the lens reads what SPADE reads at the same layer.

    Source: Zheng, Ma, Lin, Yang 2025 (arXiv 2507.17618), where it is the confidence that decides
    on an exit. Made by ``spade_lens.fit("l-spade", model)``, or loaded.
    """

    kind = "L-SPADE"


class CandidateHead(LinearLens):
    """Maps fitted so that the lens reads the right one of a prompt's candidates.

    Ours. A classifier over the rows of the unembedding, so that prompts may have candidates of
    their own. Made by ``spade_lens.fit("candidates", model, prompts, target="right")``, or loaded.
    """

    kind = "candidate head"


FittedLens: TypeAlias = LinearSpade | TunedLens | CandidateHead
"""What :func:`spade_lens.fit` gives."""


def check_linear_or_none(lens: Any) -> None:
    """Raise a TypeError if it is neither a linear lens nor None."""
    if lens is not None and not isinstance(lens, LinearLens):
        raise TypeError(
            f"lens={lens!r} was given; expected a linear lens, as sl.fit() gives it, or None."
        )


def _check(model: Model, maps: AffineMaps) -> None:
    if maps.d_model != model.d_model:
        raise ValueError(
            f"The maps have width {maps.d_model}; {model.name} has d_model={model.d_model}. They "
            "belong to another model."
        )
    _check_layers(model, maps)
    for name, tensor in maps.tensors.items():
        bad = ~torch.isfinite(tensor).flatten(1).all(dim=1)
        if bad.any():
            layers = [layer for layer, b in zip(maps.layers, bad.tolist(), strict=True) if b]
            raise ValueError(f"The maps' {name} is NaN or infinite at layers {layers}.")


def _check_layers(model: Model, maps: AffineMaps) -> None:
    outside = [layer for layer in maps.layers if not 0 <= layer < model.n_layers]
    if outside or not maps.layers:
        raise ValueError(
            f"Maps for layers {list(maps.layers)} were given; {model.name} can have them for "
            f"layers 0 to {model.n_layers - 1} (at {model.n_layers} the lens is the model)."
        )
