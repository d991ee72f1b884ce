"""Capture and patch: chosen layers and positions, ragged prompts, and nothing more."""

import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from reference import hidden_states
from tiny import ARCHITECTURES, tiny

from spade_lens import Model, Patch, Prompt, Residuals, Settings, capture, load

EXACT = {"atol": 1e-4, "rtol": 0.0}
PROMPTS = [Prompt(tokens=(1, *(4 + (5 * i) % 90 for i in range(n)))) for n in (11, 3, 0, 25)]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_equals_plain_hooks_on_every_prompt(name: str) -> None:
    hf_model = tiny(name)
    residuals = capture(load(hf_model), PROMPTS)
    for i, prompt in enumerate(PROMPTS):
        expected = torch.stack(hidden_states(hf_model, prompt.tokens))
        torch.testing.assert_close(residuals.at(i), expected, **EXACT)


def test_chosen_layers_and_positions_are_those_of_the_whole(tiny_llama: Model) -> None:
    whole = capture(tiny_llama, PROMPTS)
    positions = [[10, 2], [0], [0], []]
    part = capture(tiny_llama, PROMPTS, layers=[3, 1], positions=positions)
    assert part.layers == (3, 1)
    assert part.prompt.tolist() == [0, 0, 1, 2]
    assert part.position.tolist() == [10, 2, 0, 0]
    slots = [s for i, p in enumerate(positions) for s in whole.slots(i, p)]
    torch.testing.assert_close(part.stack, whole.stack[[3, 1]][:, slots], **EXACT)


def test_prompts_without_a_position_have_no_slots(tiny_llama: Model) -> None:
    positions = [[], [1], [], []]
    part = capture(tiny_llama, PROMPTS, positions=positions, settings=Settings(batch_size=1))
    torch.testing.assert_close(part.at(1), capture(tiny_llama, PROMPTS).at(1)[:, [1]], **EXACT)
    assert capture(tiny_llama, PROMPTS, positions=[[]] * 4).stack.shape == (5, 0, 32)


def test_small_chunks_equal_one(tiny_llama: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = capture(tiny_llama, PROMPTS)
    monkeypatch.setattr("spade_lens.settings._BATCH_TOKENS", 1)
    torch.testing.assert_close(capture(tiny_llama, PROMPTS).stack, whole.stack, **EXACT)


def test_nothing_above_the_last_layer_runs() -> None:
    hf_model = tiny("llama")
    model, calls = load(hf_model), []
    for i, block in enumerate(hf_model.model.layers):
        block.register_forward_hook(lambda *_, i=i: calls.append(i))
    capture(model, PROMPTS[:1], layers=[0, 2])
    assert calls == [0, 1]


@pytest.mark.parametrize("mode", ["replace", "add"])
@pytest.mark.parametrize("layer", [0, 2])
def test_a_patch_is_what_a_hook_by_hand_does(mode: Any, layer: int) -> None:
    hf_model = tiny("llama")
    model = load(hf_model)
    vectors = torch.randn(2, model.d_model)
    patch = Patch(layer, prompts=(3, 0), positions=[[20], [4]], values=vectors, mode=mode)
    ours = capture(model, PROMPTS, patches=[patch])
    for row, (i, position) in enumerate([(3, 20), (0, 4)]):

        def write(resid: torch.Tensor, row: int = row, position: int = position) -> torch.Tensor:
            resid = resid.clone()
            old = resid[0, position] if mode == "add" else 0
            resid[0, position] = vectors[row] + old
            return resid

        blocks = hf_model.model.layers
        if layer == 0:
            handle = blocks[0].register_forward_pre_hook(
                lambda _m, args, write=write: (write(args[0]),)
            )
        else:
            handle = blocks[layer - 1].register_forward_hook(
                lambda _m, _a, out, write=write: write(out)
            )
        last = hidden_states(hf_model, PROMPTS[i].tokens)[-1]
        handle.remove()
        torch.testing.assert_close(ours.at(i)[-1], last, **EXACT)
    untouched = capture(model, PROMPTS)
    torch.testing.assert_close(ours.at(1), untouched.at(1), **EXACT)


def test_what_was_not_captured_is_named(tiny_llama: Model) -> None:
    residuals = capture(tiny_llama, PROMPTS, layers=[1], positions=[[3], [], [], []])
    with pytest.raises(ValueError, match="prompt 0 at position 4 was not captured"):
        residuals.slots(0, [3, 4])
    with pytest.raises(ValueError, match=r"Layer 2 was not captured, only \[1\]"):
        residuals.layer(2)


ONE = torch.zeros(32)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"layers": [0, 5]}, r"\[5\] lie outside; .*layers 0 \(the embedding\) to 4"),
        ({"layers": [-1]}, r"\[-1\] lie outside"),
        ({"layers": []}, r"layers=\[\] was given"),
        ({"positions": [[12], [0], [0], [0]]}, r"Positions \[12\] lie outside prompt 0, .* 12 tok"),
        ({"positions": [[0]]}, "1 lists of positions were given for 4 prompts"),
        ({"patches": [Patch(9, prompts=(0,), positions=(0,), values=ONE)]}, r"\[9\] lie outside"),
        (
            {"patches": [Patch(1, prompts=(7,), positions=(0,), values=ONE)]},
            r"\[7\] lie outside; .* in a patch",
        ),
        ({"patches": [Patch(1, prompts=(1,), positions=(9,), values=ONE)]}, r"Positions \[9\] lie"),
        (
            {"patches": Patch(1, prompts=(0, 1), positions=[[0]], values=ONE)},
            "1 lists .* 2 prompts",
        ),
        (
            {"patches": [Patch(1, prompts=(0,), positions=(0,), values=ONE[:5])]},
            r"shape \(5,\); expected one of \[\(32,\), \(1, 32\)\]",
        ),
        ({"settings": Settings(memory_limit=1e-6)}, r"more than fits memory_limit=1e-06 GiB"),
    ],
)
def test_wrong_requests_are_named(
    tiny_llama: Model, wrong: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Model, "run_blocks", lambda *_, **__: pytest.fail("compute was spent"))
    with pytest.raises(ValueError, match=message):
        capture(tiny_llama, PROMPTS, **wrong)


