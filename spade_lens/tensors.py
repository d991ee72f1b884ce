"""Typed tensor utilities: stacking by demonstration, means by label and of others, random controls.

This module knows tensors and nothing of models. It can be imported on its own.
"""

from collections.abc import Hashable, Sequence

import numpy as np
import torch
from einops import pack, rearrange, repeat, unpack
from jaxtyping import Float, Int
from torch import Tensor

from spade_lens.checks import checked


@checked
def stack_by_demonstration(
    slots: Float[Tensor, "layer slot d_model"], n_demos: int
) -> Float[Tensor, "layer batch demo d_model"]:
    """Give each demonstration an axis, in residuals captured prompt by prompt.

    Example:
        >>> slots = torch.zeros(5, 6, 32)  # 2 prompts of 3 demonstrations
        >>> stack_by_demonstration(slots, 3).shape
        torch.Size([5, 2, 3, 32])

    Args:
        slots: One residual for each demonstration, prompt after prompt, such as
            :attr:`spade_lens.Residuals.stack`.
        n_demos: The number of demonstrations of every prompt.

    Raises:
        ValueError: If the number of slots is no multiple of ``n_demos``.
    """
    if n_demos < 1 or slots.shape[1] % n_demos:
        raise ValueError(
            f"n_demos={n_demos} was given for {slots.shape[1]} slots; expected a divisor of it."
        )
    return rearrange(slots, "layer (batch demo) d -> layer batch demo d", demo=n_demos)


@checked
def mean_by_label(
    vectors: Float[Tensor, "layer batch demo d_model"], labels: Int[Tensor, "batch demo"]
) -> Float[Tensor, "layer label d_model"]:
    """Return the mean rule vector of every label, over prompts and demonstrations.

    Example:
        >>> vectors = torch.tensor([[[[1.0], [3.0]], [[5.0], [7.0]]]])
        >>> mean_by_label(vectors, torch.tensor([[0, 1], [0, 0]])).flatten().tolist()
        [4.333..., 3.0]

    Args:
        vectors: Rule vectors.
        labels: The label of each, from 0. Negative ones are left out.

    Raises:
        ValueError: If a label below the highest one never occurs.
    """
    rows = rearrange(vectors, "layer batch demo d -> (batch demo) layer d")
    label = rearrange(labels, "batch demo -> (batch demo)").to(vectors.device)
    sums, counts = _sums(rows[label >= 0], label[label >= 0], int(label.max()) + 1)
    if not counts.all():
        raise ValueError(
            f"Labels {(counts == 0).nonzero().flatten().tolist()} never occur, so they have no "
            "mean. Count the labels from 0 without gaps."
        )
    return rearrange(sums / _column(counts), "label layer d -> layer label d")


@checked
def mean_of_others(
    vectors: Float[Tensor, "layer batch *place d_model"],
    groups: Sequence[Hashable],
    *,
    answers: Sequence[Hashable] | None = None,
) -> Float[Tensor, "layer batch *place d_model"]:
    """Return, for each prompt, the mean over the other prompts of its group.

    A prompt's own vectors are left out, so a mean that is patched into its dummy prompt holds
    nothing of the prompt itself. If all answers are equally frequent in a group, the prompt's own
    answer is less frequent among the others, and their mean leans to a wrong answer. ``answers``
    corrects this.

    Example:
        >>> vectors = torch.tensor([[[1.0], [2.0], [6.0], [9.0], [7.0]]])
        >>> mean_of_others(vectors, ["x", "x", "x", "y", "y"]).flatten().tolist()
        [4.0, 3.5, 1.5, 7.0, 9.0]

        With answers, the mean of the others' means by answer::

            >>> mean_of_others(vectors, ["x"] * 5, answers="AAABB").flatten().tolist()
            [6.0, 5.75, 4.75, 5.0, 6.0]

    Args:
        vectors: Rule vectors (means by demonstration) or vectors of the final position.
        groups: For each prompt, its group, such as ``Episode.rule``.
        answers: For each prompt, its answer. Then every answer of a group has the same weight. An
            answer that no other prompt of the group has is left out. Our choice.

    Raises:
        ValueError: If a group has only one prompt, or the numbers of prompts differ.
    """
    group = _numbered(groups, vectors.shape[1]).to(vectors.device)
    if answers is not None and len(answers) != len(groups):
        raise ValueError(
            f"{len(answers)} answers were given for {len(groups)} prompts; give one each."
        )
    cells = [*zip(groups, answers or [None] * len(groups), strict=True)]
    cell = _numbered(cells, vectors.shape[1]).to(vectors.device)
    _check_groups(groups, group)
    flat, places = pack([vectors], "layer batch *")
    rows = rearrange(flat, "layer batch place -> batch layer place")
    sums, counts = _sums(rows, cell, int(cell.max()) + 1)
    group_of_cell = torch.empty_like(counts).scatter_(0, cell, group)
    totals, n_cells = _sums(sums / _column(counts), group_of_cell, int(group.max()) + 1)
    # The mean of the prompt's own cell is replaced by that of the others in the cell, or left out
    # where the prompt is alone there.
    n_others = counts[cell] - 1
    own = (sums[cell] - rows) / _column(n_others.clamp(min=1))
    rest = totals[group] - sums[cell] / _column(counts[cell])
    mean = (rest + own) / _column(n_cells[group] - (n_others == 0).long())
    [mean] = unpack(
        rearrange(mean, "batch layer place -> layer batch place"), places, "layer batch *"
    )
    return mean


