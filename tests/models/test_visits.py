"""A user's call has the model to itself, and hooks that are open belong to one thread or task."""

import asyncio
import contextvars
import copy
from collections.abc import Callable, Iterator
from threading import Thread
from typing import Any

import pytest
import torch
from numbers_of import MANY_PROMPTS, numbers
from tiny import tiny
from torch import Tensor, nn

from spade_lens import Model, Prompt, Residuals, Spade, capture, load, read
from spade_lens.models.tree import ModuleTree
from spade_lens.settings import one_call


def new_block(hf_model: Any) -> None:
    hf_model.model.layers[2] = copy.deepcopy(hf_model.model.layers[0])


def other_scaling(hf_model: Any) -> None:
    hf_model.model.layers[1].self_attn.scaling = 0.01


def other_forward(hf_model: Any) -> None:
    hf_model.model.layers[2].mlp.forward = lambda x: 2 * x


@pytest.mark.parametrize("change", [new_block, other_scaling, other_forward, nn.Module.train])
def test_a_change_inside_hooks_is_refused(change: Callable[[Any], None]) -> None:
    hf_model = tiny("llama")
    model = load(hf_model, name="x")
    with model.hooks([("blocks.1.hook_out", lambda x, hook: x)]):
        numbers(model)
        change(hf_model)
        with pytest.raises(RuntimeError, match=r"x was changed inside model\.hooks"):
            numbers(model)
    hf_model.eval()
    numbers(model)


def test_a_loaded_bridge_that_trains_inside_hooks_is_refused() -> None:
    bridge = load(tiny("gpt2")).bridge
    model = load(bridge)
    with model.hooks([("blocks.1.hook_out", lambda x, hook: x)]):
        numbers(model)
        bridge.train()
        with pytest.raises(RuntimeError, match=r"changed inside model\.hooks\(...\): training"):
            numbers(model)


def test_autocast_is_refused() -> None:
    hf_model = tiny("llama")
    model = load(hf_model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for use in (lambda: capture(model, MANY_PROMPTS), lambda: load(hf_model)):
            with pytest.raises(ValueError, match=r"inside torch\.autocast\('cpu'\).* Leave it"):
                use()
    capture(model, MANY_PROMPTS)


def test_a_context_that_outlives_its_call_belongs_to_none() -> None:
    hf_model = tiny("llama")
    model = load(hf_model)
    contexts = []
    handle = hf_model.lm_head.register_forward_hook(
        lambda *_: contexts.append(contextvars.copy_context())
    )
    read(MANY_PROMPTS[:1], model=model)
    handle.remove()
    new_block(hf_model)
    got = contexts[0].run(capture, model, MANY_PROMPTS).stack
    assert torch.equal(got, capture(load(hf_model), MANY_PROMPTS).stack)


def test_one_call_looks_once_and_forgets_at_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(tiny("llama"))
    looks: list[int] = []
    changes = ModuleTree.changes
    monkeypatch.setattr(ModuleTree, "changes", lambda tree: looks.append(1) or changes(tree))
    read(MANY_PROMPTS, Spade(model))
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
    some = [[Prompt(MANY_PROMPTS[0].tokens[: 4 + 2 * i])] for i in range(4)]
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
            capture(model, MANY_PROMPTS)
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


def test_what_the_five_operations_are_given_is_checked(tiny_llama: Model) -> None:
    resid, at = torch.zeros(1, 2, 32), torch.tensor([[0, 1]])
    for tokens, positions in ((at + 96, at), (at - 1, at), (at, at + 127), (at, at - 1)):
        with pytest.raises(ValueError, match="expected .* from 0 to"):
            tiny_llama.embed(tokens, positions)
    for positions in (at + 127, at - 1):
        with pytest.raises(ValueError, match="expected one for every token, from 0 to 127"):
            tiny_llama.run_blocks(resid, positions, 0, 2)
    with pytest.raises(AttributeError, match="original"):
        tiny_llama.original = tiny("gpt2")  # type: ignore[misc]


def run(threads: list[Thread]) -> None:
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
