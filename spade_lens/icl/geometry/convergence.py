"""How similar rule vectors are: within a prompt, across prompts of one rule, across rules.

Rule vectors are the residuals at the demonstrations' labels, by layer. If they converge to a
vector of the rule, their cosine similarity within a rule grows with the layer and exceeds that
across rules. All vectors of a layer share a large common part, which makes any two similar. So a
mean is subtracted first (``center``). If that is the mean of two tasks, vectors of one task look
more similar the further the tasks are apart. The control for this are prompts of the same words
without the rule, and their mean. Two vectors at the same label word are similar because of that
word, so pairs of equal and of different labels are kept apart. All of this is ours. This module
knows tensors, and does not run a model.
"""

from collections.abc import Iterator

import numpy as np
import pandas as pd
import torch
from einops import einsum
from jaxtyping import Bool, Float, Int
from torch import Tensor

from spade_lens.checks import checked
from spade_lens.icl.vectors import VectorsLike, as_rule_vectors
from spade_lens.stats.intervals import mean_interval, shuffled_interval

_WITHIN, _ONE_RULE, _ACROSS = "within a prompt", "prompts of one rule", "across rules"


@checked
def convergence(
    vectors: VectorsLike,
    *,
    rule: Int[Tensor, " batch"] | None = None,
    label: Int[Tensor, "batch demo"] | None = None,
    center: str | Float[Tensor, "layer d_model"] = "all",
    shuffles: int = 39,
    seed: int = 0,
) -> pd.DataFrame:
    """Compute the mean cosine similarity of rule vectors by layer, for several kinds of pairs.

    Example:
        >>> vectors = torch.randn(3, 8, 4, 16)  # [layer batch demo d_model]
        >>> rule = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
        >>> frame = icl.convergence(vectors, rule=rule)
        >>> frame["comparison"].unique().tolist()
        ['within a prompt', 'prompts of one rule', 'across rules']

    Args:
        vectors: The rule vectors.
        rule: The rule of every prompt, as any integer; by default as the vectors know it, or one
            for all.
        label: The label of every demonstration, as any integer; by default as the vectors know it.
        center: What is subtracted from every vector, by layer: ``"all"``, the mean of all
            vectors; ``"label"``, that of the vectors with its label; ``"none"``, nothing; or a
            vector for every layer, such as the mean of vectors without a rule. Ours.
        shuffles: How often rules are permuted among the prompts, for the control.
        seed: Seed of the permutations.

    Returns:
        One row for every layer, comparison and kind of pair: ``layer, comparison`` (see the
        example), ``labels`` (``"any"``, and with labels also ``"same"`` and ``"different"``),
        ``control``, ``mean`` (of the means of all pairs of prompts), ``low``, ``high`` (of the
        95% interval) and ``n``, the number of prompts. Rows without any pair are left out. In a
        control's row rules are shuffled: mean and interval are those of its shuffles, and of 39
        shuffles the interval holds one more 19 times in 20.

    Raises:
        TypeError: If ``vectors`` is neither rule vectors nor a tensor.
        ValueError: If shapes do not fit together, ``center`` is none of these, or it is
            ``"label"`` and there are no labels.
    """
    vectors = as_rule_vectors(vectors)
    rule = vectors.rule_numbers if rule is None else rule
    label = vectors.labels if label is None else label
    check_shape("rule", rule, vectors.shape[1:2])
    check_shape("label", label, vectors.shape[1:3])
    check_center(center, vectors.tensor, label)
    _, n_prompts, n_demos, _ = vectors.shape
    rules = np.zeros(n_prompts, dtype=int) if rule is None else rule.cpu().numpy()
    ids = torch.zeros(n_prompts, n_demos, dtype=torch.long) if label is None else label.cpu()
    # [batch demo label]: 1 where a demonstration has the label
    same = torch.nn.functional.one_hot(ids.unique(return_inverse=True)[1]).double()
    rng = np.random.default_rng(seed)
    shuffled = [rng.permutation(rules) for _ in range(shuffles if len(set(rules)) > 1 else 0)]
    rows: list[dict[str, object]] = []
    for n, layer in enumerate(vectors.layers):
        middle = center if isinstance(center, str) else center[n].cpu().double()
        units = _unit(_centered(vectors.tensor[n].cpu().double(), same, middle))
        for labels, cosines, present in _cosines(units, same, split=label is not None):
            for comparison, mask in _comparisons(rules):
                mask = mask & present
                involved = int(mask.any(axis=1).sum())
                if not involved:
                    continue
                low, high = pairs_interval(cosines, mask)
                about = {"layer": layer, "comparison": comparison, "labels": labels}
                values = {"mean": float(cosines[mask].mean()), "low": low, "high": high}
                rows.append({**about, "control": False, **values, "n": involved})
                masks = [dict(_comparisons(other))[comparison] & present for other in shuffled]
                null = [cosines[mask].mean() for mask in masks if mask.any()]
                if comparison != _WITHIN and null:
                    low, high = shuffled_interval(np.array(null))
                    values = {"mean": float(np.mean(null)), "low": low, "high": high}
                    rows.append({**about, "control": True, **values, "n": involved})
    return pd.DataFrame(rows)


