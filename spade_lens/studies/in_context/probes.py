"""Linear probes: what can be read from the residual stream, by layer and kind of token.

A probe is a ridge regression with an intercept, fitted on some prompts and tested on others, on the
later half of the examples. Its error is the mean squared error over the variance of what is read: 0
is exact, and 1 is no better than the mean.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from spade_lens.stats.intervals import mean_interval
from spade_lens.training.in_context.baselines import bayes_mixture, ridge
from spade_lens.training.in_context.network import InContextNetwork
from spade_lens.training.in_context.task import Drawn, InContextTask

_PENALTY = 1e-4
"""Of the probe, per row, where residuals have variance 1."""


def quantities(task: InContextTask, drawn: Drawn) -> dict[str, dict[str, Tensor]]:
    """Return what is probed, by kind of token and name, each ``[prompt example number]``.

    At x-tokens: the input, its true representation, the target, and the Bayes prediction. At
    y-tokens: the input and representation of the token before, which can only be copies; the
    prompt's weights; and the weights of the Bayes ridge regression after this example.

    Args:
        task: The task.
        drawn: The prompts.
    """
    features, y = task.features(drawn), drawn.targets
    fitted = ridge(features, y, task.penalty)
    at_x = {"x": drawn.inputs, "Phi(x)": features, "y": y}
    at_x["Bayes prediction"] = fitted.predictions
    if task.representations > 1:
        _, probability, several = bayes_mixture(task, drawn)
        for k in range(task.representations):
            at_x[f"Phi {k}(x)"] = task.phi(drawn.inputs, k)
            at_x[f"prediction on Phi {k}"] = several[:, :, k]
        at_x["probability of Phi"] = probability
    found = {"x": {name: value.double() for name, value in at_x.items()}}
    if task.form == "dynamical":
        return found
    weights = drawn.weights.flatten(1)[:, None].expand(-1, y.shape[1], -1)
    after = fitted.weights.flatten(2)[:, 1:]  # there is none after the last example
    at_y = {"x": drawn.inputs, "Phi(x)": features, "w": weights}
    found["y"] = {name: value.double()[:, :-1] for name, value in at_y.items()}
    found["y"]["ridge weights"] = after
    return found


def probe_table(
    networks: Mapping[str, InContextNetwork],
    fitted_on: Drawn,
    tested_on: Drawn,
    *,
    layers: Sequence[int] | None = None,
) -> pd.DataFrame:
    """Return the error of every probe.

    Args:
        networks: Networks by name, such as trained and untrained.
        fitted_on: Prompts that the probes are fitted on.
        tested_on: Others.
        layers: Layers; all by default.

    Returns:
        The columns ``network``, ``place`` (the kind of token: x or y), ``quantity``, ``layer``,
        ``probe_error`` with the ends of its interval over prompts, and ``n``.
    """
    rows: list[dict[str, Any]] = []
    for name, network in networks.items():
        task, known = network.task, [quantities(network.task, d) for d in (fitted_on, tested_on)]
        streams = [network.residuals(drawn) for drawn in (fitted_on, tested_on)]
        for place, positions in (("x", task.x_positions), ("y", task.y_positions)):
            if place not in known[0]:
                continue
            count = next(iter(known[0][place].values())).shape[1]
            later = range(count // 2, count)
            at = [positions[i] for i in later]
            for layer in range(network.size.n_layers + 1) if layers is None else layers:
                fit, test = (stream[layer][:, at] for stream in streams)
                for quantity in known[0][place]:
                    own = [k[place][quantity][:, list(later)] for k in known]
                    errors = probe_errors(fit, own[0], test, own[1])
                    low, high = mean_interval(errors)
                    rows.append(
                        {"network": name, "place": place, "quantity": quantity, "layer": layer}
                        | {"probe_error": float(errors.mean()), "probe_error_low": low}
                        | {"probe_error_high": high, "n": len(errors)}
                    )
    return pd.DataFrame(rows)


def probe_errors(
    fit: Float[Tensor, "prompt example d"],
    of_fit: Float[Tensor, "prompt example number"],
    test: Float[Tensor, "other example d"],
    of_test: Float[Tensor, "other example number"],
) -> "np.ndarray[tuple[int], np.dtype[np.float64]]":
    """Return the normalised error of a linear probe on every prompt that it is tested on."""
    x, y = fit.flatten(0, 1).double(), of_fit.flatten(0, 1).double()
    mean, spread = x.mean(dim=0), x.std(dim=0).clamp(min=1e-6)
    center = y.mean(dim=0)
    z = (x - mean) / spread
    gram = z.T @ z + _PENALTY * len(z) * torch.eye(z.shape[1], dtype=torch.float64)
    weight = torch.linalg.solve(gram, z.T @ (y - center))
    predicted = ((test.double() - mean) / spread) @ weight + center
    squared = (predicted - of_test).square().mean(dim=(1, 2))
    variance = (of_test - of_test.mean(dim=(0, 1))).square().mean()
    errors: np.ndarray[tuple[int], np.dtype[np.float64]] = (squared / variance).numpy()
    return errors


def first_below(probes: pd.DataFrame, place: str, quantity: str, level: float = 0.5) -> float:
    """Return the first layer of the trained network at which a probe's error is below a level."""
    rows = probes[
        (probes["network"] == "trained")
        & (probes["place"] == place)
        & (probes["quantity"] == quantity)
        & (probes["probe_error"] < level)
    ]
    return float(rows["layer"].min()) if len(rows) else float("nan")