def test_no_prompts(tiny_llama: Model) -> None:
    with pytest.raises(ValueError, match="No prompts were given"):
        capture(tiny_llama, [])


def test_nan_is_named_with_its_place() -> None:
    model = load(tiny("llama"))
    patch = Patch(2, prompts=(1,), positions=(2,), values=torch.full((32,), 3e38), mode="add")
    with pytest.raises(ValueError, match="NaN or infinite at layer 2, first in prompt 1 at .* 2"):
        capture(model, PROMPTS, patches=[patch, patch])
    with pytest.raises(ValueError, match="patch are .*NaN or infinite"):
        Patch(2, values=torch.full((32,), torch.nan))


def test_layers_out_of_range_for_blocks(tiny_llama: Model) -> None:
    resid, at = torch.zeros(1, 1, 32), torch.zeros(1, 1, dtype=torch.long)
    for start, stop in [(0, 5), (3, 2), (-1, 2)]:
        with pytest.raises(ValueError, match="has layers 0 to 4"):
            tiny_llama.run_blocks(resid, at, start, stop)


def test_wrong_patches_are_named() -> None:
    with pytest.raises(ValueError, match="mode='sum' was given"):
        Patch(1, prompts=(0,), positions=(0,), values=ONE, mode="sum")
    with pytest.raises(ValueError, match="writes twice to one position"):
        Patch(1, prompts=(0, 0), positions=[[1, 3], [3]], values=ONE, mode="add").places(PROMPTS)


def test_one_patch_takes_what_is_at_hand(tiny_llama: Model) -> None:
    vector = torch.randn(32)
    spans = [Prompt(p.tokens, spans={"query": (0, len(p) - 1)}) for p in PROMPTS]
    last = [len(p) - 1 for p in PROMPTS]
    for positions, places in [
        ("last", [(i, p) for i, p in enumerate(last)]),
        (-1, [(i, p) for i, p in enumerate(last)]),
        (0, [(i, 0) for i in range(4)]),
        ([[p] for p in last], [(i, p) for i, p in enumerate(last)]),
        ("all", [(i, p) for i, n in enumerate(last) for p in range(n + 1)]),
    ]:
        assert Patch(1, positions=positions, values=vector).places(PROMPTS) == places
    query = Patch(1, prompts=3, positions="query", values=vector)
    assert query.places(spans) == [(3, 0), (3, last[3])]
    assert Patch(1, prompts=[1], values=vector).places(PROMPTS) == [(1, last[1])]
    one = capture(tiny_llama, PROMPTS, patches=Patch(2, values=vector))
    each = [Patch(2, i, p, values=vector) for i, p in enumerate(last)]
    torch.testing.assert_close(one.stack, capture(tiny_llama, PROMPTS, patches=each).stack)
    torch.testing.assert_close(one.at_answers(2), vector.expand(4, -1))


