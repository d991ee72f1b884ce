"""The mixture of exits: its calibration by hand, its conformal sets against their definition."""

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from made_tables import noisy
from tiny import spanned_prompts

from spade_lens import LogitLens, Model, Spade
from spade_lens.exits import Confidence, ExitTable, FixedLayer, Threshold, exit_tables
from spade_lens.exits.calibration import ExitRule
from spade_lens.exits.choice import tried_policies
from spade_lens.exits.uncertainty import check_disjoint, conformal_sets, gated_reliability
from spade_lens.studies.exits.findings import _conformal
from spade_lens.studies.exits.probabilities import conformal_of

POLICY = Threshold(0.8)


def with_options(n: int, *, seed: int) -> ExitTable:
    """Three options a prompt; the right one is drawn with the probability that it is given."""
    made = noisy(n, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    logprobs = (2 * torch.randn(3, n, 3, generator=generator)).log_softmax(dim=-1)
    logprobs[1:] = logprobs[0]  # calibrated wherever a prompt leaves
    right = torch.multinomial(logprobs[0].exp(), 1, generator=generator)[:, 0]
    best = logprobs.argmax(dim=-1)
    return replace(
        made,
        logprobs=logprobs,
        right_option=right,
        target=right,
        exit_answer=best[:2],
        final_answer=best[2],
        n_candidates=torch.full((n,), 3),
        words={0: "a", 1: "b", 2: "c"},
        identity=torch.arange(n) + 1_000_000 * seed,
    )


def test_a_table_knows_its_options(tiny_llama: Model) -> None:
    prompts = [
        replace(p, candidates=(5, 6, 7 + i % 2), target=6, target_tokens=())
        for i, p in enumerate(spanned_prompts(6))
    ]
    prompts[2] = replace(prompts[2], candidates=(5, 6), candidate_tokens=())
    [table] = exit_tables(tiny_llama, prompts, "logit", layers=[1, 3])
    assert table.logprobs.shape == (3, 6, 3)
    assert torch.isneginf(table.logprobs[:, 2, 2]).all()
    torch.testing.assert_close(table.logprobs.exp().sum(dim=-1), torch.ones(3, 6))
    options = torch.tensor([(*p.candidates, -1)[:3] for p in prompts])
    best = options[torch.arange(6), table.logprobs.argmax(dim=-1)]
    assert torch.equal(best[:2], table.exit_answer) and torch.equal(best[2], table.final_answer)
    assert table.right_option.tolist() == [1] * 6
    final = tiny_llama.read(prompts, "logit", layers=[4]).candidate_logprobs[0, 0]
    final = final.nan_to_num(-torch.inf).log_softmax(dim=-1)
    torch.testing.assert_close(table.logprobs[2], final.cpu(), rtol=1e-4, atol=1e-4)
    # Prompts without candidates have no options to give a probability to.
    [bare] = exit_tables(tiny_llama, spanned_prompts(3), "logit", layers=[1])
    assert bare.logprobs.shape == (2, 3, 0)
    with pytest.raises(ValueError, match="a prompt of this table has none"):
        gated_reliability(bare, FixedLayer(1))


def test_the_mixture_is_calibrated_as_a_whole() -> None:
    made = with_options(4000, seed=1)
    curve = gated_reliability(made, POLICY, n_bins=8)
    assert curve["n"].sum() == 4000 and curve["ece"].iloc[0] < 0.03
    assert curve["ece_low"].iloc[0] == 0
    trace = made.simulate(POLICY)
    right = (trace.answer == made.target).double()
    sure = made.logprobs[0].exp().amax(dim=-1).double()
    assert curve["brier"].iloc[0] == pytest.approx(float((sure - right).square().mean()))
    agreeing = gated_reliability(made, POLICY, event="agrees", n_bins=4)
    assert (agreeing["frequency"] == 1).all()
    few = with_options(150, seed=2)
    assert gated_reliability(few, POLICY)["bin"].nunique() == 7
    with pytest.raises(ValueError, match="n_bins=0"):
        gated_reliability(few, POLICY, n_bins=0)
    unknown = replace(made, right_option=torch.full((4000,), -1))
    with pytest.raises(ValueError, match="needs targets among"):
        gated_reliability(unknown, POLICY)


def test_sets_are_those_of_the_definition_and_hold_what_they_promise() -> None:
    pytest.importorskip("crepes")
    coverages = []
    for seed in range(40):
        first, other = with_options(120, seed=2 * seed + 1), with_options(200, seed=2 * seed + 2)
        found = conformal_sets(first, other, POLICY, confidence=0.8)
        assert set(found["confidence_wanted"]) == {0.8} and "wanted" not in found
        whole = found[found["layer"].isna()].set_index("quantile")
        coverages.append(whole["coverage"].tolist())
        score = 1 - first.logprobs[0, torch.arange(120), first.right_option].double().exp()
        rank = math.ceil(121 * 0.8) - 1
        inside = 1 - other.logprobs[0].double().exp() <= score.sort().values[rank] + 1e-12
        assert whole.loc["one", "size"] == pytest.approx(
            float(inside.double().sum(-1).mean()), abs=0.02
        )
        by_layer = found[found["quantile"].eq("one") & found["layer"].notna()]
        assert by_layer["n"].sum() == 200
    one, per_exit = np.mean(coverages, axis=0)
    assert 0.78 < one < 0.84 and 0.78 < per_exit < 0.88


@pytest.mark.parametrize("other", [{"model": "gpt"}, {"check": "tuned"}, {"keep": "last 4"}])
def test_sets_need_tables_of_one_kind(other: dict[str, str]) -> None:
    pytest.importorskip("crepes")
    first, test = with_options(60, seed=1), replace(with_options(60, seed=2), **other)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"the test table of .* expected the same model, check"):
        conformal_sets(first, test, POLICY)


