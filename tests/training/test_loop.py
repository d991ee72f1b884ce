"""The training loop: what it optimises, that it resumes exactly, and that NaN stops it."""

import math
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from spade_lens.training import TrainPlan, train

PLAN = TrainPlan(steps=12, warmup=3, row_every=5, seed=3)


class Net(nn.Module):
    """Something with all kinds of parameters: embedding, matrices, vectors, a buffer, dropout."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embed = nn.Embedding(7, 6)
        self.inner = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.2))
        self.head = nn.Linear(8, 7, bias=False)

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def loss(self, step: int) -> Tensor:
        tokens = torch.randint(7, (16,))
        logits = self.head(self.inner(self.embed(tokens)))
        return nn.functional.cross_entropy(logits, (tokens + 1) % 7)


def weights(net: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in net.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def compare(a: pd.DataFrame, b: pd.DataFrame) -> None:
    pd.testing.assert_frame_equal(a.drop(columns="seconds"), b.drop(columns="seconds"))


def test_the_schedule_against_numbers_by_hand() -> None:
    plan = TrainPlan(steps=11, warmup=2, final=0.1)
    assert [plan.factor(t) for t in (0, 1, 2)] == [0.5, 1.0, 1.0]
    assert plan.factor(6) == pytest.approx(0.1 + 0.9 * 0.5)  # half-way down the cosine
    assert plan.factor(10) == pytest.approx(0.1)


def test_matrices_go_to_muon_and_the_rest_to_adamw() -> None:
    """Two steps against the two optimisers of torch, each on its own parameters."""
    plan = TrainPlan(steps=2, warmup=1, weight_decay=0.1, clip=0.5)
    ours, plain = Net(), Net()
    inner = plain.inner[0].weight
    vectors = [p for p in plain.parameters() if p.ndim == 1]
    others = [plain.embed.weight, plain.head.weight]
    optimisers = [
        torch.optim.Muon(
            [inner], lr=1e-2, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(others, lr=2e-3, betas=(0.9, 0.98), weight_decay=0.1),
        torch.optim.AdamW(vectors, lr=2e-3, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    batches = []

    def loss(step: int) -> Tensor:
        batches.append(torch.get_rng_state())
        return ours.loss(step)

    train(ours, loss, plan)
    plain.train()
    for step, state in enumerate(batches):
        torch.set_rng_state(state)
        plain.loss(step).backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        for optimiser, rate in zip(optimisers, (1e-2, 2e-3, 2e-3), strict=True):
            optimiser.param_groups[0]["lr"] = rate * plan.factor(step)
            optimiser.step()
            optimiser.zero_grad()
    expected = weights(plain)
    for name, tensor in weights(ours).items():
        # torch's Muon rounds its products to bfloat16; a step is of about 1e-2.
        torch.testing.assert_close(tensor, expected[name], atol=2e-3, rtol=0)
    adamw = Net()
    train(adamw, adamw.loss, replace(plan, matrix_rate=None))
    assert not torch.equal(adamw.inner[0].weight, ours.inner[0].weight)


def test_a_run_has_its_own_random_numbers_and_leaves_the_users_alone() -> None:
    first, second = Net(), Net()
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    a = train(first, first.loss, PLAN, validate=lambda: float(first.loss(0)))
    assert torch.equal(torch.rand(1), expected)
    compare(a, train(second, second.loss, PLAN, validate=lambda: float(second.loss(0))))
    assert same(weights(first), weights(second))
    assert a["update"].tolist() == [5, 10, 12] and first.training
    third = Net()
    train(third, third.loss, TrainPlan(steps=12, warmup=3, row_every=5, seed=4))
    assert not same(weights(first), weights(third))


def test_validation_is_in_evaluation_mode_and_without_gradients() -> None:
    net = Net().eval()
    seen = []

    def validate() -> float:
        seen.append((net.training, torch.is_grad_enabled(), float(torch.rand(()))))
        return 0.5

    history = train(net, net.loss, PLAN, validate=validate)
    assert seen == [(False, False, seen[0][2])] * 3
    assert history.validation_loss.tolist() == [0.5] * 3 and not net.training


CHILD = """
import os, signal, sys, torch
sys.path.insert(0, sys.argv[3])
from test_loop import PLAN, Net
from spade_lens.storage import checkpoint
from spade_lens.training import train

checkpoint._SECONDS_BETWEEN = 0.0
net, at = Net(), int(sys.argv[2])

