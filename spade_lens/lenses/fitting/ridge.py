"""Ridge regression in closed form, from sums that one pass over any amount of text adds up.

For every layer the sums are X'X and X'Y of rows (x, 1) and their targets, in float64: residual
streams have large means, which are subtracted at the end, and float32 is too coarse for that.

The ridge works on correlations, not on covariances. A residual stream has a few coordinates
whose variance is thousands of times that of the others. A ridge on covariances that matters to
the others would be nothing to these few; one that matters to the few would erase the others.
This module knows neither models nor text.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from spade_lens.lenses.fitting.plan import SpadePlan
from spade_lens.lenses.fitting.rows import Rows
from spade_lens.lenses.linear import AffineMaps


@dataclass(frozen=True)
class Moments:
    """Sums over rows, by layer.

    Args:
        xx: Sum of (x, 1)(x, 1)'; its last entry is the number of rows.
        xy: Sum of (x, 1) y'.
    """

    xx: Float[Tensor, "layer with_one with_one"]
    xy: Float[Tensor, "layer with_one d_model"]

    @classmethod
    def none(cls, n_layers: int, d_model: int, device: torch.device) -> "Moments":
        """Return sums over no rows."""
        xx = torch.zeros(n_layers, d_model + 1, d_model + 1, dtype=torch.float64, device=device)
        return cls(xx, xx[..., :-1].clone())

    def add(
        self, x: Float[Tensor, "layer row d_model"], y: Float[Tensor, "layer row d_model"]
    ) -> None:
        """Add rows in place, since the sums may be larger than everything else in memory."""
        one = torch.ones(x.shape[1], 1, dtype=torch.float64, device=x.device)
        for layer in range(x.shape[0]):
            wide = torch.cat([x[layer].double(), one], dim=1)
            self.xx[layer].addmm_(wide.T, wide)
            self.xy[layer].addmm_(wide.T, y[layer].double())


@dataclass(frozen=True)
class Spectrum:
    """One layer's regression problem in the coordinates where every ridge is cheap.

    Args:
        mean_x: The mean of the rows.
        mean_y: The mean of the targets.
        scale: The standard deviation of every coordinate of x.
        values: Eigenvalues of the correlations of x, none negative.
        vectors: Their eigenvectors, as columns.
        cross: What is added to x to give y, correlated with x in the eigenvectors' coordinates.
    """

    mean_x: Float[Tensor, " d_model"]
    mean_y: Float[Tensor, " d_model"]
    scale: Float[Tensor, " d_model"]
    values: Float[Tensor, " d_model"]
    vectors: Float[Tensor, "d_model d_model"]
    cross: Float[Tensor, "d_model d_model"]

    @classmethod
    def of(
        cls, xx: Float[Tensor, "with_one with_one"], xy: Float[Tensor, "with_one d_model"]
    ) -> "Spectrum":
        """Return the problem of one layer's sums."""
        n = xx[-1, -1]
        mean_x, mean_y = xx[-1, :-1] / n, xy[-1] / n
        covariance = xx[:-1, :-1] / n - torch.outer(mean_x, mean_x)
        # y - x, not y: the map is the identity and what is added to it.
        added = xy[:-1] / n - torch.outer(mean_x, mean_y) - covariance
        scale = covariance.diagonal().clamp(min=0).sqrt()
        # A coordinate that never changes has no scale; any will do.
        scale = torch.where(scale > 1e-9 * scale.max(), scale, torch.ones_like(scale))
        values, vectors = torch.linalg.eigh(covariance / torch.outer(scale, scale))
        cross = vectors.T @ (added / scale[:, None])
        return cls(mean_x, mean_y, scale, values.clamp(min=0), vectors, cross)

    def solve(
        self, ridge: float, rank: int | None
    ) -> tuple[Float[Tensor, "d_model rank"], Float[Tensor, " d_model"], Tensor | None]:
        """Return ``up``, ``bias`` and ``down`` with the least error plus ridge times its square.

        The square is in standard units. A low rank is reached by reduced-rank regression (Izenman
        1975, with a ridge as Mukherjee and Zhu 2011): what the best map of full rank adds is
        projected on the directions in which it adds most.
        """
        inverse = 1 / (self.values + ridge)
        # Without a ridge, directions that the rows do not span stay as they are.
        inverse = torch.where(self.values + ridge > 1e-12, inverse, torch.zeros_like(inverse))
        whole = (self.vectors @ (inverse[:, None] * self.cross)) / self.scale[:, None]
        if rank is None:
            up, down, added = whole.T, None, whole
        else:
            gain = self.cross.T @ (inverse[:, None] * self.cross)
            up = torch.linalg.eigh(gain).eigenvectors[:, -rank:]
            down = up.T @ whole.T
            added = (up @ down).T
        return up, self.mean_y - self.mean_x - self.mean_x @ added, down

    def whiten(self, floor: float) -> Float[Tensor, "d_model d_model"]:
        """Return the matrix that whitens rows: ``(x - mean_x) @ whiten``, small ones aside."""
        return (self.vectors * (self.values + floor).rsqrt()) / self.scale[:, None]


def spectra(moments: Moments) -> list[Spectrum]:
    """Return every layer's problem, decomposed once."""
    return [Spectrum.of(xx, xy) for xx, xy in zip(moments.xx, moments.xy, strict=True)]


def ridge_maps(
    problems: Sequence[Spectrum], layers: Sequence[int], plan: SpadePlan, rows: Rows
) -> tuple[AffineMaps, list[float]]:
    """Return, for every layer, the map whose ridge errs least on rows it was not fitted to.

    With them, which are in float32, the ridge of every layer.
    """
    chosen, best_ridges = [], []
    for i, problem in enumerate(problems):
        best = None
        start, target = rows.start[i].double(), rows.target[i].double()  # [row d_model]
        for ridge in plan.ridges:
            up, bias, down = problem.solve(ridge, plan.rank)
            inner = start if down is None else start @ down.T
            error = float((start + inner @ up.T + bias - target).square().mean())
            if best is None or error < best[0]:
                best = (error, ridge, up, bias, down)
        assert best is not None
        best_ridges.append(best[1])
        chosen.append(best[2:])
    ups, biases, downs = zip(*chosen, strict=True)
    maps = AffineMaps(
        tuple(layers),
        torch.stack(ups).float(),
        torch.stack(biases).float(),
        None if plan.rank is None else torch.stack(downs).float(),
    )
    return maps, best_ridges
