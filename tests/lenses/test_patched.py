"""``patch`` answers what a patch changes, and is right about it."""

from pathlib import Path

import pandas as pd
import pytest
import torch
from tiny import tiny

import spade_lens as sl
from spade_lens.lenses.patched import Patched

PROMPTS = [
    sl.Prompt(tokens=(1, *(4 + (5 * i) % 90 for i in range(n))), target=t)
    for n, t in ((6, 9), (3, None), (11, 20))
]


@pytest.fixture(scope="module")
def patched(tiny_llama: sl.Model) -> Patched:
    vector = 3 * torch.randn(32, generator=torch.Generator().manual_seed(3))
    return sl.patch(PROMPTS, sl.Patch(2, positions=2, values=vector, mode="add"), model=tiny_llama)


def test_both_runs_are_what_the_model_gives(tiny_llama: sl.Model, patched: Patched) -> None:
    vector = 3 * torch.randn(32, generator=torch.Generator().manual_seed(3))
    inner = tiny("llama")
    inner.load_state_dict(tiny_llama.original.state_dict())

    def add(_: object, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        resid = args[0].clone()
        resid[0, 2] += vector
        return (resid,)

    frame = patched.to_frame()
    for i, prompt in enumerate(PROMPTS):
        tokens = torch.tensor([prompt.tokens])
        plain = inner(tokens).logits[0, -1].detach()
        handle = inner.model.layers[2].register_forward_pre_hook(add)
        after = inner(tokens).logits[0, -1].detach()
        handle.remove()
        rows = frame[frame["prompt"] == i].set_index("condition")
        assert rows.loc["unpatched", "top_1_id"] == int(plain.argmax())
        assert rows.loc["patched", "top_1_id"] == int(after.argmax())
        kl = torch.nn.functional.kl_div(after.log_softmax(-1), plain.softmax(-1), reduction="sum")
        assert rows.loc["patched", "kl"] == pytest.approx(float(kl), abs=1e-4)
        assert rows.loc["unpatched", "kl"] == pytest.approx(0, abs=1e-5)
        assert rows.loc["patched", "agrees"] == (plain.argmax() == after.argmax())
        for run, logits in (("unpatched", plain), ("patched", after)):
            if prompt.target is None:
                assert pd.isna(rows.loc[run, "target_logit"])
            else:
                expected = float(logits[prompt.target])
                assert rows.loc[run, "target_logit"] == pytest.approx(expected, abs=1e-4)


def test_it_is_saved_and_loaded(patched: Patched, tmp_path: Path) -> None:
    back = Patched.load(patched.save(tmp_path))
    pd.testing.assert_frame_equal(back.to_frame(), patched.to_frame())
    assert repr(back) == repr(patched) and "3 prompts" in repr(back)


def test_no_patches_are_refused(tiny_llama: sl.Model) -> None:
    with pytest.raises(ValueError, match="No patches were given"):
        sl.patch(PROMPTS, [], model=tiny_llama)
