"""The task in context: formulas against other libraries, the network against the bridge."""

import math
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal
from sklearn.linear_model import LinearRegression, Ridge
from tiny import TL39

from spade_lens.training import InContextNetwork, InContextTask, TrainPlan, train_in_context
from spade_lens.training.in_context.baselines import (
    PENALTIES,
    baselines,
    bayes_mixture,
    least_squares,
    oracle_ridge,
    ridge,
    ridge_on_all,
    two_layer_network,
)
from spade_lens.training.in_context.network import NetworkSize
from spade_lens.training.in_context.task import Drawn

TASK = InContextTask(d_x=2, d_phi=3, examples=5, noise=0.3, seed=4)
SIZE = NetworkSize(n_layers=2, d_model=16, n_heads=2, seed=1)
PLAN = TrainPlan(steps=8, warmup=2, row_every=4, seed=3)

needs_native = pytest.mark.skipif(TL39, reason="TransformerLens 3.9 has no native models")


def test_labels_are_linear_in_the_representation() -> None:
    task = replace(TASK, noise=0.0)
    drawn = task.draw(2000, seed=0)
    expected = torch.einsum("bnf,byf->bny", task.phi(drawn.inputs), drawn.weights)
    assert torch.equal(drawn.targets, expected)
    assert drawn.targets.var() == pytest.approx(1, abs=0.1)
    [[matrix]] = task._matrices
    torch.testing.assert_close(matrix.T @ matrix, torch.eye(2))  # orthogonal columns
    by_hand = torch.where(drawn.inputs @ matrix.T > 0, 1.0, 0.01) * (drawn.inputs @ matrix.T)
    torch.testing.assert_close(task.features(drawn), by_hand)


def test_the_seed_decides_the_representation_and_the_prompts() -> None:
    x = torch.randn(3, 2)
    assert torch.equal(TASK.phi(x), replace(TASK).phi(x))
    assert not torch.equal(TASK.phi(x), replace(TASK, seed=5).phi(x))
    assert torch.equal(TASK.draw(3, seed=1).targets, TASK.draw(3, seed=1).targets)
    assert not torch.equal(TASK.draw(3, seed=1).targets, TASK.draw(3, seed=2).targets)


def test_tokens_alternate() -> None:
    drawn = TASK.draw(3, seed=0)
    tokens = TASK.tokens(drawn)
    assert tokens.shape == (3, 10, 4)
    assert torch.equal(tokens[:, 0::2, :2], drawn.inputs) and not tokens[:, 0::2, 2:].any()
    assert torch.equal(tokens[:, 1::2, 2:3], drawn.targets) and not tokens[:, 1::2, :2].any()
    assert (tokens[:, 1::2, 3] == 1).all()
    assert list(TASK.x_positions) == [0, 2, 4, 6, 8] and list(TASK.y_positions) == [1, 3, 5, 7, 9]


def test_the_dynamical_form_is_a_trajectory() -> None:
    task = InContextTask(d_x=2, d_phi=3, examples=6, form="dynamical", recent=2, noise=0.0)
    drawn = task.draw(4, seed=0)
    assert task.tokens(drawn).shape == (4, 6, 2) and task.n_tokens == 6 and task.d_y == 2
    # What Phi reads is the input before and this one; what is predicted is the input after.
    assert torch.equal(drawn.inputs[:, 1:, 2:], drawn.targets[:, :-1])
    assert torch.equal(drawn.inputs[:, 1:, :2], drawn.inputs[:, :-1, 2:])
    expected = torch.einsum("bnf,byf->bny", task.phi(drawn.inputs), drawn.weights)
    torch.testing.assert_close(drawn.targets, expected)
    spread = task.draw(500, seed=1).targets.var(dim=(0, 2))
    assert 0.7 < spread.min() and spread.max() < 1.4  # trajectories neither grow nor fade


def test_ridge_against_scikit_learn() -> None:
    drawn = TASK.draw(3, seed=1)
    features, penalty = TASK.features(drawn), TASK.penalty
    fitted = ridge(features, drawn.targets, penalty)
    ones = torch.cat([torch.ones(3, 5, 1), drawn.inputs], dim=-1)
    errors = []
    for p in PENALTIES:
        errors.append((ridge(ones, drawn.targets, p).predictions - drawn.targets).square())
    best = torch.stack(errors).sum(dim=-1).mean(dim=1).argmin(dim=0)
    oracle = oracle_ridge(drawn.inputs, drawn.targets)
    plain = least_squares(features, drawn.targets)
    for b in range(3):
        x, y = features[b].double().numpy(), drawn.targets[b].double().numpy()
        assert fitted.predictions[b, 0] == 0 and plain[b, 0] == 0
        for i in range(1, 5):
            model = Ridge(alpha=penalty, fit_intercept=False).fit(x[:i], y[:i])
            assert fitted.predictions[b, i].numpy() == pytest.approx(model.predict(x[i : i + 1])[0])
            assert fitted.weights[b, i].numpy() == pytest.approx(model.coef_.reshape(1, -1))
            model = LinearRegression(fit_intercept=False).fit(x[:i], y[:i])
            assert plain[b, i].numpy() == pytest.approx(model.predict(x[i : i + 1])[0], abs=1e-5)
            one = ones[b].double().numpy()
            model = Ridge(alpha=PENALTIES[best[i]], fit_intercept=False).fit(one[:i], y[:i])
            assert oracle[b, i].numpy() == pytest.approx(model.predict(one[i : i + 1])[0])


