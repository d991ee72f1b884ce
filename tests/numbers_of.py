"""Numbers that tell whether a model is what it was: all that runs it in a way of its own."""

from typing import Any

import torch
from torch import Tensor

from spade_lens import Keep, LogitLens, Prompt, Spade, read
from spade_lens.exits import FixedLayer, SpadeExit

# Enough prompts for the start token's keys to be made once, and a single one.
MANY_PROMPTS = [Prompt((1, *((7 * i + k) % 90 + 3 for i in range(12)))) for k in range(8)]


def numbers(model: Any) -> Tensor:
    """SPADE, the logit lens, early exit and a hooked run, of many prompts and of one."""
    lenses = [Spade(model), LogitLens(model), Spade(model, keep=Keep(last=3), name="last 3")]
    found = [
        read(prompts, lenses).entropy.flatten() for prompts in (MANY_PROMPTS, MANY_PROMPTS[:1])
    ]
    found.append(SpadeExit(model, None, FixedLayer(2)).run(MANY_PROMPTS).answer.float())
    return torch.cat(found)
