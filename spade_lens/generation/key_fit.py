"""The ridge regression of keys and values on the residual at a lower layer.

In every block the regression is of what its projections give on its own residual, on what they
take in where it reads the lower layer's. Keys are taken before the rotary embedding, which the
block then applies by itself.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from spade_lens.lenses.fitting.rows import Places
from spade_lens.models.hooks import numbered
from spade_lens.models.model import Model
from spade_lens.models.projections import Projections, tapped
from spade_lens.models.residuals import capture

_RIDGES = (1e-4, 1e-3, 1e-2, 1e-1)
"""Over the variance of a coordinate."""

Residuals = Mapping[int, Float[Tensor, "row d_model"]]
"""Residuals of the same positions, by layer."""

Read = tuple[Float[Tensor, "row d_model"], Float[Tensor, "row out"], Float[Tensor, "row out"]]
"""What projections of a block take in, what they should give, and what they give by themselves."""


class KeyFit:
    """Sums over positions, from which the weights of all blocks above a layer are solved.

    Args:
        model: The model.
        layer: The layer whose residual is read.
        projections: The projections of the blocks from the layer on.
    """

    def __init__(self, model: Model, layer: int, projections: Sequence[Projections]) -> None:
        decoder = model.decoder()
        assert decoder is not None  # there are projections
        self._model, self._layer, self._decoder = model, layer, decoder
        self._names = {layer + i: one.needed for i, one in enumerate(projections) if i}
        self._widths: dict[int, list[int]] = {}
        self._sums: dict[int, tuple[Tensor, Tensor]] = {}

    def add(self, resid: Residuals) -> None:
        """Take in the positions of some pieces of text."""
        for block, (x, y, _) in self._read(resid).items():
            wide = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)  # [row d_model+1]
            # A batch is summed in float32, which is far faster; the batches in float64.
            xx, xy = (wide.T @ wide).double(), (wide.T @ y).double()
            known = self._sums.get(block)
            self._sums[block] = (xx, xy) if known is None else (known[0] + xx, known[1] + xy)

    def solve(self, resid: Residuals) -> tuple[dict[str, Tensor], list[float]]:
        """Return the weights, with the ridge of every block that errs least on other positions."""
        tensors: dict[str, Tensor] = {}
        ridges = []
        for block, (x, y, _) in self._read(resid).items():
            errors = {}
            for ridge in _RIDGES:
                weight, bias = _solve(*self._sums[block], ridge)
                errors[ridge] = float((x.double() @ weight + bias - y).square().mean())
            ridges.append(min(errors, key=lambda ridge: errors[ridge]))
            weight, bias = _solve(*self._sums[block], ridges[-1])
            of_each = zip(
                self._names[block],
                weight.float().T.split(self._widths[block]),
                bias.float().split(self._widths[block]),
                strict=True,
            )
            for name, own_weight, own_bias in of_each:
                tensors[f"{block}.{name}.weight"] = own_weight.contiguous()
                tensors[f"{block}.{name}.bias"] = own_bias.contiguous()
        return tensors, ridges

    def errors(self, tensors: Mapping[str, Tensor], resid: Residuals) -> list[dict[str, Any]]:
        """Return the squared error over the variance, by block, and that without a fit."""
        rows = []
        for block, (x, y, copied) in self._read(resid).items():
            given = torch.cat(
                [
                    x @ tensors[f"{block}.{name}.weight"].T + tensors[f"{block}.{name}.bias"]
                    for name in self._names[block]
                ],
                dim=1,
            )
            variance = (y - y.mean(dim=0)).square().sum()
            fitted, own = (float((z - y).square().sum() / variance) for z in (given, copied))
            rows.append({"block": block, "shortcut_error": fitted, "copied_error": own})
        return rows

    def _read(self, resid: Residuals) -> dict[int, Read]:
        """Let the projections of every block read the layer's residual, and the block's own."""
        read = {}
        for block, names in self._names.items():
            # A row is a text of one token here: projections mix none.
            lower = tapped(self._decoder, block, resid[self._layer][:, None], names)
            right = tapped(self._decoder, block, resid[block][:, None], names)
            x = lower[names[0]][0][:, 0]
            copied, y = ([of[name][1][:, 0] for name in names] for of in (lower, right))
            self._widths[block] = [out.shape[1] for out in y]
            whole = torch.cat(y, dim=1), torch.cat(copied, dim=1)
            read[block] = (x.float(), whole[0].float(), whole[1].float())
        return read


def residuals_from(model: Model, places: Places, lowest: int) -> Residuals:
    """Return the residuals at some positions of text, at all layers from the lowest to the last."""
    layers = range(lowest, model.n_layers)
    with numbered(None):  # pieces of text in an order of ours
        stack = capture(
            model, places.pieces, layers=list(layers), positions=places.positions
        ).stack  # [layer row d_model]
    return dict(zip(layers, stack, strict=True))


def _solve(
    xx: Float[Tensor, "with_one with_one"], xy: Float[Tensor, "with_one out"], ridge: float
) -> tuple[Float[Tensor, "d_model out"], Float[Tensor, " out"]]:
    """Return weight and bias with the least error plus a ridge, every coordinate standardised."""
    n = xx[-1, -1]
    mean_x, mean_y = xx[-1, :-1] / n, xy[-1] / n
    covariance = xx[:-1, :-1] / n - torch.outer(mean_x, mean_x)
    scale = covariance.diagonal().clamp(min=0).sqrt()
    # A coordinate that never changes has no scale; any will do.
    scale = torch.where(scale > 1e-9 * scale.max(), scale, torch.ones_like(scale))
    cross = (xy[:-1] / n - torch.outer(mean_x, mean_y)) / scale[:, None]
    correlations = covariance / torch.outer(scale, scale)
    correlations += ridge * torch.eye(len(scale), dtype=xx.dtype, device=xx.device)
    weight = torch.linalg.solve(correlations, cross) / scale[:, None]
    return weight, mean_y - mean_x @ weight


def check_fits(
    tensors: Mapping[str, Tensor], layer: int, projections: Sequence[Projections], model: Model
) -> None:
    """Raise if tensors are not the weights and biases of all blocks above a layer.

    Raises:
        ValueError: If one is missing, too many, or of another width than the residual stream.
    """
    wanted = {
        f"{layer + i}.{name}.{part}"
        for i, one in enumerate(projections)
        for name in one.needed
        for part in ("weight", "bias")
        if i
    }
    if set(tensors) != wanted or not wanted:
        other = sorted(set(tensors) ^ wanted)
        raise ValueError(
            f"Shortcuts from layer {layer} were given for {sorted(tensors)[:4]}...; expected "
            f"weights and biases of all blocks from {layer + 1} on. They differ in {other[:4]}."
        )
    bad = [
        n for n, t in tensors.items() if n.endswith("weight") and t.shape[1:] != (model.d_model,)
    ]
    if bad:
        raise ValueError(
            f"The weights {bad[:4]} have shapes {[tuple(tensors[n].shape) for n in bad[:4]]}; "
            f"expected a width of {model.d_model}, that of {model.name}."
        )
