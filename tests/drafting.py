"""Prompts for drafts, and the distribution that sampled text must have."""

from collections.abc import Sequence

import torch
from scipy.stats import chisquare

import spade_lens as sl
from spade_lens.generation import Generated, Sampling
from spade_lens.prompts import Prompt

# The second repeats itself, so that n-grams speak.
PROMPTS = [
    Prompt(tokens=tuple(tokens))
    for tokens in ((1, *range(5, 14)), (1, *[30, 31, 32, 33] * 5), (1,))
]


def check_marginals(
    model: sl.Model, prompt: Prompt, sampling: Sampling, written: Generated
) -> None:
    """The first two new tokens of many texts of one prompt have the model's marginals."""
    tokens = torch.tensor(written.tokens)
    n = len(tokens)
    for column, expected in enumerate(_marginals(model, prompt, sampling)):
        counts = torch.bincount(tokens[:, column], minlength=len(expected)).double()
        likely = expected * n >= 5
        rest = torch.tensor([counts[~likely].sum()]), torch.tensor([expected[~likely].sum() * n])
        observed = torch.cat([counts[likely], rest[0]])
        wanted = torch.cat([expected[likely] * n, rest[1]])
        some = wanted > 0
        assert float(observed[~some].sum()) == 0
        assert chisquare(observed[some], wanted[some]).pvalue > 1e-3


def _marginals(
    model: sl.Model, prompt: Prompt, sampling: Sampling
) -> tuple[torch.Tensor, torch.Tensor]:
    def after(tokens: Sequence[int]) -> torch.Tensor:
        with torch.no_grad():
            return sampling.probabilities(model.original(torch.tensor([tokens])).logits[0, -1])

    first = after(prompt.tokens)
    options = first.nonzero()[:, 0].tolist()
    second = sum(first[t] * after([*prompt.tokens, t]) for t in options)
    assert isinstance(second, torch.Tensor)
    return first, second
