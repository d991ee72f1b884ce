"""The attention mask of a sequence whose positions need not be neighbours.

Hugging Face takes a jump in ``position_ids`` for the seam between two packed sequences and
masks across it, silently, unless it is handed a mask. SPADE's two tokens are such a jump, so
here a 4-D mask is always built, from the order of the tokens and their positions alone.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def causal_mask(
    positions: Int[Tensor, "batch pos"],
    *,
    dtype: torch.dtype,
    valid: Bool[Tensor, "batch pos"] | None = None,
    window: int | None = None,
    prefix_positions: Int[Tensor, " prefix"] | None = None,
) -> Float[Tensor, "rows 1 pos keys"]:
    """An additive mask: 0 where a query may look at a key, the dtype's lowest value elsewhere.

    A token sees the tokens that come before it in the sequence, itself, and the whole prefix;
    with a sliding window only those whose *position* is less than ``window`` away.

    Example:
        >>> mask = causal_mask(torch.tensor([[0, 9]]), dtype=torch.float32)
        >>> (mask[0, 0] == 0).tolist()
        [[True, False], [True, True]]

    Args:
        positions: The position in the full prompt of every token of the sequence.
        dtype: The dtype of the residual stream that the mask meets.
        valid: False for padding, which nobody may look at.
        window: The sliding window's width in positions; None for full attention.
        prefix_positions: Positions of keys that come before the sequence, the same for all rows.

    Returns:
        The mask; ``rows`` is 1 (it broadcasts) where it is the same for every row.
    """
    n = positions.shape[1]
    order = torch.arange(n, device=positions.device)
    allowed = (order[None, :] <= order[:, None])[None]  # [1 pos pos]
    if valid is not None:
        allowed = allowed & valid[:, None, :]
    n_prefix = 0
    if prefix_positions is not None:
        n_prefix = len(prefix_positions)
        shape = (allowed.shape[0], n, n_prefix)
        allowed = torch.cat([allowed.new_ones(shape), allowed], dim=-1)
    if window is not None:
        keys = positions
        if prefix_positions is not None:
            keys = torch.cat([prefix_positions.expand(len(positions), n_prefix), positions], dim=1)
        allowed = allowed & (positions[:, :, None] - keys[:, None, :] < window)
    mask = torch.zeros(allowed.shape, dtype=dtype, device=positions.device)
    return mask.masked_fill_(~allowed, torch.finfo(dtype).min)[:, None]
