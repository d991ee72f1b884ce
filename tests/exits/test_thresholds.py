"""Choosing on held-out prompts, with and without a guarantee, on tables made by hand."""

import math
import warnings
from collections.abc import Sequence
from itertools import combinations, pairwise

import numpy as np
import pandas as pd
import pytest
import torch
from made_tables import CORRECT, RIGHT, SURE, WRONG, noisy, table
from scipy.stats import binom

from spade_lens.exits import (
    ExitTable,
    ExitWarning,
    FixedLayer,
    Oracle,
    Patience,
    Policy,
    Threshold,
    check_auroc,
    reliability,
    sweep,
)
from spade_lens.exits.choice import (
    Choice,
    best_of,
    binomial_p,
    certify,
    prompts_needed,
    tried_policies,
    warn_unless_supported,
)
from spade_lens.exits.families import (
    calibrated_thresholds,
    families,
    few_checks,
    global_thresholds,
)
from spade_lens.exits.sweeps import iso_compute, pareto
from spade_lens.stats import paired_interval, proportion_interval


def choose(
    policies: Sequence[Policy],
    table: ExitTable,
    *,
    loss: float | None = 0.01,
    measure: str = "accuracy",
) -> Choice:
    """As a calibration chooses, on one table."""
    best = best_of(tried_policies(policies, table, measure=measure), loss=loss)
    warn_unless_supported(best, measure)
    return best


def test_simulation_by_hand() -> None:
    made = table(SURE, CORRECT)
    trace = made.simulate(Threshold(0.5))
    assert trace.exit_layer.tolist() == [10, 10, 20, 30]
    assert trace.answer.tolist() == [1, 1, 1, 1]
    assert trace.checks.tolist() == [1, 1, 2, 2]
    assert trace.flops_blocks.tolist() == [10, 10, 20, 30]
    assert trace.flops_checks.tolist() == [1, 1, 2, 2]
    assert trace.flops_answer.tolist() == [2, 2, 2, 1]
    assert trace.layer_tokens.tolist() == [50 + 20, 50 + 20, 100 + 10, 150]
    assert trace.speedup == 4 * 31 / (2 * 13 + 24 + 33)


def test_a_layer_without_threshold_is_not_charged() -> None:
    trace = table(SURE, CORRECT).simulate(Threshold({20: 0.5}))
    assert trace.exit_layer.tolist() == [20, 20, 20, 30]
    assert trace.checks.tolist() == [1, 1, 1, 1]
    assert table(SURE, CORRECT).simulate(FixedLayer(20)).flops_checks.sum() == 0


def test_patience_by_hand() -> None:
    trace = table(SURE, CORRECT).simulate(Patience(2))
    assert trace.exit_layer.tolist() == [20, 20, 30, 20]
    assert table(SURE, CORRECT).simulate(Patience(2, 0.5)).exit_layer.tolist() == [20, 20, 30, 30]
    assert table(SURE, CORRECT).simulate(Patience(1)).exit_layer.tolist() == [10] * 4
    with pytest.raises(ValueError, match="1 or more"):
        Patience(0)


def test_oracles() -> None:
    right = torch.tensor([[1, 1, 0, 0], [1, 0, 1, 0]])
    made = table(SURE, right)
    assert made.simulate(Oracle()).exit_layer.tolist() == [10, 10, 20, 30]
    stable = made.simulate(Oracle(stable=True))
    assert stable.exit_layer.tolist() == [10, 30, 20, 30]
    assert stable.accuracy == 1
    assert stable.checks.sum() == 0


def test_the_choice_is_the_cheapest_within_the_loss() -> None:
    made = table(SURE, CORRECT)
    with pytest.warns(ExitWarning, match="rests on the 3 of 4"):
        choice = choose(global_thresholds(), made, loss=0.0)
    # Below .2 the last prompt leaves wrong at layer 10, below .3 the third.
    assert 0.3 < choice.policy.value <= 0.8  # type: ignore[attr-defined, operator]
    assert choice.loss == 0
    with pytest.warns(ExitWarning):
        loose = choose(global_thresholds(), made, loss=0.5)
    assert loose.speedup > choice.speedup
    assert loose.loss == 0.5


