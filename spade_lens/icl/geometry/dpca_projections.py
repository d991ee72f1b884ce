"""Rule vectors projected onto components of demixed PCA, to see what the components separate.

Components are chosen to separate rules, labels or demonstrations of the vectors that they were
fitted on. With more coordinates than vectors they do so even in noise. So they are fitted on one
half of the prompts, and the other half is projected. This module knows tensors, and does not run a
model.
"""

from collections.abc import Sequence
from itertools import combinations

import numpy as np
import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor

from spade_lens.checks import checked
from spade_lens.icl.geometry.dpca import (
    FACTORS,
    cell_means,
    cells_of,
    demixed_pca,
    halve,
    known_classes,
    marginalise,
)
from spade_lens.icl.vectors import VectorsLike, as_rule_vectors


@checked
def factor_projections(
    vectors: VectorsLike,
    *,
    rule: Int[Tensor, " batch"] | None = None,
    label: Int[Tensor, "batch demo"] | None = None,
    parts: Sequence[str] = FACTORS,
    ridge: float = 1e-3,
    seed: int = 0,
) -> pd.DataFrame:
    """Project half of the prompts' vectors onto components fitted on the other half.

    Example:
        >>> rule = torch.arange(16) % 2
        >>> label = (torch.arange(16)[:, None] // 2 + torch.arange(2)) % 2
        >>> frame = factor_projections(torch.randn(1, 16, 2, 8), rule=rule, label=label)
        >>> frame["factor"].unique().tolist(), len(frame)  # three factors, half of 32 vectors
        (['rule', 'label', 'demo'], 48)

    Args:
        vectors: The rule vectors.
        rule: The rule of every prompt; by default as the vectors know it.
        label: The label of every demonstration; by default as the vectors know it.
        parts: The factors and interactions, such as ``"rule x label"``, whose first component is
            taken. Those of a factor with one value are left out.
        ridge: As in :func:`demixed_pca`.
        seed: Seed of the halves, which are the same at all layers.

    Returns:
        One row for every layer, part, and demonstration of the prompts projected: ``layer,
        factor, prompt, demo, rule, label, value``. The sign is such that on the fitted half the
        first rule, label or demonstration (of an interaction, the first of each together) lies
        below 0.
    """
    vectors = as_rule_vectors(vectors)
    rule, label = known_classes(vectors, rule, label)
    every = [" x ".join(p) for size in (1, 2, 3) for p in combinations(FACTORS, size)]
    unknown = [part for part in parts if part not in every]
    if unknown or not len(parts):
        raise ValueError(f"parts={list(parts)} was given; expected some of {every}.")
    cell, shape = cells_of(rule, label)
    fitted = halve(rule, cell, shape, np.random.default_rng(seed))
    held = torch.ones(len(rule), dtype=torch.bool)
    held[fitted] = False
    shown = held.nonzero()[:, 0]
    n_demos = label.shape[1]
    about = {
        "prompt": np.repeat(shown.numpy(), n_demos),
        "demo": np.tile(np.arange(n_demos), len(shown)),
        "rule": np.repeat(rule.cpu()[shown].numpy(), n_demos),
        "label": label.cpu()[shown].flatten().numpy(),
    }
    frames = []
    for layer, at_layer in zip(vectors.layers, vectors.tensor, strict=True):
        x = at_layer.detach().cpu().double()
        demixed = demixed_pca(
            x[fitted], rule=rule[fitted], label=label[fitted], components=1, ridge=ridge
        )
        means = marginalise(cell_means(x[fitted], cell[fitted], shape))
        for part in parts:
            if part not in means:
                continue
            value = demixed.project(x[shown], part)[..., 0].flatten()
            first = means[part][0, 0, 0] @ demixed.decoders[part][0]
            value = -value if first > 0 else value
            frames.append(
                pd.DataFrame({"layer": layer, "factor": part, **about, "value": value.numpy()})
            )
    return pd.concat(frames, ignore_index=True)