def test_the_mixtures_evidence_against_scipy() -> None:
    task = replace(TASK, representations=3)
    drawn = task.draw(4, seed=2)
    predictions, probability, several = bayes_mixture(task, drawn)
    for b in range(4):
        for i in range(1, 5):
            logs = []
            for k in range(3):
                x = task.phi(drawn.inputs[b, :i], k).double().numpy()
                covariance = task.prior_variance * x @ x.T + task.noise**2 * np.eye(i)
                logs.append(multivariate_normal(cov=covariance).logpdf(drawn.targets[b, :i, 0]))
            expected = np.exp(np.array(logs) - max(logs))
            assert probability[b, i].numpy() == pytest.approx(expected / expected.sum(), abs=1e-6)
            mean = (probability[b, i] * several[b, i, :, 0]).sum()
            assert float(predictions[b, i, 0]) == pytest.approx(float(mean))


def test_ridge_on_all_representations_selects_none() -> None:
    task = replace(TASK, representations=3)
    drawn = task.draw(3, seed=2)
    found = ridge_on_all(task, drawn)
    for b in range(3):
        every = [task.phi(drawn.inputs[b], k).double().numpy() for k in range(3)]
        x, y = np.concatenate(every, axis=1), drawn.targets[b].double().numpy()
        # The same prior for every weight, of a third of the variance.
        penalty = task.noise**2 / (task.prior_variance / 3)
        model = Ridge(alpha=penalty, fit_intercept=False).fit(x[:4], y[:4])
        assert found[b, 4].numpy() == pytest.approx(model.predict(x[4:5])[0])
    many = task.draw(2000, seed=3)
    errors = {
        name: float((p - many.targets)[:, -1].square().mean())
        for name, p in baselines(task, many).items()
        if name in ("Bayes mixture", "ridge on all Phi")
    }
    assert errors["Bayes mixture"] < errors["ridge on all Phi"] < 1


def test_nothing_is_better_than_bayes() -> None:
    """And its error is what its own formula says."""
    task = InContextTask(examples=8, noise=0.2)
    drawn = task.draw(3000, seed=5)
    found = baselines(task, drawn)
    risk = {n: float((p - drawn.targets).square().mean()) for n, p in found.items()}
    best = risk.pop("Bayes ridge on Phi")
    assert all(best < other for other in risk.values()), (best, risk)
    spread = ridge(task.features(drawn), drawn.targets, task.penalty).spread
    assert best == pytest.approx(float(task.noise**2 * (1 + spread).mean()), rel=0.05)
    assert risk["zero"] == pytest.approx(1 + task.noise**2, abs=0.1)


def test_two_layer_networks_learn_from_the_examples_before_alone() -> None:
    drawn = TASK.draw(4, seed=0)
    found = two_layer_network(drawn.inputs, drawn.targets, steps=30)
    changed = drawn.targets.clone()
    changed[:, 4:] += 1.0
    again = two_layer_network(drawn.inputs, changed, steps=30)
    assert torch.equal(found[:, :4], again[:, :4])  # a prediction does not see its own target


