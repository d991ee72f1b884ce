"""What can be predicted from the examples before: exact formulas, in double precision.

Every function predicts the target of example i of a prompt from the i examples before it. So all of
them are compared with a network at every position of one prompt.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from spade_lens.checks import check_number, checked
from spade_lens.training.in_context.task import Drawn, InContextTask

PENALTIES = tuple(10 ** (k / 4) for k in range(-16, 13))
"""From 1e-4 to 1e3, for the oracle."""


@dataclass(frozen=True, eq=False)
class Posterior:
    """Ridge regression from the examples before, at every example of a prompt.

    Args:
        predictions: The mean of the prediction.
        weights: The regression's weights.
        spread: x' (X'X + penalty)^-1 x of the example x: its leverage, had it been no example yet.
            Times the variance of the noise it is the variance of the prediction's mean.
    """

    predictions: Float[Tensor, "prompt example d_y"]
    weights: Float[Tensor, "prompt example d_y d_phi"]
    spread: Float[Tensor, "prompt example"]


def ridge(
    features: Float[Tensor, "prompt example d_phi"],
    targets: Float[Tensor, "prompt example d_y"],
    penalty: float,
) -> Posterior:
    """Return ridge regression without an intercept, from the examples before.

    With the penalty of :attr:`InContextTask.penalty` it is the mean of the posterior, so no other
    predictor has a lower mean squared error. A test holds it against scikit-learn.

    Example:
        >>> x, w = torch.randn(3, 9, 2), torch.randn(3, 1, 2)
        >>> y = torch.einsum("bnf,byf->bny", x, w)
        >>> bool((ridge(x, y, 1e-6).predictions[:, -1] - y[:, -1]).abs().max() < 1e-3)
        True

    Args:
        features: What the targets are linear in.
        targets: What is predicted.
        penalty: The penalty of squared weights.

    Raises:
        ValueError: If the penalty is none or infinite, or features and targets are of different
            prompts.
    """
    check_number("penalty", penalty, whole=False)
    if not 0 < penalty < float("inf"):
        raise ValueError(
            f"penalty={penalty} was given; expected a finite number above 0. Use least_squares() "
            "for none."
        )
    before, x, y, moments = _sums(features, targets)
    eye = torch.eye(x.shape[-1], dtype=torch.float64)
    solved = torch.linalg.solve(before + penalty * eye, torch.cat([moments, x[..., None]], dim=-1))
    weights, turned = solved[..., :-1].mT, solved[..., -1]
    predictions = torch.einsum("bnyf,bnf->bny", weights, x)
    return Posterior(predictions, weights, (turned * x).sum(dim=-1))


def least_squares(
    features: Float[Tensor, "prompt example d_phi"], targets: Float[Tensor, "prompt example d_y"]
) -> Float[Tensor, "prompt example d_y"]:
    """Return least squares on the examples before: of all solutions, the shortest.

    Its error is huge where there are about as many examples as features.

    Args:
        features: What the targets are linear in.
        targets: What is predicted.

    Raises:
        ValueError: If features and targets are of different prompts.
    """
    before, x, y, moments = _sums(features, targets)
    weights = torch.linalg.pinv(before, hermitian=True, rtol=1e-10) @ moments
    return torch.einsum("bnfy,bnf->bny", weights, x)


def oracle_ridge(
    inputs: Float[Tensor, "prompt example d_in"], targets: Float[Tensor, "prompt example d_y"]
) -> Float[Tensor, "prompt example d_y"]:
    """Return ridge regression on [1, x] with the penalty that is best on these very prompts.

    The penalty is chosen for every number of examples, of :data:`PENALTIES`. So no choice of a
    penalty makes a linear model of the input better than this.

    Args:
        inputs: The inputs, without the 1.
        targets: What is predicted.

    Raises:
        ValueError: If inputs and targets are of different prompts.
    """
    ones = torch.cat([torch.ones_like(inputs[..., :1]), inputs], dim=-1)
    tried = torch.stack([ridge(ones, targets, p).predictions for p in PENALTIES])
    errors = (tried - targets.double()).square().sum(dim=-1).mean(dim=1)  # [penalty example]
    return tried[errors.argmin(dim=0), :, torch.arange(inputs.shape[1])].transpose(0, 1)


def two_layer_network(
    inputs: Float[Tensor, "prompt example d_in"],
    targets: Float[Tensor, "prompt example d_y"],
    *,
    hidden: int = 16,
    steps: int = 200,
    seed: int = 0,
) -> Float[Tensor, "prompt example d_y"]:
    """Return a network of one hidden layer of ReLUs, fitted to the examples before by Adam.

    One network for every prompt and number of examples, all at once. When to stop is chosen for
    every number of examples as it is best on these very prompts.

    Args:
        inputs: The inputs.
        targets: What is predicted.
        hidden: The width.
        steps: Steps of Adam at most, with a rate of .02.
        seed: Of the first weights.

    Raises:
        TypeError: If an argument is of another type.
        ValueError: If a number is out of range, or inputs and targets are of different prompts.
    """
    _check(inputs, targets)
    check_number("hidden", hidden, least=1)
    check_number("steps", steps, least=1)
    check_number("seed", seed, least=0)
    n, examples, d_in = inputs.shape
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a": (d_in, hidden), "b": (1, hidden), "c": (hidden, targets.shape[-1])}
    p = {
        name: nn.Parameter(
            torch.randn(n, examples, *shape, generator=generator) / max(1, shape[0]) ** 0.5
        )
        for name, shape in shapes.items()
    }
    past = torch.tril(torch.ones(examples, examples), diagonal=-1)  # [prefix example]
    weight = past / past.sum(dim=1, keepdim=True).clamp(min=1)
    x, y = inputs.float()[:, None], targets.float()[:, None]  # [prompt 1 example d]
    adam = torch.optim.Adam(p.values(), lr=0.02)
    best = torch.full((examples,), float("inf"))
    found = torch.zeros_like(targets.float())
    with torch.enable_grad():
        for step in range(steps):
            out = torch.relu(x @ p["a"] + p["b"]) @ p["c"]  # [prompt prefix example d_y]
            if step % 10 == 0:
                own = out.detach().diagonal(dim1=1, dim2=2).mT
                error = (own - targets).square().sum(dim=-1).mean(dim=0)
                better = error < best
                found[:, better], best[better] = own[:, better], error[better]
            loss = (weight[None, :, :, None] * (out - y).square()).sum()
            adam.zero_grad()
            loss.backward()
            adam.step()
    found[:, 0] = 0.0  # nothing is known before the first example
    return found.double()


@checked
def bayes_mixture(task: InContextTask, drawn: Drawn) -> tuple[Tensor, Tensor, Tensor]:
    """Return the best predictor of a task of several representations, and what it is made of.

    The ridge predictions on every representation, weighted by its probability given the examples
    before, from the evidence of each. A test holds the evidence against scipy.

    Args:
        task: The task.
        drawn: The prompts.

    Returns:
        Predictions ``[prompt example d_y]``, probabilities ``[prompt example representation]`` and
        the predictions on each representation ``[prompt example representation d_y]``.

    Raises:
        ValueError: If the task has no noise.
    """
    variance = task.noise**2
    each, logs = [], []
    for k in range(task.representations):
        fitted = ridge(task.phi(drawn.inputs, k), drawn.targets, task.penalty)
        spread = variance * (1 + fitted.spread)[..., None]  # of the target given the past
        error = drawn.targets.double() - fitted.predictions
        log = -(error.square() / spread + spread.log()).sum(dim=-1) / 2
        logs.append(log.cumsum(dim=1) - log)  # of the examples before
        each.append(fitted.predictions)
    several = torch.stack(each, dim=2)
    probability = torch.stack(logs, dim=2).softmax(dim=2)
    return (probability[..., None] * several).sum(dim=2), probability, several


@checked
def ridge_on_all(task: InContextTask, drawn: Drawn) -> Float[Tensor, "prompt example d_y"]:
    """Return ridge regression on all representations side by side, which selects none.

    What a network can do that never finds out which Phi a prompt has. The penalty is that of a
    normal prior with the same variance of the target, spread over all of them.

    Args:
        task: The task.
        drawn: The prompts.

    Raises:
        ValueError: If the task has no noise.
    """
    every = [task.phi(drawn.inputs, k) for k in range(task.representations)]
    penalty = task.representations * task.penalty
    return ridge(torch.cat(every, dim=-1), drawn.targets, penalty).predictions


@checked
def baselines(task: InContextTask, drawn: Drawn, *, seed: int = 0) -> dict[str, Any]:
    """Return the predictions of all of them by name; those that cannot be are left out.

    Args:
        task: The task.
        drawn: The prompts.
        seed: Of the two-layer networks.
    """
    features, y = task.features(drawn), drawn.targets
    found: dict[str, Any] = {}
    if task.noise:
        if task.representations > 1:
            found["Bayes mixture"] = bayes_mixture(task, drawn)[0]
            found["ridge on all Phi"] = ridge_on_all(task, drawn)
        found["Bayes ridge on Phi"] = ridge(features, y, task.penalty).predictions
        naive = task.noise**2 * task.d_in
        found["ridge on x"] = ridge(drawn.inputs, y, naive).predictions
    found["least squares on Phi"] = least_squares(features, y)
    found["ridge on [1, x], oracle"] = oracle_ridge(drawn.inputs, y)
    found["two-layer network, oracle"] = two_layer_network(drawn.inputs, y, seed=seed)
    found["zero"] = torch.zeros_like(y)
    return found


def _sums(features: Tensor, targets: Tensor) -> Sequence[Tensor]:
    """Return the Gram matrix before every example, features, targets, and X'y before it."""
    _check(features, targets)
    x, y = features.double(), targets.double()
    grams = torch.einsum("bnf,bng->bnfg", x, x)
    moments = torch.einsum("bnf,bny->bnfy", x, y)
    return grams.cumsum(dim=1) - grams, x, y, moments.cumsum(dim=1) - moments


def _check(features: Tensor, targets: Tensor) -> None:
    if features.ndim != 3 or targets.ndim != 3 or features.shape[:2] != targets.shape[:2]:
        raise ValueError(
            f"Features of shape {list(features.shape)} and targets of shape {list(targets.shape)} "
            "were given; expected [prompt example d_phi] and [prompt example d_y] of the same "
            "prompts and examples."
        )
