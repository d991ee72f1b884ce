"""Alternating training: the losses by plain formulas, the penalty's parts, and going on."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from tiny import tiny, tiny_tokenizer
from torch.nn import functional as F

import spade_lens as sl
from spade_lens import UnsupportedModelError
from spade_lens.training import AlternatePlan, train_alternating
from spade_lens.training.alternate.answers import CachedAnswers, CachedPairs, dpo_loss
from spade_lens.training.alternate.data import prepare
from spade_lens.training.alternate.importance import (
    RELEASED_TEMPERATURE,
    importances,
    mean_squared_changes,
    most_important,
    penalty,
)
from spade_lens.training.alternate.run import run_plan
from spade_lens.training.alternate.updates import LowRankUpdates

PLAN = AlternatePlan(rounds=2, steps=4, batch=3, layer=2, rank=2, learning_rate=0.02)


@pytest.fixture(scope="module")
def data(tiny_llama: sl.Model) -> dict[str, Any]:
    """Items of one and two tokens, and pairs that prefer capitals."""
    sft = [tiny_llama.prompt(f"{x}>", target=x.lower()) for x in "ABCDE"]
    sft.append(tiny_llama.prompt("of:FG>", target="fg"))
    pairs = [
        tiny_llama.prompt(f"{x}>", target=x, candidates=(x, x.lower() + "!")) for x in "HIJKLM"
    ]
    return {"sft": sft, "preferences": pairs, "held_out": (sft[:3], pairs[:3])}


def whole_logprob(model: sl.Model, prompt: sl.Prompt, answer: tuple[int, ...]) -> float:
    """An answer's log-probability by the whole Hugging Face model, token by token."""
    tokens = torch.tensor([[*prompt.tokens, *answer]])
    logprobs = model.original(tokens).logits[0].log_softmax(dim=-1)
    first = len(prompt) - 1
    return sum(float(logprobs[first + n, token]) for n, token in enumerate(answer))


@torch.no_grad()
def test_cached_residuals_give_the_whole_models_loss(
    tiny_llama: sl.Model, data: dict[str, Any]
) -> None:
    sft = data["sft"]
    expected = [whole_logprob(tiny_llama, p, p.target_tokens) for p in sft]
    for layer in (0, 2, 3):
        cached = CachedAnswers(tiny_llama, layer, sft, [p.target_tokens for p in sft])
        assert cached.all_logprobs().tolist() == pytest.approx(expected, abs=1e-5)
        # The last item alone has two tokens: the loss is per token.
        assert float(cached.sft_loss([0, 5])) == pytest.approx(
            -(expected[0] + expected[5]) / 3, abs=1e-5
        )
    pairs = data["preferences"]
    rejected = [next(one for one in p.candidate_tokens if one != p.target_tokens) for p in pairs]
    margins = [
        whole_logprob(tiny_llama, p, p.target_tokens) - whole_logprob(tiny_llama, p, other)
        for p, other in zip(pairs, rejected, strict=True)
    ]
    cached_pairs = CachedPairs(tiny_llama, 2, pairs)
    assert cached_pairs.all_margins().tolist() == pytest.approx(margins, abs=1e-5)
    assert cached_pairs.margins([4, 1]).tolist() == pytest.approx(
        [margins[4], margins[1]], abs=1e-5
    )


def test_dpo_by_a_plain_formula() -> None:
    margins, reference = torch.tensor([2.0, -1.0]), torch.tensor([0.5, 0.25])
    expected = sum(
        math.log(1 + math.exp(-0.3 * (m - r)))
        for m, r in zip(margins.tolist(), reference.tolist(), strict=True)
    )
    assert float(dpo_loss(margins, reference, 0.3)) == pytest.approx(expected / 2)


def test_the_penalty_is_zero_at_the_reference_and_by_hand_elsewhere() -> None:
    reference = {"a": torch.randn(2, 3), "b": torch.randn(4)}
    weights = torch.tensor([0.25, 0.75])
    assert float(penalty(reference, reference, weights)) == 0
    moved = {"a": reference["a"] + 1, "b": reference["b"] - 2}
    assert float(penalty(moved, reference, weights)) == pytest.approx(0.25 * 6 + 0.75 * 16)
    assert mean_squared_changes(reference, moved).tolist() == pytest.approx([1.0, 4.0])


@pytest.mark.parametrize("temperature", [None, 1.0, 1e-6, RELEASED_TEMPERATURE])
def test_importances_sum_to_one(temperature: float | None) -> None:
    changes = torch.rand(50, dtype=torch.float64) * 1e-6
    assert float(importances(changes, temperature).sum()) == pytest.approx(1)
    assert float(importances(torch.zeros(50), temperature).max()) == pytest.approx(1 / 50)


