"""Batches of prompts of like lengths for runs whose attention is made explicit by hooks."""

from collections.abc import Sequence

import torch

from spade_lens.models.model import Model
from spade_lens.settings import limits


def batches(
    model: Model, lengths: Sequence[int], n_heads: int, budget: float, *, kept: int = 1
) -> list[list[int]]:
    """Group prompts of like lengths, as many at a time as fit a budget.

    Args:
        model: The model.
        lengths: How many tokens of each prompt run.
        n_heads: Heads of a block.
        budget: Bytes that a batch may take.
        kept: Of how many blocks all that is computed is kept, as gradients need it.

    Returns:
        Indices of prompts, each in one batch.
    """
    most, element = limits(model), torch.finfo(model.dtype).bits // 8
    groups: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        n, length = len(groups[-1]) + 1 if groups else 0, lengths[i]
        # As capture() allows for, and the scores and weights of every head.
        each = kept * length * element * (32 * model.d_model + 3 * n_heads * length)
        fits = n * length <= most.batch_tokens and n * each <= budget
        if groups and fits and n <= (most.batch_size or n):
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups
