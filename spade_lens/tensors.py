"""Typed tensor utilities: means by label, means of others, random tensors of equal norm.

This module knows nothing of models.
"""

from collections.abc import Hashable, Sequence

import numpy as np
import torch
from einops import rearrange, repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor


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
