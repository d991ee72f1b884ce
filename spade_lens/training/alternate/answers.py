"""Log-probabilities of whole answers from cached residuals, and the two losses made of them."""

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from spade_lens.models.model import Model
from spade_lens.models.places import pad_after
from spade_lens.prompts.prompt import Prompt
from spade_lens.settings import limits, progress_bar

_ROWS = 32
"""Rows that run side by side where no gradient is needed."""


class CachedAnswers:
    """Prompts with an answer each, and their residuals at a layer.

    They are padded after their ends, where causal attention does not look.

    Args:
        model: The model.
        layer: The layer. What lies below it must not change as long as this is used.
        prompts: The prompts.
        answers: All tokens of the answer to every prompt.

    Raises:
        ValueError: If the residuals take more than the memory limit.
    """

    def __init__(
        self,
        model: Model,
        layer: int,
        prompts: Sequence[Prompt],
        answers: Sequence[tuple[int, ...]],
    ) -> None:
        rows = [(*p.tokens, *answer) for p, answer in zip(prompts, answers, strict=True)]
        self._model, self._layer = model, layer
        self._starts = [len(prompt) - 1 for prompt in prompts]
        self._answers = [tuple(answer) for answer in answers]
        # The last token of an answer predicts nothing.
        tokens = pad_after([row[:-1] for row in rows], model.device)
        needed = tokens.numel() * model.d_model * model.dtype.itemsize
        most = limits(model).memory_bytes
        if needed > most:
            raise ValueError(
                f"The residuals of {len(rows)} answers take {needed / 2**30:.1f} GiB, and the "
                f"memory limit is {most / 2**30:.1f} GiB. Give fewer, or "
                "settings=Settings(memory_limit=...)."
            )
        parts = []
        with torch.no_grad(), progress_bar(total=len(rows), desc="run prompts", model=model) as bar:
            for some in tokens.split(_ROWS):
                positions = torch.arange(some.shape[1], device=some.device).expand_as(some)
                resid = model.embed(some, positions)
                parts.append(model.run_blocks(resid, positions, 0, layer))
                bar.update(len(some))
        self._low = torch.cat(parts)  # [row pos d_model]

    def __len__(self) -> int:
        return len(self._answers)

    def logprobs(self, rows: Sequence[int]) -> Float[Tensor, " row"]:
        """Return the log-probability of the whole answer of some rows."""
        model, places, wanted = self._model, [], []
        for at, row in enumerate(rows):
            for n, token in enumerate(self._answers[row]):
                places.append((at, self._starts[row] + n))
                wanted.append(token)
        longest = max(position for _, position in places) + 1
        low = self._low[list(rows), :longest]
        positions = torch.arange(longest, device=low.device).expand(len(low), -1)
        top = model.run_blocks(low, positions, self._layer, model.n_layers)
        at_rows, at_positions = torch.tensor(places, device=low.device).unbind(dim=1)
        logits = model.logits(top[at_rows, at_positions])
        nats = F.cross_entropy(logits, torch.tensor(wanted, device=low.device), reduction="none")
        return torch.zeros(len(low), device=low.device).index_add(0, at_rows, -nats)

    @torch.no_grad()
    def all_logprobs(self) -> Float[Tensor, " row"]:
        """Return the log-probabilities of all answers, without gradients."""
        chunks = [
            range(start, min(start + _ROWS, len(self))) for start in range(0, len(self), _ROWS)
        ]
        return torch.cat([self.logprobs(chunk) for chunk in chunks])

    def n_tokens(self, rows: Sequence[int]) -> int:
        """Return how many tokens the answers of some rows have."""
        return sum(len(self._answers[row]) for row in rows)

    def sft_loss(self, rows: Sequence[int]) -> Float[Tensor, ""]:
        """Return the cross-entropy of the answers' tokens, in nats a token."""
        return -self.logprobs(rows).sum() / self.n_tokens(rows)


class CachedPairs:
    """Prompts with a preferred and a rejected answer each, and their residuals at a layer.

    Args:
        model: The model.
        layer: The layer; see :class:`CachedAnswers`.
        prompts: Prompts with two candidates, of which the target is the preferred one.
    """

    def __init__(self, model: Model, layer: int, prompts: Sequence[Prompt]) -> None:
        self._n = len(prompts)
        preferred = [prompt.target_tokens for prompt in prompts]
        rejected = [rejected_answer(prompt) for prompt in prompts]
        self._both = CachedAnswers(model, layer, [*prompts, *prompts], [*preferred, *rejected])

    def __len__(self) -> int:
        return self._n

    def margins(self, rows: Sequence[int]) -> Float[Tensor, " row"]:
        """Return the log-probability of the preferred answer minus that of the rejected one."""
        both = self._both.logprobs([*rows, *(self._n + row for row in rows)])
        return both[: len(rows)] - both[len(rows) :]

    @torch.no_grad()
    def all_margins(self) -> Float[Tensor, " row"]:
        """Return the margins of all pairs, without gradients."""
        both = self._both.all_logprobs()
        return both[: self._n] - both[self._n :]


def dpo_loss(
    margins: Float[Tensor, " row"], reference: Float[Tensor, " row"], beta: float
) -> Float[Tensor, ""]:
    """Return the DPO loss of margins and those of the reference, in nats a pair.

    Source: Rafailov et al. (arXiv 2305.18290).

    Example:
        >>> from spade_lens.training.alternate.answers import dpo_loss
        >>> dpo_loss(torch.ones(2), torch.ones(2), 0.1).item()  # log 2 at the reference
        0.693147...
    """
    return -F.logsigmoid(beta * (margins - reference)).mean()


def rejected_answer(prompt: Prompt) -> tuple[int, ...]:
    """Return the candidate of a pair that is not its target."""
    [rejected] = [one for one in prompt.candidate_tokens if one != prompt.target_tokens]
    return rejected


def splits(n: int, parts: int) -> Iterator[Int[Tensor, " row"]]:
    """Cut rows into parts, in their order; sizes differ by one at most."""
    yield from torch.arange(n).tensor_split(parts)
