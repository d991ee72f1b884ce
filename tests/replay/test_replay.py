"""Replay: equal to whole patched runs, whatever is patched where, in whatever batches."""

from inspect import unwrap  # past the type checks that run in tests only
from typing import Any

import pytest
import torch
from tiny import MORE_ARCHITECTURES, tiny

from spade_lens import Model, Patch, Prompt, Settings, capture, load
from spade_lens.replay import capture_for_replay, replay

EXACT = {"atol": 1e-4, "rtol": 0.0}
PROMPTS = [
    Prompt(tokens=(1, *(4 + (5 * i + n) % 90 for i in range(n))), target=5, candidates=(5, 7, 9))
    for n in (11, 3, 25)
]
PROMPTS.append(Prompt(tokens=PROMPTS[0].tokens, answer=6, target=5, candidates=(5, 7)))
ROWS = [0, 0, 2, 1, 2, 3, 3]


def patches(model: Model) -> list[Patch]:
    """One layer, several layers and modes, one vector for all, and a row that none touches."""
    vectors = torch.randn(6, model.d_model)
    return [
        Patch(2, prompts=(0, 2), positions=[[4, 7], [20]], values=vectors[:3]),
        Patch(2, prompts=(0,), positions=(4,), values=vectors[3], mode="add"),
        Patch(0, prompts=(3,), positions=(1,), values=vectors[4]),
        Patch(1, prompts=(2, 4), positions=[[3], [25]], values=vectors[5], mode="add"),
        Patch(3, prompts=(4, 2), positions=[[25], [3]], values=vectors[1:3]),
        Patch(4, prompts=(5,), positions=(6,), values=vectors[0]),
        Patch(1, prompts=(6,), positions=(9,), values=vectors[0]),  # after the answer
    ]


def whole(model: Model) -> torch.Tensor:
    prompts = [PROMPTS[i] for i in ROWS]
    positions = [[prompt.answer] for prompt in prompts]
    layers = [model.n_layers]
    return capture(
        model, prompts, layers=layers, positions=positions, patches=patches(model)
    ).stack[0]


@pytest.mark.parametrize("name", MORE_ARCHITECTURES)
def test_equals_whole_patched_runs(name: str) -> None:
    model = load(tiny(name))
    torch.manual_seed(1)
    expected = whole(model)
    torch.manual_seed(1)
    found = replay(model, capture_for_replay(model, PROMPTS), ROWS, patches(model))
    torch.testing.assert_close(found, expected, **EXACT)


@pytest.mark.parametrize("name", MORE_ARCHITECTURES)
def test_positions_written_at_every_layer(name: str) -> None:
    model = load(tiny(name))
    vectors = torch.randn(3, model.n_layers + 1, model.d_model)
    written = [
        patch
        for layer in range(model.n_layers + 1)
        for patch in (
            Patch(layer, prompts=(0, 1), positions=[[3, 7], [3, 7]], values=vectors[0, layer]),
            Patch(layer, prompts=(2,), positions=(20,), values=vectors[1, layer]),
            Patch(layer, prompts=(2,), positions=(4,), values=vectors[2, layer], mode="add"),
            Patch(layer, prompts=(5,), positions=(6,), values=vectors[2, layer]),  # the answer
        )
    ]
    prompts = [PROMPTS[i] for i in ROWS]
    expected = capture(
        model,
        prompts,
        layers=[model.n_layers],
        positions=[[prompt.answer] for prompt in prompts],
        patches=written,
    )
    found = replay(model, capture_for_replay(model, PROMPTS), ROWS, written)
    torch.testing.assert_close(found, expected.stack[0], **EXACT)


