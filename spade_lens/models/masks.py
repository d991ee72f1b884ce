"""The attention mask of a sequence whose positions need not be neighbours.

Hugging Face takes a jump in ``position_ids`` for the seam between two packed sequences and
masks across it, silently, unless it is handed a mask. SPADE's two tokens are such a jump, so
here a 4-D mask is always built, from the order of the tokens and their positions alone.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from spade_lens.models.backbone import Past


def causal_mask(
    positions: Int[Tensor, "batch pos"],
    *,
    dtype: torch.dtype,
    valid: Bool[Tensor, "batch pos"] | None = None,
    window: int | None = None,
    past: Past | None = None,
) -> Float[Tensor, "rows 1 pos keys"]:
    """An additive mask: 0 where a query may look at a key, the dtype's lowest value elsewhere.

    A token sees the tokens that come before it in the sequence, itself, and those of the past at
    lower positions; with a sliding window only those whose *position* is less than ``window``
    away.

    Example:
        >>> mask = causal_mask(torch.tensor([[0, 9]]), dtype=torch.float32)
        >>> (mask[0, 0] == 0).tolist()
        [[True, False], [True, True]]

    Args:
        positions: The position in the full prompt of every token of the sequence.
        dtype: The dtype of the residual stream that the mask meets.
        valid: False for padding, which nobody may look at.
        window: The sliding window's width in positions; None for full attention.
        past: Tokens that do not run, whose keys are put before those of the sequence.

    Returns:
        The mask; ``rows`` is 1 (it broadcasts) where it is the same for every row.
    """
    n = positions.shape[1]
    order = torch.arange(n, device=positions.device)
    allowed = (order[None, :] <= order[:, None])[None]  # [1 pos pos]
    if valid is not None:
        allowed = allowed & valid[:, None, :]
    keys = positions
    if past is not None:
        keys = torch.cat([past.positions.expand(len(positions), -1), positions], dim=1)
        seen = past.positions[:, None, :] < positions[:, :, None]  # [batch pos past]
        if past.valid is not None:
            seen = seen & past.valid[:, None, :]
        # After a start token all rows are alike, and the mask of one serves for all.
        seen = seen[:1] if bool(seen.all()) else seen
        rows = max(len(seen), len(allowed))
        allowed = torch.cat([seen.expand(rows, -1, -1), allowed.expand(rows, -1, -1)], dim=-1)
    if window is not None:
        allowed = allowed & (positions[:, :, None] - keys[:, None, :] < window)
    mask = torch.zeros(allowed.shape, dtype=dtype, device=positions.device)
    return mask.masked_fill_(~allowed, torch.finfo(dtype).min)[:, None]
