"""Keep set, check and policy, chosen together."""

import warnings
from inspect import unwrap  # past the type checks that run in tests only
from typing import Any

import pytest
import torch
from tiny import spanned_prompts

from spade_lens import Keep, LogitLens, Model, Prompt, calibrate
from spade_lens.exits import (
    Calibration,
    Confidence,
    ExitWarning,
    FixedLayer,
    sweep,
)
from spade_lens.exits.families import families
from spade_lens.exits.keep_search import keep_family, keep_sets


@pytest.fixture(scope="module")
def found(tiny_llama: Model) -> Calibration:
    prompts = spanned_prompts(12)
    keep = {name: keep_family(prompts)[name] for name in ("last 4", "query", "query+labels")}
    return calibrate(tiny_llama, prompts, keep=keep, layers=[1, 3])


def test_the_best_is_the_cheapest_within_the_loss(found: Calibration) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExitWarning)  # a random model: hardly anything is safe
        for loss in (None, 0.1, 0.5):
            best = found.best(loss, margin=0, measure="agreement")
            # By another way: every policy of every table, one after the other.
            swept = [
                sweep(table, [*policies])
                for table in found.tables
                for policies in families(table).values()
            ]
            within = [
                row.speedup
                for frame in swept
                for row in frame.itertuples()
                if 1 - row.agreement <= (loss or 0.0) + 1e-9
            ]
            assert best.choice.speedup == pytest.approx(max([1.0, *within]))
            assert best.choice.loss <= (loss or 0.0) + 1e-9
            assert found.tried(loss, margin=0, measure="agreement")[
                "speedup"
            ].max() == pytest.approx(best.choice.speedup)


def test_every_keep_set_is_tried_with_every_check(found: Calibration) -> None:
    tried = found.tried(0.5, measure="agreement")
    assert set(tried["keep"]) == {"last 4", "query", "query+labels"}
    assert set(tried.loc[tried["keep"] == "query", "check"]) == {
        "",
        "logit lens, entropy",
        "query, entropy",
    }
    assert set(tried.loc[tried["check"] == "", "family"]) == {"fixed layer"}
    assert tried["speedup"].is_monotonic_decreasing


def test_the_engine_does_what_was_simulated(tiny_llama: Model, found: Calibration) -> None:
    prompts = spanned_prompts(12)
    for wanted in ({"family": "fixed layer"}, {"check": "logit lens, entropy"}, {"keep": "last 4"}):
        rule = found.best(1.0, measure="agreement", **wanted)  # type: ignore[arg-type]
        expected = rule.table(found.tables).simulate(rule.policy)
        trace = rule.engine().run(prompts)
        assert torch.equal(trace.exit_layer, expected.exit_layer)
        assert torch.equal(trace.answer, expected.answer)
        assert torch.equal(trace.flops, expected.flops)
        assert expected.speedup == pytest.approx(rule.choice.speedup)
    assert found.best(1.0, family="fixed layer", measure="agreement").check == ""


@pytest.mark.filterwarnings("ignore:The policy:spade_lens.exits.ExitWarning")  # four prompts
def test_keep_sets_of_ones_own(tiny_llama: Model) -> None:
    def run(**arguments: Any) -> Calibration:
        prompts = spanned_prompts(4)
        return calibrate(tiny_llama, prompts, layers=[2], **arguments)

    agreement: Any = {"measure": "agreement"}
    assert run(keep=Keep(last=3), checks="logit").best(1.0, **agreement).spade.name == (
        "start+last 3"
    )
    several = run(keep={"a": Keep(), "b": Keep(last=2)}, checks="own")
    assert {t.check for t in several.tables} == {"a, entropy", "b, entropy"}
    listed = run(keep=[Keep(last=3), "last 2"], checks="own")
    assert {t.check for t in listed.tables} == {"start+last 3, entropy", "last 2, entropy"}
    with pytest.raises(ValueError, match=r"Two keep rules are called 'a'. Give rules by name"):
        run(keep=[Keep(name="a"), Keep(last=2, name="a")])
    with pytest.raises(ValueError, match=r"no keep set \['lst 8'\].*rules such as Keep\(last=8\)"):
        run(keep=[Keep(), "lst 8"])
    margin = run(keep=Keep(), checks=[Confidence(LogitLens(tiny_llama), "margin"), "own"])
    best = margin.best(1.0, check="logit lens, margin", **agreement)
    assert best.check == "logit lens, margin"
    fixed = run(keep=Keep()).best(1.0, family="fixed layer", **agreement)
    assert isinstance(fixed.policy, FixedLayer)
    every = run(keep="auto", checks="own").setup.answerers
    assert {spade.name for spade in every} == set(keep_family(spanned_prompts(4)))
    with pytest.raises(ValueError, match=r"no keep set \['all'\]"):
        unwrap(keep_sets)(tiny_llama, spanned_prompts(4), "all", [2])
    with pytest.raises(ValueError, match="have one name"):
        run(keep=Keep(), checks=[LogitLens(tiny_llama), LogitLens(tiny_llama)])
    bare = calibrate(tiny_llama, Prompt(tokens=(1, 2, 3)), keep=Keep(), layers=2)
    for measure, message in (("accuracy", "no calibration prompts with a"), ("f1", "measure='f1'")):
        with pytest.raises(ValueError, match=message):
            bare.best(0.1, measure=measure)
    with pytest.raises(ValueError, match="Nothing was tried with {'family': 'best'}"):
        several.best(0.1, family="best", **agreement)
    with pytest.raises(ValueError, match="loss=-1"):
        several.best(-1, **agreement)


def test_a_margin_makes_the_choice_more_careful(found: Calibration) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExitWarning)
        plain, careful = (
            found.best(0.4, margin=margin, measure="agreement").choice for margin in (0, 1)
        )
    # By hand: of n prompts some lose an answer, and some gain one.
    n, lost, gained = careful.n, careful.lost, careful.lost - careful.loss
    error = (lost * (1 - careful.loss) ** 2 + gained * (-1 - careful.loss) ** 2) / n
    error += (1 - lost - gained) * careful.loss**2 / n
    assert careful.loss_error == pytest.approx(error**0.5)
    assert careful.loss + careful.loss_error <= 0.4 + 1e-9
    assert careful.speedup <= plain.speedup
    with pytest.raises(ValueError, match="margin=-1"):
        found.best(0.4, margin=-1, measure="agreement")