def test_rows_that_are_shared_are_refused() -> None:
    made = with_options(60, seed=1)
    for other, message in (
        (made, "calibration and test share 60 prompts"),
        (made.of([1, 2, 3]), "share 3 prompts; expected none"),
    ):
        with pytest.raises((ValueError, ImportError), match=f"{message}|need crepes"):
            conformal_sets(made, other, POLICY)
        with pytest.raises(ValueError, match="share"):
            check_disjoint({"calibration": made, "test": other})
    check_disjoint({"a": made.of(range(30)), "b": made.of(range(30, 60))})


def test_a_study_takes_quantiles_from_half_of_its_test_prompts(tiny_llama: Model) -> None:
    pytest.importorskip("crepes")
    spade, check = Spade(tiny_llama), Confidence(LogitLens(tiny_llama))
    tables, chosen_on = (
        [replace(with_options(60, seed=seed), keep=spade.name, check=check.name)] for seed in (1, 2)
    )
    choice = tried_policies([POLICY], chosen_on[0])[0]
    rule = ExitRule(spade, check, "threshold", choice, tables[0].layers)
    rules = {("ours", None): rule, ("ours", 0.01): rule}
    found = conformal_of(rules, tables, chosen_on=chosen_on, confidence=0.9)
    halves = tables[0].of(range(30)), tables[0].of(range(30, 60))
    expected = conformal_sets(*halves, POLICY, confidence=0.9)
    for wanted, some in found.groupby("wanted", dropna=False):
        assert math.isnan(wanted) or wanted == 0.01
        some = some.drop(columns=["rule", "wanted"]).reset_index(drop=True)
        pd.testing.assert_frame_equal(some, expected)
    assert _conformal(found).count("ours") == 4
    with pytest.raises(ValueError, match="share"):
        conformal_of(rules, tables, chosen_on=tables, confidence=0.9)
    # Too few, and no right candidate.
    few = [tables[0].of(range(39))]
    unknown = [replace(tables[0], right_option=torch.full((60,), -1))]
    for some in (few, unknown):
        assert conformal_of(rules, some, chosen_on=chosen_on, confidence=0.9).empty
