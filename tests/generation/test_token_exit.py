"""Tokens that leave early: as a plain reference says, alone and in a batch."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import ARCHITECTURES, tiny
from torch import Tensor

import spade_lens as sl
from spade_lens.exits import Checks, FixedLayer, Patience, Policy, Threshold
from spade_lens.exits.confidence import confidence_of
from spade_lens.generation import Generated, Sampling, TokenExit, score_answers, score_text
from spade_lens.lenses.linear import AffineMaps
from spade_lens.prompts import Prompt
from spade_lens.prompts.answers import with_answer

PROMPTS = [
    Prompt(tokens=tuple(tokens))
    for tokens in ((1, *range(5, 14)), (1, *[30, 31, 32, 33] * 5), (1,), (1, 60, 61))
]


def log_odds(logits: Tensor) -> Tensor:
    """A measure of our own."""
    return logits.topk(2).values.diff(dim=-1)[:, 0].neg()


class Odd:
    """Leaves with an odd answer: a policy that reads nothing but answers."""

    name, reads = "odd answers", True

    def stops(self, layers: Sequence[int]) -> tuple[int, ...]:
        return tuple(layers)

    def leaves(self, checks: Checks) -> Tensor:
        return checks.answer[-1] % 2 == 1


EVERY = (1, 2, 3)
STRATEGIES = [
    *(TokenExit(layer, FixedLayer(layer)) for layer in EVERY),
    TokenExit(EVERY, 0.035),
    TokenExit(EVERY, Threshold({1: 0.04, 3: 0.035})),
    TokenExit(EVERY, 0.006, "margin"),
    TokenExit((2, 3), 0.033, "entropy"),
    TokenExit(EVERY, 0.75, "saturation"),
    TokenExit(EVERY, 0.1, log_odds),
    TokenExit(EVERY, Patience(2)),
    TokenExit(EVERY, Odd()),
]


def reference(
    model: sl.Model, prompt: Prompt, n: int, strategy: TokenExit
) -> tuple[list[int], list[int], list[float]]:
    """Write text by running all of it anew for every token, with copied states put in place."""
    policy: Policy = strategy.rule
    tokens, exits, new, logprobs = list(prompt.tokens), [], [], []
    for _ in range(n):
        ids = torch.tensor([tokens])
        resid = {0: model.embed(ids)}

        def put(layer: int, at_layer: Tensor, resid: Any = resid) -> Tensor:
            changed = at_layer.clone()
            # Of every new token that has run before, the layer it left at.
            for at, left in enumerate(exits, start=len(prompt)):
                if layer > left:
                    changed[:, at] = resid[left][:, at]
            resid[layer] = changed
            return changed

        positions = torch.arange(len(tokens))[None]
        model.run_blocks(resid[0], positions, 0, model.n_layers, after_block=put)
        read, logits = model.n_layers, model.logits(resid[model.n_layers][0, -1:])
        checks: list[tuple[int, Tensor, Tensor]] = []
        for layer in strategy.borders if len(tokens) > len(prompt) else ():
            before = resid[checks[-1][0] if checks else 0][0, -1:]
            here = resid[layer][0, -1:]
            said = model.logits(here)
            if strategy.confidence == "saturation":
                sure = torch.nn.functional.cosine_similarity(before, here)
            else:
                sure = confidence_of(said, strategy.confidence)
            checks.append((layer, sure, said.argmax(dim=-1)))
            made = Checks(
                tuple(c[0] for c in checks),
                torch.stack([c[1] for c in checks]),
                torch.stack([c[2] for c in checks]),
                torch.zeros(len(checks), 1, 0),
            )
            if bool(policy.leaves(made)):
                read, logits = layer, said
                break
        if len(tokens) > len(prompt):
            exits.append(read)
        token = int(logits.argmax())
        tokens.append(token)
        new.append(token)
        logprobs.append(float(logits.log_softmax(dim=-1)[0, token]))
    return new, [model.n_layers, *exits], logprobs


@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda strategy: strategy.name)
def test_tokens_leave_as_the_definition_says(tiny_llama: sl.Model, strategy: TokenExit) -> None:
    n = 7
    together = sl.generate(PROMPTS, n, model=tiny_llama, stop=(), strategy=strategy)
    assert together.exit_layer is not None
    exits = together.exit_layer.view(len(PROMPTS), n).tolist()
    logprobs = together.logprob.view(len(PROMPTS), n)
    for i, prompt in enumerate(PROMPTS):
        with torch.no_grad():
            tokens, layers, expected = reference(tiny_llama, prompt, n, strategy)
        assert list(together.tokens[i]) == tokens
        assert exits[i] == layers
        torch.testing.assert_close(logprobs[i], torch.tensor(expected), atol=1e-4, rtol=0)
        alone = sl.generate(prompt, n, model=tiny_llama, stop=(), strategy=strategy)
        assert alone.tokens[0] == together.tokens[i]
        assert alone.exit_layer is not None and alone.exit_layer.tolist() == layers
    if len(strategy.borders) > 1:  # or nothing is tested
        assert len({layer for of_row in exits for layer in of_row[1:]}) > 1


def test_a_threshold_out_of_reach_is_plain_text(tiny_llama: sl.Model) -> None:
    plain = sl.generate(PROMPTS, 12, model=tiny_llama, stop=())
    for strategy in (TokenExit(EVERY, 1.1), TokenExit(EVERY, Threshold(float("inf")))):
        written = sl.generate(PROMPTS, 12, model=tiny_llama, stop=(), strategy=strategy)
        assert written.tokens == plain.tokens
        torch.testing.assert_close(written.logprob, plain.logprob, atol=1e-4, rtol=0)
        assert written.exit_layer is None or set(written.exit_layer.tolist()) == {4}


class Never(Odd):
    """Wants no check."""

    name = "never"

    def stops(self, layers: Sequence[int]) -> tuple[int, ...]:
        return ()


@pytest.mark.parametrize(
    "policy", [float("inf"), Patience(3), Never()], ids=["inf", "patience", "own"]
)
def test_a_policy_without_stops_is_plain_text_also_without_a_cache(
    tiny_llama: sl.Model, policy: Any
) -> None:
    strategy = TokenExit([1, 2], policy)
    assert strategy.borders == ()
    options: dict[str, Any] = {"model": tiny_llama, "strategy": strategy}
    plain = sl.generate(PROMPTS, 6, model=tiny_llama, stop=(), layers=[3])
    scores = score_text(PROMPTS, plain.tokens, model=tiny_llama)

    def same() -> None:
        written = sl.generate(PROMPTS, 6, stop=(), layers=[3], **options)
        assert written.tokens == plain.tokens and written.exit_layer is None
        given = score_text(PROMPTS, plain.tokens, **options)
        assert given["logprob"].tolist() == pytest.approx(scores["logprob"].tolist(), abs=1e-4)
        asked = [with_answer(p, t) for p, t in zip(PROMPTS, plain.tokens, strict=True)]
        assert score_answers(asked, **options)["greedy"].all()

    same()
    with tiny_llama.hooks([("blocks.1.hook_resid_post", lambda resid, hook: resid)]):
        same()
    with pytest.raises(ValueError, match="expected candidate layers from 1 to 3"):
        sl.generate(PROMPTS, 2, model=tiny_llama, strategy=TokenExit([1, 4], policy))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_any_architecture(name: str) -> None:
    model = sl.load(tiny(name))
    if model.decoder() is None or model.n_layers < 2:
        pytest.skip("without a cache, or a layer to exit at")
    strategy = TokenExit(1, FixedLayer(1))
    written = sl.generate(PROMPTS[:2], 6, model=model, stop=(), strategy=strategy)
    with torch.no_grad():
        for prompt, tokens in zip(PROMPTS[:2], written.tokens, strict=True):
            assert reference(model, prompt, 6, strategy)[0] == list(tokens)


@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda strategy: strategy.name)
def test_given_tokens_leave_as_written_ones(tiny_llama: sl.Model, strategy: TokenExit) -> None:
    options: dict[str, Any] = {"model": tiny_llama, "strategy": strategy}
    written = sl.generate(PROMPTS, 6, stop=(), **options)
    lengths = (6, 2, 5, 1)
    given = [tokens[:n] for tokens, n in zip(written.tokens, lengths, strict=True)]
    scores = score_text(PROMPTS, given, **options)
    assert scores["greedy"].all()
    expected = [
        float(part[:n].sum()) for part, n in zip(written.logprob.split(6), lengths, strict=True)
    ]
    torch.testing.assert_close(
        torch.tensor(scores["logprob"]), torch.tensor(expected).double(), atol=1e-4, rtol=0
    )
    asked = [with_answer(p, t, [(9,), t]) for p, t in zip(PROMPTS, given, strict=True)]
    answers = score_answers(asked, **options)
    assert answers["greedy"].all()
    assert answers["logprob"].tolist() == pytest.approx(expected, abs=1e-4)


def test_texts_end_and_leave_the_batch(tiny_llama: sl.Model) -> None:
    strategy = STRATEGIES[3]
    whole = sl.generate(PROMPTS, 12, model=tiny_llama, stop=(), strategy=strategy)
    stop = [tokens[4] for tokens in whole.tokens]
    ended = sl.generate(PROMPTS, 12, model=tiny_llama, stop=stop, strategy=strategy)
    assert len({len(tokens) for tokens in ended.tokens}) > 1
    for short, long in zip(ended.tokens, whole.tokens, strict=True):
        assert long[: len(short)] == short


def test_samples_are_the_same_alone_and_in_a_batch(tiny_llama: sl.Model) -> None:
    options: dict[str, Any] = {
        "model": tiny_llama,
        "stop": (),
        "strategy": TokenExit(EVERY, 0.035),
        "sampling": Sampling(seed=3),
    }
    together = sl.generate(PROMPTS, 8, **options)
    alone = [sl.generate(prompt, 8, **options).tokens[0] for prompt in PROMPTS]
    assert together.tokens == tuple(alone)


def test_patches_and_captures_up_to_the_first_exit(tiny_llama: sl.Model) -> None:
    torch.manual_seed(3)
    patch = sl.Patch(2, positions="all", values=torch.randn(32), mode="add")
    options: dict[str, Any] = {"model": tiny_llama, "stop": ()}
    strategy = TokenExit((2, 3), FixedLayer(2))
    patched = sl.generate(PROMPTS, 4, patches=[patch], layers=[1, 2], strategy=strategy, **options)
    assert patched.tokens != sl.generate(PROMPTS, 4, strategy=strategy, **options).tokens
    assert patched.residuals is not None
    again = score_text(PROMPTS[0], [patched.tokens[0]], model=tiny_llama, strategy=strategy)
    assert not again["greedy"].all()
    for above in ({"layers": [3]}, {"patches": [sl.Patch(3, values=torch.ones(32))]}):
        with pytest.raises(ValueError, match="above the first exit at 2"):
            sl.generate(PROMPTS, 4, strategy=strategy, **above, **options)


def test_a_linear_lens_may_read_the_exits(tiny_llama: sl.Model) -> None:
    identity = sl.lenses.TunedLens(tiny_llama, AffineMaps.identity(range(4), 32))
    options: dict[str, Any] = {"model": tiny_llama, "stop": ()}
    plain = sl.generate(PROMPTS, 6, strategy=TokenExit(2, FixedLayer(2)), **options)
    mapped = TokenExit(2, FixedLayer(2), lens=identity)
    assert sl.generate(PROMPTS, 6, strategy=mapped, **options).tokens == plain.tokens
    shifted = AffineMaps.identity(range(4), 32)
    shifted.bias.add_(torch.randn(shifted.bias.shape))
    other = TokenExit(2, FixedLayer(2), lens=sl.lenses.TunedLens(tiny_llama, shifted))
    assert sl.generate(PROMPTS, 6, strategy=other, **options).tokens != plain.tokens
    elsewhere = sl.load(tiny("mistral"))
    with pytest.raises(ValueError, match="another model|one model"):
        sl.generate(PROMPTS, 2, model=elsewhere, strategy=mapped)


def test_exit_layers_are_in_the_table_and_saved(tiny_llama: sl.Model, tmp_path: Path) -> None:
    written = sl.generate(PROMPTS, 5, model=tiny_llama, stop=(), strategy=STRATEGIES[3])
    assert written.exit_layer is not None
    assert written.to_frame()["exit_layer"].tolist() == written.exit_layer.tolist()
    again = Generated.load(written.save(tmp_path / "some"))
    assert again.exit_layer is not None and torch.equal(again.exit_layer, written.exit_layer)
    plain = sl.generate(PROMPTS, 2, model=tiny_llama)
    assert plain.exit_layer is None and "exit_layer" not in plain.to_frame()
    assert Generated.load(plain.save(tmp_path / "plain")).exit_layer is None


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: TokenExit(0), "layers="),
        (lambda: TokenExit([3, 1]), "ascending"),
        (lambda: TokenExit([]), "ascending"),
        (lambda: TokenExit(2, FixedLayer(3)), "expected one of the candidate layers"),
        (lambda: TokenExit(2, float("nan")), "expected a number"),
        (lambda: TokenExit(2, confidence="entrpy"), "'saturation'"),
        (lambda: TokenExit([1, 2], Patience(), "saturation"), "reads none"),
    ],
)
def test_what_is_refused(make: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make()


def test_layers_beyond_the_model_and_hooks_are_refused(tiny_llama: sl.Model) -> None:
    for layers in (4, [2, 9]):
        with pytest.raises(ValueError, match="expected"):
            sl.generate("ab", 2, model=tiny_llama, strategy=TokenExit(layers))
    with (
        tiny_llama.hooks([("blocks.1.hook_resid_post", lambda resid, hook: resid)]),
        pytest.raises(sl.UnsupportedModelError, match="needs a key/value cache"),
    ):
        sl.generate("ab", 2, model=tiny_llama, strategy=TokenExit(2))
