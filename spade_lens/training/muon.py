"""Muon in single precision, with matrices of one shape in one product.

torch's own optimiser of this name multiplies in bfloat16, one matrix at a time. On a processor
without bfloat16 products a step on 30 matrices of width 64 took ten times as long as here. Torch
before 2.9 has none. A test holds this one against torch's.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5


class Muon(torch.optim.Optimizer):
    """Steps of momentum whose singular values are all about 1, for matrices.

    Source: Jordan et al., Muon (2024): Nesterov's momentum, then five iterations of Newton and
    Schulz. The scale, 0.2 times the root of the longer side, is that of Liu et al.
    (arXiv 2502.16982), by which learning rates are those of AdamW. Products in single precision
    are ours.

    Args:
        matrices: What is trained; two dimensions each.
        lr: The learning rate.
        weight_decay: Decoupled weight decay.
        momentum: Decay rate of the running mean of gradients.

    Raises:
        ValueError: If a parameter is no matrix.
    """

    def __init__(
        self,
        matrices: Iterable[nn.Parameter],
        lr: float,
        *,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
    ) -> None:
        matrices = list(matrices)
        if wrong := [list(p.shape) for p in matrices if p.ndim != 2]:
            raise ValueError(f"Parameters of shape {wrong} were given; expected matrices alone.")
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Change the matrices by their gradients.

        Args:
            closure: Computes the loss and gradients again, as torch's optimisers take it.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            shapes: dict[Any, list[nn.Parameter]] = {}
            for matrix in group["params"]:
                if matrix.grad is not None:
                    shapes.setdefault((matrix.shape, matrix.device), []).append(matrix)
            for some in shapes.values():
                self._step(some, **{k: group[k] for k in ("lr", "weight_decay", "momentum")})
        return loss

    def _step(
        self, matrices: list[nn.Parameter], *, lr: float, weight_decay: float, momentum: float
    ) -> None:
        """Change matrices of one shape."""
        updates = []
        for matrix in matrices:
            state, gradient = self.state[matrix], matrix.grad
            assert gradient is not None
            if not state:
                state["momentum_buffer"] = torch.zeros_like(gradient)
            mean = state["momentum_buffer"].lerp_(gradient, 1 - momentum)
            updates.append(gradient.lerp(mean, momentum))
        scale = 0.2 * lr * math.sqrt(max(matrices[0].shape))
        for matrix, update in zip(matrices, orthogonalised(torch.stack(updates)), strict=True):
            matrix.mul_(1 - lr * weight_decay).add_(update.to(matrix.dtype), alpha=-scale)


def orthogonalised(matrices: Float[Tensor, "n rows cols"]) -> Float[Tensor, "n rows cols"]:
    """Return matrices of the same singular vectors, with singular values of about 0.7 to 1.2.

    Example:
        >>> matrices = torch.eye(3).expand(2, 3, 3) * torch.tensor([[1.0, 2.0, 3.0]])
        >>> values = torch.linalg.svdvals(orthogonalised(matrices))
        >>> bool(((values > 0.6) & (values < 1.3)).all())
        True

    Args:
        matrices: All of one shape.
    """
    a, b, c = _COEFFICIENTS
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.float()
    x = x.mT if tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x
