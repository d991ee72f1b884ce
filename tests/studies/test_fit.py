"""Fitting a lens, its report, and where it is found again."""

from pathlib import Path

import pandas as pd
import pytest
import torch
from tiny import tiny, tiny_tokenizer

import spade_lens
from spade_lens import LogitLens, Model
from spade_lens.lenses.linear import TunedLens
from spade_lens.studies.fit import default_lens, fit_lens, held_out_text, lens_folder, named_lens

FEW = {"n_pieces": 40, "n_tokens": 32, "per_piece": "all", "layers": [1, 2]}


def test_what_is_fitted_is_found_again(
    tiny_llama: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPADE_LENS_CACHE", str(tmp_path))
    lens = fit_lens(tiny_llama, **FEW)  # type: ignore[arg-type]
    place = lens_folder(tiny_llama, "l-spade")
    assert {p.name for p in place.iterdir()} == {
        *("lens.json", "lens.safetensors", "held-out.csv", "held-out.png", "held-out.pdf")
    }
    for again in (default_lens(tiny_llama), named_lens(tiny_llama, "l-spade")):
        assert torch.equal(again.maps.up, lens.maps.up)  # type: ignore[attr-defined]
    written = pd.read_csv(place / "held-out.csv")
    assert written["kl_to_spade"].tolist() == pytest.approx(lens.held_out["kl_to_spade"].tolist())
    text = held_out_text(lens.held_out)
    assert "KL to SPADE: L-SPADE" in text and "KL to SPADE: SPADE" not in text.replace(
        "KL to SPADE: SPADE ", ""
    )


def test_tuned_lenses_from_a_folder(tiny_llama: Model, tmp_path: Path) -> None:
    fit_lens(tiny_llama, "tuned", **FEW, passes=1, out=tmp_path / "t")  # type: ignore[arg-type]
    assert isinstance(named_lens(tiny_llama, str(tmp_path / "t")), TunedLens)
    assert isinstance(named_lens(tiny_llama, "logit"), LogitLens)
    with pytest.raises(ValueError, match="There is no lens 'nowhere'"):
        named_lens(tiny_llama, "nowhere")
    other = spade_lens.load(tiny("qwen2"), tokenizer=tiny_tokenizer(), name="other")
    with pytest.raises(ValueError, match="other"):
        named_lens(other, str(tmp_path / "t"))
