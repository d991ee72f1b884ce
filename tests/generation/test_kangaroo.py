"""Drafts of a trained adapter change no text; its loss and figures are what their formulas say."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from drafting import PROMPTS, check_marginals
from tiny import ARCHITECTURES, tiny

import spade_lens as sl
from spade_lens.generation import (
    Kangaroo,
    LayerExit,
    PromptLookup,
    Sampling,
    Speculate,
    load_kangaroo,
)
from spade_lens.generation.kangaroo import Adapter
from spade_lens.generation.known_text import KnownText, record_drafts
from spade_lens.models.unembedding import unembedding_of
from spade_lens.prompts import Prompt
from spade_lens.training import AdapterPlan, TrainPlan, own_text, train_kangaroo
from spade_lens.training.kangaroo import compare_predictions, fit_adapter
from spade_lens.training.streams import Streams

PLAN = TrainPlan(30, warmup=3, row_every=10)


def trained(model: sl.Model, layer: int = 2, **made: Any) -> Kangaroo:
    text = own_text(model, [PROMPTS[0], PROMPTS[1]] * 4, 16)
    return train_kangaroo(model, layer, text, adapter=AdapterPlan(**made), plan=PLAN)


@pytest.fixture(scope="module")
def kangaroo(tiny_llama: sl.Model) -> Kangaroo:
    return trained(tiny_llama)


@pytest.mark.parametrize(
    ("made", "draft_tokens", "eta", "adaptive"),
    [
        ({}, 1, 0.0, False),
        ({}, 6, 0.0, False),
        ({}, 6, 0.012, False),
        ({"residual": "diagonal"}, 3, 0.0, True),
        ({"residual": "ridge", "vocabulary": 12}, 4, 0.05, False),
        ({"hidden": 24, "vocabulary": 30}, 4, 0.0, False),
    ],
)
def test_drafts_change_nothing(
    tiny_llama: sl.Model, made: dict[str, Any], draft_tokens: int, eta: float, adaptive: bool
) -> None:
    strategy = Speculate(trained(tiny_llama, **made), draft_tokens, eta, adaptive)
    plain = sl.generate(PROMPTS, 16, model=tiny_llama, stop=())
    drafted = sl.generate(PROMPTS, 16, model=tiny_llama, stop=(), strategy=strategy)
    assert drafted.tokens == plain.tokens
    assert adaptive or int(drafted.rounds[:, 1].sum()) > 0
    # Rows that leave the batch take their keys and values along.
    stop = plain.tokens[0][3]
    expected = sl.generate(PROMPTS, 16, model=tiny_llama, stop=stop)
    drafted = sl.generate(PROMPTS, 16, model=tiny_llama, stop=stop, strategy=strategy)
    assert drafted.tokens == expected.tokens


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("ids", [None, range(60, 70)])
def test_a_row_of_a_batch_drafts_what_it_drafts_alone(
    tiny_llama: sl.Model, kangaroo: Kangaroo, ids: range | None, adaptive: bool
) -> None:
    """Greedy and sampled, where rows leave: other rows' prompts add no tokens to draft."""
    few = replace(kangaroo, ids=None if ids is None else torch.tensor(ids))
    prompts = [*PROMPTS[:2], *(Prompt(tokens=tuple(range(1 + i, 97, 5))) for i in (0, 1))]
    strategy = Speculate(few, 3, adaptive=adaptive)
    stop = range(0, 97, 8)  # so many that rows leave early, sampled ones too
    for sampling in (None, Sampling(top_k=20, seed=3)):
        settings: dict[str, Any] = {"stop": list(stop), "sampling": sampling, "strategy": strategy}
        together = sl.generate(prompts, 16, model=tiny_llama, **settings)
        assert len({len(tokens) for tokens in together.tokens}) > 1
        for i, prompt in enumerate(prompts):
            alone = sl.generate(prompt, 16, model=tiny_llama, **settings)
            assert alone.tokens[0] == together.tokens[i]
            of_row = together.rounds[together.rounds[:, 0] == i][:, 1:]
            assert alone.rounds[:, 1:].tolist() == of_row.tolist()