@pytest.mark.parametrize("limit", [1, 40])
def test_small_batches_equal_one(
    tiny_llama: Model, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    residuals, some = capture_for_replay(tiny_llama, PROMPTS), patches(tiny_llama)
    expected = replay(tiny_llama, residuals, ROWS, some)
    monkeypatch.setattr("spade_lens.settings._BATCH_TOKENS", limit)
    torch.testing.assert_close(replay(tiny_llama, residuals, ROWS, some), expected, **EXACT)
    little = replay(tiny_llama, residuals, ROWS, some, settings=Settings(memory_limit=1e-06))
    torch.testing.assert_close(little, expected, **EXACT)


def test_starts_at_the_next_captured_layer_below(tiny_llama: Model) -> None:
    residuals = capture_for_replay(tiny_llama, PROMPTS, layers=[0, 1])
    torch.manual_seed(1)
    expected = whole(tiny_llama)
    torch.manual_seed(1)
    found = replay(tiny_llama, residuals, ROWS, patches(tiny_llama))
    torch.testing.assert_close(found, expected, **EXACT)


def test_own_residuals_change_nothing(tiny_llama: Model) -> None:
    residuals = capture_for_replay(tiny_llama, PROMPTS)
    own = [
        Patch(layer, prompts=layer, positions=(0, 5, 11), values=residuals.at(0)[layer][at])
        for layer, at in [(layer, [0, 5, 11]) for layer in range(5)]
    ]
    found = replay(tiny_llama, residuals, [0] * 5, own)
    torch.testing.assert_close(found, residuals.at(0)[-1, -1].expand(5, -1), **EXACT)


def test_only_blocks_above_the_patch_run() -> None:
    hf_model = tiny("llama")
    model, calls = load(hf_model), []
    for i, block in enumerate(hf_model.model.layers):
        block.register_forward_hook(lambda *_, i=i: calls.append(i))
    residuals = capture_for_replay(model, PROMPTS)
    calls.clear()
    replay(model, residuals, [0], [Patch(2, prompts=(0,), positions=(3,), values=torch.ones(32))])
    assert calls == [2, 3]


@pytest.mark.parametrize(
    ("rows", "patch", "message"),
    [
        ([], {}, r"rows=\[\] was given; expected the prompt of every row, from 0 to 3"),
        ([0, 4], {}, r"and \[4\] lie outside"),
        ([0], {"prompts": (1,)}, r"prompts=\[1\] was given, and \[1\] lie outside"),
        ([0], {"layer": 7}, r"\[7\] lie outside"),
        ([0], {"layer": 1}, r"patched at layer 1 needs .* only \[2, 4\] were captured"),
    ],
)
def test_wrong_requests_are_named(
    tiny_llama: Model, rows: list[int], patch: dict[str, Any], message: str
) -> None:
    residuals = capture_for_replay(tiny_llama, PROMPTS, layers=[2, 4])
    made = Patch(
        patch.get("layer", 3),
        prompts=patch.get("prompts", (0,)),
        positions=(2,),
        values=torch.ones(32),
    )
    with pytest.raises(ValueError, match=message):
        replay(tiny_llama, residuals, rows, [made])


def test_residuals_of_a_model_that_has_changed_are_refused() -> None:
    hf_model = tiny("llama")
    model = load(hf_model, name="x")
    residuals = capture_for_replay(model, PROMPTS)
    patch = [Patch(2, prompts=(0,), positions=(3,), values=torch.ones(32))]
    before = replay(model, residuals, [0], patch)
    keys = hf_model.model.layers[0].self_attn.k_proj.weight.data
    keys.mul_(-3)
    with pytest.raises(ValueError, match="not what x gives now: it has been changed"):
        replay(model, residuals, [0], patch)
    keys.div_(-3)
    torch.testing.assert_close(replay(model, residuals, [0], patch), before, atol=1e-5, rtol=0)


def test_rows_are_whole_numbers_however_given(tiny_llama: Model) -> None:
    residuals = capture_for_replay(tiny_llama, PROMPTS)
    expected = replay(tiny_llama, residuals, [1, 0], [])
    for rows in (torch.tensor([1, 0]), (n for n in (1, 0)), range(1, -1, -1)):
        assert torch.equal(replay(tiny_llama, residuals, rows, []), expected)
    for wrong in ([0.5], [True], "0", None):
        with pytest.raises(TypeError, match="expected the prompt of every row"):
            unwrap(replay)(tiny_llama, residuals, wrong, [])  # type: ignore[arg-type]


def test_residuals_captured_without_the_hooks_are_refused(tiny_llama: Model) -> None:
    residuals = capture_for_replay(tiny_llama, PROMPTS)
    with (
        tiny_llama.hooks([("blocks.0.hook_resid_post", lambda x, hook: x * 2)]),
        pytest.raises(ValueError, match="captured without them. Capture them where"),
    ):
        replay(tiny_llama, residuals, [0], [])
