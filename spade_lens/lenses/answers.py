"""What a model answers: the right token or not, and by how much it prefers it to the wrong ones."""

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from spade_lens.models.model import Model
from spade_lens.models.residuals import capture
from spade_lens.prompts.prompt import Prompt
from spade_lens.settings import Settings, scoped

_ROWS_AT_ONCE = 256
"""No more rows of logits than this exist at a time."""


@dataclass(frozen=True)
class Answers:
    """One answer for each of several rows.

    Args:
        correct: Whether the target is the top token of the whole vocabulary.
        prefers: Whether the target is preferred to all other candidates.
        logit_diff: The target's logit minus the highest of the other candidates.
    """

    correct: Bool[Tensor, " row"]
    prefers: Bool[Tensor, " row"]
    logit_diff: Float[Tensor, " row"]

    def to_frame(self) -> pd.DataFrame:
        """One row each, with the columns ``correct``, ``prefers`` and ``logit_diff``."""
        return pd.DataFrame(
            {
                "correct": self.correct.tolist(),
                "prefers": self.prefers.tolist(),
                "logit_diff": self.logit_diff.double().tolist(),
            }
        )


@torch.no_grad()
def read_answers(
    model: Model, final: Float[Tensor, "row d_model"], prompts: Sequence[Prompt]
) -> Answers:
    """What residuals at layer ``n_layers`` answer, measured by each prompt's target and candidates.

    Args:
        model: The model.
        final: For every row, the residual at the answer position.
        prompts: For every row, its prompt.

    Raises:
        ValueError: If a prompt has no target, or no candidates beside it.
    """
    check_choices(prompts)
    if len(prompts) != len(final):
        raise ValueError(f"{len(final)} rows were given for {len(prompts)} prompts; give one each.")
    correct, diffs = [], []
    for first in range(0, len(final), _ROWS_AT_ONCE):
        logits = model.unembed(model.final_norm(final[first : first + _ROWS_AT_ONCE]))
        for row, prompt in zip(logits, prompts[first : first + _ROWS_AT_ONCE], strict=True):
            wrong = [token for token in prompt.candidates if token != prompt.target]
            correct.append(row.argmax() == prompt.target)
            diffs.append((row[prompt.target] - row[wrong].max()).float())
    diff = torch.stack(diffs).cpu()
    return Answers(torch.stack(correct).cpu(), diff > 0, diff)


@scoped
def full_answers(
    model: Model, prompts: Sequence[Prompt], *, settings: Settings | None = None
) -> Answers:
    """What the model itself answers to prompts.

    Args:
        model: The model.
        prompts: Prompts with a target and candidates.
        settings: Memory limit, batch size and progress; see :class:`spade_lens.Settings`.

    Raises:
        ValueError: As :func:`read_answers` and :func:`spade_lens.capture` do.
    """
    check_choices(prompts)
    residuals = capture(
        model,
        prompts,
        layers=[model.n_layers],
        positions=[[prompt.answer] for prompt in prompts],
    )
    return read_answers(model, residuals.stack[0], prompts)


def check_choices(prompts: Sequence[Prompt]) -> None:
    """Raise if a prompt has no right answer or nothing to compare it with.

    Raises:
        ValueError: If one has no target, or no candidates beside it.
    """
    for i, prompt in enumerate(prompts):
        if prompt.target is None or not set(prompt.candidates) - {prompt.target}:
            raise ValueError(
                f"Prompt {i} has target {prompt.target} and candidates {prompt.candidates}; an "
                "answer is measured by its target against at least one other candidate. Make "
                "prompts with Episode.prompt, or give both."
            )
