"""Descent on what a linear lens says of prompts' candidates, from few prompts, with a ridge.

A map adds to where it starts (the identity, or a lens that is fitted already). What it adds sees
the residual's principal components in standard units, so that its rank is at most the number of
prompts, and a ridge shrinks it towards the start. This module knows no prompts and no text.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from einops import einsum
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from scipy.optimize import minimize
from torch import Tensor

from spade_lens.models.model import Model
from spade_lens.models.unembedding import unembedding_rows

_STEPS = 20
"""Steps of L-BFGS for one ridge; each ridge begins where the stronger one ended."""


@dataclass(frozen=True)
class Options:
    """The candidates of several prompts, and how to read them.

    Args:
        model: The model.
        ids: The candidates, padded.
        padding: Where a prompt has no more candidates.
        unembedding: Weight and bias, if rows of them give the model's own logits.
    """

    model: Model
    ids: Int[Tensor, "row option"]
    padding: Bool[Tensor, "row option"]
    unembedding: tuple[Tensor, Tensor | None] | None

    @classmethod
    def of(cls, model: Model, candidates: Sequence[Sequence[int]]) -> "Options":
        """Return the options of prompts' candidates."""
        counts = torch.tensor([len(c) for c in candidates])
        ids = torch.zeros(len(candidates), int(counts.max()), dtype=torch.long)
        for row, own in enumerate(candidates):
            ids[row, : len(own)] = torch.tensor(own)
        padding = torch.arange(ids.shape[1]) >= counts[:, None]
        rows = None if model.hooked else unembedding_rows(model)
        return cls(model, ids.to(model.device), padding.to(model.device), rows)

    def __getitem__(self, rows: Tensor) -> "Options":
        return Options(self.model, self.ids[rows], self.padding[rows], self.unembedding)

    def logprobs(self, final: Float[Tensor, "row d_model"]) -> Float[Tensor, "row option"]:
        """Return log-probabilities of the candidates among themselves; -inf for padding."""
        final = final.to(self.model.dtype)
        if self.unembedding is None:
            logits = self.model.logits(final).gather(-1, self.ids)
        else:
            weight, bias = (None if t is None else t.detach() for t in self.unembedding)
            assert weight is not None
            normed = self.model.final_norm(final)
            logits = einsum(weight[self.ids], normed, "row option d, row d -> row option").float()
            logits = logits if bias is None else logits + bias[self.ids]
        return logits.masked_fill(self.padding, -torch.inf).log_softmax(dim=-1)

    def loss(
        self, final: Float[Tensor, "row d_model"], wanted: Float[Tensor, "row option"]
    ) -> Float[Tensor, " row"]:
        """Return the cross-entropy of the candidates with the wanted probabilities, in nats."""
        return -(wanted * self.logprobs(final).masked_fill(self.padding, 0)).sum(dim=-1)


@dataclass(frozen=True)
class Added:
    """What is added to a start: ``x -> x @ down.T @ up.T + bias``."""

    up: Float[Tensor, "d_model rank"]
    bias: Float[Tensor, " d_model"]
    down: Float[Tensor, "rank d_model"]

    def __call__(self, x: Float[Tensor, "row d_model"]) -> Float[Tensor, "row d_model"]:
        """Return what is added to the start of these residuals."""
        return x @ self.down.T @ self.up.T + self.bias


@dataclass(frozen=True)
class Problem:
    """One layer's prompts.

    Args:
        x: Residuals of the answer tokens, in float32.
        start: What the start makes of them.
        options: Their candidates.
        wanted: The probabilities that the candidates should have.
        rank: The most principal components that are used.
    """

    x: Float[Tensor, "row d_model"]
    start: Float[Tensor, "row d_model"]
    options: Options
    wanted: Float[Tensor, "row option"]
    rank: int

    def __getitem__(self, rows: Tensor) -> "Problem":
        some = (self.x[rows], self.start[rows], self.options[rows], self.wanted[rows])
        return Problem(*some, self.rank)

    def solve(self, ridges: Sequence[float]) -> list[Added]:
        """Return what is added with each ridge, the strongest first.

        Minimised is the mean cross-entropy plus the ridge times the squares of all weights. The
        weights are of components of mean square 1 in all, and of steps as large as a final
        residual, so that one grid of ridges serves all layers and models.
        """
        mean, scale = self.x.mean(dim=0), self.x.std(dim=0)
        scale = torch.where(scale > 1e-6 * scale.max(), scale, torch.ones_like(scale))
        scale = scale * self.x.shape[1] ** 0.5
        standard = (self.x - mean) / scale
        rank = min(self.rank, len(self.x) - 1)
        down = torch.linalg.svd(standard, full_matrices=False)[2][:rank]  # [rank d_model]
        components = standard @ down.T
        size = float(self.start.square().mean().sqrt())
        # The last row of the weights is the bias.
        inner = torch.cat([components, torch.ones_like(components[:, :1])], dim=1)
        weights = np.zeros((rank + 1, self.x.shape[1]))
        path = []
        for ridge in ridges:
            weights = self._descended(weights, inner, size, ridge)
            learned = torch.from_numpy(weights).to(self.x) * size
            within = down / scale
            bias = learned[-1] - mean @ within.T @ learned[:-1]
            path.append(Added(learned[:-1].T.contiguous(), bias, within))
        return path

    def _descended(
        self,
        weights: NDArray[np.float64],
        inner: Float[Tensor, "row with_one"],
        size: float,
        ridge: float,
    ) -> NDArray[np.float64]:
        """Go downhill with one ridge, from the weights of another."""

        def loss(flat: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
            given = torch.from_numpy(flat.reshape(weights.shape)).to(self.x).requires_grad_()
            with torch.enable_grad():
                final = self.start + size * (inner @ given)
                total = self.options.loss(final, self.wanted).mean() + ridge * given.square().sum()
            # For these alone: the model's parameters have gradients of their own to offer.
            [slope] = torch.autograd.grad(total, [given])
            return float(total.detach()), slope.cpu().double().numpy().ravel()

        found = minimize(
            loss, weights.ravel(), jac=True, method="L-BFGS-B", options={"maxiter": _STEPS}
        )
        return np.asarray(found.x).reshape(weights.shape)
