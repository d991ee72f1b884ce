"""How good a lens is on text that it was not fitted on, beside the logit lens and SPADE itself."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from spade_lens.lenses.fitting.rows import Rows
from spade_lens.lenses.linear import LinearLens
from spade_lens.models.model import Model
from spade_lens.settings import limits, progress_bar


@torch.no_grad()
def held_out_figures(lens: LinearLens, rows: Rows, layers: Sequence[int]) -> list[dict[str, Any]]:
    """Return the records of :attr:`LinearLens.held_out`, of rows that it was not fitted on."""
    model, n_rows = lens.model, len(rows.model)
    names = [lens.name, "logit lens", "SPADE"]
    sums = torch.zeros(len(layers), len(names), 2, 2, dtype=torch.float64)
    at_once = limits(model).rows(3 * 4 * model.d_vocab)  # of each lens and of two references
    parts = range(0, n_rows, at_once)
    with progress_bar(total=len(parts) * len(layers), desc="held-out figures", model=model) as bar:
        for first in parts:
            part = slice(first, first + at_once)
            of_model = log_probs(model, rows.model[part])
            for i, layer in enumerate(layers):
                start, spade = rows.start[i, part], log_probs(model, rows.target[i, part])
                read = [log_probs(model, lens.at(start, layer)), log_probs(model, start), spade]
                for n, logprobs in enumerate(read):
                    sums[i, n, 0] += _compare(of_model, logprobs)
                    sums[i, n, 1] += _compare(spade, logprobs)
                bar.update()
    means = (sums / n_rows).tolist()
    return [
        {
            "layer": layer,
            "lens": name,
            "kl_to_model": to_model[0],
            "agrees_with_model": to_model[1],
            "kl_to_spade": to_spade[0],
            "agrees_with_spade": to_spade[1],
            "n": n_rows,
        }
        for layer, by_lens in zip(layers, means, strict=True)
        for name, (to_model, to_spade) in zip(names, by_lens, strict=True)
    ]


def log_probs(model: Model, resid: Float[Tensor, "row d_model"]) -> Float[Tensor, "row d_vocab"]:
    """Return the log-probabilities over the vocabulary that residuals stand for."""
    return model.logits(resid).log_softmax(dim=-1)


def _compare(
    reference: Float[Tensor, "row d_vocab"], read: Float[Tensor, "row d_vocab"]
) -> Float[Tensor, " 2"]:
    """Return sums over rows: of KL(reference || read), and of equal top tokens."""
    kl = torch.linalg.vecdot(reference.exp(), reference - read).clamp(min=0)
    agrees = reference.argmax(dim=-1) == read.argmax(dim=-1)
    return torch.stack([kl.double().sum(), agrees.double().sum()]).cpu()
