"""The family of keep sets, and the ones that are learned."""

from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from tiny import spanned_prompts

from spade_lens import Keep, LogitLens, Model, Prompt, Spade, capture
from spade_lens.exits import ExitWarning, Patience, SpadeExit, compare_wall_clock, wall_clock
from spade_lens.exits.keep_search import attention_keep, common_places, greedy_keep, keep_family
from spade_lens.lenses import Reading


def test_the_family_by_name() -> None:
    prompt = spanned_prompts()[0]
    kept = {name: tuple(rule(prompt, 11)) for name, rule in keep_family(spanned_prompts()).items()}
    assert kept["start+answer"] == (0, 11)
    assert kept["last 4"] == (0, 8, 9, 10, 11)
    assert kept["query"] == (0, 8, 9, 10, 11)
    assert kept["labels"] == (0, 2, 4, 6, 11)
    assert kept["query+last 1 labels"] == (0, 6, 8, 9, 10, 11)
    assert kept["query+last 4 labels"] == kept["query+labels"] == (0, 2, 4, 6, 8, 9, 10, 11)
    plain = [Prompt(tokens=(1, 2, 3))]
    assert list(keep_family(plain)) == ["start+answer", *(f"last {w}" for w in (2, 4, 8, 16, 32))]


def test_places() -> None:
    prompt = spanned_prompts()[0]
    rule = Keep(places=(("labels", 0), ("labels", -9), ("", -2)))
    assert rule(prompt, 11) == (0, 2, 10, 11)
    assert rule(prompt, 1) == (0, 1)
    assert rule.name == "start+answer+labels[0]+labels[-9]+prompt[-2]"
    with pytest.raises(ValueError, match=r"names spans \['rule'\]"):
        Keep(places=(("rule", -1),))(prompt, 11)


def test_greedy_takes_what_helps_most(tiny_llama: Model) -> None:
    prompts = spanned_prompts()
    path = greedy_keep(tiny_llama, prompts, size=2, layers=[2])
    assert [len(rule.places) for rule in path] == [1, 2]
    assert path[0].places == path[1].places[:1]

    def score(rule: Callable[..., Any]) -> float:
        residuals = capture(tiny_llama, prompts)
        readings = [Reading(i, p.answer, rule(p, p.answer)) for i, p in enumerate(prompts)]
        final = Spade(tiny_llama).final_residuals(residuals, readings, [2])[0]
        with torch.no_grad():
            logprobs = tiny_llama.unembed(tiny_llama.final_norm(final)).log_softmax(-1)
            last = [residuals.slots(i, [p.answer])[0] for i, p in enumerate(prompts)]
            own = tiny_llama.unembed(tiny_llama.final_norm(residuals.layer(4)[last])).argmax(-1)
        return float(logprobs[torch.arange(len(prompts)), own].mean())

    best = score(path[0])
    for place in (("labels", -1), ("labels", -3), ("query", -1), ("", -3), ("", -5)):
        assert score(Keep(places=(place,))) <= best + 1e-5
    with pytest.raises(ValueError, match="size=0"):
        greedy_keep(tiny_llama, prompts, size=0, layers=[2])


def test_attention_ranks_by_the_models_own_patterns(tiny_llama: Model) -> None:
    prompts = spanned_prompts(2)
    places = common_places(prompts, 2)
    assert {("labels", -1), ("labels", -2), ("query", -2)} <= set(places)
    seen: dict[tuple[int, int], torch.Tensor] = {}
    for n, prompt in enumerate(prompts):

        def look(pattern: torch.Tensor, hook: Any, n: int = n) -> None:
            seen[n, int(hook.name.split(".")[1])] = pattern[0].mean(0)[-1]

        with tiny_llama.hooks([(lambda name: name.endswith("hook_pattern"), look)]):
            capture(tiny_llama, [prompt], layers=[4])
    weight = {
        place: sum(
            float(seen[n, block][Keep(start=False, last=0, places=(place,))(prompt, 11)[0]])
            for n, prompt in enumerate(prompts)
            for block in (2, 3)
        )
        for place in places
    }
    rule = attention_keep(tiny_llama, prompts, size=2, layer=2)
    assert list(rule.places) == sorted(places, key=lambda p: -weight[p])[:2]
    with pytest.raises(ValueError, match="layer from 0 to 3"):
        attention_keep(tiny_llama, prompts, size=1, layer=4)


def test_the_wall_clock_is_compared(tiny_llama: Model) -> None:
    prompts = spanned_prompts(3)
    with pytest.warns(ExitWarning):
        engine = SpadeExit(tiny_llama, LogitLens(tiny_llama), Patience(9), layers=[2])
    for baseline in ("answer logits", "left-padded", "all logits"):
        [result] = compare_wall_clock([engine], prompts, rounds=7, baseline=baseline)  # type: ignore[arg-type]
        assert 0 < result.low <= result.speedup <= result.high
        assert result.to_dict()["rounds"] == 7
    batches = [range(len(prompts))]
    answers = [
        wall_clock._plain(tiny_llama, prompts, batches, baseline)()[0].tolist()  # type: ignore[arg-type]
        for baseline in get_args(wall_clock.Baseline)
    ]
    assert len(answers) == 3
    assert all(same == answers[0] for same in answers)
    with pytest.raises(ValueError, match="rounds=0"):
        compare_wall_clock([engine], prompts, rounds=0)
    with pytest.raises(ValueError, match="0 engines of 0 models"):
        compare_wall_clock([], prompts)
