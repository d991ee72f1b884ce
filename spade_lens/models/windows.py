"""Sliding windows, taken from what a model does: from its own masks, and from what blocks ignore.

A family's settings only say how far to look. Most families put the window into the mask that a
block gets. GPT-Neo's local blocks cut by themselves, by the order of the keys that they see.
"""

import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from spade_lens.models.backbone import KeysValues
from spade_lens.models.errors import UnsupportedModelError

_KINDS = {"full_attention", "sliding_attention"}
_LEAST = 1024
"""Keys that a block is shown at least, whatever the settings say."""
_MOST = 2**13 + 2
"""Tokens whose masks are looked at, at most; such a mask takes 67 MB, or 268 MB in float32."""


def longest_prompt(config: Any) -> int:
    """Return up to how many tokens the rotary embedding is independent of the rest of a batch."""
    # Models without learned positions may have no longest prompt.
    longest: int = getattr(config, "max_position_embeddings", sys.maxsize)
    rope = getattr(config, "rope_parameters", None) or {}
    # One set for all blocks, or one for every type of block.
    for settings in [rope, *(value for value in rope.values() if isinstance(value, dict))]:
        if settings.get("rope_type") == "longrope":
            # A longer prompt changes the keys of all others in its batch, also the cached ones.
            longest = min(longest, settings["original_max_position_embeddings"])
    return longest


def named_windows(config: Any, n_ctx: int, name: str) -> list[int]:
    """Return the numbers of tokens that settings name as a window, where the context is longer.

    Args:
        config: The settings of the text model.
        n_ctx: The longest prompt.
        name: For the message.

    Raises:
        UnsupportedModelError: If a block is of a kind that mixes tokens in another way.
    """
    other = sorted(set(getattr(config, "layer_types", None) or ()) - _KINDS)
    if other:
        raise UnsupportedModelError(
            f"{name} has blocks of kind {other}; only {sorted(_KINDS)} carry a residual stream "
            "whose tokens can be run apart from the rest of the prompt."
        )
    named = {
        value
        for key, value in config.to_dict().items()
        if re.search("window|chunk|local|block", key) and type(value) is int
    }
    return sorted(value for value in named if 1 < value < n_ctx)


def mask_length(named: Sequence[int], n_ctx: int) -> int:
    """Return how many tokens to look at the masks of: more than any window, where memory allows."""
    return min(n_ctx, _MOST, 2 + max([62, *named]))


def window_of(mask: Tensor | None, n: int, name: str) -> int | None:
    """Return the window in a block's own mask of ``n`` consecutive tokens; None for all of them.

    Raises:
        UnsupportedModelError: If it is not a causal mask with a window.
    """
    if mask is None:  # the block itself looks at all that came before
        return None
    allowed = mask if mask.dtype == torch.bool else mask == 0
    width = int(allowed.reshape(-1, n)[-1].sum())
    expected = torch.ones(n, n, dtype=torch.bool, device=mask.device).tril_().triu_(1 - width)
    if not bool((allowed == expected).all()):
        raise UnsupportedModelError(
            f"{name} masks attention in another way than by the last few tokens (in chunks, both "
            "ways or with biases), so its tokens cannot be run apart from the rest of the prompt."
        )
    return None if width == n else width


def own_window(
    keys_values: KeysValues,
    named: Sequence[int],
    n_ctx: int,
    run: Callable[[KeysValues, Tensor, Tensor], Tensor],
) -> int | None:
    """Return the window that a block applies by itself, whatever its mask says; None for none.

    One token looks at many equal keys. In each row of the batch another one of them is changed.
    Where the outcome stays the same, the block does not look.

    Args:
        keys_values: Keys and values of one token in this block.
        named: The windows that the settings name.
        n_ctx: The longest prompt.
        run: Runs the block on one token, after these keys and values at these positions, with this
            mask.

    Raises:
        ValueError: If the block looks less far back than the context, and no setting says how far.
    """
    n = max(min(_LEAST, n_ctx - 1), *named, 1)
    distances = sorted({1, n, *(d for w in named for d in (w - 1, w))})
    rows = torch.arange(1, len(distances) + 1)
    positions = torch.zeros(1, n, dtype=torch.long, device=keys_values[0].device)
    mask = torch.zeros(1, 1, 1, n + 1, dtype=keys_values[0].dtype, device=positions.device)
    for changed in (1, 0):  # of the latent attention of DeepSeek, the second says nothing alone
        made = [x.expand(len(distances) + 1, -1, n, -1) for x in keys_values]
        made[changed] = made[changed].clone()
        largest = min(
            8 * n * (1 + float(made[changed].abs().max())), torch.finfo(mask.dtype).max / 4
        )
        made[changed][rows, :, [n - d for d in distances]] += largest if changed else 1.0
        out = run((made[0], made[1]), positions, mask).double()
        # Medians: a few coordinates of a start token may be thousands of times as large.
        change = (out[1:] - out[:1]).flatten(1).abs().median(dim=1).values
        if change[0] > 64 * torch.finfo(mask.dtype).eps * out[0].abs().median():
            break
    else:  # attention adds nothing here, from whatever distance
        return None
    cut = dict(zip(distances, (change < 0.1 * change[0]).tolist(), strict=True))
    if not any(cut.values()):
        return None
    for window in named:
        if all(is_cut == (distance >= window) for distance, is_cut in cut.items()):
            return window
    farthest = max(distance for distance, is_cut in cut.items() if not is_cut)
    raise ValueError(f"it looks back {farthest} tokens, but not {n}, and no setting says how far")
