"""Where a network that learned several representations selects one: probes, and patching.

The best predictor is known exactly: ridge regression on every Phi, weighted by how probable each
is given the examples. So a prompt's prediction has two parts that can move alone: the probabilities
(selection) and the regressions. Residuals of another prompt move either, or both. The rival is a
network that selects nothing, and does one regression on all Phi side by side. Ours.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from spade_lens.stats.intervals import coefficient_intervals, mean_interval
from spade_lens.studies.in_context.probes import probe_errors
from spade_lens.studies.in_context.validation import (
    ORDER,
    distance_row,
    patched_prediction,
    score_row,
    with_labels,
)
from spade_lens.training.in_context.baselines import bayes_mixture, ridge_on_all
from spade_lens.training.in_context.network import InContextNetwork
from spade_lens.training.in_context.task import Drawn

MOVES = ("selection", "regressions", "both", "ridge on all Phi")


def selection_table(
    networks: Mapping[str, InContextNetwork],
    fitted_on: Drawn,
    tested_on: Drawn,
    *,
    layers: Sequence[int] | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """Return where every regression can be read, and where the selection is moved by patching.

    Args:
        networks: Networks by name, ``"trained"`` among them. That one is patched.
        fitted_on: Prompts that probes are fitted on.
        tested_on: Others, which are patched too.
        layers: Layers; all by default.
        seed: Of the prompts that residuals are taken from.

    Returns:
        The columns ``method``, ``truth``, ``layer``, ``measure``, ``score`` with the ends of its
        interval over prompts, and ``n``.

    Raises:
        ValueError: If the task has one representation, or is no supervised one.
    """
    task = networks["trained"].task
    if task.form != "supervised" or task.representations < 2:
        raise ValueError(
            f"A {task.form} task of {task.representations} representations was given; expected a "
            "supervised one of two or more, or there is nothing to select."
        )
    several = range(networks["trained"].size.n_layers + 1) if layers is None else layers
    rows = nearest_predictor(networks["trained"], tested_on)
    rows += unused_regressions(networks, fitted_on, tested_on, several)
    rows += selection_patching(networks["trained"], tested_on, several, seed=seed)
    return pd.DataFrame(rows)[ORDER]


@torch.no_grad()
def nearest_predictor(network: InContextNetwork, drawn: Drawn) -> list[dict[str, Any]]:
    """Return rows on how far the prediction at the last input is from what is exact.

    The mean squared distance over the variance of what is held against.

    Args:
        network: The network.
        drawn: The prompts.
    """
    read = network(drawn)[:, -1, 0].double()
    known = {
        "Bayes mixture": bayes_mixture(network.task, drawn)[0],
        "ridge on all Phi": ridge_on_all(network.task, drawn),
    }
    rows: list[dict[str, Any]] = []
    for name, predictions in known.items():
        row = distance_row(name, read, predictions[:, -1, 0], network.size.n_layers)
        rows.append({"method": "the whole network"} | row)
    return rows


def unused_regressions(
    networks: Mapping[str, InContextNetwork],
    fitted_on: Drawn,
    tested_on: Drawn,
    layers: Sequence[int],
) -> list[dict[str, Any]]:
    """Return rows on probes of the ridge prediction on a Phi that is not the prompt's own.

    On its own Phi the prediction is nearly the target. So only prompts of another Phi tell whether
    the regression on this one is there to be selected. Errors are means over the Phi.

    Args:
        networks: Networks by name.
        fitted_on: Prompts that probes are fitted on.
        tested_on: Others.
        layers: Layers to read at.
    """
    rows: list[dict[str, Any]] = []
    for name, network in networks.items():
        task = network.task
        sides = []
        for drawn in (fitted_on, tested_on):
            known = bayes_mixture(task, drawn)[2]
            sides.append((drawn, known, network.residuals(drawn)))
        later = range(fitted_on.inputs.shape[1] // 2, fitted_on.inputs.shape[1])
        at = [task.x_positions[i] for i in later]
        for layer in layers:
            errors = np.full((len(tested_on), task.representations), np.nan)
            for k in range(task.representations):
                parts = []
                for drawn, known, stream in sides:
                    others = drawn.which != k
                    parts += [stream[layer][others][:, at], known[others][:, list(later), k]]
                errors[(tested_on.which != k).numpy(), k] = probe_errors(*parts)
            of_prompt = np.nanmean(errors, axis=1)
            about = {"method": f"probe, {name}", "truth": "prediction on another Phi"}
            score = score_row(float(of_prompt.mean()), mean_interval(of_prompt), len(of_prompt))
            rows.append({**about, "layer": layer, "measure": "normalised error", **score})
    return rows


@torch.no_grad()
def selection_patching(
    network: InContextNetwork, drawn: Drawn, layers: Sequence[int], *, seed: int = 0
) -> list[dict[str, Any]]:
    """Return rows on residuals of another prompt: the same inputs, another Phi and another w.

    Least squares explain how far the prediction moves by what would move if the selection alone
    were the other prompt's (*selection*), the regressions alone (*regressions*), or all (*both*),
    and by what one regression on all Phi would move. A weight of 1 beside three of 0 says that
    exactly this moved.

    Args:
        network: The network, of a task of several representations.
        drawn: The prompts that are patched.
        layers: Layers to patch at.
        seed: Of the other prompts.
    """
    task = network.task
    other = another_phi(network, drawn, seed)
    moves = exact_moves(network, drawn, other)
    own, of_other = network.residuals(drawn), network.residuals(other)
    last = task.x_positions[drawn.inputs.shape[1] - 1]
    full = network.predict(own[-1][:, last])[:, 0].double()
    places = {
        "y-tokens": [p for p in task.y_positions if p < last],
        "x-tokens": [p for p in task.x_positions if p < last],
        "the query": [last],
    }
    rows: list[dict[str, Any]] = []
    for layer in layers:
        for name, positions in places.items():
            patched = (own[layer], of_other[layer], positions)
            moved = patched_prediction(network, layer, *patched, last) - full
            fitted = coefficient_intervals(moves.numpy(), moved.numpy())
            for move, (weight, low, high) in zip(MOVES, fitted, strict=True):
                about = {"method": f"patch {name}", "truth": move, "measure": "weight"}
                score = score_row(weight, (low, high), len(drawn))
                rows.append({**about, "layer": layer, **score})
    return rows


def another_phi(network: InContextNetwork, drawn: Drawn, seed: int) -> Drawn:
    """Return prompts of the same inputs, each with another Phi and a random prompt's weights."""
    task, n = network.task, len(drawn)
    generator = torch.Generator().manual_seed(seed)
    step = torch.randint(1, task.representations, (n,), generator=generator)
    which = (drawn.which + step) % task.representations
    weights = drawn.weights[torch.randperm(n, generator=generator)]
    return with_labels(task, drawn, weights, which, generator)


def exact_moves(
    network: InContextNetwork, drawn: Drawn, other: Drawn
) -> Float[Tensor, "prompt move"]:
    """Return how far the exact prediction at the last input moves, for each of :data:`MOVES`."""
    sides = [bayes_mixture(network.task, prompts)[1:] for prompts in (drawn, other)]
    (p, f), (p_other, f_other) = ((a[:, -1], b[:, -1, :, 0]) for a, b in sides)
    at = [(p_other * f).sum(-1), (p * f_other).sum(-1), (p_other * f_other).sum(-1)]
    moves = torch.stack(at, dim=-1) - (p * f).sum(-1, keepdim=True)
    on_all = [ridge_on_all(network.task, prompts)[:, -1, 0] for prompts in (drawn, other)]
    return torch.cat([moves, (on_all[1] - on_all[0])[:, None]], dim=-1)
