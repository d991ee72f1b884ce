"""Select and join cached keys and values."""

from collections.abc import Sequence

import torch

from spade_lens.models.backbone import KeysValues, Past


def pick(past: Past, wanted: Sequence[Sequence[int]]) -> Past | None:
    """Of a past of one row, the tokens wanted in each row of a batch; None if there are none."""
    longest = max(len(row) for row in wanted)
    if not longest:
        return None
    device = past.positions.device
    index = torch.tensor([[*row, *[0] * (longest - len(row))] for row in wanted], device=device)
    lengths = torch.tensor([len(row) for row in wanted], device=device)
    valid = torch.arange(longest, device=device) < lengths[:, None]

    def keys_values(block: int) -> KeysValues:
        keys, values = (x[0][:, index].transpose(0, 1) for x in past.keys_values(block))
        return keys, values

    return Past(past.positions[0][index], keys_values, valid)


def joined(*pasts: Past | None) -> Past | None:
    """Several pasts of one batch as one."""
    some = [past for past in pasts if past is not None]
    if len(some) < 2:
        return some[0] if some else None
    valid = [
        torch.ones_like(past.positions, dtype=torch.bool) if past.valid is None else past.valid
        for past in some
    ]

    def keys_values(block: int) -> KeysValues:
        each = [past.keys_values(block) for past in some]
        keys, values = (torch.cat(x, dim=2) for x in zip(*each, strict=True))
        return keys, values

    positions = torch.cat([past.positions for past in some], dim=1)
    return Past(positions, keys_values, torch.cat(valid, dim=1))
