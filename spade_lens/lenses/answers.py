"""What is answered, and by how much: the one place where residuals become answers.

A prompt's *options* are its candidates or, where it has none, the whole vocabulary. This module
knows nothing of lenses: whatever takes a residual to layer ``n_layers`` is measured alike.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from spade_lens.lenses.lens import check_readable
from spade_lens.models.model import Model
from spade_lens.models.residuals import capture
from spade_lens.prompts.inputs import PromptsLike
from spade_lens.prompts.prompt import Prompt
from spade_lens.settings import Settings, limits, scoped


@dataclass(frozen=True, eq=False)
class Answers:
    """One answer for each of several rows, measured at one token each: as a rule the target.

    Args:
        top: The top token of the whole vocabulary.
        choice: The likeliest option.
        logprob: The measured token's log-probability over the vocabulary.
        option_logprob: Its log-probability over the prompt's options.
        logit_diff: Its logit minus the highest of the other options; infinite if there is none.
        correct: Whether it is the top token of the whole vocabulary.
        ambiguous: Whether the prompt's target also begins another answer, or the query.
    """

    top: Int[Tensor, " row"]
    choice: Int[Tensor, " row"]
    logprob: Float[Tensor, " row"]
    option_logprob: Float[Tensor, " row"]
    logit_diff: Float[Tensor, " row"]
    correct: Bool[Tensor, " row"]
    ambiguous: Bool[Tensor, " row"]

    @property
    def prefers(self) -> Bool[Tensor, " row"]:
        """Whether the measured token is preferred to all other options."""
        return self.logit_diff > 0

    def __repr__(self) -> str:
        return (
            f"Answers({len(self.top)} rows, {int(self.correct.sum())} correct, mean logit_diff "
            f"{float(self.logit_diff.mean()):.2f})"
        )

    def to_frame(self) -> pd.DataFrame:
        """Return one row each: ``correct``, ``prefers``, ``logit_diff`` and ``ambiguous``."""
        return pd.DataFrame(
            {
                "correct": self.correct.tolist(),
                "prefers": self.prefers.tolist(),
                "logit_diff": self.logit_diff.double().tolist(),
                "ambiguous": self.ambiguous.tolist(),
            }
        )


def read_answers(
    model: Model,
    final: Float[Tensor, "row d_model"],
    prompts: Sequence[Prompt],
    *,
    tokens: Int[Tensor, " row"] | None = None,
) -> Answers:
    """Measure the answers of residuals at layer ``n_layers``, a few rows of logits at a time.

    The token that is measured is the prompt's target, or that of ``tokens``.
    """
    _check_rows(final, prompts)
    if tokens is None:
        check_targets(prompts)
        tokens = torch.tensor([prompt.target for prompt in prompts], dtype=torch.long)
    return _measured(model, final, prompts, tokens)


def own_answers(
    model: Model, final: Float[Tensor, "row d_model"], prompts: Sequence[Prompt]
) -> Answers:
    """Measure each row at its own likeliest option (``choice``), so that no target is needed."""
    _check_rows(final, prompts)
    return _measured(model, final, prompts, None)


@scoped
def full_answers(
    model: Model, prompts: PromptsLike, *, settings: Settings | None = None
) -> Answers:
    """Measure what the model itself answers to prompts with a target and candidates."""
    prompts = model.prompts(prompts)
    check_choices(prompts)
    answer = [[prompt.answer] for prompt in prompts]
    residuals = capture(model, prompts, layers=model.n_layers, positions=answer)
    return read_answers(model, residuals.stack[0], prompts)


@torch.no_grad()
def _measured(
    model: Model,
    final: Float[Tensor, "row d_model"],
    prompts: Sequence[Prompt],
    tokens: Int[Tensor, " row"] | None,
) -> Answers:
    parts = []
    at_once = limits(model).rows(4 * model.d_vocab)
    for first in range(0, len(final), at_once):
        rows = slice(first, first + at_once)
        logits = model.logits(final[rows])
        options = _options(logits, prompts[rows])
        highest, top = logits.max(dim=-1)
        check_readable(highest, f"{model.name} at the answer position")
        choice = options.argmax(dim=-1)
        token = choice if tokens is None else tokens[rows].to(logits.device)
        at_token = logits.gather(-1, token[:, None])[:, 0]
        others = options.scatter(-1, token[:, None], -torch.inf)
        columns = (
            top,
            choice,
            at_token - logits.logsumexp(dim=-1),
            at_token - options.logsumexp(dim=-1),
            at_token - others.amax(dim=-1),
            top == token,
            torch.tensor([prompt.shares_first_token for prompt in prompts[rows]]),
        )
        parts.append([column.cpu() for column in columns])
    return Answers(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _options(
    logits: Float[Tensor, "row d_vocab"], prompts: Sequence[Prompt]
) -> Float[Tensor, "row d_vocab"]:
    """Logits of each prompt's options; -inf for all other tokens."""
    outside = torch.zeros_like(logits, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        if prompt.candidates:
            outside[row] = True
            outside[row, list(prompt.candidates)] = False
    return logits.masked_fill(outside, -torch.inf)


def _check_rows(final: Float[Tensor, "row d_model"], prompts: Sequence[Prompt]) -> None:
    if len(prompts) != len(final):
        raise ValueError(f"{len(final)} rows were given for {len(prompts)} prompts; give one each.")


def check_targets(prompts: Sequence[Prompt]) -> None:
    """Raise if a prompt has no right answer."""
    without = [i for i, prompt in enumerate(prompts) if prompt.target is None]
    if without:
        raise ValueError(
            f"Prompts {without[:5]} have no target, so their answers cannot be measured. Give "
            "Prompt(target=...)."
        )


def check_choices(prompts: Sequence[Prompt]) -> None:
    """Raise if a prompt has no right answer or nothing to compare it with."""
    for i, prompt in enumerate(prompts):
        if prompt.target is None or not set(prompt.candidates) - {prompt.target}:
            raise ValueError(
                f"Prompt {i} has target {prompt.target} and candidates {prompt.candidates}; an "
                "answer is measured by its target against at least one other candidate. Make "
                "prompts with Episode.prompt, or give both."
            )
