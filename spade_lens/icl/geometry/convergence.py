"""How alike rule vectors are: within a prompt, across prompts of one rule, across rules.

Rule vectors are the residuals at the demonstrations' labels, by layer. If they converge to a
vector of the rule, their likeness within a rule grows with the layer and exceeds that across
rules. All vectors of a layer share a large common part, which makes any two alike; so a mean is
taken off first (``center``). Where that is the mean of two tasks, those of one look the more alike
the further the tasks part; the control for it are prompts of the same words without the rule, and
their mean. Two vectors at the same label word are alike because of that word; so pairs of the same
and of different labels are told apart. All of this is ours. This module knows tensors, nothing of
models.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

_WITHIN, _ONE_RULE, _ACROSS = "within a prompt", "prompts of one rule", "across rules"


def convergence(
    vectors: Float[Tensor, "layer batch demo d_model"],
    *,
    rule: Int[Tensor, " batch"] | None = None,
    label: Int[Tensor, "batch demo"] | None = None,
    layers: Sequence[int] | None = None,
    center: str | Float[Tensor, "layer d_model"] = "all",
    shuffles: int = 20,
    samples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> pd.DataFrame:
    """Mean cosine similarity of rule vectors by layer, for pairs that share more or less.

    Example:
        >>> vectors = torch.randn(3, 8, 4, 16)  # [layer batch demo d_model]
        >>> rule = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
        >>> frame = icl.convergence(vectors, rule=rule)
        >>> frame["comparison"].unique().tolist()
        ['within a prompt', 'prompts of one rule', 'across rules']

    Args:
        vectors: The rule vectors.
        rule: The rule of every prompt, as any integer; by default all have one.
        label: The label of every demonstration, as any integer.
        layers: The layers that ``vectors`` are of, for the table; 0, 1, 2, ... by default.
        center: What is taken off every vector, by layer: ``"all"``, the mean of all vectors;
            ``"label"``, that of the vectors with its label; ``"none"``, nothing; or a vector for
            every layer, such as the mean of vectors without a rule. Ours.
        shuffles: How often rules are dealt out anew among the prompts, for the control.
        samples: How often prompts are drawn with replacement, for the intervals.
        confidence: Of the intervals.
        seed: Seed of both.

    Returns:
        One row for every layer, comparison and kind of pair: ``layer, comparison`` (see the
        example), ``labels`` (``"any"``, and with ``label`` also ``"same"`` and ``"different"``),
        ``control``, ``mean`` (of the means of all pairs of prompts), ``low``, ``high`` and
        ``n``, the number of prompts. Rows without any pair are left out. In a control's row
        rules are shuffled: mean and interval are those of its shuffles.

    Raises:
        ValueError: If shapes do not fit together, ``center`` is none of these, or it is
            ``"label"`` and there are no labels.
    """
    n_layers, n_prompts, n_demos, _ = vectors.shape
    layers = check_layer_names(layers, n_layers)
    check_center(center, vectors, label)
    check_shape("rule", rule, (n_prompts,))
    check_shape("label", label, (n_prompts, n_demos))
    rules = np.zeros(n_prompts, dtype=int) if rule is None else rule.cpu().numpy()
    ids = torch.zeros(n_prompts, n_demos, dtype=torch.long) if label is None else label.cpu()
    same = torch.nn.functional.one_hot(ids.unique(return_inverse=True)[1]).double()
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(n_prompts, np.full(n_prompts, 1 / n_prompts), size=samples)
    tail = (1 - confidence) / 2
    shuffled = [rng.permutation(rules) for _ in range(shuffles if len(set(rules)) > 1 else 0)]
    rows = []
    for n, layer in enumerate(layers):
        middle = center if isinstance(center, str) else center[n].cpu().double()
        units = _unit(_centered(vectors[n].cpu().double(), same, middle))
        for labels, likeness, known in _likeness(units, same, split=label is not None):
            for comparison, mask in _comparisons(rules):
                mask = mask & known
                involved = int(mask.any(axis=1).sum())
                if not involved:
                    continue
                resampled = _mean(likeness, mask, drawn)
                # A draw may hold no such pair at all.
                low, high = np.nanquantile(resampled, [tail, 1 - tail])
                mean = float(likeness[mask].mean())
                named: dict[str, object] = {
                    "layer": layer,
                    "comparison": comparison,
                    "labels": labels,
                }
                rows.append(_row(named, False, mean, low, high, involved))
                if comparison == _WITHIN or not shuffled:
                    continue
                null = []
                for other in shuffled:
                    mask = dict(_comparisons(other))[comparison] & known
                    if mask.any():
                        null.append(likeness[mask].mean())
                if null:
                    low, high = np.quantile(null, [tail, 1 - tail])
                    rows.append(_row(named, True, float(np.mean(null)), low, high, involved))
    return pd.DataFrame(rows)


def likeness_within(
    vectors: Float[Tensor, "layer batch demo d_model"],
) -> Float[Tensor, "layer batch"]:
    """Every prompt's mean cosine similarity of two of its vectors, nothing taken off.

    Example:
        >>> icl.likeness_within(torch.ones(3, 8, 4, 16)).shape
        torch.Size([3, 8])

    Args:
        vectors: The rule vectors, of at least two demonstrations.

    Raises:
        ValueError: If there is one demonstration only.
    """
    n = vectors.shape[2]
    if n < 2:
        raise ValueError("Vectors of one demonstration were given; likeness is that of two.")
    whole = _unit(vectors.double()).sum(dim=2)
    # The square of a sum of n units is n, for each with itself, and twice what pairs have.
    return (whole.square().sum(dim=-1) - n) / (n * (n - 1))


def check_layer_names(layers: Sequence[int] | None, n: int) -> list[int]:
    """The layers that the first axis is of; 0, 1, 2, ... for None.

    Raises:
        ValueError: If there is not one for each.
    """
    if layers is None:
        return list(range(n))
    if len(layers) != n:
        raise ValueError(
            f"layers={list(layers)} names {len(layers)} layers, but the vectors are of {n}; give "
            "one for each."
        )
    return list(layers)


def check_shape(name: str, given: Tensor | None, expected: tuple[int, ...]) -> None:
    """Raise unless a tensor of ids, where given, has the vectors' shape.

    Raises:
        ValueError: If it has not.
    """
    if given is not None and tuple(given.shape) != expected:
        raise ValueError(
            f"{name} has shape {tuple(given.shape)}, but the vectors are of {expected[0]} prompts"
            + (f" of {expected[1]} demonstrations" if len(expected) > 1 else "")
            + f"; expected {expected}."
        )


def check_center(center: str | Tensor, vectors: Tensor, label: Tensor | None) -> None:
    """Raise unless ``center`` can be taken off.

    Raises:
        ValueError: If it cannot.
    """
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
        raise ValueError("center='label' takes off each label's mean. Give label= as well.")


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
    means = torch.einsum("bkd,bkl->ld", vectors, same) / same.sum(dim=(0, 1))[:, None]
    return vectors - torch.einsum("bkl,ld->bkd", same, means)


def _unit(
    vectors: Float[Tensor, "*more demo d_model"],
) -> Float[Tensor, "*more demo d_model"]:
    """Vectors of length 1; a vector of 0 stays, and is then unlike all."""
    return torch.nn.functional.normalize(vectors, dim=-1)


def _likeness(
    units: Float[Tensor, "batch demo d_model"],
    same: Float[Tensor, "batch demo label"],
    *,
    split: bool,
) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """For any, same and different labels: mean cosines of two prompts, and where there are any.

    The cosines of all pairs of two prompts' vectors add up to the product of the vectors' sums,
    so they need not be held one by one.
    """
    by_label = torch.einsum("bkd,bkl->bld", units, same)
    per_label = same.sum(dim=1)
    # A vector is not paired with itself.
    itself = torch.diag(units.square().sum(dim=(1, 2)))
    count_itself = torch.diag(torch.full((len(units),), float(units.shape[1]))).double()
    whole = by_label.sum(dim=1)
    total = whole @ whole.T - itself
    n_total = per_label.sum(dim=1).outer(per_label.sum(dim=1)) - count_itself
    alike = torch.einsum("ild,jld->ij", by_label, by_label) - itself
    n_alike = per_label @ per_label.T - count_itself
    kinds = {"any": (total, n_total)}
    if split:
        kinds |= {"same": (alike, n_alike), "different": (total - alike, n_total - n_alike)}
    for name, (cosines, count) in kinds.items():
        known: Bool[Tensor, "batch batch"] = count > 0.5
        yield name, (cosines / count.clamp(min=1)).numpy(), known.numpy()


def _comparisons(rules: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """Which pairs of prompts each comparison is over."""
    alike = rules[:, None] == rules[None, :]
    itself = np.eye(len(rules), dtype=bool)
    return [(_WITHIN, itself), (_ONE_RULE, alike & ~itself), (_ACROSS, ~alike)]


def _mean(likeness: np.ndarray, mask: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    """The mean over masked pairs of prompts, for every draw of prompts."""
    if not (mask & ~np.eye(len(mask), dtype=bool)).any():
        # Within prompts: a prompt drawn twice counts twice, not four times.
        on = np.diag(mask)
        value, weight = drawn @ (np.diag(likeness) * on), drawn @ on.astype(float)
    else:
        value = np.einsum("si,ij,sj->s", drawn, likeness * mask, drawn, optimize=True)
        weight = np.einsum("si,ij,sj->s", drawn, mask.astype(float), drawn, optimize=True)
    return np.divide(value, weight, out=np.full(len(drawn), np.nan), where=weight > 0)


def _row(
    named: dict[str, object], control: bool, mean: float, low: float, high: float, n: int
) -> dict[str, object]:
    return {**named, "control": control, "mean": mean, "low": low, "high": high, "n": n}