def test_what_is_drafted_is_what_the_whole_text_predicts(
    tiny_llama: sl.Model, kangaroo: Kangaroo
) -> None:
    """One draft a round stands where the adapter, run on the whole text, says the next token."""
    strategy = Speculate(kangaroo, 1, adaptive=False)
    written = sl.generate(PROMPTS, 20, model=tiny_llama, stop=(), strategy=strategy)
    for i, (prompt, tokens) in enumerate(zip(PROMPTS, written.tokens, strict=True)):
        text = Prompt(tokens=(*prompt.tokens, *tokens))
        [(_, same, _)] = compare_predictions(kangaroo, Streams.of(tiny_llama, 2, [text]))
        at = len(prompt)  # of the next new token
        for _, drafted, accepted in written.rounds[written.rounds[:, 0] == i].tolist():
            if drafted and at >= 2:  # the first token has no figure
                assert bool(same[at - 2]) == bool(accepted)
            at += accepted + 1


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "mistral", "qwen3", "deepseek-v3"])
def test_other_families(name: str) -> None:
    assert name in ARCHITECTURES
    model = sl.load(tiny(name))
    for vocabulary in (None, 20):
        strategy = Speculate([PromptLookup(2), trained(model, 1, vocabulary=vocabulary)], 3)
        drafted = sl.generate(PROMPTS, 12, model=model, stop=(), strategy=strategy)
        assert drafted.tokens == sl.generate(PROMPTS, 12, model=model, stop=()).tokens


