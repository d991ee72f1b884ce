"""Ridge regressions of many targets on the same few inputs, with predictions for rows left out.

Inputs are factorised once for all targets. Scikit-learn's ``RidgeCV`` gives the same lines, and
factorises anew for each.
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

RIDGES = torch.logspace(-1, 4, 11, dtype=torch.double)

Line = tuple[Float[Tensor, " input"], Float[Tensor, ""]]


class Ridge:
    """Ridge regressions on standardised inputs; the ridge is chosen by leave-one-out.

    Args:
        inputs: The inputs, in double precision.
    """

    def __init__(self, inputs: Float[Tensor, "row input"]) -> None:
        self.mean, scale = inputs.mean(dim=0), inputs.std(dim=0)
        self.scale = scale.where(scale > 1e-9, torch.ones_like(scale))  # some never vary
        left, self.size, self.right = torch.linalg.svd(
            (inputs - self.mean) / self.scale, full_matrices=False
        )
        self.left = left
        self.shrunk = self.size**2 / (self.size**2 + RIDGES[:, None])  # [ridge direction]
        # By how much a row's own target moves its prediction, the intercept's part included.
        self.others = 1 - 1 / len(inputs) - self.shrunk @ left.square().T  # [ridge row]

    def line(self, target: Float[Tensor, " row"]) -> Line:
        """Return weights and bias."""
        mean = target.mean()
        along = self.left.T @ (target - mean)
        errors = (target - mean - (self.shrunk * along) @ self.left.T) / self.others
        ridge = RIDGES[int(errors.square().mean(dim=1).argmin())]
        weights = self.right.T @ (self.size / (self.size**2 + ridge) * along) / self.scale
        return weights, mean - weights @ self.mean


class Regressions:
    """Regressions on what gates see at the layers checked, with and without each fold.

    Args:
        inputs: From the layers checked, by index, to what a gate sees at the last of them.
        fold: The fold of every row.
    """

    def __init__(
        self,
        inputs: Callable[[Sequence[int]], Float[Tensor, "row input"]],
        fold: Int[Tensor, " row"],
    ) -> None:
        self._inputs, self._folds = inputs, [fold == one for one in fold.unique()]
        self._known: dict[tuple[int, ...], tuple[Tensor, Ridge, list[Ridge]]] = {}

    def _at(self, checked: tuple[int, ...]) -> tuple[Tensor, Ridge, list[Ridge]]:
        if checked not in self._known:
            inputs = self._inputs(checked)
            parts = [Ridge(inputs[~left_out]) for left_out in self._folds]
            self._known[checked] = inputs, Ridge(inputs), parts
        return self._known[checked]

    def line(self, checked: tuple[int, ...], target: Float[Tensor, " row"]) -> Line:
        """Return the line that is fitted on all rows."""
        return self._at(checked)[1].line(target)

    def left_out(
        self, checked: tuple[int, ...], target: Float[Tensor, " row"]
    ) -> Float[Tensor, " row"]:
        """Return a prediction for every row, by the line that is fitted on the other folds."""
        inputs, _, parts = self._at(checked)
        predicted = torch.empty_like(target)
        for left_out, ridge in zip(self._folds, parts, strict=True):
            weights, bias = ridge.line(target[~left_out])
            predicted[left_out] = inputs[left_out] @ weights + bias
        return predicted
