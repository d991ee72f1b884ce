"""Heuristic-guided search: what a plain reference without cache writes, alone and in a batch."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny import tiny, tiny_tokenizer

import spade_lens as sl
from spade_lens.generation import Deal, Generated, Sampling, heuristics, score_text
from spade_lens.generation.heuristics import (
    BannedWords,
    HeuristicError,
    KeywordCoverage,
    Repetition,
    TextLength,
    WeightedSum,
)
from spade_lens.generation.stops import Stops
from spade_lens.lenses.linear import AffineMaps
from spade_lens.prompts import Prompt

PROMPTS = [
    Prompt(tokens=tuple(tokens), text=f"prompt {i}")
    for i, tokens in enumerate(((1, *range(5, 14)), (1, *[30, 31, 32, 33] * 5), (1,), (1, 60, 61)))
]
N = 7


def vowels(prompt: str, continuation: str) -> float:
    """A heuristic without a maximum, which also reads the prompt."""
    return sum(continuation.count(c) for c in "aeiouAEIOU04") - 0.1 * len(prompt)


class Letters:
    """The fraction of some letters that occur: as keyword coverage, for single characters."""

    name, maximum = "letters", 1.0

    def __init__(self, letters: str) -> None:
        self.letters = letters

    def __call__(self, prompt: str, continuation: str) -> float:
        return sum(c in continuation for c in self.letters) / len(self.letters)


class Few:
    """Minus the number of distinct characters above two: highest at first, and falls."""

    name, maximum = "few", 0.0

    def __call__(self, prompt: str, continuation: str) -> float:
        return -float(max(0, len(set(continuation)) - 2))


HEURISTICS: list[Any] = [vowels, Letters("aE0~"), Few()]
STRATEGIES = [
    *(Deal(h, 4, 3, weight=2.0) for h in HEURISTICS),
    Deal(vowels, 3, 0, weight=1.0),
    Deal(Letters("xyz"), 12, 1, weight=30.0),
    Deal(Letters("aE0~"), 4, 4, weight=5.0, commit=3),
    Deal(vowels, 4, 3, weight=2.0, exit_layer=2),
    Deal(Letters("aE0~"), 5, 2, weight=5.0, exit_layer=3),
]


def reference(
    model: sl.Model, prompt: Prompt, n: int, strategy: Deal, stop: Any = ()
) -> tuple[list[int], list[float], list[int]]:
    """Search by the definition: every text runs whole and alone, and every candidate is judged."""
    (heuristic,) = strategy.several
    stops = Stops(model, stop)
    new: list[int] = []
    logprobs: list[float] = []
    greedy: list[int] = []

    def next_logprobs(tokens: list[int], layer: int | None, lens: Any = None) -> torch.Tensor:
        ids = torch.tensor([[*prompt.tokens, *tokens]])
        positions = torch.arange(ids.shape[1])[None]
        stop_at = model.n_layers if layer is None else layer
        resid = model.run_blocks(model.embed(ids), positions, 0, stop_at)
        last = resid[0, -1:] if lens is None else lens.maps(resid[0, -1:], layer)
        return model.logits(last)[0].log_softmax(dim=-1)

    while len(new) < n and not (new and stops.ends(new)):
        of_next = next_logprobs(new, None)
        top = of_next.topk(min(strategy.k, model.d_vocab))
        best: tuple[float, list[int]] = (-math.inf, [])
        for logprob, token in zip(top.values.tolist(), top.indices.tolist(), strict=True):
            path = [token]
            while len(path) < min(1 + strategy.lookahead, n - len(new)):
                if stops.ends([*new, *path]):
                    break
                ahead = next_logprobs([*new, *path], strategy.exit_layer, strategy.lens)
                path.append(int(ahead.argmax()))
            text = stops.cut(stops.text([*new, *path]))
            score = logprob + strategy.weight * heuristic(prompt.text, text)
            if score > best[0]:
                best = (score, path)
        # The last token of a path has not run, and is read again.
        ended = bool(stops.ends([*new, *best[1]]))
        ran = len(best[1]) - 1
        kept = best[1][: max(1, min(strategy.commit, ran))] if not ended or ran else best[1][:1]
        for token in kept:
            of_token = next_logprobs(new, None)
            logprobs.append(float(of_token[token]))
            greedy.append(int(of_token.argmax()) if len(kept) == 1 or token == kept[0] else token)
            new.append(token)
    return new, logprobs, greedy


@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda strategy: strategy.name)
def test_a_search_is_that_of_the_reference(tiny_llama: sl.Model, strategy: Deal) -> None:
    together = sl.generate(PROMPTS, N, model=tiny_llama, stop=(), strategy=strategy)
    plain = sl.generate(PROMPTS, N, model=tiny_llama, stop=())
    assert together.tokens != plain.tokens  # or nothing is tested
    assert together.greedy is not None
    logprobs, greedy = together.logprob.view(len(PROMPTS), N), together.greedy.view(-1, N)
    for i, prompt in enumerate(PROMPTS):
        with torch.no_grad():
            tokens, expected, likeliest = reference(tiny_llama, prompt, N, strategy)
        assert list(together.tokens[i]) == tokens
        assert greedy[i].tolist() == likeliest
        torch.testing.assert_close(logprobs[i], torch.tensor(expected), atol=1e-4, rtol=0)
        alone = sl.generate(prompt, N, model=tiny_llama, stop=(), strategy=strategy)
        assert alone.tokens[0] == together.tokens[i]


def test_a_linear_lens_reads_the_look_ahead(tiny_llama: sl.Model) -> None:
    d_model = tiny_llama.d_model
    up = torch.randn(2, d_model, d_model, generator=torch.Generator().manual_seed(0))
    lens = sl.lenses.LinearSpade(tiny_llama, AffineMaps((2, 3), up, torch.ones(2, d_model)))
    strategy = Deal(vowels, 4, 3, weight=2.0, exit_layer=2, lens=lens)
    assert "read at 2 by L-SPADE" in strategy.name
    written = sl.generate(PROMPTS, N, model=tiny_llama, stop=(), strategy=strategy)
    plain = sl.generate(PROMPTS, N, model=tiny_llama, stop=(), strategy=STRATEGIES[-2])
    assert written.tokens != plain.tokens  # or the lens reads as the head does
    for prompt, tokens in zip(PROMPTS, written.tokens, strict=True):
        with torch.no_grad():
            assert reference(tiny_llama, prompt, N, strategy)[0] == list(tokens)
    with pytest.raises(ValueError, match="without exit_layer=; expected the layer"):
        Deal(vowels, lens=lens)
    with pytest.raises(ValueError, match="fitted at layers|reads at"):
        sl.generate("ab", 2, model=tiny_llama, strategy=replace(strategy, exit_layer=1))


def test_stops_and_strings_end_texts_in_the_look_ahead(tiny_llama: sl.Model) -> None:
    strategy = Deal(Letters("aE0~"), 4, 3, weight=3.0)
    whole = sl.generate(PROMPTS[:2], N, model=tiny_llama, stop=(), strategy=strategy)
    stop = [whole.tokens[0][3], tiny_llama.word(whole.tokens[1][2])]
    ended = sl.generate(PROMPTS[:2], N, model=tiny_llama, stop=stop, strategy=strategy)
    assert set(ended.ended) != {"length"}
    for prompt, tokens in zip(PROMPTS[:2], ended.tokens, strict=True):
        with torch.no_grad():
            assert reference(tiny_llama, prompt, N, strategy, stop)[0] == list(tokens)


@pytest.mark.parametrize(
    "strategy",
    [
        Deal(vowels, weight=0),
        Deal(vowels, weight=0, exit_layer=2),
        Deal(vowels, k=1),
        Deal(lambda prompt, text: 7.0),
        Deal(lambda prompt, text: 7.0, exit_layer=1),
        Deal(vowels, 4, 3, weight=1e-9),
    ],
    ids=["weight 0", "weight 0, exit", "one candidate", "ties", "ties, exit", "light"],
)
def test_without_a_preference_it_is_greedy_text(tiny_llama: sl.Model, strategy: Deal) -> None:
    plain = sl.generate(PROMPTS, 12, model=tiny_llama, stop=())
    written = sl.generate(PROMPTS, 12, model=tiny_llama, stop=(), strategy=strategy)
    assert written.tokens == plain.tokens
    assert written.greedy is not None and torch.equal(written.greedy, written.token)
    torch.testing.assert_close(written.logprob, plain.logprob, atol=1e-4, rtol=0)


def test_a_maximum_saves_candidates_and_changes_nothing(tiny_llama: sl.Model) -> None:
    def as_function(prompt: str, text: str) -> float:
        return Letters("aE0")(prompt, text)

    options: dict[str, Any] = {"model": tiny_llama, "stop": ()}
    known = sl.generate(PROMPTS, 12, strategy=Deal(Letters("aE0"), 4, 3), **options)
    unknown = sl.generate(PROMPTS, 12, strategy=Deal(as_function, 4, 3), **options)
    assert known.tokens == unknown.tokens
    assert known.rounds[:, 1].sum() <= unknown.rounds[:, 1].sum()
    satisfied = sl.generate(PROMPTS, 12, strategy=Deal(BannedWords(["zebra"])), **options)
    # No candidate but the greedy one ever ran, except in the first step.
    assert satisfied.tokens == sl.generate(PROMPTS, 12, **options).tokens
    assert satisfied.rounds[:, 1].sum() <= len(PROMPTS) * (12 + 5 * 6)


def test_each_prompt_may_have_its_own_heuristic(tiny_llama: sl.Model) -> None:
    several = [Letters("aE"), Letters("xyz"), vowels, Few()]
    options: dict[str, Any] = {"model": tiny_llama, "stop": ()}
    together = sl.generate(PROMPTS, N, strategy=Deal(several, 4, 2), **options)
    for prompt, own, tokens in zip(PROMPTS, several, together.tokens, strict=True):
        assert sl.generate(prompt, N, strategy=Deal(own, 4, 2), **options).tokens[0] == tokens
    with pytest.raises(ValueError, match="4 heuristics were given for 1 prompts"):
        sl.generate("ab", 2, strategy=Deal(several), **options)


@pytest.mark.parametrize("name", ["gpt2", "mistral", "gemma2", "deepseek-v3", "gpt-oss"])
def test_any_architecture(name: str) -> None:
    model = sl.load(tiny(name), tokenizer=tiny_tokenizer())
    if model.decoder() is None:
        pytest.skip("without a cache")
    strategy = Deal(Letters("aE0~"), 3, 2, weight=3.0)
    written = sl.generate(PROMPTS[:2], 5, model=model, stop=(), strategy=strategy)
    with torch.no_grad():
        for prompt, tokens in zip(PROMPTS[:2], written.tokens, strict=True):
            assert reference(model, prompt, 5, strategy)[0] == list(tokens)


def test_patches_act_and_captures_are_of_the_text(tiny_llama: sl.Model) -> None:
    patch = sl.Patch(2, positions="all", values=torch.randn(32), mode="add")
    options: dict[str, Any] = {"model": tiny_llama, "stop": (), "patches": [patch]}
    strategy = Deal(Letters("aE0~"), 4, 3, weight=3.0, commit=2)
    patched = sl.generate(PROMPTS, N, strategy=strategy, **options)
    assert patched.tokens != sl.generate(PROMPTS, N, model=tiny_llama, strategy=strategy).tokens
    captured = sl.generate(PROMPTS, N, strategy=strategy, layers=[1, 3], **options)
    assert captured.tokens == patched.tokens
    assert captured.residuals is not None
    whole = [
        Prompt(tokens=(*p.tokens, *new[:-1]))
        for p, new in zip(PROMPTS, captured.tokens, strict=True)
    ]
    expected = sl.capture(tiny_llama, whole, layers=[1, 3], positions="all", patches=[patch])
    at = {
        (int(i), int(p)): n
        for n, (i, p) in enumerate(zip(expected.prompt, expected.position, strict=True))
    }
    wanted = [
        at[int(i), int(p)]
        for i, p in zip(captured.residuals.prompt, captured.residuals.position, strict=True)
    ]
    torch.testing.assert_close(
        captured.residuals.stack, expected.stack[:, wanted], atol=1e-4, rtol=1e-4
    )


def test_up_to_the_end_of_the_context(tiny_llama: sl.Model) -> None:
    prompt = Prompt(tokens=(1, *([30, 31, 32, 33] * 30)))
    n = tiny_llama.n_ctx - len(prompt) + 1
    strategy = Deal(vowels, 3, 4, weight=1.0)
    assert len(sl.generate(prompt, n, model=tiny_llama, stop=(), strategy=strategy).token) == n


def test_where_the_search_acted_is_in_the_table_and_saved(
    tiny_llama: sl.Model, tmp_path: Any
) -> None:
    written = sl.generate(PROMPTS, N, model=tiny_llama, stop=(), strategy=STRATEGIES[0])
    frame = written.to_frame()
    assert written.greedy is not None
    assert frame["greedy_token_id"].tolist() == written.greedy.tolist()
    assert (frame["token"] != frame["greedy_token"]).any()
    again = Generated.load(written.save(tmp_path / "some"))
    assert again.greedy is not None and torch.equal(again.greedy, written.greedy)
    assert "greedy_token" not in sl.generate("ab", 2, model=tiny_llama).to_frame()


def _raises(prompt: str, text: str) -> float:
    if len(text) > 6:
        raise KeyError("no such thing")
    return 0.0


@pytest.mark.parametrize(
    ("heuristic", "match"),
    [
        (_raises, "'_raises' raised KeyError: 'no such thing', at step 4 of prompt"),
        (lambda p, t: math.nan, r"gave nan, at step 0 of prompt \d, for the continuation"),
        (lambda p, t: math.inf, "gave inf"),
        (lambda p, t: 10**400, "gave 1000"),
        (lambda p, t: "good", "gave 'good'"),
        (lambda p, t: None, "gave None"),
        (lambda p, t: torch.ones(2), r"gave \[1.0, 1.0\]"),
    ],
)
def test_a_heuristic_that_fails_loses_nothing(
    tiny_llama: sl.Model, heuristic: Callable[[str, str], Any], match: str
) -> None:
    with pytest.raises(HeuristicError, match=match) as caught:
        sl.generate(PROMPTS, 9, model=tiny_llama, stop=(), strategy=Deal(heuristic, 4, 2))
    assert len(caught.value.texts) == len(PROMPTS)
    assert {len(text) for text in caught.value.texts} == {caught.value.step}
    assert all(t in (caught.value.text[: len(t)], *caught.value.texts) for t in caught.value.texts)


def test_more_than_the_maximum_is_refused(tiny_llama: sl.Model) -> None:
    class Wrong(Letters):
        maximum = -0.5

    with pytest.raises(HeuristicError, match="more than its maximum -0.5"):
        sl.generate("ab", 4, model=tiny_llama, strategy=Deal(Wrong("a"), 4, 1))


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Deal(vowels, commit=8), "commit=8"),
        (lambda: Deal(vowels, commit=2, exit_layer=1), "expected commit=1"),
        (lambda: Deal(vowels, lookahead=0, exit_layer=1), "expected some look-ahead"),
        (lambda: Deal(vowels, weight=math.inf), "weight=inf"),
        (lambda: KeywordCoverage([]), "at least one"),
        (lambda: KeywordCoverage(["two words"]), "are none"),
        (lambda: TextLength(5, 3), "most=3"),
        (lambda: WeightedSum([vowels], [1.0, 2.0]), "one number for each"),
    ],
)
def test_what_is_refused(make: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make()


def test_sampling_hooks_and_layers_beyond_the_model_are_refused(tiny_llama: sl.Model) -> None:
    options: dict[str, Any] = {"model": tiny_llama, "strategy": Deal(vowels)}
    with pytest.raises(ValueError, match="a search takes the best candidate"):
        sl.generate("ab", 2, sampling=Sampling(), **options)
    with pytest.raises(ValueError, match="expected one below 4"):
        sl.generate("ab", 2, model=tiny_llama, strategy=Deal(vowels, exit_layer=4))
    with pytest.raises(TypeError, match="decides which tokens are written"):
        score_text("ab", "c", **options)
    with (
        tiny_llama.hooks([("blocks.1.hook_resid_post", lambda resid, hook: resid)]),
        pytest.raises(sl.UnsupportedModelError, match="needs a key/value cache"),
    ):
        sl.generate("ab", 2, **options)


def test_a_slow_heuristic_is_told(tiny_llama: sl.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spade_lens.generation.deal.SLOW_SECONDS", 0.0)
    with pytest.warns(UserWarning, match="vowels took 0 seconds at step 0, for 1 texts"):
        sl.generate("ab", 3, model=tiny_llama, strategy=Deal(vowels, 3, 1))


def test_heuristics_that_come_with_it() -> None:
    coverage = KeywordCoverage(["bake", "carry", "swim", "bus", "Key"])
    assert coverage.found("Baking, she carries keys; a swimmer's buses.") == [True] * 5
    assert coverage.found("bak carr swam bush keyhole") == [False] * 5
    assert BannedWords(["good"])("", "Goods are good.") == -2
    assert TextLength(0, 5, "characters")("", "1234567890") == -1
    assert Repetition(1)("", "") == 0 and Repetition(1)("", "a a a a") == -0.75
    both = WeightedSum([coverage, vowels])
    assert both.maximum is None and both.weights == [1.0, 1.0]
    both.weights[:] = [2.0, 0.0]
    assert both.maximum == 2.0 and both("p", "bus") == 0.4
    both.weights[0] = -1.0
    with pytest.raises(ValueError, match=r"weights\[0\]=-1.0"):
        both("p", "bus")
    assert heuristics.KeywordCoverage is KeywordCoverage


def test_weights_that_change_while_text_is_written(tiny_llama: sl.Model) -> None:
    both = WeightedSum([Letters("aE0~"), vowels], [1.0, 0.0])
    options: dict[str, Any] = {"model": tiny_llama, "stop": ()}
    first = sl.generate(PROMPTS[0], 8, strategy=Deal(both, 5, 2, weight=4), **options)

    def switch(prompt: int, token: int, text: str) -> None:
        both.weights[:] = [0.0, 1.0]

    changed = sl.generate(
        PROMPTS[0], 8, strategy=Deal(both, 5, 2, weight=4), on_token=switch, **options
    )
    assert changed.tokens[0][0] == first.tokens[0][0] and changed.tokens != first.tokens
