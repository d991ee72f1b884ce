"""LayerSkip's formulas by hand, its dropout and loss against plain code."""

import math
from typing import Any

import pytest
import torch
from tiny import tiny
from torch import Tensor
from torch.nn import functional as F

from spade_lens import UnsupportedModelError
from spade_lens.training import LayerSkip
from spade_lens.training.layerskip import run_with_dropout

TOKENS = torch.randint(3, 97, (6, 10), generator=torch.Generator().manual_seed(0))


def test_dropout_rates_by_hand() -> None:
    recipe = LayerSkip(steps=11, p_max=0.2)
    assert recipe.dropout(0, 5).tolist() == [0.0] * 5
    # At the last step S = 1; D(l) = 2^(l/4) - 1.
    expected = [0.2 * (2 ** (block / 4) - 1) for block in range(5)]
    assert recipe.dropout(10, 5).tolist() == pytest.approx(expected)
    assert recipe.dropout(10, 5)[-1] == pytest.approx(0.2)
    # Half-way S = 2^(1/2) - 1.
    half = recipe.dropout(5, 5).tolist()
    assert half == pytest.approx([x * (math.sqrt(2) - 1) for x in expected])
    tuned = LayerSkip(steps=11, p_max=0.2, scratch=False)
    assert tuned.dropout(0, 5).tolist() == pytest.approx(expected)


def test_weights_by_hand() -> None:
    # e(l) with e_scale 0.2 and L = 4: 0, 0.2 x 1, 0.2 x 3, 3 + 0.2 x 3.
    every = LayerSkip(steps=16, curriculum="all").weights(3, 4)
    assert every.tolist() == pytest.approx([0.0, 0.2 / 4.4, 0.6 / 4.4, 3.6 / 4.4])
    # The last exit's part, worked out from the paper: 11.1% of 32 blocks, 33% and 23% of 12.
    for n_layers, scale, expected in ((32, 0.2, 0.111), (12, 0.2, 0.33), (12, 1.0, 0.23)):
        recipe = LayerSkip(steps=2, e_scale=scale, curriculum="all")
        assert float(recipe.weights(0, n_layers)[-1]) == pytest.approx(expected, abs=0.005)


def on(recipe: LayerSkip, step: int, n_layers: int) -> list[int]:
    """The exits with weight; block 0 never has any."""
    return recipe.weights(step, n_layers).nonzero()[:, 0].tolist()


def test_curricula() -> None:
    pure = LayerSkip(steps=9, period=3)
    assert [on(pure, t, 7) for t in range(4)] == [[3, 6], [1, 4], [2, 5], [3, 6]]
    kept = LayerSkip(steps=9, period=3, last=True)
    assert [on(kept, t, 7) for t in range(3)] == [[3, 6], [1, 4, 6], [2, 5, 6]]
    gradual = LayerSkip(steps=40, curriculum="gradual")  # one more every 40 / (2 x 4) = 5 steps
    assert [on(gradual, t, 4) for t in (0, 4, 5, 9, 10, 39)] == [
        *([3], [3], [2, 3], [2, 3], [1, 2, 3], [1, 2, 3])
    ]


@pytest.mark.parametrize("name", ["llama", "llama-eager", "mistral", "qwen3"])
def test_without_dropout_and_lower_exits_it_is_the_models_own_loss(name: str) -> None:
    model = tiny(name).train()
    recipe = LayerSkip(steps=5, p_max=0.0, e_scale=0.0, last=True)
    found = recipe.loss(model, TOKENS, 2)
    own = model(input_ids=TOKENS, labels=TOKENS, use_cache=False).loss
    torch.testing.assert_close(found, own)


def plain_run(model: Any, tokens: Tensor, stays: Tensor) -> list[Tensor]:
    """Residuals after every block: x + M f(x), all rows through all blocks, by the paper."""
    base = model.model
    resid = base.embed_tokens(tokens)
    positions = torch.arange(tokens.shape[1])[None]
    rotary = base.rotary_emb(resid, positions)
    mask = torch.full((tokens.shape[1],) * 2, -torch.inf).triu(1)[None, None]
    found = []
    for block, keep in zip(base.layers, stays, strict=True):
        out = block(resid, attention_mask=mask, position_ids=positions, position_embeddings=rotary)
        resid = resid + keep[:, None, None] * (out - resid)
        found.append(resid)
    return found


