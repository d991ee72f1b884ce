"""Linear lenses fitted to the candidates of prompts: they learn, shrink, resume and refuse."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny

from spade_lens import Keep, LogitLens, Model, Prompt, Spade, load, read
from spade_lens.lenses.fitting import candidates
from spade_lens.lenses.fitting.fit import fit
from spade_lens.lenses.fitting.options import Options, Problem
from spade_lens.lenses.fitting.plan import CandidatePlan
from spade_lens.lenses.linear import AffineMaps, CandidateHead, LinearSpade
from spade_lens.lenses.saving import load_lens

KEEP = Keep(last=2)
FEW: dict[str, Any] = {"ridges": (1.0, 0.1, 0.01), "folds": 3, "layers": [1, 3]}


def decisions(n: int, *, seed: int = 0) -> list[Prompt]:
    """Prompts whose right answer is told by their last token; candidates differ by prompt."""
    draws = torch.Generator().manual_seed(seed)
    prompts = []
    for i in range(n):
        tokens = torch.randint(20, 90, (6,), generator=draws).tolist()
        kind = i % 2
        candidates = ((5, 6), (5, 6, 7 + i % 5))[i % 3 > 0]
        tokens[-1] = 10 + kind
        prompts.append(Prompt((1, *tokens), candidates=candidates, target=5 + kind))
    return prompts


def accuracy(lens: LinearSpade | CandidateHead | LogitLens, prompts: list[Prompt]) -> float:
    return float(read(prompts, lens, layers=[3]).to_frame()["prefers"].mean())


def test_a_head_learns_the_right_answer(tiny_llama: Model) -> None:
    head = fit("candidates", tiny_llama, decisions(120), target="right", **FEW)
    assert isinstance(head, CandidateHead)
    assert accuracy(head, decisions(40, seed=1)) > 0.8
    assert accuracy(LogitLens(tiny_llama), decisions(40, seed=1)) < 0.6
    assert head.about["ridge"][1] is not None
    assert set(head.held_out["lens"]) == {"candidate head", "logit lens"}


@torch.no_grad()
def test_task_l_spade_comes_closer_to_the_same_keep_set(tiny_llama: Model) -> None:
    lens = fit("candidates", tiny_llama, decisions(60), keep=KEEP, **FEW)
    assert isinstance(lens, LinearSpade)
    assert lens.name == "task L-SPADE (start+last 2)"
    figures = lens.held_out.set_index(["layer", "lens"])["kl_to_spade"].unstack()
    assert (figures[lens.name] < figures["logit lens"]).all()
    assert figures[lens.name][1] < 0.7 * figures["logit lens"][1]
    assert figures["SPADE"].abs().max() < 1e-6
    # On prompts that no fold has seen.
    new = decisions(40, seed=1)
    options = Options.of(tiny_llama, [p.candidates for p in new])
    rows = candidates._rows(
        tiny_llama, new, (1,), Spade(tiny_llama, keep=KEEP), candidates.Checkpoint(None, {})
    )
    assert rows.spade is not None
    wanted = options.logprobs(rows.spade[0]).exp()
    start = rows.start[0]
    ours, theirs = (options.loss(h, wanted).mean() for h in (lens.at(start, 1), start))
    least = options.loss(rows.spade[0], wanted).mean()
    assert ours - least < 0.7 * (theirs - least)


@pytest.mark.parametrize("rank", [None, 3])
def test_a_strong_ridge_leaves_the_start_as_it_is(tiny_llama: Model, rank: int | None) -> None:
    draws = torch.Generator().manual_seed(0)
    down = None if rank is None else 0.1 * torch.randn(4, rank, 32, generator=draws)
    up = 0.1 * torch.randn(4, 32, rank or 32, generator=draws)
    bias = 0.1 * torch.randn(4, 32, generator=draws)
    start = LinearSpade(tiny_llama, AffineMaps((0, 1, 2, 3), up, bias, down))
    options = FEW | {"ridges": (1e6,)}
    lens = fit("candidates", tiny_llama, decisions(12), start=start, **options)
    h = torch.randn(5, 32)
    for layer in (1, 3):
        assert torch.allclose(lens.at(h, layer), start.at(h, layer), atol=1e-4)
    learned = fit("candidates", tiny_llama, decisions(12), start=start, target="right", **FEW)
    assert not torch.allclose(learned.at(h, 3), start.at(h, 3), atol=1e-2)
    assert learned.maps.rank == (None if rank is None else 3 + 11)


def test_what_is_added_is_no_more_than_the_components_allow(tiny_llama: Model) -> None:
    head = fit("candidates", tiny_llama, decisions(40), target="right", rank=2, **FEW)
    assert head.maps.rank == 2


@torch.no_grad()
def test_a_weaker_ridge_fits_the_rows_better(tiny_llama: Model) -> None:
    prompts = decisions(20)
    options = Options.of(tiny_llama, [p.candidates for p in prompts])
    wanted = (options.ids == torch.tensor([[p.target] for p in prompts])).float()
    x = torch.randn(20, 32, generator=torch.Generator().manual_seed(0))
    path = Problem(x, x, options, wanted, 32).solve([10.0, 1.0, 0.1, 0.01])
    losses = [float(options.loss(x + added(x), wanted).mean()) for added in path]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.6 * losses[0]


def test_options_are_the_models_own_logits(tiny_llama: Model) -> None:
    prompts = decisions(5)
    options = Options.of(tiny_llama, [p.candidates for p in prompts])
    h = torch.randn(5, 32)
    whole = replace(options, unembedding=None)
    assert options.unembedding is not None
    assert torch.allclose(options.logprobs(h), whole.logprobs(h), atol=1e-5)
    expected = tiny_llama.logits(h)[1, list(prompts[1].candidates)].log_softmax(-1)
    assert torch.allclose(options.logprobs(h)[1, :3], expected, atol=1e-5)


def test_seeds_decide_the_folds_alone(tiny_llama: Model) -> None:
    one, same, other = (
        fit("candidates", tiny_llama, decisions(20), target="right", seed=seed, **FEW)
        for seed in (0, 0, 1)
    )
    assert torch.equal(one.maps.up, same.maps.up)
    assert not one.held_out.equals(other.held_out)


def test_saved_loaded_and_refused(tiny_llama: Model, tmp_path: Path) -> None:
    head = fit("candidates", tiny_llama, decisions(12), target="right", **FEW)
    head.save(tmp_path)
    again = load_lens(tmp_path, tiny_llama)
    assert isinstance(again, CandidateHead)
    assert torch.equal(again.maps.up, head.maps.up)
    assert again.held_out.equals(head.held_out)
    with pytest.raises(ValueError, match="belongs to"):
        load_lens(tmp_path, load(tiny("gpt2")))


def test_an_interrupted_fit_goes_on(
    tiny_llama: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = decisions(20)
    whole = fit("candidates", tiny_llama, prompts, keep=KEEP, **FEW)

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(candidates._Decisions, "by_folds", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fit("candidates", tiny_llama, prompts, keep=KEEP, checkpoint=tmp_path, **FEW)
    with monkeypatch.context() as patched:
        patched.setattr(candidates, "rows_at", interrupted)  # all rows are there already
        resumed = fit("candidates", tiny_llama, prompts, keep=KEEP, checkpoint=tmp_path, **FEW)
    assert torch.equal(resumed.maps.up, whole.maps.up)
    assert not list(tmp_path.iterdir())


def test_fits_to_candidates_refuse_what_cannot_be(tiny_llama: Model) -> None:
    prompts = decisions(20)
    bare = [*prompts[:5], Prompt((1, 2, 3)), *prompts[5:]]
    wrong = [*prompts[:5], replace(prompts[5], target=90, target_tokens=()), *prompts[6:]]
    for message, given, options in (
        ("No prompts were given", None, {}),
        ("Prompt 5 has 0 candidates", bare, {}),
        ("Prompt 5 has no target among", wrong, {"target": "right"}),
        ("5 prompts were given for 3 folds", prompts[:5], {"folds": 3}),
        ("target='left' was given", prompts, {"target": "left"}),
        ("no SPADE is run for", prompts, {"target": "right", "keep": KEEP}),
        ("expected one or more numbers above 0", prompts, {"ridges": (0.0,)}),
        ("folds=1 was given", prompts, {"folds": 1}),
        ("rank=0 was given", prompts, {"rank": 0}),
        ("Only layer 4 was asked for", prompts, {"layers": [4]}),
    ):
        with pytest.raises(ValueError, match=message):
            fit("candidates", tiny_llama, given, **options)
    with pytest.raises(TypeError, match="start"):
        CandidatePlan(start=LogitLens(tiny_llama))  # type: ignore[arg-type]
    start = LinearSpade(tiny_llama, AffineMaps.identity([1], 32))
    with pytest.raises(ValueError, match=r"Layers \[3\] were asked for; start= has maps for"):
        fit("candidates", tiny_llama, prompts, start=start, layers=[1, 3])
    with pytest.raises(ValueError, match="start= is a lens of"):
        fit("candidates", load(tiny("llama")), prompts, start=start, layers=[1])
    with pytest.raises(TypeError, match="Options \\['passes'\\] were given"):
        fit("candidates", tiny_llama, prompts, passes=3)
