"""Controls of early exit: mixtures are what random draws give on the mean, and intervals hold."""

from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from made_tables import CORRECT, SURE, noisy, table

from spade_lens.exits import ExitTable, FixedLayer, Policy, Threshold, sweep
from spade_lens.exits.choice import NEVER
from spade_lens.exits.controls import (
    Outcomes,
    beyond_fixed,
    match_fixed,
    match_ways,
    mixed,
    outcomes,
    random_exits,
)


def test_outcomes_are_those_of_the_simulation() -> None:
    made = noisy(400, seed=5)
    for policy in (Threshold(0.9), FixedLayer(10), NEVER):
        trace, measured = made.simulate(policy), outcomes(made, policy)
        assert measured.accuracy == pytest.approx(trace.accuracy)
        assert 1 / measured.compute == pytest.approx(trace.speedup)
        figures = measured.figures()
        row = sweep(made, policy).iloc[0]
        assert {name: row[name] for name in figures} == pytest.approx(figures)
    assert outcomes(made, NEVER).figures()["lost"] == 0
    unknown = table(SURE, CORRECT, known=torch.zeros(4, dtype=torch.bool))
    figures = outcomes(unknown, FixedLayer(10)).figures()
    assert np.isnan(figures["accuracy"]) and np.isnan(figures["loss_low"])
    with pytest.raises(ValueError, match="No prompt has a target"):
        match_fixed([unknown], 0.5)


def test_random_exits_are_the_mean_of_shuffled_ones() -> None:
    made = noisy(300, seed=1)
    trace = made.simulate(Threshold(0.8))
    expected = random_exits(made, Threshold(0.8))
    assert expected.exit_layer.mean() == pytest.approx(trace.exit_layer.double().mean())
    generator = torch.Generator().manual_seed(0)
    answers = torch.cat([made.exit_answer, made.final_answer[None]])
    stop = torch.searchsorted(torch.tensor(made.prices.stops), trace.exit_layer)
    right = []
    for _ in range(200):
        shuffled = stop[torch.randperm(len(made), generator=generator)]
        right.append((answers[shuffled, torch.arange(300)] == made.target).double().mean())
    assert expected.accuracy == pytest.approx(float(np.mean(right)), abs=0.005)
    # Confidence is of use here, and random exits make no check.
    assert expected.accuracy < outcomes(made, Threshold(0.8)).accuracy - 0.02
    assert (expected.flops <= outcomes(made, FixedLayer(20)).flops.max() + 8).all()


def test_fixed_layers_meet_an_accuracy_at_the_least_cost() -> None:
    made = noisy(2000, seed=2)
    points = {p: outcomes(made, p) for p in (FixedLayer(10), FixedLayer(20), NEVER)}
    low, _, high = (p.accuracy for p in points.values())
    for wanted in np.linspace(low, high, 7):
        match = match_fixed([made], float(wanted))
        found = match.outcomes([made])
        assert found.accuracy == pytest.approx(wanted)
        assert sum(match.weights) == pytest.approx(1)
        # No mixture of two ways is as accurate for less.
        for one in points.values():
            for other in points.values():
                for weight in np.linspace(0, 1, 21):
                    mixture = mixed([one, other], [1 - weight, weight])
                    if mixture.accuracy >= wanted + 1e-9:
                        assert mixture.compute >= found.compute - 1e-9
        assert match.price > 0
    assert match_fixed([made], 2.0).ways == (("SPADE", NEVER),)
    assert match_fixed([made], 0.0).ways == (("SPADE", FixedLayer(10)),)
    assert "layer 10" in match_fixed([made], 0.0).name
    # One that is the cheapest and the best leaves nothing to buy.
    easy = table(torch.ones(2, 30), torch.ones(2, 30))
    assert match_fixed([easy], 0.9).price == 0


RUNS, N = 500, 150


def part(whole: Outcomes, run: int) -> Outcomes:
    """The prompts of one run."""
    here = slice(run * N, (run + 1) * N)
    return Outcomes(*(getattr(whole, field.name)[here] for field in fields(Outcomes)))


def compared(made: ExitTable, policy: Policy) -> tuple[float, float]:
    """How often the interval holds the truth, and how often it lies above 0.

    Fixed layers are matched on the prompts of every other run.
    """
    ways = {("", way): outcomes(made, way) for way in (FixedLayer(10), FixedLayer(20), NEVER)}
    whole = outcomes(made, policy)
    held, sure = [], []
    for run in range(0, 2 * RUNS, 2):
        match = match_ways({w: part(o, run) for w, o in ways.items()}, part(whole, run).accuracy)
        own = [part(ways[way], run + 1) for way in match.ways]
        found = beyond_fixed(part(whole, run + 1), mixed(own, match.weights), match)
        fixed = mixed([ways[way] for way in match.ways], match.weights)
        truth = beyond_fixed(whole, fixed, match)["beyond_fixed"]
        held.append(found["beyond_fixed_low"] <= truth <= found["beyond_fixed_high"])
        sure.append(found["beats_fixed"])
    return float(np.mean(held)), float(np.mean(sure))


@pytest.mark.parametrize("level", [0.6, 0.9])
def test_the_interval_of_the_difference_holds_it(level: float) -> None:
    held, sure = compared(noisy(2 * RUNS * N, seed=4), Threshold(level))
    assert 0.925 < held < 0.985
    assert sure > 0.5  # this confidence says the chance to be right


def test_a_confidence_that_knows_nothing_is_not_called_adaptive() -> None:
    made = noisy(2 * RUNS * N, seed=5)
    made.confidence[:] = torch.rand(made.confidence.shape)
    held, sure = compared(made, Threshold(0.5))
    assert held > 0.925 and sure < 0.05


def test_accuracy_is_not_for_sale_beyond_the_most_accurate_fixed_layers() -> None:
    made = noisy(150, seed=3)
    rule, match = outcomes(made, Threshold(0.8)), match_fixed([made], 0.75)
    fixed = match.outcomes([made])
    assert match.reached and rule.accuracy > fixed.accuracy
    assert match.span == pytest.approx((outcomes(made, FixedLayer(10)).compute, 1.0))
    # Two fixed layers that differ by one prompt can give any price.
    found = beyond_fixed(rule, fixed, replace(match, price=45.0))
    assert found["saved"] + 45 * found["more_right"] / rule.compute > 1
    assert found["beyond_fixed"] == pytest.approx(1 / rule.compute - 1)
    assert found["beyond_fixed_high"] < 2 / rule.compute - 1 and found["reached_by_fixed"]
    worse = beyond_fixed(fixed, rule, replace(match, price=45.0))
    assert worse["beyond_fixed"] == pytest.approx(match.span[0] / fixed.compute - 1)
    # Where none is as accurate, the most accurate one is compared with, as it is.
    match = match_fixed([made], 2.0)
    best = match.outcomes([made])
    found = beyond_fixed(rule, mixed([best, outcomes(made, FixedLayer(10))], [0, 1]), match)
    assert not match.reached and not found["reached_by_fixed"]
    found = beyond_fixed(best, best, replace(match, price=45.0))
    assert found["beyond_fixed"] == found["beyond_fixed_high"] == 0 > found["beyond_fixed_low"]


def test_a_fixed_layer_is_not_beyond_itself() -> None:
    made = noisy(200, seed=3)
    own = outcomes(made, FixedLayer(20))
    found = beyond_fixed(own, own, match_fixed([made], own.accuracy - 0.01))
    assert found["saved"] == found["more_right"] == found["beyond_fixed"] == 0
    assert found["beyond_fixed_low"] < 0 < found["beyond_fixed_high"] and not found["beats_fixed"]