def loss(step):
    if step == at:
        print("here", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    return net.loss(step)

train(net, loss, PLAN, checkpoint=sys.argv[1])
"""


def test_a_killed_run_goes_on_as_if_nothing_had_happened(tmp_path: Path) -> None:
    at = 7
    here = str(Path(__file__).parent)
    command = [sys.executable, "-c", CHILD, str(tmp_path), str(at), here]
    killed = subprocess.run(command, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL and "here" in killed.stdout, killed.stderr
    steps = []

    def loss(step: int) -> Tensor:
        steps.append(step)
        return net.loss(step)

    net, whole = Net(), Net()
    history = train(net, loss, PLAN, checkpoint=tmp_path)
    assert steps == list(range(at - 1, 12))  # the step before the kill was stored before its update
    compare(history, train(whole, whole.loss, PLAN))
    assert same(weights(net), weights(whole))


def test_a_run_that_is_done_returns_what_it_had(tmp_path: Path) -> None:
    net, again = Net(), Net()
    history = train(net, net.loss, PLAN, checkpoint=tmp_path)

    def never(step: int) -> Tensor:
        raise AssertionError

    pd.testing.assert_frame_equal(train(again, never, PLAN, checkpoint=tmp_path), history)
    assert same(weights(net), weights(again))


def test_it_stops_early_with_the_best_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After two validations without a loss below 1.0: at once, resumed, and once more when done."""
    monkeypatch.setattr("spade_lens.storage.checkpoint._SECONDS_BETWEEN", 0.0)
    losses = {2: 3.0, 4: 1.0, 6: 1.5, 8: 1.0, 10: 0.5, 12: 0.5}
    plan = replace(PLAN, row_every=2, patience=2)

    def run(folder: Path | None, until: int = 99) -> tuple[dict[str, Tensor], pd.DataFrame]:
        net, seen = Net(), [0]

        def loss(step: int) -> Tensor:
            if step == until:
                raise KeyboardInterrupt
            seen[0] = step + 1
            return net.loss(step)

        found = train(net, loss, plan, validate=lambda: losses[seen[0]], checkpoint=folder)
        return weights(net), found

    whole = Net()
    best, history = run(None)
    assert history["update"].tolist() == [2, 4, 6, 8]

    def keep_fourth(step: int) -> Tensor:
        if step == 4:
            keep_fourth.weights = weights(whole)  # type: ignore[attr-defined]
        return whole.loss(step)

    train(whole, keep_fourth, PLAN)
    assert same(best, keep_fourth.weights)  # type: ignore[attr-defined]
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, until=7)
    for _ in range(2):  # it goes on; then it is done
        weight, again = run(tmp_path)
        assert same(weight, best)
        compare(again, history)
    net = Net()
    with pytest.raises(ValueError, match="patience=2 was given without validate="):
        train(net, net.loss, plan)
    with pytest.raises(TypeError, match="validate\\(\\) returned 'low'; expected one number"):
        train(net, net.loss, PLAN, validate=lambda: "low")  # type: ignore[arg-type, return-value]
    worse = iter([3.0, 1.0, math.nan])
    with pytest.raises(FloatingPointError, match="After step 6 .* lowest loss before"):
        train(net := Net(), net.loss, plan, validate=lambda: next(worse))
    assert same(weights(net), best)
    with pytest.raises(FloatingPointError, match="After step 2 validate\\(\\) gave nan"):
        train(net, net.loss, plan, validate=lambda: math.nan)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_loss_that_is_not_finite_stops_and_the_last_good_weights_stay(
    tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spade_lens.storage.checkpoint._SECONDS_BETWEEN", 0.0)
    net, whole = Net(), Net()

    def loss(step: int) -> Tensor:
        found = net.loss(step)
        if step < 6:
            return found
        return found * math.nan if what == "loss" else found + (net.head.weight * 0).sum().sqrt()

    with pytest.raises(FloatingPointError, match=rf"At step 6 .*{tmp_path}"):
        train(net, loss, PLAN, checkpoint=tmp_path)
    assert all(p.isfinite().all() for p in net.parameters())
    [file] = tmp_path.iterdir()
    assert int(load_file(file)["step"]) == 5  # whose loss was finite
    train(net, net.loss, PLAN, checkpoint=tmp_path)  # the cause is gone: it goes on
    train(whole, whole.loss, PLAN)
    assert same(weights(net), weights(whole))


def test_parts_in_evaluation_mode_stay_so() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    net[1].eval()
    before = {name: buffer.clone() for name, buffer in net.named_buffers()}
    x = torch.randn(8, 3)
    train(net, lambda step: net(x).square().mean(), PLAN, validate=lambda: float(net(x).sum()))
    assert net.training and net[0].training and not net[1].training
    assert same(before, dict(net.named_buffers()))


def test_frozen_and_tied_parameters(tmp_path: Path) -> None:
    net = Net()
    net.head = nn.Linear(6, 7, bias=False)
    net.inner = nn.Sequential(nn.Linear(6, 6))
    net.head.weight = net.embed.weight
    net.inner[0].bias.requires_grad_(False)
    before = weights(net)
    train(net, net.loss, PLAN, checkpoint=tmp_path)
    after = weights(net)
    assert {n for n in before if torch.equal(before[n], after[n])} == {"inner.0.bias"}
    assert net.head.weight is net.embed.weight


def test_bad_input(tmp_path: Path) -> None:
    net = Net()
    train(net, net.loss, PLAN, checkpoint=tmp_path)
    with pytest.raises(ValueError, match=r"another run; different are \['about'\]"):
        train(net, net.loss, PLAN, checkpoint=tmp_path, about={"data": "others"})
    with pytest.raises(TypeError, match=r"loss\(0\) returned tensor.*; expected a tensor"):
        train(net, lambda step: torch.tensor(2.0), PLAN)
    other = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"different are \['parameters'\]"):
        train(other, lambda step: other.weight.sum(), PLAN, checkpoint=tmp_path)
    with pytest.raises(ValueError, match="no parameter that requires a gradient"):
        train(nn.ReLU(), net.loss, PLAN)
    for wrong, message in (
        ({"steps": 0}, "steps=0 was given; expected a whole number, 1 or more"),
        ({"steps": 9, "warmup": 9}, "warmup=9 was given for steps=9"),
        ({"steps": 9, "warmup": 0, "clip": -1.0}, "clip=-1.0 was given"),
        ({"steps": 9, "warmup": 0, "learning_rate": math.inf}, "learning_rate=inf was given"),
        ({"steps": 9, "warmup": 0, "seed": -1}, "seed=-1 was given"),
    ):
        with pytest.raises(ValueError, match=message):
            TrainPlan(**wrong)  # type: ignore[arg-type]
