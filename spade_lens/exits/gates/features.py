"""What gates see: four numbers of a readout, and what the checks before it say.

This module knows neither models nor how gates are fitted.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from spade_lens.exits.policies import Checks


def gate_features(
    finals: Float[Tensor, "row d_model"], logits: Float[Tensor, "row option"]
) -> Float[Tensor, "row 4"]:
    """Return four numbers of each readout, for ``Confidence(features=gate_features)``.

    These are the probability of the likeliest option, the entropy in nats, the probability of the
    likeliest minus that of the second, and the entropy of the squared probabilities made to add up
    to 1. Source: Regol, Chataoui and Coates, JEI-DNN (arXiv 2310.09163).

    With two options all four are functions of one number. A gate on them can then place a
    threshold, and learn nothing else.

    Example:
        >>> logits = torch.tensor([[0.0, 0.0], [0.0, 100.0], [5.0, -torch.inf]])
        >>> gate_features(torch.empty(3, 0), logits)[:, [0, 2]]
        tensor([[0.5000, 0.0000],
                [1.0000, 1.0000],
                [1.0000, 1.0000]])

    Args:
        finals: Not used.
        logits: The options' logits; -inf where a row has fewer.
    """
    logprobs = logits.float().log_softmax(dim=-1)
    best = logprobs.topk(min(2, logprobs.shape[-1]), dim=-1).values.exp()
    second = best[:, 1] if best.shape[1] > 1 else torch.zeros_like(best[:, 0])
    squared = (2 * logprobs).log_softmax(dim=-1)
    return torch.stack([best[:, 0], _entropy(logprobs), best[:, 0] - second, _entropy(squared)], 1)


def _entropy(logprobs: Float[Tensor, "row option"]) -> Float[Tensor, " row"]:
    surprise = logprobs.masked_fill(logprobs == -torch.inf, 0)
    return (logprobs.exp() * -surprise).sum(dim=-1)


def history_inputs(checks: Checks) -> Float[Tensor, "prompt input"]:
    """Return what a gate by regression sees at the last check, in double precision. Ours.

    These are the confidence and the features; how much each changed since the previous check;
    whether the answer is that of the previous check; and the fraction of earlier checks that gave
    it. At the first check all that compares is 0.
    """
    now = _numbers(checks, -1)
    compared = torch.zeros_like(now)
    agrees = torch.zeros(len(now), 2, dtype=now.dtype)
    if len(checks.layers) > 1:
        compared = now - _numbers(checks, -2)
        same = (checks.answer[:-1] == checks.answer[-1]).to(now.dtype)
        agrees = torch.stack([same[-1], same.mean(dim=0)], dim=1)
    return torch.cat([now, compared, agrees], dim=1)


def _numbers(checks: Checks, check: int) -> Float[Tensor, "prompt number"]:
    confidence, features = checks.confidence[check], checks.features[check]
    return torch.cat([confidence[:, None], features], dim=1).double()
