"""Hooks: a batch as each prompt alone, every name of six families, and nothing but what runs."""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from hook_table import (
    FAMILIES,
    Firing,
    by_position,
    firings,
    names_to_try,
    page_table,
    pattern,
    table,
)
from tiny import TL39, tiny
from torch import Tensor

import spade_lens as sl
from spade_lens import icl
from spade_lens.exits import SpadeExit, Threshold
from spade_lens.icl.attention.heads import count_heads, head_contributions, head_outputs
from spade_lens.icl.attention.saliency import attention_saliency
from spade_lens.models import HookRun

TOKENS = (1, *((7 * i) % 90 + 3 for i in range(15)))
LENGTHS = (7, 4, 4, 9, 7)
PROMPTS = [
    sl.Prompt(tokens=(*TOKENS[: n - 1], 60 + k), spans={"kept": tuple(range(1, 2 + k % 3))})
    for k, n in enumerate(LENGTHS)
]


@cache
def loaded(family: str) -> sl.Model:
    return sl.load(tiny(family), name=family)


@cache
def measured(family: str) -> dict[Firing, set[str]]:
    return firings(loaded(family))


def read(model: sl.Model, prompts: list[sl.Prompt]) -> Tensor:
    return sl.read(prompts, sl.Spade(model, keep=sl.Keep(spans=("kept",))), layers=[1, 4]).entropy


