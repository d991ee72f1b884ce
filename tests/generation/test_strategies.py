"""Drafts change nothing in greedy text and in sampled distributions; an exit goes on exactly."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from drafting import PROMPTS, check_marginals
from tiny import ARCHITECTURES, tiny

import spade_lens as sl
from spade_lens.generation import (
    ExitPrefill,
    LayerExit,
    PromptLookup,
    Sampling,
    Speculate,
)
from spade_lens.generation.draft_length import Acceptance


class Follows:
    """Drafts the text that is known to come, with every third token wrong."""

    name, layer = "follows", 0

    def __init__(self, texts: Sequence[Sequence[int]]) -> None:
        self._texts = texts

    def draft(self, tokens: Sequence[int], most: int) -> list[int]:
        for text in self._texts:
            if tuple(text[: len(tokens)]) == tuple(tokens):
                ahead = list(text[len(tokens) : len(tokens) + most])
                return [t if (len(tokens) + i) % 3 else 3 for i, t in enumerate(ahead)]
        return []


@pytest.mark.parametrize(
    ("layer", "draft_tokens", "eta"),
    [(1, 1, 0.0), (1, 6, 0.012), (2, 3, 0.0), (2, 6, 0.012), (3, 6, 0.9), (3, 2, 0.0)],
)
def test_drafts_of_a_layer_change_nothing(
    tiny_llama: sl.Model, layer: int, draft_tokens: int, eta: float
) -> None:
    plain = sl.generate(PROMPTS, 12, model=tiny_llama, stop=())
    strategy = Speculate(LayerExit(layer), draft_tokens, eta, adaptive=False)
    drafted = sl.generate(PROMPTS, 12, model=tiny_llama, stop=(), strategy=strategy)
    assert drafted.tokens == plain.tokens
    torch.testing.assert_close(drafted.logprob, plain.logprob, atol=1e-4, rtol=0)
    alone = [
        sl.generate(p, 12, model=tiny_llama, stop=(), strategy=strategy).tokens[0] for p in PROMPTS
    ]
    assert tuple(alone) == plain.tokens


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_drafts_change_nothing_in_any_architecture(name: str) -> None:
    model = sl.load(tiny(name))
    plain = sl.generate(PROMPTS, 12, model=model, stop=())
    whole = [[*p.tokens, *t] for p, t in zip(PROMPTS, plain.tokens, strict=True)]
    layer = max(1, model.n_layers // 2)
    drafters = [Speculate(Follows(whole)), Speculate(), Speculate([PromptLookup(2), LayerExit(1)])]
    if layer < model.n_layers:
        drafters.append(Speculate(LayerExit(layer), 3, adaptive=False))
    for strategy in drafters if model.decoder() is not None else []:
        drafted = sl.generate(PROMPTS, 12, model=model, stop=(), strategy=strategy)
        assert drafted.tokens == plain.tokens, strategy.name


def test_what_is_accepted_is_counted(tiny_llama: sl.Model) -> None:
    plain = sl.generate(PROMPTS, 24, model=tiny_llama, stop=())
    whole = [[*p.tokens, *t] for p, t in zip(PROMPTS, plain.tokens, strict=True)]
    drafted = sl.generate(
        PROMPTS,
        24,
        model=tiny_llama,
        stop=(),
        strategy=Speculate(Follows(whole), 6, adaptive=False),
    )
    assert drafted.tokens == plain.tokens
    # A wrong draft every third place, and then the model's own token there.
    assert 0.2 < drafted.acceptance < 0.7
    assert drafted.tokens_per_round == pytest.approx(72 / len(drafted.rounds))
    assert 2 < drafted.tokens_per_round <= 3
    accepted = drafted.to_frame()["accepted"].sum()
    assert accepted == int(drafted.rounds[:, 2].sum())


def test_a_text_ends_within_a_draft(tiny_llama: sl.Model) -> None:
    plain = sl.generate(PROMPTS, 24, model=tiny_llama, stop=())
    whole = [[*p.tokens, *t] for p, t in zip(PROMPTS, plain.tokens, strict=True)]
    stop = [tokens[4] for tokens in plain.tokens]
    strategy = Speculate(Follows(whole), 6, adaptive=False)
    expected = sl.generate(PROMPTS, 24, model=tiny_llama, stop=stop)
    drafted = sl.generate(PROMPTS, 24, model=tiny_llama, stop=stop, strategy=strategy)
    assert drafted.tokens == expected.tokens
    assert drafted.ended == expected.ended
    short = sl.generate(PROMPTS, 2, model=tiny_llama, stop=(), strategy=strategy)
    assert short.tokens == tuple(tokens[:2] for tokens in plain.tokens)


def test_patches_act_on_drafts_too(tiny_llama: sl.Model) -> None:
    torch.manual_seed(3)
    patch = sl.Patch(2, positions="all", values=torch.randn(32), mode="add")
    options: dict[str, Any] = {"model": tiny_llama, "stop": (), "patches": [patch], "layers": [3]}
    plain = sl.generate(PROMPTS, 16, **options)
    drafted = sl.generate(
        PROMPTS, 16, strategy=Speculate(LayerExit(1), 3, adaptive=False), **options
    )
    assert drafted.tokens == plain.tokens
    assert drafted.residuals is not None and plain.residuals is not None
    torch.testing.assert_close(drafted.residuals.stack, plain.residuals.stack, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("strategy", [Speculate(LayerExit(2), 3, adaptive=False), Speculate()])
def test_sampled_drafts_have_the_models_distribution(
    tiny_llama: sl.Model, strategy: Speculate
) -> None:
    """The second new token, which is a draft or the model's own, has the right marginal."""
    prompt, n = PROMPTS[1], 1500
    sampling = Sampling(top_k=6, seed=1)
    written = sl.generate(
        [prompt] * n, 3, model=tiny_llama, sampling=sampling, stop=(), strategy=strategy
    )
    check_marginals(tiny_llama, prompt, sampling, written)


