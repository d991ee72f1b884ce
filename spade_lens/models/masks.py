"""The attention mask of a sequence whose positions need not be consecutive.

Hugging Face reads a jump in ``position_ids`` as the border between two packed sequences, and
silently masks across it unless it is given a mask. SPADE's two tokens are such a jump. So a 4-D
mask is always built here, from the order of the tokens and their positions alone.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from spade_lens.models.backbone import CachedTokens


def causal_mask(
    positions: Int[Tensor, "batch pos"],
    *,
    dtype: torch.dtype,
    valid: Bool[Tensor, "batch pos"] | None = None,
    window: int | None = None,
    cached: CachedTokens | None = None,
) -> Float[Tensor, "rows 1 pos keys"]:
    """Return an additive mask: 0 where a query attends to a key, the lowest value elsewhere.

    A token attends to itself, to the tokens before it in the sequence, and to cached tokens at
    lower positions. Where cached tokens have ``paths``, a token attends to itself and to its path.
    With a sliding window, the *position* must also be less than ``window`` away.
    The mask has one row, which broadcasts, where it is the same for every row.

    Example:
        >>> mask = causal_mask(torch.tensor([[0, 9]]), dtype=torch.float32)
        >>> (mask[0, 0] == 0).tolist()
        [[True, False], [True, True]]
    """
    n = positions.shape[1]
    order = torch.arange(n, device=positions.device)
    allowed = (order[None, :] <= order[:, None])[None]  # [1 pos pos]
    if valid is not None:
        allowed = allowed & valid[:, None, :]
    keys = positions
    if cached is not None:
        keys = torch.cat([cached.positions.expand(len(positions), -1), positions], dim=1)
        seen = cached.positions[:, None, :] < positions[:, :, None]  # [batch pos cached]
        if cached.valid is not None:
            seen = seen & cached.valid[:, None, :]
        if cached.paths is not None:
            seen = seen & cached.paths
            allowed = allowed & (order[None, :] == order[:, None])
        # After a start token all rows are alike, and the mask of one row serves for all.
        seen = seen[:1] if bool(seen.all()) else seen
        rows = max(len(seen), len(allowed))
        allowed = torch.cat([seen.expand(rows, -1, -1), allowed.expand(rows, -1, -1)], dim=-1)
    if window is not None:
        allowed = allowed & (positions[:, :, None] - keys[:, None, :] < window)
    mask = torch.zeros(allowed.shape, dtype=dtype, device=positions.device)
    # Families that take the softmax in float32 would make -inf, and NaN, of less than its lowest.
    lowest = max(torch.finfo(dtype).min, torch.finfo(torch.float32).min)
    return mask.masked_fill_(~allowed, lowest)[:, None]
