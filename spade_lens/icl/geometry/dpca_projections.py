"""Rule vectors on the components of demixed PCA, for a look at what the components tell apart.

Components are chosen so that they tell rules, labels or demonstrations apart on the vectors that
they were found on, and with more coordinates than vectors they do so even in noise. So they are
found on one half of the prompts, and the other half is projected. This module knows tensors,
nothing of models.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from spade_lens.icl.geometry.convergence import check_layer_names, check_shape
from spade_lens.icl.geometry.dpca import (
    FACTORS,
    cell_means,
    cells_of,
    demixed_pca,
    halve,
    marginalise,
)


def factor_projections(
    vectors: Float[Tensor, "layer batch demo d_model"],
    *,
    rule: Int[Tensor, " batch"],
    label: Int[Tensor, "batch demo"],
    layers: Sequence[int] | None = None,
    parts: Sequence[str] = FACTORS,
    ridge: float = 1e-3,
    seed: int = 0,
) -> pd.DataFrame:
    """Vectors of half of the prompts along the first components that the other half gives.

    Example:
        >>> rule = torch.arange(16) % 2
        >>> label = (torch.arange(16)[:, None] // 2 + torch.arange(2)) % 2
        >>> frame = icl.factor_projections(torch.randn(1, 16, 2, 8), rule=rule, label=label)
        >>> frame["factor"].unique().tolist(), len(frame)  # three factors, half of 32 vectors
        (['rule', 'label', 'demo'], 48)

    Args:
        vectors: The rule vectors.
        rule: The rule of every prompt.
        label: The label of every demonstration.
        layers: The layers that ``vectors`` are of, for the table; 0, 1, 2, ... by default.
        parts: The factors and interactions, such as ``"rule x label"``, whose first component is
            taken. Those of a factor with one value are left out.
        ridge: As in :func:`demixed_pca`.
        seed: Seed of the halves, which are the same at all layers.

    Returns:
        One row for every layer, part, and demonstration of the prompts projected: ``layer,
        factor, prompt, demo, rule, label, value``. The sign is such that on the half that the
        component was found on, the first rule, label or demonstration (of an interaction, the
        first of each together) lies below 0.

    Raises:
        ValueError: If shapes do not fit together, a cell has no vector, there are too few prompts
            to halve them, or there is no such part.
    """
    layers = check_layer_names(layers, len(vectors))
    check_shape("rule", rule, (vectors.shape[1],))
    check_shape("label", label, tuple(vectors.shape[1:3]))
    every = [" x ".join(p) for p in (*((f,) for f in FACTORS), *_PAIRS, FACTORS)]
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
    for layer, at_layer in zip(layers, vectors, strict=True):
        x = at_layer.detach().cpu().double()
        found = demixed_pca(
            x[fitted], rule=rule[fitted], label=label[fitted], components=1, ridge=ridge
        )
        means = marginalise(cell_means(x[fitted], cell[fitted], shape))
        for part in parts:
            if part not in means:
                continue
            value = found.project(x[shown], part)[..., 0].flatten()
            first = means[part][0, 0, 0] @ found.decoders[part][0]
            value = -value if first > 0 else value
            frames.append(
                pd.DataFrame({"layer": layer, "factor": part, **about, "value": value.numpy()})
            )
    return pd.concat(frames, ignore_index=True)


_PAIRS = (("rule", "label"), ("rule", "demo"), ("label", "demo"))