def test_a_gain_is_a_negative_loss_and_best_accuracy_takes_it() -> None:
    n = 40
    full = torch.ones(n)
    full[:10] = WRONG
    right = torch.ones(2, n)
    right[0, 20:] = WRONG
    made = table(torch.full((2, n), 0.9), right, full=full)
    best = choose([FixedLayer(10), FixedLayer(20)], made, loss=None)
    assert best.policy == FixedLayer(20)
    assert best.loss == pytest.approx(-0.25)
    agreeing = choose([FixedLayer(20)], made, loss=0.3, measure="agreement")
    assert agreeing.loss == pytest.approx(0.25)


def test_never_exits_with_a_warning() -> None:
    made = table(SURE, torch.zeros(2, 4))
    with pytest.warns(ExitWarning, match="never exits"):
        choice = choose(global_thresholds(), made, loss=0.01)
    assert choice.policy.stops(made.layers) == ()
    assert choice.early == 0


def test_prompts_without_a_target_take_no_part_in_accuracy() -> None:
    known = torch.tensor([True, True, True, False])
    made = table(SURE, CORRECT, known=known)
    with pytest.warns(ExitWarning):
        assert choose([FixedLayer(20)], made).n == 3
    with pytest.raises(ValueError, match="no calibration prompts with a target"):
        choose([FixedLayer(20)], table(SURE, CORRECT, known=~known & known))
    with pytest.raises(ValueError, match="No policies"):
        choose([], made)
    with pytest.raises(ValueError, match="loss=-0.1"):
        choose([FixedLayer(20)], made, loss=-0.1)
    with pytest.raises(ValueError, match="measure='f1'"):
        choose([FixedLayer(20)], made, measure="f1")


def test_calibrated_thresholds_leave_out_layers_that_are_not_safe() -> None:
    n = 30
    confidence = torch.linspace(0.01, 0.99, n).repeat(2, 1)
    right = torch.stack([torch.arange(n) % 2 == 0, torch.arange(n) >= 10])
    family = calibrated_thresholds(table(confidence, right), levels=[0.99, 0.4])
    assert [p.stops([10, 20]) for p in family] == [(20,), (10, 20)]
    # Half way between the last prompt that is wrong and the first of those that are right.
    assert family[0].at(20) == pytest.approx(float(confidence[0, 9:11].mean()))


def test_few_checks_are_at_few_layers() -> None:
    n = 40
    confidence = torch.linspace(0.01, 0.99, n).repeat(3, 1)
    right = torch.stack([torch.arange(n) >= first for first in (20, 10, 0)])
    made = table(confidence, right)
    family = few_checks(made, most=3)
    stops = [p.stops(made.layers) for p in family]
    assert {len(s) for s in stops} == {1, 2, 3}
    assert set(stops) == {s for k in (1, 2, 3) for s in combinations(made.layers, k)}
    assert len({p.name for p in family}) == len(family)
    # The first check lets none go wrong; at the second everybody leaves, and is charged for it.
    leaves_at_20 = next(p for p in family if p.name == "checks at 10, chance 0.98, else 20")
    trace = made.simulate(leaves_at_20)
    assert trace.exit_layer.tolist() == [20] * 20 + [10] * 20
    assert trace.checks.tolist() == [2] * 20 + [1] * 20
    assert {len(p.stops(made.layers)) for p in few_checks(made)} == {1, 2}
    many = table(confidence[:1].repeat(20, 1), right[:1].repeat(20, 1))
    assert len({layer for p in few_checks(many) for layer in p.stops(many.layers)}) == 8
    # Layers at which no confidence is safe are checked by nobody.
    assert {p.stops(made.layers) for p in few_checks(table(confidence, 0 * right))} == set()


def test_p_values() -> None:
    assert binomial_p(0, 100, 0.05) == pytest.approx(0.95**100)
    for lost in (0, 3, 10, 50):
        assert binomial_p(lost, 200, 0.1) == pytest.approx(binom.cdf(lost, 200, 0.1))
    assert binomial_p(0, 200, 0.1) == pytest.approx(0.9**200)


def test_too_few_prompts_for_a_guarantee() -> None:
    assert prompts_needed(loss=0.01, risk=0.05) == 299
    assert 0.99**299 <= 0.05 < 0.99**298
    with pytest.raises(ValueError, match="takes at least 299. Give 259 more prompts"):
        certify(global_thresholds(), noisy(40, seed=0), loss=0.01)
    with pytest.raises(ValueError, match="risk=0 was given"):
        certify(global_thresholds(), noisy(40, seed=0), loss=0.1, risk=0)