@pytest.mark.parametrize("name", ["llama", "llama-eager"])
def test_dropout_against_a_plain_reference(name: str) -> None:
    """Values and gradients, with rows that skip, blocks that all rows skip, and none."""
    ours, plain = tiny(name).train(), tiny(name).train()
    rates = torch.tensor([0.0, 0.5, 1.0, 0.5])
    torch.manual_seed(4)
    found = run_with_dropout(ours, list(ours.model.layers), TOKENS, rates, range(4))
    torch.manual_seed(4)
    stays = torch.rand(4, 6) >= rates[:, None]
    assert stays[0].all() and not stays[2].any() and 0 < stays[1].sum() < 6
    expected = plain_run(plain, TOKENS, stays.float())
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    found[-1].square().sum().backward()
    expected[-1].square().sum().backward()
    for (n, a), b in zip(ours.named_parameters(), plain.parameters(), strict=True):
        zero = torch.zeros_like(a)
        torch.testing.assert_close(
            zero if a.grad is None else a.grad,
            zero if b.grad is None else b.grad,
            rtol=1e-4,
            atol=1e-4 * float(max(1.0, 0.0 if b.grad is None else b.grad.abs().max())),
            msg=n,
        )


def test_rows_are_dropped_at_the_rate() -> None:
    model = tiny()
    tokens = TOKENS[:1, :2].expand(2000, -1)
    rates = torch.tensor([0.0, 0.0, 0.25, 0.0])
    with torch.no_grad():
        before, after = run_with_dropout(model, list(model.model.layers), tokens, rates, [1, 2])
    skipped = (before == after).all(dim=-1).all(dim=-1).float().mean()
    assert abs(float(skipped) - 0.25) < 4 * math.sqrt(0.25 * 0.75 / 2000)


def test_the_loss_against_a_plain_reference() -> None:
    model = tiny().train()
    recipe = LayerSkip(steps=9, p_max=0.5, e_scale=1.0, curriculum="all")
    torch.manual_seed(2)
    found = recipe.loss(model, TOKENS, 8)
    torch.manual_seed(2)
    stays = torch.rand(4, 6) >= recipe.dropout(8, 4)[:, None]
    losses = [
        F.cross_entropy(
            model.lm_head(model.model.norm(resid))[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten()
        )
        for resid in plain_run(model, TOKENS, stays.float())
    ]
    # e: 0, 1, 3, 3 + 3
    expected = (1 * losses[1] + 3 * losses[2] + 6 * losses[3]) / 10
    torch.testing.assert_close(found, expected)


def test_the_model_is_as_before_afterwards() -> None:
    model = tiny().train()
    kind, state = type(model), {k: v.clone() for k, v in model.state_dict().items()}
    LayerSkip(steps=5).loss(model, TOKENS, 1)
    model.model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        LayerSkip(steps=5).loss(model, TOKENS, 1)
    assert type(model) is kind
    assert not any("forward" in vars(module) for module in model.modules())
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())


def test_bad_input() -> None:
    model = tiny()
    with pytest.raises(UnsupportedModelError, match="GPT2LMHeadModel was given; expected"):
        LayerSkip(5).loss(tiny("gpt2"), TOKENS, 0)
    with pytest.raises(UnsupportedModelError, match="changes its logits .*softcapping"):
        LayerSkip(5).loss(tiny("gemma2"), TOKENS, 0)
    with pytest.raises(ValueError, match="step=5 and 4 blocks were given; expected a step from 0"):
        LayerSkip(5).loss(model, TOKENS, 5)
    with pytest.raises(ValueError, match="none of the exits that are on has weight"):
        LayerSkip(5, period=9, last=False).weights(0, 4)
    for wrong, message in (
        ({"p_max": 1.5}, "p_max=1.5 was given; expected 0 to 1"),
        ({"e_scale": -1.0}, "e_scale=-1.0 was given"),
        ({"period": 0}, "period=0 was given"),
        ({"curriculum": "cosine"}, "curriculum='cosine' was given; expected 'rotational'"),
    ):
        with pytest.raises(ValueError, match=message):
            LayerSkip(5, **wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="steps=1 was given"):
        LayerSkip(1)