def test_the_released_constants_saturate() -> None:
    # Root mean squared changes of one training step at a learning rate of 1e-6, all alike.
    changes = 1e-12 * (1 + 0.01 * torch.rand(200, dtype=torch.float64))
    by_code = ((changes.sqrt() * 1e10).square()).softmax(dim=0)
    ours = importances(changes, RELEASED_TEMPERATURE)
    assert ours.tolist() == pytest.approx(by_code.tolist())
    assert float(ours.max()) > 0.999
    assert float(importances(changes).max()) < 0.0051
    # Only changes of 1e-11 and less leave it near uniform.
    tiny_changes = changes * 1e-11
    assert float(importances(tiny_changes, RELEASED_TEMPERATURE).max()) < 0.0055


def test_what_is_most_important_stays() -> None:
    changes = torch.tensor([1.0, 5.0, 3.0, 4.0, 2.0])
    names = list("abcde")
    assert most_important(changes, names, 0.4) == ["b", "d"]
    assert most_important(changes, names, 0.0) == []
    assert len(most_important(changes, names, 0.99)) == 4


def test_a_resumed_run_equals_an_unbroken_one(
    tiny_llama: sl.Model, data: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = replace(PLAN, guard="ewc")
    whole = train_alternating(tiny_llama, **data, plan=plan)
    calls = 0
    sft_loss = CachedAnswers.sft_loss

    def failing(self: CachedAnswers, rows: list[int]) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 7:  # in the middle of the third phase
            raise KeyboardInterrupt
        return sft_loss(self, rows)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(CachedAnswers, "sft_loss", failing)
        patched.setattr("spade_lens.storage.checkpoint._SECONDS_BETWEEN", 0)
        train_alternating(tiny_llama, **data, plan=plan, checkpoint=tmp_path)
    calls = 100
    with monkeypatch.context() as patched:
        patched.setattr(CachedAnswers, "sft_loss", failing)
        resumed = train_alternating(tiny_llama, **data, plan=plan, checkpoint=tmp_path)
    assert calls == 103  # the last three steps of the third phase alone
    pd.testing.assert_frame_equal(whole.history, resumed.history, check_exact=True)
    pd.testing.assert_frame_equal(whole.drift, resumed.drift, check_exact=True)
    assert whole.importances == resumed.importances
    for name, factor in whole.updates.factors().items():
        assert factor.equal(resumed.updates.factors()[name])
    with pytest.raises(ValueError, match="another run"):
        train_alternating(tiny_llama, **data, plan=replace(plan, beta=0.2), checkpoint=tmp_path)


def test_the_model_stays_and_has_the_updates_where_they_are_applied(
    tiny_llama: sl.Model, data: dict[str, Any]
) -> None:
    before = tiny_llama.sha256
    trained = train_alternating(tiny_llama, **data, plan=PLAN)
    assert tiny_llama.sha256 == before and not tiny_llama.hooked
    assert all(p.requires_grad for p in tiny_llama.original.parameters())
    _, pairs = data["held_out"]
    with trained.applied(), torch.no_grad():
        # The weights hold what the hooks did, for the whole model.
        margin = CachedPairs(tiny_llama, 0, pairs).all_margins().mean()
        assert float(margin) == pytest.approx(trained.history.preference_margin.iloc[-1], abs=1e-4)
    assert tiny_llama.sha256 == before
    last = trained.drift[trained.drift.phase == 4]
    assert last.block.tolist() == [2, 3]
    assert last.drift.pow(2).sum() ** 0.5 == pytest.approx(trained.history.drift.iloc[-1])
    assert sum(trained.importances.values()) == pytest.approx(1)


def test_schedules_and_guards_do_what_they_say(tiny_llama: sl.Model, data: dict[str, Any]) -> None:
    def run(**changes: Any) -> pd.DataFrame:
        return train_alternating(tiny_llama, **data, plan=replace(PLAN, **changes)).history

    free = run()
    assert free["update"].tolist() == [0, 4, 8, 12, 16]
    in_order = ["", "sft", "sft", "preference", "preference"]
    assert run(schedule="sequential").objective.tolist() == in_order
    assert run(schedule="joint").objective.tolist() == ["", "joint", "joint"]
    # SFT lowers its loss, preferences raise their margin.
    assert free.sft_loss[1] < free.sft_loss[0]
    assert free.preference_margin[2] > free.preference_margin[1]
    # A guard of no strength is none; the first phase is never guarded; strength holds fast.
    pd.testing.assert_frame_equal(free, run(guard="ewc", strength=0.0))
    strong = run(guard="l2", strength=1e6)
    assert strong.iloc[:2].equals(free.iloc[:2])
    assert strong.drift.iloc[-1] == pytest.approx(free.drift[1], rel=0.1)
    # One tensor holds all importance: the others are as free as without a guard.
    released = run(guard="ewc", strength=1e6, temperature=RELEASED_TEMPERATURE)
    assert released.drift.iloc[-1] > 1.2 * strong.drift.iloc[-1]


def test_frozen_tensors_stay(tiny_llama: sl.Model, data: dict[str, Any]) -> None:
    plan = replace(PLAN, guard="freeze", rounds=1, frozen=0.5)
    first = train_alternating(tiny_llama, **data, plan=replace(plan, preference_weight=0.0))
    both = train_alternating(tiny_llama, **data, plan=plan)
    after_sft, after_both = first.updates.factors(), both.updates.factors()
    same = [name for name in after_sft if after_sft[name].equal(after_both[name])]
    assert len(same) == round(0.5 * len(after_sft))


def test_a_fresh_update_changes_nothing(tiny_llama: sl.Model) -> None:
    updates = LowRankUpdates(tiny_llama, 2, 2, seed=0)
    tokens = torch.tensor([[1, 5, 6]])
    expected = tiny_llama.original(tokens).logits
    with updates.acting():
        assert tiny_llama.original(tokens).logits.equal(expected)
    assert updates.drift() == {2: 0.0, 3: 0.0}


def test_models_without_linear_layers_are_refused() -> None:
    model = sl.load(tiny("gpt2"), tokenizer=tiny_tokenizer())
    plain = [model.prompt("a>", target="b")]
    pairs = [model.prompt("a>", target="b", candidates=("b", "c"))]
    with pytest.raises(UnsupportedModelError, match=r"no torch.nn.Linear"):
        train_alternating(
            model, plain, pairs, held_out=(plain, pairs), plan=replace(PLAN, rounds=1)
        )


def test_hooks_are_refused(tiny_llama: sl.Model, data: dict[str, Any]) -> None:
    def hook(resid: torch.Tensor, hook: Any) -> torch.Tensor:
        return resid

    with (
        tiny_llama.hooks([("blocks.1.hook_out", hook)]),
        pytest.raises(ValueError, match="Hooks are in force"),
    ):
        train_alternating(tiny_llama, **data, plan=PLAN)


def test_cross_entropy_has_the_gradient_of_the_merged_weights(
    tiny_llama: sl.Model, data: dict[str, Any]
) -> None:
    """The gradient of ``up`` is that of the weight itself, times ``down`` transposed."""
    sft = data["sft"][:1]
    weight = tiny_llama.original.model.layers[3].mlp.down_proj.weight
    logits = tiny_llama.original(torch.tensor([sft[0].tokens])).logits[0, -1:]
    [of_weight] = torch.autograd.grad(
        F.cross_entropy(logits, torch.tensor([sft[0].target])), weight
    )
    updates = LowRankUpdates(tiny_llama, 2, 2, seed=0)
    cached = CachedAnswers(tiny_llama, 2, sft, [sft[0].target_tokens])
    down = updates.get_parameter("3/mlp/down_proj/down")
    with updates.acting():
        [of_up] = torch.autograd.grad(
            cached.sft_loss([0]), updates.get_parameter("3/mlp/down_proj/up")
        )
    torch.testing.assert_close(of_up, of_weight @ down.detach().T, atol=1e-5, rtol=1e-4)


def test_updates_are_applied_once_and_to_the_weights_they_were_trained_on(
    data: dict[str, Any],
) -> None:
    model = sl.load(tiny("llama"), tokenizer=tiny_tokenizer())
    trained = train_alternating(model, **data, plan=replace(PLAN, rounds=1, steps=1))
    with (
        trained.applied(),
        pytest.raises(ValueError, match="not those that the updates were trained on"),
        trained.applied(),
    ):
        pass
    prepared = prepare(model, **data, layer=2)
    with torch.no_grad():
        model.original.model.layers[3].mlp.down_proj.weight += 0.01
    with (
        pytest.raises(ValueError, match="not those that the updates were trained on"),
        trained.applied(),
    ):
        pass
    with pytest.raises(ValueError, match="What was prepared belongs to"):
        run_plan(prepared, PLAN)
    with pytest.raises(ValueError, match="5 prompts were given as sft for rounds=9|6 prompts"):
        run_plan(prepare(model, **data, layer=2), replace(PLAN, rounds=9))


def test_an_answer_that_does_not_fit_is_named(tiny_llama: sl.Model, data: dict[str, Any]) -> None:
    long = sl.Prompt((5,) * tiny_llama.n_ctx, target=6, target_tokens=(6,))
    prepare(tiny_llama, [long], data["preferences"], data["held_out"])  # its answer need not run
    longer = sl.Prompt((5,) * tiny_llama.n_ctx, target=6, target_tokens=(6, 7))
    with pytest.raises(ValueError, match=r"sft\[1\] and an answer of 2 tokens take"):
        prepare(tiny_llama, [long, longer], data["preferences"], data["held_out"])


def test_weights_that_get_no_updates_are_named() -> None:
    with pytest.warns(UserWarning, match="get no updates and stay as they are: block 2: .*experts"):
        LowRankUpdates(sl.load(tiny("mixtral")), 2, 2, seed=0)
