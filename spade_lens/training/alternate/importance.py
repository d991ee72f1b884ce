"""Modified EWC: how important tensors are for what was learned before, and the penalty.

Source: Hbat (arXiv 2406.15178) and its released code. The importance of a tensor is the mean square
of the change that the phases before made to it, summed over these phases and then normalised over
tensors. The penalty is the weighted squared distance from the start of the phase. Here it counts
low-rank factors as tensors.

The released code multiplies every change by 1e10 before it squares and takes the softmax. Changes
of a single training step are 1e-6 and more, so that the softmax gets numbers that are 1e8 and more
apart. It *saturates*: one tensor has all the importance, and the penalty holds that one alone. So
the temperature is explicit here, and the default divides by the sum.
"""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

RELEASED_TEMPERATURE = 1e-20
"""What the released constants amount to: a factor of (1e10)² before the softmax."""


def mean_squared_changes(
    before: Mapping[str, Tensor], after: Mapping[str, Tensor]
) -> Float[Tensor, " tensor"]:
    """Return the mean squared change of every tensor, in the order of the names.

    Example:
        >>> from spade_lens.training.alternate.importance import mean_squared_changes
        >>> mean_squared_changes({"a": torch.zeros(2)}, {"a": torch.tensor([1.0, 3.0])}).tolist()
        [5.0]
    """
    changes = [(after[name].detach() - tensor.detach()).double() for name, tensor in before.items()]
    return torch.stack([change.square().mean() for change in changes]).cpu()


def importances(
    changes: Float[Tensor, " tensor"], temperature: float | None = None
) -> Float[Tensor, " tensor"]:
    """Return importances that sum to 1, of mean squared changes.

    Example:
        >>> from spade_lens.training.alternate.importance import RELEASED_TEMPERATURE, importances
        >>> changes = torch.tensor([1.0, 3.0]) * 2**-32  # about 1e-10
        >>> importances(changes).tolist()
        [0.25, 0.75]
        >>> importances(changes, RELEASED_TEMPERATURE).tolist()
        [0.0, 1.0]

    Args:
        changes: From :func:`mean_squared_changes`, summed over phases.
        temperature: That of a softmax; None divides by the sum.

    Raises:
        ValueError: If there are none, one is negative or not finite, or the temperature is not
            above 0.
    """
    good = changes.ndim == 1 and len(changes) > 0 and bool(changes.isfinite().all())
    if not good or bool((changes < 0).any()):
        raise ValueError(
            f"Mean squared changes of shape {tuple(changes.shape)} from "
            f"{changes.min() if changes.numel() else 'none'} were given; expected at least one, "
            "all finite and 0 or more."
        )
    if temperature is not None:
        if not temperature > 0:
            raise ValueError(
                f"temperature={temperature} was given; expected a number above 0, or None."
            )
        return (changes.double() / temperature).softmax(dim=0)
    total = changes.double().sum()
    if total == 0:
        return torch.full_like(changes, 1 / len(changes), dtype=torch.float64)
    return changes.double() / total


def penalty(
    parameters: Mapping[str, Tensor],
    reference: Mapping[str, Tensor],
    weights: Float[Tensor, " tensor"],
) -> Float[Tensor, ""]:
    """Return the weighted sum over tensors of their squared distance from a reference.

    Example:
        >>> from spade_lens.training.alternate.importance import penalty
        >>> penalty({"a": torch.ones(3)}, {"a": torch.zeros(3)}, torch.tensor([0.5])).item()
        1.5
    """
    each = [
        (parameters[name] - tensor).float().square().sum() for name, tensor in reference.items()
    ]
    return (torch.stack(each) * weights.to(each[0])).sum()


def most_important(
    changes: Float[Tensor, " tensor"], names: list[str], fraction: float
) -> list[str]:
    """Return the names of the fraction of tensors that changed most, rounded; at least one stays.

    Example:
        >>> from spade_lens.training.alternate.importance import most_important
        >>> most_important(torch.tensor([1.0, 3.0, 2.0]), ["a", "b", "c"], 0.34)
        ['b']
    """
    n = min(round(fraction * len(names)), len(names) - 1)
    order = changes.argsort(descending=True, stable=True)[:n].tolist()
    return [names[at] for at in sorted(order)]