@pytest.mark.filterwarnings("ignore:A forward hook edited", "ignore:A hook on")
@pytest.mark.parametrize("family", FAMILIES)
def test_every_name_acts_on_a_batch_as_on_each_prompt_alone(family: str) -> None:
    model = loaded(family)
    prompts = PROMPTS[1:4]
    idle = {name for name, operation, _ in measured(family) if "read only" in operation}
    for name in names_to_try(model):
        if pattern(name) in idle:
            continue
        with model.hooks([(name, by_position)]):
            alone = torch.cat([read(model, [prompt]) for prompt in prompts], dim=-1)
            together = read(model, prompts)
        torch.testing.assert_close(together, alone, atol=2e-5, rtol=0.0, msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_all_other_names_are_refused_with_the_nearest(family: str) -> None:
    model = loaded(family)
    silent = set(model.bridge.hook_dict) - set(model.hook_names)
    assert "blocks.0.attn.hook_result" in silent
    # Those outside blocks and in one block: the same are silent in all.
    tried = {name for name in silent if not name.startswith("blocks.") or ".0." in name}
    assert {pattern(name) for name in tried} == {pattern(name) for name in silent}
    for name in tried:
        with (
            pytest.raises(ValueError, match="never fires in .* Nearest: 'blocks.0|Nearest"),
            model.hooks([(name, by_position)]),
        ):
            pass
    fired = {pattern(name) for name in model.hook_names.values()}
    assert fired == {name for name, _, _ in measured(family)}


@pytest.mark.skipif(TL39, reason="the page is of TransformerLens 4")
def test_the_table_on_the_page_is_what_fires() -> None:
    assert page_table() == table({family: measured(family) for family in FAMILIES})


def shown(model: sl.Model, act: Callable[[], object], **options: Any) -> list[HookRun]:
    seen: list[HookRun] = []

    def note(activation: Tensor, hook: Any) -> None:
        assert model.running is not None
        seen.append(model.running)

    with model.hooks([("blocks.2.hook_resid_pre", note)], **options):
        act()
    return seen


def test_a_hook_is_told_what_runs(tiny_llama: sl.Model) -> None:
    runs = shown(tiny_llama, lambda: sl.capture(tiny_llama, PROMPTS))
    assert [run.prompts for run in runs] == [(0,), (1, 2), (3,), (4,)]
    assert [run.last.tolist() for run in runs] == [[6], [3, 3], [8], [6]]
    assert all(bool(run.mask.all()) and run.phase == "prompt" for run in runs)
    (run,) = shown(tiny_llama, lambda: sl.capture(tiny_llama, PROMPTS), ragged=True)
    assert run.prompts == (0, 1, 2, 3, 4)
    assert run.mask.sum(dim=1).tolist() == list(LENGTHS)
    assert run.last.tolist() == [n - 1 for n in LENGTHS]
    assert run.positions is not None and run.positions.shape == run.mask.shape
    assert (run.start, run.stop) == (0, 4)
    assert tiny_llama.running is None


def test_numbers_are_the_users_in_chunks_and_tails(tiny_llama: sl.Model) -> None:
    one_by_one = sl.Settings(memory_limit=1e-5)

    def act() -> None:
        sl.read(PROMPTS, sl.Spade(tiny_llama), layers=[1], settings=one_by_one)

    runs = shown(tiny_llama, act)
    assert len({id(run) for run in runs}) >= 2 * len({7, 4, 9})
    for phase in ("prompt", "lens"):
        told = [i for run in runs if run.phase == phase for i in run.prompts or ()]
        assert told == [0, 1, 2, 3, 4], phase
    tails = [run for run in runs if run.phase == "lens"]
    assert [run.start for run in tails] == [1] * len(tails)
    assert torch.cat([run.positions[:, -1] for run in tails]).tolist() == [n - 1 for n in LENGTHS]


def test_a_fit_does_not_number_its_prompts(tiny_llama: sl.Model) -> None:
    text = [sl.Prompt(tokens=tuple((k + i) % 90 + 3 for i in range(40))) for k in range(6)]
    runs = shown(tiny_llama, lambda: sl.fit("tuned", text=text, model=tiny_llama, layers=2))
    assert runs and all(run.prompts is None for run in runs)


@pytest.mark.parametrize("keep", [sl.Keep(), sl.Keep(spans=("kept",))])
def test_ragged_hooks_that_heed_the_mask_give_the_same(tiny_llama: sl.Model, keep: sl.Keep) -> None:
    def steer(resid: Tensor, hook: Any) -> Tensor:
        run = tiny_llama.running
        assert run is not None and run.prompts is not None
        added = torch.tensor(run.prompts)[:, None] * torch.linspace(-1, 1, resid.shape[-1])
        resid[torch.arange(len(resid)), run.last] += added
        return resid

    def entropy() -> Tensor:
        return sl.read(PROMPTS, sl.Spade(tiny_llama, keep=keep)).entropy

    hooks = [("blocks.1.hook_resid_post", steer)]
    with tiny_llama.hooks(hooks):
        expected = entropy()
    with tiny_llama.hooks(hooks, ragged=True):
        torch.testing.assert_close(entropy(), expected, atol=1e-5, rtol=0.0)
    assert not torch.allclose(entropy(), expected, atol=1e-2)


def last_token(resid: Tensor, hook: Any) -> Tensor:
    resid[:, -1] += torch.linspace(-2, 2, resid.shape[-1])
    return resid


def exits(model: sl.Model, prompts: list[sl.Prompt]) -> list[Any]:
    trace = SpadeExit(model, "logit", Threshold(2.9), layers=[2, 3]).run(prompts)
    return [*trace.exit_layer.tolist(), *trace.answer.tolist()]


def replayed(model: sl.Model, prompts: list[sl.Prompt]) -> list[Any]:
    residuals = sl.replay.capture_for_replay(model, prompts)
    write = sl.Patch(2, positions=1, values=torch.ones(32))
    rows = range(len(prompts))
    out = sl.replay.replay(model, residuals, [*rows, *rows], [write])
    return out.mul(1e4).round().div(1e4)[: len(prompts), :4].T.flatten().tolist()


def cut(model: sl.Model, prompts: list[sl.Prompt]) -> list[Any]:
    asked = [sl.Prompt(tokens=p.tokens, target=5) for p in prompts]
    edges = {"last": lambda p: [(p.answer, k) for k in range(1, p.answer)]}
    frame = icl.knockout(model, asked, edges=edges, windows=[(1, 3)], draws=0)
    return frame["logit_diff"].round(3).tolist()


def salient(model: sl.Model, prompts: list[sl.Prompt]) -> list[Any]:
    asked = [sl.Prompt(tokens=p.tokens, target=5) for p in prompts]
    return [round(s.sum().item(), 3) for s in attention_saliency(model, asked)]


@pytest.mark.parametrize("verb", [exits, replayed, cut, salient])
def test_every_verb_acts_on_a_batch_as_on_each_prompt_alone(
    tiny_llama: sl.Model, verb: Callable[[sl.Model, list[sl.Prompt]], list[Any]]
) -> None:
    with tiny_llama.hooks([("blocks.1.hook_resid_post", last_token)]):
        alone = [verb(tiny_llama, [prompt]) for prompt in PROMPTS]
        together = verb(tiny_llama, PROMPTS)
    n = len(alone[0])
    expected = [values[k] for k in range(n) for values in alone]
    assert together == pytest.approx(expected, abs=2e-3)
    assert verb(tiny_llama, PROMPTS) != together


def test_a_replay_is_the_capture_with_the_same_hooks(tiny_llama: sl.Model) -> None:
    rows = [3, 0, 0, 2]
    write = sl.Patch(2, positions=1, values=torch.ones(32))
    with tiny_llama.hooks([("blocks.1.hook_resid_post", last_token)]):
        residuals = sl.replay.capture_for_replay(tiny_llama, PROMPTS)
        got = sl.replay.replay(tiny_llama, residuals, rows, [write])
        again = [PROMPTS[i] for i in rows]
        expected = sl.capture(tiny_llama, again, layers=4, positions="last", patches=[write])
    torch.testing.assert_close(got, expected.stack[0], atol=1e-4, rtol=0.0)


def test_what_a_hook_writes_in_place_reaches_no_other_run(tiny_llama: sl.Model) -> None:
    tokens = torch.tensor([PROMPTS[0].tokens])
    at = torch.arange(tokens.shape[1])[None]
    kept: list[Tensor] = []

    def double(resid: Tensor, hook: Any) -> None:
        resid *= 2

    def inputs(name: str) -> bool:
        return name.endswith("hook_in") and "emb" not in name

    with tiny_llama.hooks([(inputs, double)]):
        resid = tiny_llama.embed(tokens)
        before = resid.clone()
        tiny_llama.run_blocks(resid, at, 0, 4, after_block=lambda _, after: kept.append(after))
        torch.testing.assert_close(resid, before, atol=0.0, rtol=0.0)
        copies = [after.clone() for after in kept]
        tiny_llama.logits(kept[-1][0])
        torch.testing.assert_close(kept, copies, atol=0.0, rtol=0.0)


def test_nothing_fires_while_things_are_measured(tiny_llama: sl.Model) -> None:
    fired: list[str] = []

    def note(activation: Tensor, hook: Any) -> None:
        fired.append(hook.name)

    with tiny_llama.hooks([(lambda name: True, note)]):
        SpadeExit(tiny_llama, "logit", Threshold(1.0), layers=[2])
        assert count_heads(tiny_llama) == 4
        assert fired == []
        sl.capture(tiny_llama, "ab", layers=[1])
    assert {pattern(name).split(".")[0] for name in fired} == {"embed", "rotary_emb", "blocks"}
    assert not any(name.startswith("blocks.1") for name in fired)
    assert len(set(fired)) == len(fired)


def test_torch_hooks_fire_where_their_module_runs() -> None:
    hf_model = tiny("gpt2")
    fired: list[str] = []
    for name in ("", "transformer", "transformer.wte", "transformer.wpe", "transformer.ln_f"):
        hf_model.get_submodule(name).register_forward_hook(lambda *_, name=name: fired.append(name))
    model = sl.load(hf_model, name="gpt2")
    fired.clear()
    sl.capture(model, PROMPTS, layers=[2])
    one_each = ["transformer.wpe", "transformer.wte"]
    assert sorted(set(fired)) == one_each
    assert len(fired) % 2 == 0


BAD: list[tuple[Any, type[Exception], str]] = [
    ([("blocks.1.hook_resid_pots", last_token)], ValueError, "Nearest: 'blocks.1.hook_resid_post'"),
    ([("blocks.9.hook_out", last_token)], ValueError, "has none such"),
    ([("blocks.0.attn.hook_result", last_token)], ValueError, "set_use_attn_result"),
    ([("hook_pos_embed", last_token)], ValueError, "nothing in this model passes it"),
    ([(lambda name: "nowhere" in name, last_token)], ValueError, "matches no hook name"),
    ([(3, last_token)], TypeError, "a filter on names"),
    ([("blocks.0.hook_out", lambda x: x)], TypeError, "the second of which is called 'hook'"),
    ([("blocks.0.hook_out", lambda x, point: x)], TypeError, r"def scale\(tensor, hook\)"),
]


@pytest.mark.parametrize(("hooks", "error", "says"), BAD)
def test_wrong_hooks_are_refused(
    tiny_llama: sl.Model, hooks: Any, error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says), tiny_llama.hooks(hooks):
        pass
    assert not tiny_llama.hooked


@pytest.mark.parametrize(
    "give", [lambda x: x[:, -1:], lambda x: x.double(), lambda x: True, lambda x: x[0]]
)
def test_what_a_hook_gives_has_to_fit(tiny_llama: sl.Model, give: Callable[[Tensor], Any]) -> None:
    with (
        pytest.raises(ValueError, match="hook on 'blocks.1.hook_resid_post'.*expected"),
        tiny_llama.hooks([("blocks.1.hook_resid_post", lambda x, hook: give(x))]),
    ):
        sl.capture(tiny_llama, "abc")


def test_a_switch_lets_more_names_fire() -> None:
    model = sl.load(tiny("llama"), name="llama")
    seen: list[tuple[int, ...]] = []
    hooks = [("blocks.1.attn.hook_result", lambda x, hook: seen.append(tuple(x.shape)))]
    with pytest.raises(ValueError, match="never fires"), model.hooks(hooks):
        pass
    model.bridge.set_use_attn_result(True)
    with model.hooks(hooks):
        sl.capture(model, PROMPTS[:1])
    assert seen == [(1, 7, 4, 32)]


def test_single_heads_are_not_replayed_while_hooks_act(tiny_llama: sl.Model) -> None:
    outputs = head_outputs(tiny_llama, PROMPTS[:1])
    with (
        tiny_llama.hooks([("blocks.1.hook_resid_post", last_token)]),
        pytest.raises(ValueError, match="outside model.hooks"),
    ):
        head_contributions(tiny_llama, outputs)
