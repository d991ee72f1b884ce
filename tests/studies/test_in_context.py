"""The study of learning in context: methods find what is exact where the truth is built in."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from tiny import TL39

import spade_lens as sl
from spade_lens.studies import InContextPlan
from spade_lens.studies.base import StudyResult
from spade_lens.studies.in_context.pasting import PastedNetwork, linear_task
from spade_lens.studies.in_context.probes import probe_errors, quantities
from spade_lens.studies.in_context.selection import (
    MOVES,
    another_phi,
    exact_moves,
    nearest_predictor,
    selection_patching,
    selection_table,
)
from spade_lens.studies.in_context.validation import Validation, exact_prediction
from spade_lens.training import InContextNetwork, InContextTask, TrainPlan
from spade_lens.training.in_context.baselines import bayes_mixture, ridge_on_all
from spade_lens.training.in_context.network import NetworkSize

pytestmark = pytest.mark.skipif(TL39, reason="TransformerLens 3.9 has no native models")

TASK = InContextTask(d_x=2, d_phi=2, examples=4, noise=0.2)
SIZE = NetworkSize(n_layers=2, d_model=16, n_heads=2)
SMALL: dict[str, Any] = {
    "task": TASK,
    "size": SIZE,
    "training": TrainPlan(steps=6, warmup=2, row_every=3),
    "prompts": 24,
    "paste_steps": 4,
}


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> StudyResult:
    return sl.study(InContextPlan(**SMALL, seeds=(0, 1), out=tmp_path_factory.mktemp("ic")))


def test_all_tables_are_written_and_read_again(
    result: StudyResult, capsys: pytest.CaptureFixture[str]
) -> None:
    names = {"risk", "ratios", "probes", "pasting", "pasting-differences", "validation", "history"}
    assert set(result.tables) == names
    assert all(set(table["seed"]) == {0, 1} for table in result.tables.values())
    folder = result.files["risk"].parent
    again = sl.study(InContextPlan(**SMALL, seeds=(0, 1), out=folder))
    assert "not again" in capsys.readouterr().out
    for name, table in again.tables.items():
        assert table.equals(result.tables[name]), name


def test_exact_predictions_contributions_and_leverage() -> None:
    drawn = TASK.draw(5, seed=3)
    network = InContextNetwork(TASK, SIZE)
    at = Validation(network, drawn)
    x, y = at.x.numpy(), at.y.numpy()
    kept = torch.tensor([True, False, True])
    leverage = at.leverages().numpy()
    everyone = at.exact(torch.ones(3, dtype=torch.bool))
    for b in range(5):
        model = Ridge(alpha=TASK.penalty, fit_intercept=False)
        model.fit(x[b, [0, 2]], y[b, [0, 2]])
        expected = model.predict(x[b, 3:4])[0]
        assert float(exact_prediction(TASK, at.x, at.y, kept)[b]) == pytest.approx(expected)
        inverse = np.linalg.inv(x[b, :3].T @ x[b, :3] + TASK.penalty * np.eye(2))
        fitted = x[b, :3] @ inverse @ x[b, :3].T
        assert leverage[b] == pytest.approx(np.diag(fitted))
        # What leaving example 1 out changes, by the formula of its leverage and its residual.
        own = model.fit(x[b, :3], y[b, :3])
        residual = y[b, 1] - own.predict(x[b, 1:2])[0]
        change = x[b, 3] @ inverse @ x[b, 1] * residual / (1 - leverage[b, 1])
        assert float((everyone - at.exact(kept))[b]) == pytest.approx(change)


class RidgeNetwork(Validation):
    """A network that does ridge regression itself, so that every method must find it."""

    def without(self, kept: torch.Tensor, layer: int = 0) -> torch.Tensor:
        return self.exact(kept)

    def knocked_out(self, example: int, *, query_only: bool) -> torch.Tensor:
        kept = torch.ones(self.query, dtype=torch.bool)
        kept[example] = False
        return self.exact(kept)


def test_methods_find_the_truth_where_the_network_is_it() -> None:
    drawn = TASK.draw(30, seed=3)
    at = RidgeNetwork(InContextNetwork(TASK, SIZE), drawn)
    rows = [*at.contributions(), *at.shapley()]
    scores = {(r["method"], r["truth"]): r["score"] for r in rows}
    assert scores["the network minus Bayes", "0"] == 0 < scores["exact leave one out", "0"]
    for key, score in scores.items():
        if key[1] not in ("size against leverage", "0"):
            assert score == pytest.approx(1.0), key
    half = [r for r in at.sufficiency([0]) if r["method"] == "drop half of the examples"]
    assert half[0]["score"] == pytest.approx(1.0)


def test_runs_of_some_tokens_are_runs_of_the_bridge() -> None:
    drawn = TASK.draw(4, seed=1)
    network = InContextNetwork(TASK, SIZE).eval()
    at = Validation(network, drawn)
    everyone = torch.ones(3, dtype=torch.bool)
    full = network(drawn)[:, -1, 0].double()
    for layer in range(3):
        torch.testing.assert_close(at.without(everyone, layer), full, atol=1e-6, rtol=1e-5)
    # Nothing that comes before the query attends to the last example, so both cuts are the same.
    last = [at.knocked_out(2, query_only=only) for only in (True, False)]
    torch.testing.assert_close(*last, atol=1e-5, rtol=1e-4)
    # And in the last block alone what only the query sees is all that counts.
    one = InContextNetwork(TASK, replace(SIZE, n_layers=1)).eval()
    at = Validation(one, drawn)
    kept = torch.tensor([True, False, True])
    cut = at.knocked_out(1, query_only=True)
    torch.testing.assert_close(at.without(kept), cut, atol=1e-5, rtol=1e-4)


def test_patching_all_of_another_prompt_gives_its_prediction() -> None:
    drawn = TASK.draw(40, seed=2)
    rows = Validation(InContextNetwork(TASK, SIZE), drawn).rule_patching([0, 2])
    by = {(r["method"], r["layer"]): r["score"] for r in rows}
    assert by["patch the query", 0] == pytest.approx(0, abs=1e-6)  # its token is the same
    assert by["patch y-tokens", 2] == pytest.approx(0, abs=1e-6)  # nothing reads them any more
    assert by["patch y-tokens", 0] == pytest.approx(by["patch the query", 2], abs=1e-5)


def test_a_probe_reads_what_is_linear_and_not_noise() -> None:
    x, other = torch.randn(200, 3, 5), torch.randn(100, 3, 5)
    map_ = torch.randn(5, 2)
    assert probe_errors(x, x @ map_ + 3, other, other @ map_ + 3).mean() < 1e-6
    noise = probe_errors(x, torch.randn(200, 3, 2), other, torch.randn(100, 3, 2))
    assert noise.mean() == pytest.approx(1, abs=0.15)


def test_what_is_probed_of_a_mixture() -> None:
    task = replace(TASK, representations=2)
    known = quantities(task, task.draw(3, seed=0))
    assert {"prediction on Phi 0", "prediction on Phi 1", "probability of Phi"} < set(known["x"])
    assert known["y"]["ridge weights"].shape == (3, 3, 2)
    assert set(
        quantities(
            InContextTask(form="dynamical", examples=4),
            InContextTask(form="dynamical", examples=4).draw(2, seed=0),
        )
    ) == {"x"}


def test_a_pasted_network_starts_as_the_regression_and_keeps_its_blocks() -> None:
    network = InContextNetwork(TASK, SIZE).eval()
    linear = linear_task(TASK)
    assert linear.depth == 0 and linear.d_x == TASK.d_phi
    pasted = PastedNetwork(network, linear, 1, copied=True)
    pasted.start_like(TASK, TASK.draw(200, seed=0))
    assert {n for n, p in pasted.named_parameters() if p.requires_grad} == {
        "read_in.weight",
        "positions",
    }
    assert any(p.requires_grad for p in network.parameters())  # the one given is not changed
    drawn = TASK.draw(50, seed=1)
    as_phi = replace(drawn, inputs=TASK.features(drawn))
    made = pasted.read_in(pasted.tokens(as_phi)) + pasted.positions
    expected = network.residuals(drawn)[1]
    error = (made - expected).square().mean() / (expected - expected.mean(0)).square().mean()
    assert error < 0.7  # a part of the residual is linear in Phi and y


def test_the_dynamical_form_and_the_mixture_run(tmp_path: Any) -> None:
    for name, task in (
        ("d", InContextTask(d_x=2, d_phi=2, examples=4, form="dynamical", noise=0.3)),
        ("m", replace(TASK, representations=2)),
    ):
        parts = ("risk", "probes")
        plan = InContextPlan(**(SMALL | {"task": task}), parts=parts, out=tmp_path / name)
        tables = sl.study(plan).tables
        assert {"risk", "probes"} < set(tables)
    assert "Bayes mixture" in set(tables["ratios"]["baseline"])


def test_bad_input(tmp_path: Any, tiny_llama: sl.Model) -> None:
    for wrong, message in (
        ({"prompts": 5}, "prompts=5 was given; expected 20 or more"),
        ({"seeds": (1, 1)}, r"seeds=\[1, 1\] was given, and \[1\] twice; give each once"),
        ({"seeds": ()}, "at least one, each once"),
        ({"parts": ("risks",)}, r"parts=\['risks'\] was given; expected some of"),
        ({"paste_steps": -1}, "paste_steps=-1 was given"),
        ({"layers": [3]}, r"Layers \[3\] were asked for"),
        ({"task": replace(TASK, noise=0.0)}, "A task with noise=0 was given"),
        ({"task": replace(TASK, examples=2)}, "examples=2 was given; expected at least 3"),
        ({"size": NetworkSize(1, 8, 2)}, "n_layers=1 was given; pasting cuts between"),
        ({"parts": ("pasting",), "paste_steps": 0}, "nothing of it can be measured"),
        (
            {"task": replace(TASK, representations=2), "parts": ("validation",)},
            "nothing of it can be measured",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            InContextPlan(**(SMALL | wrong), out=tmp_path / "never")
    assert not (tmp_path / "never").exists()
    plan = InContextPlan(**SMALL, out=tmp_path)
    with pytest.raises(TypeError, match="Without a model: InContextPlan"):
        sl.study(tiny_llama, plan)
    with pytest.raises(TypeError, match="expected a model"):
        sl.study(sl.studies.LensPlan(out=tmp_path))
    mixed = replace(TASK, representations=2)
    with pytest.raises(ValueError, match="whose ridge regression is the truth"):
        Validation(InContextNetwork(mixed, SIZE), mixed.draw(3, seed=0))


MIXTURE = replace(TASK, representations=3)


class Selecting(InContextNetwork):
    """A network whose residuals are what is known: every block does one part of what is exact.

    Numbers 0 to 2 hold the probabilities, from layer 1 on at y-tokens and from layer 2 on at the
    query. Numbers 3 to 5 hold the predictions, likewise from layer 0 on and from layer 1 on.
    """

    def residuals(self, drawn: Any) -> torch.Tensor:
        _, probability, several = bayes_mixture(self.task, drawn)
        known = torch.cat([probability[:, -1], several[:, -1, :, 0]], dim=-1)
        stream = torch.zeros(4, len(drawn), self.task.n_tokens, 6, dtype=torch.float64)
        last = self.task.x_positions[-1]
        stream[0:, :, 1, 3:] = known[:, 3:]
        stream[1:, :, 1, :3] = known[:, :3]
        stream[1:, :, last, 3:] = known[:, 3:]
        stream[2:, :, last, :3] = known[:, :3]
        return stream

    def run_blocks(self, resid: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        resid = resid.clone()
        last = self.task.x_positions[-1]
        if start <= 0:
            resid[:, 1, :3] = self.held  # nothing was there yet
            resid[:, last, 3:] = resid[:, 1, 3:]
        if start <= 1:
            resid[:, last, :3] = resid[:, 1, :3]
        return resid

    def predict(self, resid: torch.Tensor) -> torch.Tensor:
        return (resid[..., :3] * resid[..., 3:]).sum(dim=-1, keepdim=True)

    held: torch.Tensor


def test_patching_tells_selection_from_regressions() -> None:
    network = Selecting(MIXTURE, NetworkSize(n_layers=3, d_model=8, n_heads=2))
    drawn = MIXTURE.draw(60, seed=1)
    network.held = network.residuals(drawn)[1][:, 1, :3]
    rows = selection_patching(network, drawn, [0, 1, 2, 3])
    found = {(r["method"], r["layer"]): {} for r in rows}
    for row in rows:
        found[row["method"], row["layer"]][row["truth"]] = row["score"]
    nothing = dict.fromkeys(MOVES, 0.0)
    expected = {
        # Where the regressions are copied and the probabilities are not there yet.
        ("patch y-tokens", 0): {"regressions": 1.0},
        ("patch y-tokens", 1): {"selection": 1.0},
        ("patch the query", 1): {"regressions": 1.0},
        ("patch the query", 2): {"both": 1.0},
        ("patch y-tokens", 2): {},
        ("patch x-tokens", 1): {},
    }
    for key, moved in expected.items():
        assert found[key] == pytest.approx(nothing | moved, abs=1e-9), key


def test_another_phi_is_another_one_and_what_would_move_is_exact() -> None:
    network = InContextNetwork(MIXTURE, SIZE)
    drawn = MIXTURE.draw(40, seed=2)
    other = another_phi(network, drawn, seed=0)
    assert torch.equal(other.inputs, drawn.inputs) and (other.which != drawn.which).all()
    each = zip(other.inputs, other.which.tolist(), strict=True)
    features = torch.stack([MIXTURE.phi(x, k) for x, k in each])
    clean = torch.einsum("bnf,byf->bny", features, other.weights)
    assert float((other.targets - clean).std()) == pytest.approx(MIXTURE.noise, rel=0.2)
    moves = exact_moves(network, drawn, other)
    both = [bayes_mixture(MIXTURE, side)[0][:, -1, 0] for side in (drawn, other)]
    torch.testing.assert_close(moves[:, MOVES.index("both")], both[1] - both[0])
    on_all = [ridge_on_all(MIXTURE, side)[:, -1, 0] for side in (drawn, other)]
    torch.testing.assert_close(moves[:, -1], on_all[1] - on_all[0])


def test_the_whole_network_is_held_against_both_predictors() -> None:
    network = InContextNetwork(MIXTURE, SIZE)
    drawn = MIXTURE.draw(40, seed=2)
    exact = ridge_on_all(MIXTURE, drawn).float()
    network.forward = lambda _: exact  # type: ignore[method-assign]
    by = {row["truth"]: row["score"] for row in nearest_predictor(network, drawn)}
    assert by["ridge on all Phi"] < 1e-9 < 0.01 < by["Bayes mixture"]


def test_selection_is_of_mixtures_alone(tmp_path: Any) -> None:
    plan = InContextPlan(**SMALL | {"task": MIXTURE, "paste_steps": 0}, out=tmp_path)
    made = sl.study(plan)
    table = made.tables["selection"]
    assert "validation" not in made.tables and "Selection of a repr" in made.text
    probes = table[table["method"].str.startswith("probe")]
    assert set(probes["method"]) == {"probe, trained", "probe, untrained"}
    assert (probes["n"] == 24).all() and probes["score"].gt(0).all()
    assert {"Phi 0(x)", "Phi 2(x)"} <= set(made.tables["probes"]["quantity"])
    network = {"trained": InContextNetwork(TASK, SIZE)}
    with pytest.raises(ValueError, match="of 1 representations was given; expected a supervised"):
        selection_table(network, TASK.draw(3, seed=0), TASK.draw(3, seed=1))
    with pytest.raises(ValueError, match=r"parts=\['selection'\] was given for a supervised task"):
        InContextPlan(**SMALL, parts=("selection",), out=tmp_path)
