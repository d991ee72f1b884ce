"""Whole answers: scored and written on shared caches as each would be alone."""

from dataclasses import replace
from typing import Any

import pandas as pd
import pytest
import torch
from tiny import tiny

import spade_lens as sl
from spade_lens.generation import ExitPrefill, Speculate, score_answers, score_text
from spade_lens.prompts import Prompt
from spade_lens.prompts.answers import with_answer

STRATEGIES = [None, ExitPrefill(2, sl.Keep(last=3)), ExitPrefill(1)]
STOP = 40


def asked() -> list[Prompt]:
    """Prompts of different lengths, with answers and candidates of different lengths."""
    draws = torch.Generator().manual_seed(4)

    def some(n: int) -> tuple[int, ...]:
        return tuple(torch.randint(5, 90, (n,), generator=draws).tolist())

    prompts = [Prompt(tokens=(1, *some(n))) for n in (7, 3, 0, 12, 3)]
    each = [[some(n) for n in lengths] for lengths in ((3, 1, 2), (1, 4), (2, 2, 2, 1), (2,), (4,))]
    given = zip(prompts, each, strict=True)
    return [with_answer(p, a[0], a[::-1] if len(a) > 1 else ()) for p, a in given]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("batch_size", [None, 2, 1])
def test_candidates_are_scored_as_each_alone(
    tiny_llama: sl.Model, strategy: Any, batch_size: int | None
) -> None:
    prompts = asked()
    settings = sl.Settings(batch_size=batch_size)
    options: dict[str, Any] = {"model": tiny_llama, "strategy": strategy}
    table = score_answers(prompts, stop=STOP, settings=settings, **options)
    texts = sl.generate(prompts, 8, stop=STOP, **options)
    for i, prompt in enumerate(prompts):
        row = table.iloc[i]
        alone = {
            one: score_text(prompt, [one], **options).iloc[0]
            for one in {prompt.target_tokens, *prompt.candidate_tokens}
        }
        own = alone[prompt.target_tokens]
        assert row["logprob"] == pytest.approx(own["logprob"], abs=1e-4)
        assert row["logprob_per_token"] == pytest.approx(own["logprob"] / len(prompt.target_tokens))
        assert row["greedy"] == own["greedy"]
        tokens = texts.tokens[i][: len(prompt.target_tokens) + 4]
        assert row["written"] == tiny_llama.tokenizer.decode(
            [t for t in tokens if t != STOP], skip_special_tokens=True
        )
        if not prompt.candidates:
            assert pd.isna(row["choice_text"]) and row["among"] == "vocabulary"
            assert row["correct_first_token"] == (tokens[0] == prompt.target)
            continue
        best = max(alone, key=lambda one: alone[one]["logprob"])
        longest = max(alone, key=lambda one: alone[one]["logprob"] / len(one))
        assert row["choice_text"] == tiny_llama.tokenizer.decode(best)
        assert row["correct_scored"] == (best == prompt.target_tokens)
        assert row["correct_scored_per_token"] == (longest == prompt.target_tokens)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_models_own_text_is_right_by_every_count(tiny_llama: sl.Model, strategy: Any) -> None:
    """The target is what the model writes, so every way of counting says so."""
    prompts = asked()
    options: dict[str, Any] = {"model": tiny_llama, "strategy": strategy}
    written = sl.generate(prompts, 6, stop=(), **options).tokens
    own = []
    for prompt, tokens in zip(prompts, written, strict=True):
        n = next((n for n in (4, 3, 2, 1) if tokens[n] not in tokens[:n]), 0)
        if n == 0:  # it repeats itself, and nothing ends it
            continue
        others = [one for one in prompt.candidate_tokens if one[0] != tokens[0]]
        own.append((with_answer(prompt, tokens[:n], [*others, tokens[:n]]), tokens[n]))
    assert len(own) > 1
    for prompt, stop in own:
        row = score_answers(prompt, stop=stop, **options).iloc[0]
        assert row["greedy"] and row["correct_first_token"] and row["correct_generated"]
        longer = with_answer(prompt, (*prompt.target_tokens, 7))
        row = score_answers(longer, stop=stop, **options).iloc[0]
        assert row["correct_first_token"] and not row["correct_generated"]


def test_copying_the_query_is_right_by_the_first_token_alone(tiny_llama: sl.Model) -> None:
    """What the issue complains of: ``pig -> pig|let``."""
    [copied] = sl.generate("pig>", 2, model=tiny_llama, stop=()).tokens
    prompt = replace(
        with_answer(tiny_llama.prompt("pig>"), (copied[0], (copied[1] + 1) % 90 + 5)),
        ambiguous=True,
    )
    row = score_answers(prompt, model=tiny_llama).iloc[0]
    assert row["correct_first_token"] and row["ambiguous"]
    assert not row["greedy"] and not row["correct_generated"]