@needs_native
def test_the_network_is_its_bridge() -> None:
    network = InContextNetwork(TASK, SIZE)
    drawn = TASK.draw(3, seed=0)
    resid = network.residuals(drawn)
    before = {name: p.clone() for name, p in network.state_dict().items()}
    bridge = network.bridge()
    with torch.no_grad():
        out, cache = bridge.run_with_cache(network.read_in(TASK.tokens(drawn)))
        torch.testing.assert_close(out[:, ::2], network(drawn))
        for layer in range(3):
            name = f"blocks.{layer}.hook_resid_pre" if layer < 2 else "blocks.1.hook_resid_post"
            torch.testing.assert_close(cache[name], resid[layer], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(bridge(resid[1], start_at_layer=1), out)
    after = network.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert InContextNetwork(TASK, SIZE).read_in.weight.equal(network.read_in.weight)
    assert not InContextNetwork(TASK, replace(SIZE, seed=2))(drawn).equal(network(drawn))


@needs_native
def test_training_lowers_the_risk() -> None:
    task = InContextTask(d_x=1, d_phi=1, depth=0, examples=6, noise=0.1)
    plan = TrainPlan(steps=150, warmup=20, row_every=50)
    trained = train_in_context(task, size=SIZE, plan=plan)
    drawn = task.draw(500, seed=9)
    with torch.no_grad():
        risk = (trained.network(drawn) - drawn.targets).square().mean()
        untrained = (trained.untrained(drawn) - drawn.targets).square().mean()
    assert risk < 0.75 * untrained
    assert not trained.network.training


CHILD = """
import os, signal, sys
sys.path.insert(0, sys.argv[2])
from test_in_context import PLAN, SIZE, TASK
from spade_lens.storage import checkpoint
from spade_lens.training import InContextNetwork, train_in_context

checkpoint._SECONDS_BETWEEN = 0.0
steps, plain = [], InContextNetwork.loss

def loss(self, batch):
    steps.append(batch)
    if len(steps) == 6:
        os.kill(os.getpid(), signal.SIGKILL)
    return plain(self, batch)

InContextNetwork.loss = loss
train_in_context(TASK, size=SIZE, plan=PLAN, checkpoint=sys.argv[1])
"""


@needs_native
def test_a_killed_training_goes_on(tmp_path: Path) -> None:
    command = [sys.executable, "-c", CHILD, str(tmp_path), str(Path(__file__).parent)]
    paths = {"PYTHONPATH": ":".join([str(Path(__file__).parents[1]), *filter(None, sys.path)])}
    killed = subprocess.run(command, capture_output=True, text=True, env=os.environ | paths)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert [path.suffix for path in tmp_path.iterdir()] == [".safetensors"]
    whole = train_in_context(TASK, size=SIZE, plan=PLAN)
    resumed = train_in_context(TASK, size=SIZE, plan=PLAN, checkpoint=tmp_path)
    losses = ["train_loss", "validation_loss"]
    assert resumed.history[losses].equals(whole.history[losses])
    others = whole.network.state_dict()
    assert all(t.equal(others[name]) for name, t in resumed.network.state_dict().items())
    with pytest.raises(ValueError, match=r"another run; different are \['about'\]"):
        train_in_context(replace(TASK, noise=0.1), size=SIZE, plan=PLAN, checkpoint=tmp_path)


def test_bad_input() -> None:
    for wrong, message in (
        ({"d_x": 0}, "d_x=0 was given; expected a whole number, 1 or more"),
        ({"noise": -0.1}, "noise=-0.1 was given"),
        ({"noise": math.inf}, "noise=inf was given"),
        ({"noise": 1e-30}, "noise=1e-30 was given; expected 0, or a number from 1e-06 to 1e"),
        ({"noise": 1e200}, "noise=1e.200 was given"),
        ({"seed": 2**70}, "seed=.* was given; expected 9223372036854775807 or less"),
        ({"recent": 2}, "recent=2 was given for the supervised form"),
        ({"depth": 0, "d_phi": 3}, "depth=0 was given with d_phi=3; expected d_phi=4"),
        ({"depth": 0, "representations": 2}, "expected 1, since all would be the identity"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            InContextTask(**wrong)
    with pytest.raises(ValueError, match="expected a width that the number of heads divides"):
        NetworkSize(d_model=10, n_heads=4)
    with pytest.raises(ValueError, match="noise=0 was given, with which the penalty of the Bayes"):
        _ = replace(TASK, noise=0.0).penalty
    with pytest.raises(ValueError, match="penalty=0 was given; expected a finite number above 0"):
        ridge(torch.randn(2, 3, 2), torch.randn(2, 3, 1), 0)
    # Tests also check shapes at run time, and then before ours.
    with pytest.raises((ValueError, TypeError), match="of the same prompts|violates type hint"):
        ridge(torch.randn(2, 3, 2), torch.randn(2, 4, 1), 1.0)
    with pytest.raises(ValueError, match="Inputs of 3 numbers and representation 0"):
        TASK.phi(torch.randn(5, 3))
    with pytest.raises(ValueError, match="Inputs of 2 numbers and representation 1"):
        TASK.phi(torch.randn(5, 2), 1)
    longer = replace(TASK, examples=6).draw(2, seed=0)
    with pytest.raises(ValueError, match="Prompts of 6 examples were given; expected at most 5"):
        TASK.tokens(longer)
    which = torch.zeros(2, dtype=torch.long)
    other = Drawn(torch.randn(2, 3, 4), torch.randn(2, 3, 1), torch.randn(2, 1, 3), which)
    with pytest.raises(ValueError, match="Inputs of 4 numbers and targets of 1"):
        TASK.tokens(other)
    x, y = torch.randn(2, 3, 2), torch.randn(2, 3, 1)
    wrong: Any
    for wrong in (
        lambda: TASK.draw(2, seed=-1),
        lambda: TASK.draw(2, seed=2**70),
        lambda: ridge(x, y, math.inf),
        lambda: two_layer_network(x, y, steps=0),
        lambda: two_layer_network(x, y, seed=-1),
    ):
        with pytest.raises((ValueError, TypeError), match="was given; expected"):
            wrong()
