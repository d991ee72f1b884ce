"""Demixed PCA of rule vectors: how much rule, label and demonstration index each explain.

Every rule vector has a rule, a label and the index of its demonstration; the vectors of one
combination are a *cell*. The mean of every cell is split into parts that depend on one factor or
interaction each (a marginalisation, as in an analysis of variance). For each part a few components
are found that predict it from the whole: a reduced-rank regression of the part on the whole.

Source: Kobak et al., "Demixed principal component analysis of neural population data" (eLife
2016). Ours: the factors, every cell counting the same, interactions kept apart, and a held-out
fraction. The package ``dPCA`` needs numba and numexpr, and takes whole cells only. This module
knows tensors, and does not run a model.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, product

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from spade_lens.checks import checked
from spade_lens.icl.geometry.convergence import check_shape
from spade_lens.icl.vectors import RuleVectors, VectorsLike, as_rule_vectors
from spade_lens.stats.intervals import shuffled_interval

FACTORS = ("rule", "label", "demo")


def marginalise(
    cells: Float[Tensor, "*factors d_model"], factors: Sequence[str] = FACTORS
) -> dict[str, Float[Tensor, "*factors d_model"]]:
    """Split an array of means into parts that depend on one factor or interaction each.

    The parts and the overall mean add up to the array. Their sums of squares add up to that of
    the array without its mean.

    Example:
        >>> parts = marginalise(torch.randn(2, 3, 5), ["rule", "label"])
        >>> list(parts)
        ['rule', 'label', 'rule x label']

    Returns:
        The parts by name; factors first, then interactions. Factors of a single value are left
        out, because nothing depends on them.
    """
    if len(factors) != cells.ndim - 1:
        raise ValueError(
            f"{len(factors)} factors {list(factors)} were named for an array of shape "
            f"{tuple(cells.shape)}; expected one for each axis but the last."
        )
    axes = range(len(factors))
    parts: dict[tuple[int, ...], Tensor] = {(): cells.mean(dim=tuple(axes), keepdim=True)}
    named = {}
    for size in range(1, len(factors) + 1):
        for kept in combinations(axes, size):
            others = tuple(a for a in axes if a not in kept)
            mean = cells.mean(dim=others, keepdim=True) if others else cells
            within = [p for axes_of, p in parts.items() if set(axes_of) < set(kept)]
            parts[kept] = mean - sum(within[1:], within[0])
            if all(cells.shape[a] > 1 for a in kept):
                named[" x ".join(factors[a] for a in kept)] = parts[kept].expand_as(cells)
    return named


@dataclass(frozen=True, eq=False)
class Demixed:
    """Components of demixed PCA. Fractions are of the variance of the cells' means.

    Args:
        mean: The mean of the cells, which is subtracted before anything else.
        fraction: By part, the fraction of the variance that it has; they add up to 1.
        decoders: By part, the directions onto which vectors are projected.
        encoders: By part, orthonormal directions that reconstruct the part from projections.
        explained: By part, the fraction of the whole that each component reconstructs on its own.
    """

    mean: Float[Tensor, " d_model"]
    fraction: Mapping[str, float]
    decoders: Mapping[str, Float[Tensor, "component d_model"]]
    encoders: Mapping[str, Float[Tensor, "component d_model"]]
    explained: Mapping[str, Float[Tensor, " component"]]

    def project(
        self, vectors: Float[Tensor, "*batch d_model"], part: str
    ) -> Float[Tensor, "*batch component"]:
        """Project vectors onto the components of a part."""
        if part not in self.decoders:
            raise ValueError(f"There is no part {part!r}; expected one of {list(self.decoders)}.")
        return (vectors.to(self.mean) - self.mean) @ self.decoders[part].T


def demixed_pca(
    vectors: Float[Tensor, "batch demo d_model"],
    *,
    rule: Int[Tensor, " batch"],
    label: Int[Tensor, "batch demo"],
    components: int = 2,
    ridge: float = 1e-3,
) -> Demixed:
    """Find components of rule, label, demonstration index and their interactions, of one layer.

    No part gets more components than the rank that it can have. ``ridge`` is the penalty on
    decoders, as a fraction of the whole variance. The noise of vectors around their cell's mean
    penalises decoders as well.

    Example:
        >>> rule, label = torch.arange(8) % 2, torch.arange(8)[:, None] // 2 % 2
        >>> label = (label + torch.arange(4)) % 2
        >>> demixed = demixed_pca(torch.randn(8, 4, 16), rule=rule, label=label)
        >>> demixed.encoders["rule"].shape
        torch.Size([1, 16])
    """
    check_shape("rule", rule, (len(vectors),))
    check_shape("label", label, tuple(vectors.shape[:2]))
    if components < 1 or ridge < 0:
        raise ValueError(
            f"components={components} and ridge={ridge} were given; expected at least 1 and at "
            "least 0."
        )
    x = vectors.detach().cpu().double()
    cell, shape = cells_of(rule, label)
    means = cell_means(x, cell, shape)
    mean = means.flatten(0, -2).mean(dim=0)
    whole = (means - mean).flatten(0, -2)  # [cell d_model]
    variance = whole.square().sum()
    if not variance > 0:
        raise ValueError("All cells have one mean, so there is no variance to explain.")
    noise = (x - means.flatten(0, -2)[cell]).flatten(0, 1)
    # Every cell counts the same, however many vectors it has.
    weight = 1 / cell.flatten().bincount()[cell.flatten()].double()
    gram = whole.T @ whole + (noise * weight[:, None]).T @ noise
    gram.diagonal().add_((ridge + 1e-12) * variance)
    solved = torch.linalg.solve(gram, whole.T)  # [d_model cell]
    # The penalties are rows of the regression too, with 0 to predict. The best encoders are the
    # principal axes of what the full-rank regression predicts for all rows: of part.T @ hat @ part.
    hat, axes = torch.linalg.eigh(whole @ solved)
    root = hat.clamp(min=0).sqrt()[:, None] * axes.T
    fraction, decoders, encoders, explained = {}, {}, {}, {}
    for name, part in marginalise(means).items():
        flat = part.flatten(0, -2)
        fraction[name] = float(flat.square().sum() / variance)
        n = min(components, _rank(shape, name), x.shape[-1])
        encoder = torch.linalg.svd(root @ flat, full_matrices=False).Vh[:n]
        encoders[name] = encoder
        decoders[name] = encoder @ flat.T @ solved.T
        readings = whole @ decoders[name].T  # [cell component]
        left = [(whole - readings[:, k : k + 1] * encoder[k]).square().sum() for k in range(n)]
        explained[name] = 1 - torch.stack(left) / variance
    return Demixed(mean, fraction, decoders, encoders, explained)


@checked
def factor_variance(
    vectors: VectorsLike,
    *,
    rule: Int[Tensor, " batch"] | None = None,
    label: Int[Tensor, "batch demo"] | None = None,
    shuffles: int = 39,
    splits: int = 10,
    seed: int = 0,
) -> pd.DataFrame:
    """Compute which fraction of the variance each factor and interaction has, by layer.

    Example:
        >>> rule = torch.arange(16) % 2
        >>> label = (torch.arange(16)[:, None] // 2 + torch.arange(2)) % 2
        >>> frame = icl.factor_variance(torch.randn(1, 16, 2, 8), rule=rule, label=label)
        >>> f"{frame['fraction'].sum():.3f}"
        '1.000'

    Args:
        vectors: The rule vectors.
        rule: The rule of every prompt; by default as the vectors know it.
        label: The label of every demonstration; by default as the vectors know it.
        shuffles: How often vectors are permuted for the control: rules among prompts, and
            vectors among each prompt's demonstrations. 0 leaves it out.
        splits: How often prompts are halved for the held-out fraction; 0 leaves it out.
        seed: Seed of shuffles and halves.

    Returns:
        One row for every layer and part (``"rest"`` is the variance within cells): ``layer,
        factor, fraction`` of the whole variance, every cell counting the same;
        ``control``, the mean fraction of the shuffles, with the ends ``control_low`` and
        ``control_high`` of their 95% interval, which takes 39 shuffles; and ``held_out``, the
        fraction on which two halves of the prompts agree. Noise raises ``fraction`` as it raises
        ``control``, but not ``held_out``, which may fall below 0.

    Raises:
        TypeError: If ``vectors`` is neither rule vectors nor a tensor.
        ValueError: If shapes do not fit together, a cell has no vector, or there are too few
            prompts to halve them.
    """
    vectors = as_rule_vectors(vectors)
    rule, label = known_classes(vectors, rule, label)
    cell, shape = cells_of(rule, label)
    rng = np.random.default_rng(seed)
    halves = [halve(rule, cell, shape, rng) for _ in range(splits)]
    permuted = [_permuted(rule, label, rng) for _ in range(shuffles)]
    rows = []
    for layer, at_layer in zip(vectors.layers, vectors.tensor, strict=True):
        x = at_layer.detach().cpu().double()
        fractions = _fractions(x, cell, shape)
        null = [
            _fractions(x.take_along_dim(order[..., None], 1), c, shape) for c, order in permuted
        ]
        held = [_held_out(x, cell, shape, half) for half in halves]
        for factor, value in fractions.items():
            row: dict[str, object] = {"layer": layer, "factor": factor, "fraction": value}
            if null:
                controls = [n[factor] for n in null]
                low, high = shuffled_interval(np.array(controls))
                row |= {"control": np.mean(controls), "control_low": low, "control_high": high}
            if held:
                agreed = [h[factor] for h in held if factor in h]
                row["held_out"] = float(np.mean(agreed)) if agreed else float("nan")
            rows.append(row)
    return pd.DataFrame(rows)


def known_classes(
    vectors: RuleVectors, rule: Tensor | None, label: Tensor | None
) -> tuple[Int[Tensor, " batch"], Int[Tensor, "batch demo"]]:
    """Return rules and labels as they are given or, if they are not, as the vectors know them."""
    rule = vectors.rule_numbers if rule is None else rule
    label = vectors.labels if label is None else label
    if rule is None or label is None:
        raise ValueError(
            f"{vectors} do not know their {'rules' if rule is None else 'labels'}. Give rule= and "
            "label=, or take the vectors of a rule task's episodes."
        )
    check_shape("rule", rule, vectors.shape[1:2])
    check_shape("label", label, vectors.shape[1:3])
    return rule, label


def cells_of(
    rule: Int[Tensor, " batch"], label: Int[Tensor, "batch demo"]
) -> tuple[Int[Tensor, "batch demo"], tuple[int, int, int]]:
    """Return the number of every vector's cell, and how many rules, labels and demonstrations."""
    rules, of_rule = rule.cpu().unique(return_inverse=True)
    labels, of_label = label.cpu().unique(return_inverse=True)
    n_demos = label.shape[1]
    shape = (len(rules), len(labels), n_demos)
    cell = (of_rule[:, None] * len(labels) + of_label) * n_demos + torch.arange(n_demos)
    count = cell.flatten().bincount(minlength=int(np.prod(shape)))
    if (count == 0).any():
        every = list(product(rules.tolist(), labels.tolist(), range(n_demos)))
        empty = [every[i] for i in (count == 0).nonzero()[:, 0].tolist()]
        raise ValueError(
            f"{len(empty)} of {len(every)} combinations of rule, label and demonstration have no "
            f"vector, {empty[0]} among them. Give more prompts, or balance labels over positions."
        )
    return cell, shape


def cell_means(
    x: Float[Tensor, "batch demo d_model"],
    cell: Int[Tensor, "batch demo"],
    shape: tuple[int, int, int],
) -> Float[Tensor, "rule label demo d_model"]:
    """Return the mean of every cell's vectors."""
    flat, number = x.flatten(0, 1), cell.flatten()
    n = int(np.prod(shape))
    sums = flat.new_zeros(n, flat.shape[-1]).index_add_(0, number, flat)
    return (sums / number.bincount(minlength=n)[:, None]).unflatten(0, shape)


def _fractions(
    x: Float[Tensor, "batch demo d_model"],
    cell: Int[Tensor, "batch demo"],
    shape: tuple[int, int, int],
) -> dict[str, float]:
    """Return fractions of the whole variance, within cells included; they add up to 1."""
    means = cell_means(x, cell, shape)
    n = int(np.prod(shape))
    parts = {k: float(p.square().sum()) / n for k, p in marginalise(means).items()}
    noise = (x - means.flatten(0, -2)[cell]).square().sum(dim=-1)
    parts["rest"] = float(cell_means(noise[..., None], cell, shape).mean())
    whole = sum(parts.values())
    return {k: v / whole if whole else 0.0 for k, v in parts.items()}


def _held_out(
    x: Float[Tensor, "batch demo d_model"],
    cell: Int[Tensor, "batch demo"],
    shape: tuple[int, int, int],
    half: Int[Tensor, " prompt"],
) -> dict[str, float]:
    """Return the fraction of the whole variance on which two halves of the prompts agree.

    Their noise is independent, so it cancels in the mean of the products of their parts.
    """
    rest = torch.ones(len(x), dtype=torch.bool)
    rest[half] = False
    one, other = (cell_means(x[part], cell[part], shape) for part in (half, rest))
    means = cell_means(x, cell, shape)
    n = int(np.prod(shape))
    noise = (x - means.flatten(0, -2)[cell]).square().sum(dim=-1)
    between = (means - means.flatten(0, -2).mean(dim=0)).square().sum() / n
    whole = float(between + cell_means(noise[..., None], cell, shape).mean())
    parts, others = marginalise(one), marginalise(other)
    return {k: float((p * others[k]).sum()) / n / (whole or 1.0) for k, p in parts.items()}


def halve(
    rule: Int[Tensor, " batch"],
    cell: Int[Tensor, "batch demo"],
    shape: tuple[int, int, int],
    rng: np.random.Generator,
) -> Int[Tensor, " prompt"]:
    """Draw half of each rule's prompts, such that both halves have vectors of every cell."""
    rules = rule.cpu().numpy()
    n = int(np.prod(shape))
    for _ in range(100):
        chosen: list[int] = []
        for value in np.unique(rules):
            members = rng.permutation(np.flatnonzero(rules == value))
            chosen += members[: len(members) // 2].tolist()
        half = torch.tensor(sorted(chosen), dtype=torch.long)
        rest = torch.tensor(sorted(set(range(len(rules))) - set(chosen)), dtype=torch.long)
        counts = [cell[part].flatten().bincount(minlength=n) for part in (half, rest)]
        if all((c > 0).all() for c in counts):
            return half
    raise ValueError(
        f"{len(rules)} prompts are too few to halve: one half always lacks some of the {n} "
        "combinations of rule, label and demonstration. Give more prompts, or splits=0."
    )


def _permuted(
    rule: Int[Tensor, " batch"], label: Int[Tensor, "batch demo"], rng: np.random.Generator
) -> tuple[Int[Tensor, "batch demo"], Int[Tensor, "batch demo"]]:
    """Return cells with rules permuted among prompts, and an order of each prompt's vectors.

    Labels move with the rules, so that no cell is empty.
    """
    to = torch.as_tensor(rng.permutation(len(rule)))
    cell, _ = cells_of(rule[to], label[to])
    order = rng.permuted(np.tile(np.arange(label.shape[1]), (len(rule), 1)), axis=1)
    return cell, torch.as_tensor(order)


def _rank(shape: tuple[int, int, int], part: str) -> int:
    """Return the rank that a part can have: the degrees of freedom of its factors."""
    sizes = dict(zip(FACTORS, shape, strict=True))
    return int(np.prod([sizes[f] - 1 for f in part.split(" x ")]))