def test_first_tokens_are_those_of_a_read(tiny_llama: sl.Model) -> None:
    prompts = [replace(p, candidates=(), candidate_tokens=()) for p in asked()]
    frame = sl.read(prompts, "spade", model=tiny_llama, layers=[2]).to_frame()
    scores = score_answers(prompts, model=tiny_llama, strategy=ExitPrefill(2))
    assert scores["correct_first_token"].tolist() == frame["correct"].tolist()


def test_hooks_and_models_without_a_cache(tiny_llama: sl.Model) -> None:
    prompts = asked()
    plain = score_answers(prompts, model=tiny_llama, stop=STOP)
    with tiny_llama.hooks([("blocks.1.hook_resid_post", lambda resid, hook: resid)]):
        hooked = score_answers(prompts, model=tiny_llama, stop=STOP)
    pd.testing.assert_frame_equal(plain, hooked, check_exact=False, atol=1e-4)


def test_texts_near_the_end_of_the_context(tiny_llama: sl.Model) -> None:
    full = Prompt(tokens=(1, *range(5, 5 + tiny_llama.n_ctx - 1 - 60), *[9] * 59))
    fits = with_answer(full, (7, 8))
    assert len(score_answers(fits, model=tiny_llama)) == 1
    with pytest.raises(ValueError, match="do not fit the context"):
        score_answers(with_answer(full, (7, 8, 9)), model=tiny_llama)


def test_accuracies_have_their_names_and_intervals(tiny_llama: sl.Model) -> None:
    both = [score_answers(asked(), model=tiny_llama, strategy=s) for s in STRATEGIES[:2]]
    summary = sl.stats.summarise(both)
    assert summary["strategy"].unique().tolist() == ["plain", "exit prefill at 2, start+last 3"]
    ways = ["first_token", "scored", "scored_per_token", "generated"]
    assert summary["measure"].tolist()[:5] == [f"accuracy_{way}" for way in ways] + ["greedy"]
    assert summary.query("measure == 'accuracy_scored'")["n"].tolist() == [3, 3]
    assert (summary["low"] <= summary["mean"]).all() and (summary["mean"] <= summary["high"]).all()


def test_models_are_not_averaged_together(tiny_llama: sl.Model) -> None:
    models = [tiny_llama, sl.load(tiny("gpt2"))]
    each = [score_answers(asked(), model=model, stop=STOP) for model in models]
    together = sl.stats.summarise(each)
    assert together["model"].unique().tolist() == [model.name for model in models]
    for scores, model in zip(each, models, strict=True):
        alone = sl.stats.summarise(scores)
        assert "model" not in alone.columns
        rows = together[together["model"] == model.name].drop(columns="model")
        pd.testing.assert_frame_equal(rows.reset_index(drop=True), alone)


def test_what_is_refused(tiny_llama: sl.Model) -> None:
    with pytest.raises(ValueError, match="have no target"):
        score_answers("ab", model=tiny_llama)
    with pytest.raises(TypeError, match="decides which tokens are written"):
        score_answers(asked(), model=tiny_llama, strategy=Speculate())
    with pytest.raises(ValueError, match="expected the whole answer among them"):
        score_answers(
            Prompt(tokens=(1,), target=7, target_tokens=(7, 5), candidates=(7, 8)),
            model=tiny_llama,
        )
    with pytest.raises(ValueError, match="more_tokens=0"):
        score_answers(asked(), model=tiny_llama, more_tokens=0)


@pytest.mark.parametrize("name", ["gpt2", "mistral", "gemma2"])
def test_other_architectures(name: str) -> None:
    model = sl.load(tiny(name))
    prompts = asked()
    scores = score_answers(prompts, model=model, stop=STOP)
    alone = [score_text(p, [p.target_tokens], model=model)["logprob"].iloc[0] for p in prompts]
    torch.testing.assert_close(
        torch.tensor(scores["logprob"]), torch.tensor(alone), atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_model_that_breaks_gives_no_answers(strategy: Any) -> None:
    hf_model = tiny("llama")
    model, prompts = sl.load(hf_model), asked()[:2]
    with torch.no_grad():
        hf_model.model.norm.weight[0] = torch.nan
    for run in (
        lambda: score_answers(prompts, model=model, strategy=strategy, stop=STOP),
        lambda: score_text(prompts, [(5,), (6, 7)], model=model, strategy=strategy),
        lambda: sl.generate(prompts, 3, model=model, strategy=strategy),
    ):
        with pytest.raises((ValueError, sl.UnsupportedModelError), match="NaN or infinite|not fin"):
            run()