def test_mean_acceptance_is_the_overlap(tiny_llama: sl.Model) -> None:
    """A draft stands with probability sum min(p, q), over the model's p and the drafter's q."""
    prompt, n = PROMPTS[0], 1500
    sampling = Sampling(top_k=20, seed=5)
    strategy = Speculate(LayerExit(1), 1, adaptive=False)
    written = sl.generate(
        [prompt] * n, 2, model=tiny_llama, sampling=sampling, stop=(), strategy=strategy
    )
    # Of the first rounds alone: there all rows are at one place.
    first = {int(i): int(a) for i, _, a in written.rounds.flip(0)}
    tokens = torch.tensor([prompt.tokens])
    with torch.no_grad():
        resid = tiny_llama.run_blocks(
            tiny_llama.embed(tokens), torch.arange(len(prompt))[None], 0, 1
        )
        q = sampling.probabilities(tiny_llama.logits(resid[:, -1])[0])
        p = sampling.probabilities(tiny_llama.original(tokens).logits[0, -1])
    overlap = float(torch.minimum(p, q).sum())
    mean = sum(first.values()) / n
    assert abs(mean - overlap) < 4 * (overlap * (1 - overlap) / n) ** 0.5


def test_drafts_are_as_long_as_pays() -> None:
    sure, unsure = Acceptance(), Acceptance()
    for _ in range(20):
        sure.update(4, 4)
        unsure.update(4, 0)
    steps = (1.0, 1.1, 1.2, 1.3, 1.4, 1.5)
    assert sure.best_length(5, steps) == 5
    assert unsure.best_length(5, steps) == 0
    assert unsure.best_length(5, (1.0, 1.0, 1.3, 1.3, 1.3, 1.3)) == 1  # a second token is free
    assert sure.best_length(5, steps, per_draft=1.0) == 0
    # By hand: at a rate of .75 two drafts give 1 + .75 + .75^2 tokens for 1.5 steps.
    assert Acceptance().best_length(2, (1.0, 1.5, 1.5)) == 2
    assert Acceptance().best_length(2, (1.0, 1.5, 2.4)) == 1