@pytest.mark.parametrize(
    ("name", "bias", "narrow"),
    [
        ("llama", False, True),
        ("llama", True, True),
        ("gemma2", False, False),
        ("granite-moe", False, False),
    ],
)
def test_a_small_vocabulary_has_the_models_own_logits(name: str, bias: bool, narrow: bool) -> None:
    """With soft caps, scales and biases of the head too: all tokens as ids are as no ids."""
    original = tiny(name)
    if bias:
        original.lm_head = torch.nn.Linear(32, 97)
        torch.nn.init.normal_(original.lm_head.bias, std=2.0)
    model = sl.load(original)
    whole = Kangaroo(model, 2, Adapter(32, 1))
    every = replace(whole, ids=torch.arange(97))
    assert (unembedding_of(model, every.ids) is not None) is narrow
    written = sl.generate(PROMPTS, 6, model=model, stop=()).tokens
    texts = [KnownText(p.tokens, new, 6) for p, new in zip(PROMPTS, written, strict=True)]
    streams = Streams.of(model, 2, [Prompt(tokens=(*t.prompt, *t.new)) for t in texts])
    confidences, overlaps = [], []
    for kangaroo in (whole, every):
        recorded = record_drafts(kangaroo, texts, model=model, draft_tokens=1)
        confidences.append(torch.tensor([drafts.confidence for drafts in recorded]))
        compared = {i: overlap for i, _, overlap in compare_predictions(kangaroo, streams)}
        overlaps.append(torch.cat([compared[i] for i in range(len(texts))]))
    torch.testing.assert_close(*confidences, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(*overlaps, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("vocabulary", [None, 40])
def test_sampled_drafts_have_the_models_distribution(
    tiny_llama: sl.Model, vocabulary: int | None
) -> None:
    prompt, n = PROMPTS[1], 1500
    sampling = Sampling(top_k=6, seed=1)
    strategy = Speculate(trained(tiny_llama, vocabulary=vocabulary), 3, adaptive=False)
    written = sl.generate(
        [prompt] * n, 3, model=tiny_llama, sampling=sampling, stop=(), strategy=strategy
    )
    check_marginals(tiny_llama, prompt, sampling, written)


def test_training_lowers_the_loss_and_leaves_the_model_alone(tiny_llama: sl.Model) -> None:
    before = tiny_llama.sha256
    text = own_text(tiny_llama, [PROMPTS[0], PROMPTS[1]] * 8, 16)
    plan = TrainPlan(150, warmup=5, row_every=50)
    trained = train_kangaroo(
        tiny_llama, 3, text, adapter=AdapterPlan(residual="diagonal", hidden=32), plan=plan
    )
    losses = trained.about["history"]["train_loss"]
    assert losses[-1] < losses[0]
    assert tiny_llama.sha256 == before
    weights = list(tiny_llama.original.parameters())
    assert all(w.requires_grad and w.grad is None for w in weights)
    assert not any(p.requires_grad for p in trained.adapter.parameters())


def test_the_figures_are_those_of_the_definition(tiny_llama: sl.Model, kangaroo: Kangaroo) -> None:
    few = replace(kangaroo, ids=torch.arange(10, 50))
    texts = [Prompt(tokens=(1, *range(20, 20 + n))) for n in (4, 30, 9)]
    for drafter in (kangaroo, few):
        found = {
            i: both for i, *both in compare_predictions(drafter, Streams.of(tiny_llama, 2, texts))
        }
        for i, text in enumerate(texts):
            tokens = torch.tensor([text.tokens])
            positions = torch.arange(len(text))[None]
            with torch.no_grad():
                low = tiny_llama.run_blocks(tiny_llama.embed(tokens), positions, 0, 2)
                q = tiny_llama.logits(drafter.adapter(low, positions)[0, 1:])
                p = tiny_llama.original(tokens).logits[0, 1:]
            if drafter is few:
                q[:, :10] = q[:, 50:] = -torch.inf
            same, overlap = found[i]
            # Residuals in half precision move a probability by little.
            torch.testing.assert_close(
                overlap, torch.minimum(p.softmax(-1), q.softmax(-1)).sum(-1), atol=5e-3, rtol=0
            )
            assert (same.bool() == (p.argmax(-1) == q.argmax(-1))).float().mean() > 0.8


def test_the_map_starts_as_the_regression_of_the_last_residual(tiny_llama: sl.Model) -> None:
    """Without steps that change it, a map alone is nearer to the last residual than none."""
    fixed = trained(tiny_llama, residual="ridge").adapter
    diagonal = trained(tiny_llama, residual="diagonal").adapter
    torch.nn.init.zeros_(fixed.out.weight)
    torch.nn.init.zeros_(diagonal.out.weight)
    torch.nn.init.ones_(diagonal.gain)
    text = own_text(tiny_llama, [PROMPTS[0], PROMPTS[1]] * 4, 16).pieces[:4]
    batch = Streams.of(tiny_llama, 2, text).get(range(4))
    errors = [
        float((adapter(batch.low, batch.positions) - batch.top)[batch.valid].square().mean())
        for adapter in (fixed, diagonal)
    ]
    assert errors[0] < 0.7 * errors[1]


def test_held_out_text_chooses_nothing(tiny_llama: sl.Model) -> None:
    """A map kept as the ridge regression is the same whatever is held out."""
    text = own_text(tiny_llama, [PROMPTS[0], PROMPTS[1]] * 4, 16)
    learned, held_out = Streams.of(tiny_llama, 2, text.pieces).split(6)
    # Where the last residual is the one at the layer, the strongest ridge errs least.
    unlike = replace(held_out, top=held_out.low)
    made = AdapterPlan(residual="ridge")
    first, second = (
        fit_adapter(tiny_llama, 2, learned, held, made, TrainPlan(1, warmup=0)).adapter.path
        for held in (held_out, unlike)
    )
    assert first is not None and second is not None
    torch.testing.assert_close(first.weight, second.weight, atol=0, rtol=0)


def test_the_memory_limit_holds_for_all_text_together(tiny_llama: sl.Model) -> None:
    text = own_text(tiny_llama, [PROMPTS[0], PROMPTS[1]] * 4, 16)
    needed = 4 * sum(map(len, text.pieces)) * tiny_llama.d_model / 2**30
    plan = TrainPlan(1, warmup=0)
    with pytest.raises(ValueError, match="memory limit"):
        few = sl.Settings(memory_limit=0.99 * needed)
        train_kangaroo(tiny_llama, 2, text, plan=plan, settings=few)
    enough = sl.Settings(memory_limit=1.01 * needed)
    train_kangaroo(tiny_llama, 2, text, plan=plan, settings=enough)


def test_it_is_saved_with_its_model(
    tiny_llama: sl.Model, kangaroo: Kangaroo, tmp_path: Path
) -> None:
    few = replace(kangaroo, ids=torch.arange(5, 60))
    for name, one in (("all", kangaroo), ("few", few)):
        again = load_kangaroo(one.save(tmp_path / name), tiny_llama)
        assert again.name == one.name and again.layer == 2
        strategy = [Speculate(k, 3, adaptive=False) for k in (one, again)]
        texts = [sl.generate(PROMPTS, 8, model=tiny_llama, strategy=s) for s in strategy]
        assert texts[0].rounds.tolist() == texts[1].rounds.tolist()
    other = sl.load(tiny("mistral"))
    with pytest.raises(ValueError, match="belongs to"):
        load_kangaroo(tmp_path / "all", other)
    with pytest.raises(ValueError, match="belongs to"):
        sl.generate(PROMPTS, 2, model=other, strategy=Speculate(kangaroo))
    (tmp_path / "all" / "kangaroo.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="kangaroo"):
        load_kangaroo(tmp_path / "all", tiny_llama)


def test_a_killed_training_goes_on(tiny_llama: sl.Model, tmp_path: Path) -> None:
    text = own_text(tiny_llama, PROMPTS[:2], 12, folder=tmp_path / "text")
    again = own_text(tiny_llama, PROMPTS[:2], 12, folder=tmp_path / "text")
    assert again.pieces == text.pieces
    first, second = (
        train_kangaroo(tiny_llama, 2, text, plan=PLAN, checkpoint=tmp_path / "run")
        for _ in range(2)
    )
    for a, b in zip(first.adapter.parameters(), second.adapter.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    with pytest.raises(ValueError, match="another run"):
        train_kangaroo(tiny_llama, 1, text, plan=PLAN, checkpoint=tmp_path / "run")
    with pytest.raises(ValueError, match="another run"):
        own_text(tiny_llama, PROMPTS[:2], 12, seed=1, folder=tmp_path / "text")


def test_own_text_is_greedy_where_the_temperature_is_0(tiny_llama: sl.Model) -> None:
    text = own_text(tiny_llama, [PROMPTS[0]] * 4, 12, temperatures=(0.0, 1.0))
    plain = sl.generate(PROMPTS[0], 12, model=tiny_llama, stop=()).tokens[0]
    new = [piece.tokens[len(PROMPTS[0]) :] for piece in text.pieces]
    assert new[0] == new[2] == plain
    assert new[1] != plain and new[3] != new[1]


def test_what_does_not_fit_is_refused(tiny_llama: sl.Model, kangaroo: Kangaroo) -> None:
    text = own_text(tiny_llama, PROMPTS[:2], 12)
    for layer in (0, 4):
        with pytest.raises(ValueError, match=f"layer={layer}"):
            train_kangaroo(tiny_llama, layer, text, plan=PLAN)
    with pytest.raises(ValueError, match="at least two"):
        train_kangaroo(tiny_llama, 2, ["abc"], plan=PLAN)
    with pytest.raises(ValueError, match="memory limit"):
        train_kangaroo(tiny_llama, 2, text, plan=PLAN, settings=sl.Settings(memory_limit=1e-6))
    with pytest.raises(ValueError, match="below 97"):
        replace(kangaroo, ids=torch.tensor([97]))
    with pytest.raises(ValueError, match="width 16"):
        replace(kangaroo, adapter=Adapter(16, 1))
    # One check says the same of every drafter.
    with pytest.raises(ValueError, match="layer=4 was given; expected one below 4, the last of"):
        replace(kangaroo, layer=4)
    exit_at_last = Speculate(LayerExit(4))
    with pytest.raises(ValueError, match="reads layer 4; expected one below 4, the last of"):
        sl.generate(PROMPTS, 2, model=tiny_llama, strategy=exit_at_last)
    with pytest.raises(ValueError, match="n_heads=3"):
        Adapter(32, 3)


def test_the_real_model(smollm2: sl.Model) -> None:
    texts = ["The capital of France is", "one two three one two three one", "Once upon a time,"]
    text = own_text(smollm2, texts, 12)
    plan = TrainPlan(4, warmup=1)
    trained = train_kangaroo(smollm2, 4, text, adapter=AdapterPlan(vocabulary=500), plan=plan)
    strategy = Speculate(trained, 3, adaptive=False)
    drafted = sl.generate(texts, 16, model=smollm2, stop=(), strategy=strategy)
    assert drafted.tokens == sl.generate(texts, 16, model=smollm2, stop=()).tokens


def test_the_seed_of_the_plan_is_all_that_training_draws_from(tiny_llama: sl.Model) -> None:
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first = trained(tiny_llama, layer=2)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(2)
    second = trained(tiny_llama, layer=2)
    for a, b in zip(first.adapter.parameters(), second.adapter.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=0, rtol=0)


def test_an_adapter_is_saved_for_the_model_that_it_was_trained_on(tmp_path: Path) -> None:
    model = sl.load(tiny("llama"))
    kangaroo = trained(model, 2, hidden=8)
    kangaroo.save(tmp_path)
    assert load_kangaroo(tmp_path, model).layer == 2
    with torch.no_grad():
        model.original.model.norm.weight.mul_(1.5)
    with pytest.raises(ValueError, match="The adapter"):
        kangaroo.save(tmp_path / "changed")


def test_texts_of_one_token_teach_nothing(tiny_llama: sl.Model) -> None:
    one, long = Prompt(tokens=(6,)), Prompt(tokens=tuple(range(3, 40)))
    for text in ([long, one], [one, long], [one, one]):
        with pytest.raises(ValueError, match="two tokens or more"):
            train_kangaroo(tiny_llama, 2, text, plan=TrainPlan(4, warmup=1))


def test_the_held_out_documents_do_not_choose_when_to_stop(tiny_llama: sl.Model) -> None:
    text = own_text(tiny_llama, [PROMPTS[0], PROMPTS[1]] * 4, 16)
    with pytest.raises(ValueError, match="patience=3 was given; expected None"):
        train_kangaroo(tiny_llama, 2, text, plan=replace(PLAN, patience=3))