def check_shape(name: str, given: Tensor | None, expected: tuple[int, ...]) -> None:
    """Raise unless a tensor of ids is None or has the vectors' shape."""
    if given is not None and tuple(given.shape) != expected:
        raise ValueError(
            f"{name} has shape {tuple(given.shape)}, but the vectors are of {expected[0]} prompts"
            + (f" of {expected[1]} demonstrations" if len(expected) > 1 else "")
            + f"; expected {expected}."
        )


def check_center(center: str | Tensor, vectors: Tensor, label: Tensor | None) -> None:
    """Raise unless ``center`` can be subtracted."""
    if isinstance(center, Tensor):
        expected = (vectors.shape[0], vectors.shape[-1])
        if tuple(center.shape) != expected:
            raise ValueError(
                f"center has shape {tuple(center.shape)}, but the vectors are of {expected[0]} "
                f"layers and width {expected[1]}; give one vector for every layer."
            )
    elif center not in ("all", "label", "none"):
        raise ValueError(
            f"center={center!r} was given; expected 'all', 'label', 'none' or vectors."
        )
    elif center == "label" and label is None:
        raise ValueError("center='label' subtracts each label's mean. Give label= as well.")


def _centered(
    vectors: Float[Tensor, "batch demo d_model"],
    same: Float[Tensor, "batch demo label"],
    center: str | Float[Tensor, " d_model"],
) -> Float[Tensor, "batch demo d_model"]:
    if isinstance(center, Tensor):
        return vectors - center
    if center == "none":
        return vectors
    if center == "all":
        return vectors - vectors.mean(dim=(0, 1))
    sums = einsum(vectors, same, "batch demo d, batch demo label -> label d")
    means = sums / same.sum(dim=(0, 1))[:, None]
    return vectors - einsum(same, means, "batch demo label, label d -> batch demo d")


def _unit(vectors: Float[Tensor, "*more demo d_model"]) -> Float[Tensor, "*more demo d_model"]:
    """Return vectors of length 1. A vector of 0 stays 0, so that its cosines are 0."""
    return torch.nn.functional.normalize(vectors, dim=-1)


def _cosines(
    units: Float[Tensor, "batch demo d_model"],
    same: Float[Tensor, "batch demo label"],
    *,
    split: bool,
) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Yield mean cosines of two prompts and where there are any: any, same, different labels.

    The cosines of all pairs of two prompts' vectors add up to the product of the vectors' sums.
    So they need not be held one by one.
    """
    by_label = einsum(units, same, "batch demo d, batch demo label -> batch label d")
    per_label = same.sum(dim=1)
    # A vector is not paired with itself.
    itself = torch.diag(units.square().sum(dim=(1, 2)))
    count_itself = torch.diag(torch.full((len(units),), float(units.shape[1]))).double()
    whole = by_label.sum(dim=1)
    total = whole @ whole.T - itself
    n_total = per_label.sum(dim=1).outer(per_label.sum(dim=1)) - count_itself
    equal = einsum(by_label, by_label, "i label d, j label d -> i j") - itself
    n_alike = per_label @ per_label.T - count_itself
    kinds = {"any": (total, n_total)}
    if split:
        kinds |= {"same": (equal, n_alike), "different": (total - equal, n_total - n_alike)}
    for name, (cosines, count) in kinds.items():
        present: Bool[Tensor, "batch batch"] = count > 0.5
        yield name, (cosines / count.clamp(min=1)).numpy(), present.numpy()


def _comparisons(rules: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """Return the pairs of prompts that each comparison is over."""
    equal = rules[:, None] == rules[None, :]
    itself = np.eye(len(rules), dtype=bool)
    return [(_WITHIN, itself), (_ONE_RULE, equal & ~itself), (_ACROSS, ~equal)]


def pairs_interval(cosines: np.ndarray, mask: np.ndarray) -> tuple[float, float]:
    """Return the 95% interval of the mean over masked pairs of prompts, prompts being random.

    Student's interval of the jackknife: every prompt is left out once, with all its pairs. NaN
    where no pair is left without some prompt. Source: Arvesen (1969), Annals of Mathematical
    Statistics 40, 2076-2100.
    """
    involved = (mask | mask.T).any(axis=1)
    masked, pairs = cosines * mask, mask.astype(float)
    own, own_pairs = (x.sum(axis=0) + x.sum(axis=1) - np.diag(x) for x in (masked, pairs))
    left = (pairs.sum() - own_pairs)[involved]
    if not (left > 0).all():
        return float("nan"), float("nan")
    n = int(involved.sum())
    without = (masked.sum() - own)[involved] / left
    return mean_interval(n * masked.sum() / pairs.sum() - (n - 1) * without)