def test_a_drafter_that_does_not_pay_is_tried_again() -> None:
    steps = (1.0, 1.1, 1.2)
    seldom = Acceptance()
    for _ in range(20):
        seldom.update(2, 0)

    def refusals() -> int:
        return next(n for n in range(200) if seldom.next_length(2, steps))

    assert refusals() == 16
    assert seldom.next_length(2, steps) == 1  # until a draft was made: a lookup may find none
    seldom.update(1, 0)
    assert refusals() == 32  # a trial failed, so the pause is longer
    seldom.update(1, 1)
    assert refusals() == 0  # it is right again, and drafts as long as pays
    for _ in range(20):
        seldom.update(2, 0)
    assert refusals() == 16  # and the pause is the first one again
    hopeless = Acceptance()
    assert not any(hopeless.next_length(2, steps, 1.0) for _ in range(50))


def test_lookups_find_a_pattern_that_begins_late(tiny_llama: sl.Model) -> None:
    """Early misses do not end the drafts of a text that repeats itself later."""

    class Late(Follows):
        """Guesses wrongly for 30 tokens and rightly after them."""

        def draft(self, tokens: Sequence[int], most: int) -> list[int]:
            ahead = next(list(t[len(tokens) :]) for t in self._texts if t[: len(tokens)] == tokens)
            n = len(tokens) - len(PROMPTS[0])
            return [t if n >= 30 else (t + 1) % 60 for t in ahead[:most]]

    plain = sl.generate(PROMPTS[0], 80, model=tiny_llama, stop=())
    whole = (*PROMPTS[0].tokens, *plain.tokens[0])
    drafted = sl.generate(
        PROMPTS[0], 80, model=tiny_llama, stop=(), strategy=Speculate(Late([whole]))
    )
    assert drafted.tokens == plain.tokens
    assert len(drafted.rounds) < 65 and drafted.to_frame()["accepted"].iloc[45:].mean() > 0.5


@pytest.mark.parametrize("length", [1, 2, 3])
def test_lookup_is_a_plain_search(length: int) -> None:
    draws = torch.Generator().manual_seed(length)
    for n in range(1, 40):
        text = torch.randint(0, 4, (n,), generator=draws).tolist()
        found = [
            text[at + length : at + length + 3]
            for at in range(n - length)
            if text[at : at + length] == text[n - length :]
        ]
        assert PromptLookup(length).draft(text, 3) == (found[-1] if found else [])


# -- what is refused


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Speculate(draft_tokens=0), "draft_tokens=0"),
        (lambda: Speculate(eta=1.5), "eta=1.5"),
        (lambda: PromptLookup(0), "length=0"),
        (lambda: Speculate([]), "at least one"),
        (lambda: Speculate([LayerExit(1), PromptLookup(1)]), "as the last"),
        (lambda: LayerExit(0), "layer=0"),
        (lambda: ExitPrefill(0), "layer=0"),
    ],
)
def test_bad_strategies_are_refused(make: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make()


@pytest.mark.parametrize(
    "strategy", [ExitPrefill(5), Speculate(LayerExit(4)), Speculate(LayerExit(9))]
)
def test_layers_outside_the_model_are_refused(tiny_llama: sl.Model, strategy: Any) -> None:
    with pytest.raises(ValueError, match="expected"):
        sl.generate("ab", 2, model=tiny_llama, strategy=strategy)


def test_hooks_and_drafts_are_refused(tiny_llama: sl.Model) -> None:
    with (
        tiny_llama.hooks([("blocks.1.hook_resid_post", lambda resid, hook: resid)]),
        pytest.raises(sl.UnsupportedModelError, match="needs a key/value cache"),
    ):
        sl.generate("ab", 2, model=tiny_llama, strategy=ExitPrefill(2))


def test_drafts_outside_the_vocabulary_are_refused(tiny_llama: sl.Model) -> None:
    class Wild:
        name, layer = "wild", 0

        def draft(self, tokens: Sequence[int], most: int) -> list[int]:
            return [4000]

    with pytest.raises(ValueError, match="draft\\(\\) of the drafter 'wild'"):
        sl.generate("ab", 4, model=tiny_llama, strategy=Speculate(Wild()))
