"""A model that changes after it was loaded is seen as a fresh load sees it, or refused."""

import asyncio
import copy
from collections.abc import Callable, Iterator
from threading import Thread
from typing import Any

import pytest
import torch
from tiny import tiny
from torch import Tensor, nn

from spade_lens import Keep, LogitLens, Prompt, Residuals, Spade, capture, load, read
from spade_lens.exits import FixedLayer, SpadeExit
from spade_lens.models.tree import ModuleTree
from spade_lens.settings import one_call

# Enough prompts for the start token's keys to be made once, and a single one.
MANY = [Prompt((1, *((7 * i + k) % 90 + 3 for i in range(12)))) for k in range(8)]


def numbers(model: Any) -> torch.Tensor:
    """SPADE, the logit lens, early exit and a hooked run, of many prompts and of one."""
    lenses = [Spade(model), LogitLens(model), Spade(model, keep=Keep(last=3), name="last 3")]
    found = [read(prompts, lenses).entropy.flatten() for prompts in (MANY, MANY[:1])]
    found.append(SpadeExit(model, None, FixedLayer(2)).run(MANY).answer.float())
    return torch.cat(found)


def hooked_numbers(model: Any) -> torch.Tensor:
    with model.hooks([("blocks.1.hook_out", lambda x, hook: x * 1.5)], name="louder"):
        return read(MANY[:2], Spade(model)).entropy.flatten()


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
    *(other_constant, other_scaling, other_rotary_table, other_type, other_forward),
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
        capture(model, MANY[:1])


def test_training_mode_is_refused_until_it_ends() -> None:
    hf_model = tiny("gpt2")
    model = load(hf_model, name="x")
    before = capture(model, MANY).stack
    hf_model.transformer.h[1].mlp.dropout.train()
    with pytest.raises(RuntimeError, match=r"training mode .*h\.1\.mlp\.dropout.*\.eval\(\)"):
        capture(model, MANY)
    hf_model.eval()
    assert torch.equal(capture(model, MANY).stack, before)
    for block in hf_model.transformer.h[:2]:  # a new module is in training mode until told
        block.mlp.act = nn.GELU()
        capture(model, MANY[:1])


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
        expected = read(MANY[:2], Spade(plain)).entropy
    torch.testing.assert_close(read(MANY[:2], Spade(model)).entropy, expected, atol=1e-4, rtol=0)
    bridge.reset_hooks()
    assert torch.equal(numbers(model), before)


def test_a_change_inside_hooks_is_refused() -> None:
    hf_model = tiny("llama")
    model = load(hf_model, name="x")
    with model.hooks([("blocks.1.hook_out", lambda x, hook: x)]):
        new_block(hf_model)
        with pytest.raises(RuntimeError, match=r"x was changed inside model\.hooks"):
            numbers(model)
    numbers(model)


def test_one_call_looks_once_and_forgets_at_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(tiny("llama"))
    looks: list[int] = []
    changes = ModuleTree.changes
    monkeypatch.setattr(ModuleTree, "changes", lambda tree: looks.append(1) or changes(tree))
    read(MANY, Spade(model))
    assert len(looks) == 1
    with one_call():
        model.expect_rows(100)
        for token in range(30):
            model.prefix(token)
        assert model.prefix(29) is model.prefix(29)
        assert len(model._now._prefixes) == 8
    with one_call():
        model.expect_rows(1)
        assert model.prefix(29) is None


def test_threads_share_a_model_without_a_wrong_number() -> None:
    model = load(tiny("llama"))
    some = [[Prompt(MANY[0].tokens[: 4 + 2 * i])] for i in range(4)]
    expected = [capture(model, prompts).stack for prompts in some]
    told: list[str] = []

    def work(i: int) -> None:
        for _ in range(25):
            got: Residuals = capture(model, some[i])
            if not torch.equal(got.stack, expected[i]):
                told.append("wrong")

    run([Thread(target=work, args=(i,)) for i in range(4)])
    assert not told


def test_hooks_belong_to_one_thread() -> None:
    model = load(tiny("llama"), name="x")
    told: list[str] = []

    def work() -> None:
        try:
            capture(model, MANY)
        except RuntimeError as error:
            told.append(str(error))

    with model.hooks([("blocks.1.hook_out", lambda x, hook: x * 0)]):
        run([Thread(target=work)])
    assert told and told[0].startswith("Another thread or asyncio task is inside x.hooks(")
    run([Thread(target=work)])
    assert len(told) == 1


def test_hooks_belong_to_one_task() -> None:
    model = load(tiny("llama"), name="x")

    async def inside() -> None:
        with model.hooks([("blocks.1.hook_out", lambda x, hook: x / 2)]):
            await asyncio.sleep(0.02)
            numbers(model)

    async def beside() -> None:
        await asyncio.sleep(0.01)
        with pytest.raises(RuntimeError, match="asyncio task is inside"):
            numbers(model)

    async def both() -> None:
        await asyncio.gather(inside(), beside())

    asyncio.run(both())


def test_hooks_that_close_out_of_turn_leave_nothing_behind() -> None:
    model = load(tiny("llama"))
    before = numbers(model)

    def reading() -> Iterator[Tensor]:
        with model.hooks([("blocks.1.hook_out", lambda x, hook: x / 2)]):
            yield numbers(model)

    first, second = reading(), reading()
    next(first), next(second)
    first.close()
    with pytest.raises(RuntimeError, match=r"changed inside model\.hooks"):
        numbers(model)
    second.close()
    assert torch.equal(numbers(model), before)


def run(threads: list[Thread]) -> None:
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
