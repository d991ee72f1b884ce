"""A model that changes after it was loaded is seen as a fresh load sees it, or refused."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from numbers_of import MANY_PROMPTS, numbers
from tiny import tiny
from torch import nn

from spade_lens import Keep, Prompt, Spade, capture, load, read


def hooked_numbers(model: Any) -> torch.Tensor:
    with model.hooks([("blocks.1.hook_out", lambda x, hook: x * 1.5)], name="louder"):
        return read(MANY_PROMPTS[:2], Spade(model)).entropy.flatten()


def scale_keys(hf_model: Any) -> None:
    for block in hf_model.model.layers:
        block.self_attn.k_proj.weight.data.mul_(-3)


def one_number(hf_model: Any) -> None:
    hf_model.model.layers[3].self_attn.k_proj.weight.data[5, 7] += 40


def zero_a_head(hf_model: Any) -> None:
    with torch.no_grad():
        hf_model.model.layers[1].self_attn.o_proj.weight[:, 8:16] = 0


def zero_a_head_through_the_bridge(hf_model: Any) -> None:
    load(hf_model).bridge.blocks[1].attn.o.weight.data[:, 8:16] = 0


def new_parameter(hf_model: Any) -> None:
    linear = hf_model.model.layers[2].mlp.down_proj
    linear.weight = nn.Parameter(linear.weight.detach() * -1)


def new_data(hf_model: Any) -> None:
    linear = hf_model.model.layers[2].mlp.down_proj
    linear.weight.data = linear.weight.detach() * -1


def new_block(hf_model: Any) -> None:
    hf_model.model.layers[2] = copy.deepcopy(hf_model.model.layers[0])
    hf_model.model.layers[2].self_attn.layer_idx = 2


def new_head(hf_model: Any) -> None:
    hf_model.lm_head = copy.deepcopy(hf_model.lm_head)
    hf_model.lm_head.weight.data.mul_(2)


def new_embedding(hf_model: Any) -> None:
    hf_model.resize_token_embeddings(120)


def fewer_blocks(hf_model: Any) -> None:
    del hf_model.model.layers[3]
    hf_model.config.num_hidden_layers = 3


def block_taken_out(hf_model: Any) -> None:
    del hf_model.model.layers[1]  # the others keep their layer_idx
    hf_model.config.num_hidden_layers = 3


def blocks_swapped(hf_model: Any) -> None:
    layers = hf_model.model.layers
    layers[1], layers[2] = layers[2], layers[1]


def other_constant(hf_model: Any) -> None:
    hf_model.model.norm.variance_epsilon = 2.0


def other_scaling(hf_model: Any) -> None:
    hf_model.model.layers[1].self_attn.scaling = 0.01


def other_rotary_table(hf_model: Any) -> None:
    hf_model.model.rotary_emb.inv_freq.mul_(3)


def other_width(hf_model: Any) -> None:
    hf_model.lm_head.weight.data = hf_model.lm_head.weight.detach()[:90]


def other_type(hf_model: Any) -> None:
    hf_model.double()


def other_forward(hf_model: Any) -> None:
    mlp = hf_model.model.layers[2].mlp
    forward = mlp.forward
    mlp.forward = lambda x: 2 * forward(x)


def adapter(hf_model: Any) -> None:
    class Adapter(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner, self.down, self.up = inner, nn.Linear(32, 2), nn.Linear(2, 32)

        def forward(self, x: torch.Tensor) -> Any:
            return self.inner(x) + self.up(self.down(x))

    torch.manual_seed(0)
    attention = hf_model.model.layers[1].self_attn
    attention.q_proj = Adapter(attention.q_proj)


def checkpointing(hf_model: Any) -> None:
    for block in hf_model.model.layers:
        block.gradient_checkpointing = True


def hook_on_keys(hf_model: Any) -> None:
    for block in hf_model.model.layers:
        block.self_attn.k_proj.register_forward_hook(lambda _m, _a, out: out * 0)


def hook_before_a_block(hf_model: Any) -> None:
    hf_model.model.layers[2].register_forward_pre_hook(lambda _m, args: (args[0] * 2, *args[1:]))


def hook_on_the_head(hf_model: Any) -> None:
    hf_model.lm_head.register_forward_hook(lambda _m, _a, out: out * 2)


CHANGES: list[Callable[[Any], None]] = [
    *(scale_keys, one_number, zero_a_head, zero_a_head_through_the_bridge),
    *(new_parameter, new_data, new_block, new_head, new_embedding, fewer_blocks),
    *(block_taken_out, blocks_swapped),
    *(other_constant, other_scaling, other_rotary_table, other_width, other_type, other_forward),
    *(adapter, checkpointing, hook_on_keys, hook_before_a_block, hook_on_the_head),
]
OF_HOOKS = [hook_on_keys, hook_before_a_block, hook_on_the_head]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_every_change_is_seen_as_by_a_fresh_load(change: Callable[[Any], None]) -> None:
    hf_model = tiny("llama")
    model = load(hf_model, name="x")
    before = numbers(model)
    hooked_numbers(model)
    change(hf_model)
    fresh = load(hf_model, name="y")
    # The checkpointing flag changes nothing outside of training.
    assert change is checkpointing or not torch.equal(before, numbers(fresh))
    torch.testing.assert_close(numbers(model), numbers(fresh), atol=1e-6, rtol=0)
    assert model.sha256 == fresh.sha256
    assert (model.n_layers, model.d_vocab, model.dtype) == (
        fresh.n_layers,
        fresh.d_vocab,
        fresh.dtype,
    )
    if change in OF_HOOKS:
        with pytest.raises(RuntimeError, match="Hooks are registered on modules of x"):
            hooked_numbers(model)
    else:
        torch.testing.assert_close(hooked_numbers(model), hooked_numbers(fresh), atol=1e-6, rtol=0)


def test_a_list_inside_the_settings_counts() -> None:
    hf_model = tiny("gemma3")
    model = load(hf_model)
    before = capture(model, MANY_PROMPTS).stack
    hf_model.config.layer_types[0] = "full_attention"
    fresh = capture(load(hf_model), MANY_PROMPTS).stack
    assert not torch.equal(before, fresh)
    assert torch.equal(capture(model, MANY_PROMPTS).stack, fresh)


def test_blocks_that_do_not_run_are_named() -> None:
    hf_model = tiny("llama")
    model = load(hf_model)
    hf_model.config.num_hidden_layers = 2
    says = r"4 blocks and does not run blocks 2, 3 \(config.num_hidden_layers is 2\). Take out"
    for use in (lambda: capture(model, MANY_PROMPTS), lambda: load(hf_model)):
        with pytest.raises(ValueError, match=says):
            use()
    hf_model.config.num_hidden_layers = 4
    capture(model, MANY_PROMPTS)


def test_a_class_whose_forward_is_replaced_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    hf_model = tiny("llama")
    model = load(hf_model)
    kind = type(hf_model.model)
    forward = kind.forward

    def louder(*args: Any, **options: Any) -> Any:
        out = forward(*args, **options)
        out.last_hidden_state = out.last_hidden_state * 2
        return out

    with monkeypatch.context() as patched:
        patched.setattr(kind, "forward", louder)
        with pytest.raises(Exception, match="differ from the model's own logits"):
            capture(model, MANY_PROMPTS[:1])
    capture(model, MANY_PROMPTS[:1])


def test_what_was_measured_with_hooks_is_measured_again_without() -> None:
    hf_model = tiny("gpt-neo")
    prompts = [Prompt((1, *((7 * i + k) % 90 + 3 for i in range(20)))) for k in range(3)]
    expected = read(prompts, Spade(load(hf_model), keep=Keep(last=9))).entropy
    # Without attention no window of it can be seen.
    handles = [
        block.attn.attention.out_proj.register_forward_hook(lambda _m, _a, out: out * 0)
        for block in hf_model.transformer.h
    ]
    model = load(hf_model)
    for handle in handles:
        handle.remove()
    got = read(prompts, Spade(model, keep=Keep(last=9))).entropy
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=0)


def test_hooks_taken_away_are_gone() -> None:
    hf_model = tiny("llama")
    model = load(hf_model)
    before = numbers(model)
    handle = hf_model.model.layers[1].register_forward_hook(lambda _m, _a, out: out * 2)
    assert model.hooked and not torch.equal(numbers(model), before)
    handle.remove()
    assert not model.hooked
    torch.testing.assert_close(numbers(model), before, atol=0, rtol=0)


def test_a_hook_on_what_never_runs_as_a_whole_is_refused() -> None:
    hf_model = tiny("llama")
    model = load(hf_model)

    def louder(_m: Any, _a: Any, out: Any) -> Any:
        out.last_hidden_state = out.last_hidden_state * 2
        return out

    hf_model.model.register_forward_hook(louder)
    with pytest.raises(Exception, match="differ from the model's own logits"):
        capture(model, MANY_PROMPTS[:1])


def test_training_mode_is_refused_until_it_ends() -> None:
    hf_model = tiny("gpt2")
    model = load(hf_model, name="x")
    before = capture(model, MANY_PROMPTS).stack
    hf_model.transformer.h[1].mlp.dropout.train()
    with pytest.raises(RuntimeError, match=r"training mode .*h\.1\.mlp\.dropout.*\.eval\(\)"):
        capture(model, MANY_PROMPTS)
    hf_model.eval()
    assert torch.equal(capture(model, MANY_PROMPTS).stack, before)
    for block in hf_model.transformer.h[:2]:  # a new module is in training mode until told
        block.mlp.act = nn.GELU()
        capture(model, MANY_PROMPTS[:1])


def test_the_bridge_is_a_view_and_says_so() -> None:
    model = load(tiny("llama"), name="x")
    before = numbers(model)
    model.bridge.run_with_cache(torch.tensor([[1, 5, 6]]))
    assert torch.equal(numbers(model), before)
    model.bridge.add_hook("blocks.1.hook_out", lambda x, hook: x * 0)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"x\.bridge was changed .* Use model\.hooks"):
            numbers(model)
    model.bridge.reset_hooks()
    assert torch.equal(numbers(model), before)


def test_hooks_of_a_loaded_bridge_are_seen() -> None:
    bridge = load(tiny("llama")).bridge
    model, plain = load(bridge), load(tiny("llama"))
    before = numbers(model)
    torch.testing.assert_close(before, numbers(plain), atol=1e-4, rtol=0)
    bridge.add_hook("blocks.1.hook_out", lambda x, hook: x * 1.5)
    with plain.hooks([("blocks.1.hook_out", lambda x, hook: x * 1.5)]):
        expected = read(MANY_PROMPTS[:2], Spade(plain)).entropy
    torch.testing.assert_close(
        read(MANY_PROMPTS[:2], Spade(model)).entropy, expected, atol=1e-4, rtol=0
    )
    bridge.reset_hooks()
    assert torch.equal(numbers(model), before)