def test_the_guarantee_holds() -> None:
    truth = noisy(20_000, seed=1)
    policies = [Threshold(v) for v in np.linspace(0.995, 0.3, 15)]
    risks = {}
    for policy in policies:
        trace = truth.simulate(policy)
        lost = (truth.final_answer == RIGHT) & (trace.answer != RIGHT)
        risks[policy] = float(lost.double().mean())
    broken, used = 0, 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExitWarning)
        for seed in range(60):
            choice = certify(policies, noisy(300, seed=100 + seed), loss=0.1, risk=0.1)
            broken += risks.get(choice.policy, 0.0) > 0.1  # type: ignore[call-overload]
            used += choice.early > 0
    assert broken <= 13  # 60 draws at risk .1: 6 expected at most, 13 is three deviations off
    assert used > 50


def test_certified_never_exits_with_a_warning() -> None:
    made = table(torch.rand(2, 100), torch.zeros(2, 100))
    with pytest.warns(ExitWarning, match="never exits"):
        choice = certify([FixedLayer(10)], made, loss=0.05)
    assert choice.speedup == 1


def test_expected_calibration_error_by_hand() -> None:
    confidence = torch.tensor([[0.1, 0.3, 0.6, 1.0]])
    right = torch.tensor([[0, 1, 1, 1]])
    made = table(confidence, right)
    wide = reliability(made, bins="equal-width", n_bins=2)
    # (.2 against .5) and (.8 against 1), half the prompts each.
    assert wide["ece"].tolist() == pytest.approx([0.5 * 0.3 + 0.5 * 0.2] * 2)
    brier = (0.1**2 + 0.7**2 + 0.4**2) / 4
    assert wide["brier"].tolist() == pytest.approx([brier] * 2)
    for name in ("ece", "brier"):
        assert (wide[f"{name}_low"] <= wide[name]).all()
        assert (wide[name] <= wide[f"{name}_high"]).all()
    mass = reliability(made, bins="equal-mass", n_bins=4)
    assert mass["n"].tolist() == [1, 1, 1, 1]
    assert mass["frequency"].tolist() == [0, 1, 1, 1]
    assert mass["confidence"].tolist() == pytest.approx([0.1, 0.3, 0.6, 1.0])
    every = [reliability(made, event=e)["ece"].unique().item() for e in ("agrees", "check correct")]
    assert every[0] == every[1]


def test_auroc_of_checks_by_hand() -> None:
    made = table(torch.tensor([[0.1, 0.4, 0.35, 0.8]] * 2), torch.tensor([[0, 0, 1, 1], [1] * 4]))
    frame = check_auroc([made, made], event="correct")
    assert frame["layer"].tolist() == [10, 20, 10, 20]
    assert frame["auroc"][0] == 0.75
    assert frame[["auroc", "auroc_low", "auroc_high"]].loc[1].isna().all()  # all were right
    assert frame["frequency"].tolist() == [0.5, 1, 0.5, 1]
    assert check_auroc(noisy(2000, seed=3))["auroc_low"].gt(0.5).all()
    with pytest.raises(ValueError, match="at least one exit table"):
        check_auroc([])
    with pytest.raises(ValueError, match="expected 'agrees'"):
        check_auroc(made, event="right")  # type: ignore[arg-type]


def test_a_calibrated_confidence_has_little_error() -> None:
    # Sampling noise alone gives about sqrt(bins / n) / 2.
    error = reliability(noisy(20_000, seed=3), event="correct")
    assert (error["ece"] < 0.02).all()


@pytest.mark.parametrize(("n", "n_bins"), [(24, 4), (150, 7), (2000, 15)])
def test_bins_hold_20_prompts_by_default(n: int, n_bins: int) -> None:
    made = noisy(n, seed=3)
    curve = reliability(made)
    pd.testing.assert_frame_equal(curve, reliability(made, n_bins=n_bins))
    assert curve.groupby("layer")["bin"].nunique().tolist() == [n_bins] * len(made.layers)


def test_calibration_errors_are_clear() -> None:
    made = table(SURE, CORRECT, known=torch.zeros(4, dtype=torch.bool))
    with pytest.raises(ValueError, match="needs targets"):
        reliability(made, event="correct")
    with pytest.raises(ValueError, match="expected 'agrees'"):
        reliability(made, event="right")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="equal-mass"):
        reliability(made, bins="equal")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="n_bins=0"):
        reliability(made, n_bins=0)


