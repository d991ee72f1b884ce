"""Rule vectors and task vectors: residuals at answer positions, and what is made of them.

A *rule vector* is the residual at a demonstration's answer position, the last token of its label
(span ``labels``). A *task vector* is the mean over prompts of the residual at the final arrow, as
Hendel et al. take it (arXiv 2310.15916). The means and the random control work on plain tensors
and need nothing else of this library.
"""

from collections.abc import Hashable, Sequence

import numpy as np
import torch
from einops import rearrange, reduce, repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor

from spade_lens.models import Model, capture
from spade_lens.prompts import Prompt


def rule_vectors(
    model: Model,
    prompts: Sequence[Prompt],
    *,
    layers: Sequence[int] | None = None,
    memory_limit: float = 4.0,
    progress: bool = True,
) -> Float[Tensor, "layer batch demo d_model"]:
    """The residual at the answer position of every demonstration, by layer.

    Example:
        >>> template = icl.Template(pair="{input}>{output}", query="{input}>", separator=";")
        >>> shown = [("a", "A"), ("b", "B")]
        >>> prompts = [icl.few_shot_prompt(model.tokenizer, shown, "c", template=template)]
        >>> rule_vectors(model, prompts, layers=[0, 2]).shape
        torch.Size([2, 1, 2, 32])

    Args:
        model: The model.
        prompts: Few-shot prompts with as many demonstrations each.
        layers: Layers, 0 to ``n_layers``, each once and ascending; all by default.
        memory_limit: About the most memory to take beside the model's weights, in GiB.
        progress: Show a progress bar when it takes longer than two seconds.

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
        memory_limit=memory_limit,
        progress=progress,
    )
    return rearrange(
        residuals.stack, "layer (batch demo) d_model -> layer batch demo d_model", demo=n_demos
    )


def arrow_vectors(
    model: Model,
    prompts: Sequence[Prompt],
    *,
    layers: Sequence[int] | None = None,
    memory_limit: float = 4.0,
    progress: bool = True,
) -> Float[Tensor, "layer batch d_model"]:
    """The residual at every prompt's answer position, for our prompts the final arrow.

    Example:
        >>> arrow_vectors(model, prompts).shape
        torch.Size([5, 2, 32])

    Args:
        model: The model.
        prompts: The prompts.
        layers: Layers, 0 to ``n_layers``, each once and ascending; all by default.
        memory_limit: About the most memory to take beside the model's weights, in GiB.
        progress: Show a progress bar when it takes longer than two seconds.

    Raises:
        ValueError: As :func:`spade_lens.capture` does.
    """
    positions = [[prompt.answer] for prompt in prompts]
    return capture(
        model,
        prompts,
        layers=layers,
        positions=positions,
        memory_limit=memory_limit,
        progress=progress,
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


def mean_by_label(
    vectors: Float[Tensor, "layer batch demo d_model"], labels: Int[Tensor, "batch demo"]
) -> Float[Tensor, "layer label d_model"]:
    """The mean rule vector of every label, over prompts and demonstrations.

    Example:
        >>> vectors = torch.tensor([[[[1.0], [3.0]], [[5.0], [7.0]]]])
        >>> mean_by_label(vectors, torch.tensor([[0, 1], [0, 0]])).flatten().tolist()
        [4.333..., 3.0]

    Args:
        vectors: Rule vectors.
        labels: The label of each, from 0; negative ones are left out.

    Raises:
        ValueError: If a label below the highest one never occurs.
    """
    flat = rearrange(vectors, "layer batch demo d_model -> (batch demo) layer d_model")
    of = rearrange(labels, "batch demo -> (batch demo)").to(vectors.device)
    sums, counts = _sums(flat[of >= 0], of[of >= 0], int(of.max()) + 1)
    if not counts.all():
        raise ValueError(
            f"Labels {(counts == 0).nonzero().flatten().tolist()} never occur, so they have no "
            "mean. Count the labels from 0 without gaps."
        )
    return rearrange(sums / counts[:, None, None], "label layer d_model -> layer label d_model")


def mean_of_others(
    vectors: Float[Tensor, "layer batch *place d_model"],
    groups: Sequence[Hashable],
    *,
    answers: Sequence[Hashable] | None = None,
) -> Float[Tensor, "layer batch *place d_model"]:
    """In each prompt's place, the mean over the other prompts of its group.

    A prompt's own vectors take no part, so a mean patched into its dummy holds nothing of the
    prompt itself. Where the prompts of a group ask for every answer equally often, those left
    without it ask less often for its own: their mean leans to a wrong answer, always, which
    ``answers`` evens out.

    Example:
        >>> vectors = torch.tensor([[[1.0], [2.0], [6.0], [9.0], [7.0]]])
        >>> mean_of_others(vectors, ["x", "x", "x", "y", "y"]).flatten().tolist()
        [4.0, 3.5, 1.5, 7.0, 9.0]

        With answers, the mean of the others' means by answer::

            >>> mean_of_others(vectors, ["x"] * 5, answers="AAABB").flatten().tolist()
            [6.0, 5.75, 4.75, 5.0, 6.0]

    Args:
        vectors: Rule vectors (means by demonstration) or arrow vectors.
        groups: For each prompt, its group, such as ``Episode.rule``.
        answers: For each prompt, its answer: then every answer of a group counts the same. One
            that no other prompt of the group has cannot take part. Ours.

    Raises:
        ValueError: If a group has one prompt only, or the numbers of prompts differ.
    """
    of = _numbered(groups, vectors.shape[1]).to(vectors.device)
    if answers is not None and len(answers) != len(groups):
        raise ValueError(
            f"{len(answers)} answers were given for {len(groups)} prompts; give one each."
        )
    cells = [*zip(groups, answers or [None] * len(groups), strict=True)]
    cell = _numbered(cells, vectors.shape[1]).to(vectors.device)
    by_prompt = rearrange(vectors, "layer batch ... -> batch layer ...")
    _check_groups(groups, of, torch.bincount(of))
    sums, counts = _sums(by_prompt, cell, int(cell.max()) + 1)

    def wide(x: Tensor) -> Tensor:
        return x.view(-1, *[1] * (by_prompt.ndim - 1))

    of_cell = torch.empty_like(counts).scatter_(0, cell, of)
    totals, n_cells = _sums(sums / wide(counts), of_cell, int(of.max()) + 1)
    # In the place of its own cell's mean, that of the others there; none where it is alone.
    others = counts[cell] - 1
    own = (sums[cell] - by_prompt) / wide(others.clamp(min=1))
    rest = totals[of] - sums[cell] / wide(counts[cell])
    mean = (rest + own) / wide(n_cells[of] - (others == 0).long())
    return rearrange(mean, "batch layer ... -> layer batch ...")


def label_mean_of_others(
    vectors: Float[Tensor, "layer batch demo d_model"],
    labels: Int[Tensor, "batch demo"],
    groups: Sequence[Hashable],
) -> Float[Tensor, "layer batch demo d_model"]:
    """In each rule vector's place, the mean of those of its label in the group's other prompts.

    Args:
        vectors: Rule vectors.
        labels: The label of each, from 0.
        groups: For each prompt, its group, such as ``Episode.rule``.

    Raises:
        ValueError: If the other prompts of a group lack a label that a prompt has, a label is
            negative, or the numbers of prompts differ.
    """
    of = _numbered(groups, vectors.shape[1]).to(vectors.device)
    labels = labels.to(vectors.device)
    if int(labels.min()) < 0:
        raise ValueError("A negative label was given; means by label need the labels, from 0.")
    n_batch, n_demo = labels.shape
    n_labels = int(labels.max()) + 1
    cell = rearrange(of, "batch -> batch 1") * n_labels + labels
    own = torch.arange(n_batch, device=of.device)[:, None] * n_labels + labels
    flat = rearrange(vectors, "layer batch demo d_model -> (batch demo) layer d_model")
    in_cell, n_cell = _sums(flat, cell.flatten(), int(of.max() + 1) * n_labels)
    in_own, n_own = _sums(flat, own.flatten(), n_batch * n_labels)
    others = n_cell[cell] - n_own[own]  # [batch demo]
    if not (others > 0).all():
        i, j = (others == 0).nonzero()[0].tolist()
        raise ValueError(
            f"No other prompt of the group {groups[i]!r} has the label {int(labels[i, j])} of "
            f"prompt {i}, so there is no mean of others. Give more prompts of each group."
        )
    mean = (in_cell[cell] - in_own[own]) / repeat(others, "batch demo -> batch demo 1 1")
    return rearrange(mean, "batch demo layer d_model -> layer batch demo d_model", demo=n_demo)


def random_like(
    vectors: Float[Tensor, "*place d_model"], *, seed: int = 0
) -> Float[Tensor, "*place d_model"]:
    """Vectors of random directions, each as long as the one in whose place it stands.

    Example:
        >>> vectors = torch.ones(2, 3, 8)
        >>> random = random_like(vectors)
        >>> torch.allclose(random.norm(dim=-1), vectors.norm(dim=-1))
        True

    Args:
        vectors: The vectors whose norms are wanted.
        seed: Seed of the directions.
    """
    # Not torch's generator: under the same seed it may have made the very vectors.
    normal = np.random.default_rng(seed).standard_normal(vectors.shape)
    drawn = torch.from_numpy(normal).to(vectors.device, vectors.dtype)
    return drawn / drawn.norm(dim=-1, keepdim=True) * vectors.norm(dim=-1, keepdim=True)


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


def _numbered(groups: Sequence[Hashable], n_batch: int) -> Int[Tensor, " batch"]:
    if len(groups) != n_batch:
        raise ValueError(f"{len(groups)} groups were given for {n_batch} prompts; give one each.")
    order = {group: i for i, group in enumerate(dict.fromkeys(groups))}
    return torch.tensor([order[group] for group in groups])


def _check_groups(
    groups: Sequence[Hashable], of: Int[Tensor, " batch"], counts: Int[Tensor, " group"]
) -> None:
    alone: Bool[Tensor, " batch"] = counts[of] < 2
    if alone.any():
        group = groups[int(alone.nonzero()[0])]
        raise ValueError(
            f"The group {group!r} has one prompt only, so there are no others to take a mean of. "
            "Give more prompts of each group."
        )


def _sums(
    rows: Float[Tensor, "row layer *place"], of: Int[Tensor, " row"], n: int
) -> tuple[Float[Tensor, "group layer *place"], Int[Tensor, " group"]]:
    """The sum and the number of rows of every group."""
    sums = rows.new_zeros(n, *rows.shape[1:]).index_add_(0, of, rows)
    return sums, torch.bincount(of, minlength=n)
