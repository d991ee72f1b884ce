"""Rule vectors and task vectors: residuals at answer positions, and what is made of them.

A *rule vector* is the residual at a demonstration's answer position, the last token of its label
(span ``labels``). A *task vector* is the mean over prompts of the residual at the final arrow, as
Hendel et al. take it (arXiv 2310.15916). The means and the random control work on plain tensors
and need nothing else of this library.
"""

from collections.abc import Sequence

import torch
from einops import rearrange, reduce
from jaxtyping import Float, Int
from torch import Tensor

from spade_lens.models.model import Model
from spade_lens.models.residuals import capture
from spade_lens.prompts.prompt import Prompt
from spade_lens.settings import Settings, scoped


@scoped
def rule_vectors(
    model: Model,
    prompts: Sequence[Prompt],
    *,
    layers: Sequence[int] | None = None,
    settings: Settings | None = None,
) -> Float[Tensor, "layer batch demo d_model"]:
    """The residual at the answer position of every demonstration, by layer.

    Example:
        >>> template = sl.prompts.Template(pair="{input}>{output}", query="{input}>", separator=";")
        >>> shown = [("a", "A"), ("b", "B")]
        >>> prompts = [sl.prompts.few_shot_prompt(model.tokenizer, shown, "c", template=template)]
        >>> rule_vectors(model, prompts, layers=[0, 2]).shape
        torch.Size([2, 1, 2, 32])

    Args:
        model: The model.
        prompts: Few-shot prompts with as many demonstrations each.
        layers: Layers, 0 to ``n_layers``, each once and ascending; all by default.
        settings: Memory limit, batch size and progress; see :class:`spade_lens.Settings`.

    Raises:
        ValueError: If a prompt has no demonstrations or not as many as the others, or as
            :func:`spade_lens.capture` does.
    """
    n_demos = check_demonstrations(prompts)
    residuals = capture(
        model,
        prompts,
        layers=layers,
        positions=[prompt.spans["labels"] for prompt in prompts],
    )
    return rearrange(
        residuals.stack, "layer (batch demo) d_model -> layer batch demo d_model", demo=n_demos
    )


@scoped
def arrow_vectors(
    model: Model,
    prompts: Sequence[Prompt],
    *,
    layers: Sequence[int] | None = None,
    settings: Settings | None = None,
) -> Float[Tensor, "layer batch d_model"]:
    """The residual at every prompt's answer position, for our prompts the final arrow.

    Example:
        >>> arrow_vectors(model, prompts).shape
        torch.Size([5, 2, 32])

    Args:
        model: The model.
        prompts: The prompts.
        layers: Layers, 0 to ``n_layers``, each once and ascending; all by default.
        settings: Memory limit, batch size and progress; see :class:`spade_lens.Settings`.

    Raises:
        ValueError: As :func:`spade_lens.capture` does.
    """
    positions = [[prompt.answer] for prompt in prompts]
    return capture(
        model,
        prompts,
        layers=layers,
        positions=positions,
    ).stack


def task_vector(
    arrows: Float[Tensor, "layer batch d_model"],
) -> Float[Tensor, "layer d_model"]:
    """The mean over prompts at the final arrow: one global vector of a task by layer.

    Example:
        >>> task_vector(arrow_vectors(model, prompts)).shape
        torch.Size([5, 32])

    Args:
        arrows: From :func:`arrow_vectors`, of prompts with other queries than those to be patched.
    """
    return reduce(arrows, "layer batch d_model -> layer d_model", "mean")


def demonstration_labels(prompts: Sequence[Prompt]) -> Int[Tensor, "batch demo"]:
    """Which of a prompt's candidates each demonstration's label is, counted from 0.

    Args:
        prompts: Prompts of a rule task, with as many demonstrations each.

    Returns:
        The label's place among ``Prompt.candidates``; -1 where it is none of them.

    Raises:
        ValueError: If a prompt has no demonstrations or not as many as the others.
    """
    check_demonstrations(prompts)
    rows = []
    for prompt in prompts:
        tokens = [prompt.tokens[p] for p in prompt.spans["labels"]]
        known = {token: i for i, token in enumerate(prompt.candidates)}
        rows.append([known.get(token, -1) for token in tokens])
    return torch.tensor(rows)


def check_demonstrations(prompts: Sequence[Prompt]) -> int:
    """How many demonstrations every one of the prompts has.

    Raises:
        ValueError: If there are no prompts, one has no demonstrations, or their numbers differ.
    """
    if not prompts:
        raise ValueError("No prompts were given. Give at least one.")
    counts = [len(prompt.spans.get("labels", ())) for prompt in prompts]
    wrong = [i for i, count in enumerate(counts) if count == 0 or count != counts[0]]
    if wrong:
        i = wrong[0]
        raise ValueError(
            f"Prompt {i} has {counts[i]} demonstrations (the tokens of its span 'labels') and "
            f"prompt 0 has {counts[0]}; rule vectors need as many in each, and at least one. Make "
            "prompts with few_shot_prompt or a task."
        )
    return counts[0]