def test_a_patch_among_some_prompts_is_renumbered() -> None:
    values = torch.randn(3, 32)
    patch = Patch(1, (0, 3), [[2], [5, 7]], values=values)
    part = patch.among(PROMPTS, [1, 3])
    assert part is not None and part.places([PROMPTS[1], PROMPTS[3]]) == [(1, 5), (1, 7)]
    torch.testing.assert_close(part.values, values[1:])
    assert patch.among(PROMPTS, [1, 2]) is None


def test_wrong_types_of_patches_are_named() -> None:
    """In a process of its own, where nothing checks annotations."""
    said: list[tuple[dict[str, Any], str]] = [
        ({"layer": "3"}, "layer='3' was given; expected a whole number"),
        ({"values": [0.0] * 32}, "(list) was given; expected a tensor [*n d_model]"),
        ({"prompts": "0"}, "prompts='0' was given; expected the number of a prompt"),
        ({"positions": 1.5}, "positions=1.5 was given"),
    ]
    code = f"""
import torch
from spade_lens import Patch, Prompt
for arguments in {[arguments for arguments, _ in said]!r}:
    try:
        Patch(**dict(layer=1, values=torch.zeros(32)) | arguments).places([Prompt((1, 2))])
    except TypeError as error:
        print(str(error).replace("\\n", " "))
    else:
        print("taken")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for line, (_, message) in zip(done.stdout.splitlines(), said, strict=True):
        assert message in line


def test_save_and_load_give_back_the_same(tiny_llama: Model, tmp_path: Path) -> None:
    made = [tiny_llama.prompt("ab->", target="c", candidates=("c", "d")), PROMPTS[0]]
    residuals = capture(tiny_llama, made, layers=[0, 3], positions="all")
    back = Residuals.load(residuals.save(tmp_path / "some"))
    assert torch.equal(back.stack, residuals.stack) and back.layers == (0, 3)
    assert back.prompts == residuals.prompts and back.start_is_pure
    pd.testing.assert_frame_equal(back.to_frame(), residuals.to_frame())
    assert repr(back) == repr(residuals) and len(repr(back)) < 100
    (tmp_path / "some" / "residuals.safetensors").write_bytes(b"other")
    with pytest.raises(ValueError, match=r"is not the file that residuals\.json beside it"):
        Residuals.load(tmp_path / "some")


def test_the_frame_has_one_row_per_layer_and_slot(tiny_llama: Model) -> None:
    residuals = capture(tiny_llama, ["ab", "c"], layers=[1, 4])
    frame = residuals.to_frame()
    assert list(frame) == ["layer", "prompt", "position", "token", "token_id", "norm"]
    assert frame["layer"].tolist() == [1] * 5 + [4] * 5
    row = frame[(frame["layer"] == 4) & (frame["prompt"] == 1)].iloc[-1]
    assert row.token == "c" and row.token_id == residuals.prompts[1].tokens[-1]
    assert row["norm"] == pytest.approx(float(residuals.at_answers(4)[1].norm()))


def test_a_patch_takes_iterators_and_can_be_used_again(tiny_llama: Model) -> None:
    patch = Patch(1, [0], iter([1, 2]), values=torch.ones(32))
    assert patch.places(tiny_llama.prompts("abc")) == patch.places(tiny_llama.prompts("abc"))
    assert len(repr(Patch(1, range(999), [[1]] * 999, values=torch.ones(32)))) < 200


def test_residuals_are_copied_and_pickled_without_their_model(tiny_llama: Model) -> None:
    residuals = capture(tiny_llama, "abc")
    for copied in (copy.deepcopy(residuals), pickle.loads(pickle.dumps(residuals))):
        assert torch.equal(copied.stack, residuals.stack)
        assert copied.to_frame().equals(residuals.to_frame())
        assert getattr(copied.word, "__self__", None) is None


DAMAGED = [
    *({"tensors_sha256": None}, {"layers": None}, {"layers": 3}, {"prompts": None}, {"prompts": 3}),
    *({"words": None}, {"words": 3}, {"prompts": [{}]}),
]


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_description_is_named(
    tiny_llama: Model, tmp_path: Path, damage: dict[str, Any]
) -> None:
    path = capture(tiny_llama, "abc").save(tmp_path) / "residuals.json"
    content = json.loads(path.read_text()) | damage
    path.write_text(json.dumps({key: v for key, v in content.items() if v is not None}))
    with pytest.raises(ValueError, match=r"residuals\.json"):
        Residuals.load(tmp_path)