def test_sweep_and_its_intervals() -> None:
    made = noisy(400, seed=5)
    frame = sweep(made, [*global_thresholds([0.9, 0.5]), Oracle(), FixedLayer(10)])
    assert frame["policy"].tolist() == ["threshold 0.9", "threshold 0.5", "oracle", "layer 10"]
    for name in ("speedup", "agreement", "accuracy", "loss", "lost", "gained"):
        assert (frame[f"{name}_low"] <= frame[name]).all()
        assert (frame[name] <= frame[f"{name}_high"]).all()
    accuracy = frame["accuracy"].to_numpy()
    half = 1.96 * np.sqrt(accuracy * (1 - accuracy) / 400)
    np.testing.assert_allclose(frame["accuracy_high"] - accuracy, half, atol=0.01)
    np.testing.assert_allclose(frame["lost"] - frame["gained"], frame["loss"])
    lost = (frame["lost"] * 400).round().astype(int)
    gained = (frame["gained"] * 400).round().astype(int)
    for row, a, b in zip(frame.itertuples(), lost, gained, strict=True):
        assert (row.loss_low, row.loss_high) == pytest.approx(paired_interval(a, b, 400))
        assert (row.lost_low, row.lost_high) == pytest.approx(proportion_interval(a, 400))
    front = sweep(made, global_thresholds([0.9, 0.5]), front="accuracy")
    assert set(front["chosen_on"]) == {"these prompts"}
    again = sweep(made, [Oracle()]).iloc[0]
    pd.testing.assert_series_equal(again, frame.iloc[2], check_names=False)
    trace = made.simulate(Threshold(0.9))
    assert frame["speedup"][0] == pytest.approx(trace.speedup)
    assert frame["compute"][0] == pytest.approx(1 / trace.speedup)
    assert frame["loss"][0] == pytest.approx(made.accuracy - trace.accuracy)


def test_the_front_has_no_row_that_another_beats() -> None:
    frame = sweep(noisy(200, seed=6), global_thresholds())
    front = pareto(frame)
    assert front["compute"].is_monotonic_increasing
    assert front["accuracy"].is_monotonic_increasing
    for _, row in frame.iterrows():
        fits = front[front["compute"] <= row["compute"]]
        assert fits["accuracy"].max() >= row["accuracy"]
    with pytest.raises(ValueError, match="'compute'"):
        pareto(frame.drop(columns="compute"))


def test_a_choice_is_measured_on_other_prompts() -> None:
    calibration, evaluation = noisy(300, seed=7), noisy(300, seed=8)
    for policies in families(calibration).values():
        for loss in (None, 0.01, 0.1):
            choice = best_of(tried_policies(policies, calibration), loss=loss)
            assert choice.loss <= (1 if loss is None else loss) + 1e-9
            row = sweep(evaluation, [choice.policy]).iloc[0]
            assert row["speedup"] == pytest.approx(evaluation.simulate(choice.policy).speedup)
    with pytest.raises(ValueError, match="expected the same"):
        iso_compute(calibration, table(SURE[:1], CORRECT[:1]), families(calibration))


def test_iso_compute_stays_within_budget() -> None:
    calibration, evaluation = noisy(300, seed=9), noisy(300, seed=10)
    found = families(calibration)
    frame = iso_compute(calibration, evaluation, found, budgets=(0.01, 0.6, 0.8, 1.0))
    assert not (frame["budget"] == 0.01).any()
    assert (frame["compute"] <= frame["budget"] + 0.05).all()
    met = frame.groupby("budget")["family"].nunique()
    common = frame[frame["budget"].map(met) == len(found)]
    assert len(common) < len(frame)
    for _, some in common.groupby("family"):
        assert some["accuracy"].mean() == pytest.approx(some["iso_compute"].iloc[0])
    with pytest.raises(ValueError, match="No policy of any family"):
        iso_compute(calibration, evaluation, found, budgets=(0.01,))


def test_families_run_from_careful_to_bold() -> None:
    calibration = noisy(300, seed=11)
    for name in ("fixed layer", "threshold", "thresholds by layer"):
        computes = sweep(calibration, families(calibration)[name])["early"]
        assert all(a <= b for a, b in pairwise(computes))
    assert all(math.isfinite(p.at(10)) for p in global_thresholds())