@checked
def label_mean_of_others(
    vectors: Float[Tensor, "layer batch demo d_model"],
    labels: Int[Tensor, "batch demo"],
    groups: Sequence[Hashable],
) -> Float[Tensor, "layer batch demo d_model"]:
    """Return, for each rule vector, the mean of those of its label in the group's other prompts.

    Example:
        >>> vectors = torch.tensor([[[[1.0], [2.0]], [[3.0], [4.0]], [[5.0], [8.0]]]])
        >>> labels = torch.tensor([[0, 1], [0, 1], [1, 0]])
        >>> label_mean_of_others(vectors, labels, ["x"] * 3).flatten().tolist()
        [5.5, 4.5, 4.5, 3.5, 3.0, 2.0]

    Args:
        vectors: Rule vectors.
        labels: The label of each, from 0.
        groups: For each prompt, its group, such as ``Episode.rule``.

    Raises:
        ValueError: If the other prompts of a group lack a label that a prompt has, a label is
            negative, or the numbers of prompts differ.
    """
    group = _numbered(groups, vectors.shape[1]).to(vectors.device)
    labels = labels.to(vectors.device)
    if int(labels.min()) < 0:
        raise ValueError("A negative label was given; means by label need the labels, from 0.")
    n_batch, n_demos = labels.shape
    n_labels = int(labels.max()) + 1
    batch = torch.arange(n_batch, device=group.device)
    by_group = rearrange(group, "batch -> batch 1") * n_labels + labels
    by_prompt = rearrange(batch, "batch -> batch 1") * n_labels + labels
    rows = rearrange(vectors, "layer batch demo d -> (batch demo) layer d")
    in_group, n_group = _sums(rows, by_group.flatten(), int(group.max() + 1) * n_labels)
    in_prompt, n_prompt = _sums(rows, by_prompt.flatten(), n_batch * n_labels)
    n_others = n_group[by_group] - n_prompt[by_prompt]  # [batch demo]
    if not (n_others > 0).all():
        i, j = (n_others == 0).nonzero()[0].tolist()
        raise ValueError(
            f"No other prompt of the group {groups[i]!r} has the label {int(labels[i, j])} of "
            f"prompt {i}, so there is no mean of others. Give more prompts of each group."
        )
    mean = (in_group[by_group] - in_prompt[by_prompt]) / repeat(
        n_others, "batch demo -> batch demo 1 1"
    )
    return rearrange(mean, "batch demo layer d -> layer batch demo d", demo=n_demos)


@checked
def random_like(
    vectors: Float[Tensor, "*place d_model"], *, seed: int = 0
) -> Float[Tensor, "*place d_model"]:
    """Return vectors of random directions with the norms of the given ones.

    Example:
        >>> vectors = torch.ones(2, 3, 8)
        >>> random = random_like(vectors)
        >>> torch.allclose(random.norm(dim=-1), vectors.norm(dim=-1))
        True

    Args:
        vectors: The vectors whose norms are used.
        seed: Seed of the directions.
    """
    # Not torch's generator: with the same seed it may have made these very vectors.
    normal = np.random.default_rng(seed).standard_normal(vectors.shape)
    random = torch.from_numpy(normal).to(vectors.device, vectors.dtype)
    return random / random.norm(dim=-1, keepdim=True) * vectors.norm(dim=-1, keepdim=True)


def _numbered(groups: Sequence[Hashable], n_batch: int) -> Int[Tensor, " batch"]:
    if len(groups) != n_batch:
        raise ValueError(f"{len(groups)} groups were given for {n_batch} prompts; give one each.")
    order = {group: i for i, group in enumerate(dict.fromkeys(groups))}
    return torch.tensor([order[group] for group in groups])


def _check_groups(groups: Sequence[Hashable], group: Int[Tensor, " batch"]) -> None:
    alone = (torch.bincount(group)[group] < 2).nonzero().flatten().tolist()
    if alone:
        raise ValueError(
            f"The group {groups[alone[0]]!r} has one prompt only, so there are no others to take a "
            "mean of. Give more prompts of each group."
        )


def _column(counts: Int[Tensor, " row"]) -> Int[Tensor, "row 1 1"]:
    return rearrange(counts, "row -> row 1 1")


def _sums(
    rows: Float[Tensor, "row layer place"], group: Int[Tensor, " row"], n: int
) -> tuple[Float[Tensor, "group layer place"], Int[Tensor, " group"]]:
    """Return the sum and the number of rows of every group."""
    sums = rows.new_zeros(n, *rows.shape[1:]).index_add_(0, group, rows)
    return sums, torch.bincount(group, minlength=n)
