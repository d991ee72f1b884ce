"""Saved lenses come back to the bit, to their own model only; so do those of tuned-lens."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny

from spade_lens import Model, Prompt, load, read
from spade_lens.lenses.linear import AffineMaps, LinearSpade, TunedLens
from spade_lens.lenses.saving import load_lens


def some_lens(model: Model, kind: type = LinearSpade, rank: int | None = None) -> Any:
    down = None if rank is None else torch.randn(2, rank, 32)
    maps = AffineMaps((1, 3), torch.randn(2, 32, rank or 32), torch.randn(2, 32), down)
    about = {"seed": 3, "text": {"source": "here"}, "held_out": [{"layer": 1, "kl_to_spade": 0.5}]}
    return kind(model, maps, name="mine", about=about)


@pytest.mark.parametrize("kind", [TunedLens, LinearSpade])
@pytest.mark.parametrize("rank", [None, 3])
def test_round_trip_is_exact(
    tiny_llama: Model, tmp_path: Path, kind: type, rank: int | None
) -> None:
    lens = some_lens(tiny_llama, kind, rank)
    folder = lens.save(tmp_path / "a" / "lens")
    back = load_lens(folder, tiny_llama)
    assert type(back) is kind and back.name == "mine" and back.about == lens.about
    assert back.maps.layers == (1, 3) and back.maps.rank == rank
    for name, tensor in lens.maps.tensors.items():
        assert torch.equal(back.maps.tensors[name], tensor)
    assert back.held_out["kl_to_spade"].tolist() == [0.5]
    assert sorted(p.name for p in folder.iterdir()) == ["lens.json", "lens.safetensors"]
    for saved in (lens, back):
        again = eval(repr(saved), {"load_lens": load_lens, "model": tiny_llama})
        assert torch.equal(again.maps.up, lens.maps.up)


def test_the_json_says_what_it_is_and_of_which_model(tiny_llama: Model, tmp_path: Path) -> None:
    content = json.loads((some_lens(tiny_llama).save(tmp_path) / "lens.json").read_text())
    assert content["kind"] == "L-SPADE" and content["fit"]["seed"] == 3
    assert content["model"]["name"] == "tiny-llama"
    assert content["model"]["sha256"] == tiny_llama.sha256
    assert content["model"]["hooks"] is None
    assert {"spade-lens", "torch", "transformers"} <= content["versions"].keys()


def test_another_model_is_refused_and_both_are_named(tiny_llama: Model, tmp_path: Path) -> None:
    some_lens(tiny_llama).save(tmp_path)
    other = load(tiny("qwen3"), name="tiny-qwen")
    with pytest.raises(ValueError, match="belongs to 'tiny-llama' .* was given 'tiny-qwen'"):
        load_lens(tmp_path, other)
    # The same architecture and name, but one weight is another one.
    hf_model = tiny("llama")
    hf_model.model.layers[2].mlp.up_proj.weight.data[0, 0] += 1
    with pytest.raises(ValueError, match="differ in weights. Load it with the model"):
        load_lens(tmp_path, load(hf_model, name="tiny-llama"))


def test_files_that_do_not_belong_together_are_refused(tiny_llama: Model, tmp_path: Path) -> None:
    some_lens(tiny_llama).save(tmp_path / "one")
    some_lens(tiny_llama).save(tmp_path / "two")
    (tmp_path / "one/lens.safetensors").replace(tmp_path / "two/lens.safetensors")
    with pytest.raises(ValueError, match="is not the file that lens.json beside it"):
        load_lens(tmp_path / "two", tiny_llama)
    with pytest.raises(FileNotFoundError, match=r"no lens\.safetensors"):
        load_lens(tmp_path / "one", tiny_llama)


def test_what_is_no_lens_is_refused(tiny_llama: Model, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"There is no lens\.json"):
        load_lens(tmp_path, tiny_llama)
    for text, message in [
        ("{", "is no JSON"),
        ("[]", "holds a list"),
        ('{"kind": "direct lens", "format": 4}', "a 'direct lens'.*expected 'tuned lens'"),
        ('{"kind": "L-SPADE", "format": 6}', "format 6; .*another version"),
    ]:
        (tmp_path / "lens.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            load_lens(tmp_path, tiny_llama)


# -- lenses of the package tuned-lens

# Made with tuned-lens 0.2.0: TunedLens.from_model(waves_model()), its translators filled by
# waves(..., 0.05), and TunedLens.forward(hidden_states[layer], layer) of the model's own hidden
# states at positions 1 and 4, logits of tokens 0, 13 and 96.
TOKENS = (1, 5, 9, 30, 77)
THEIRS = {
    0: [[3.0142, -5.05421, -3.99946], [-3.34708, 3.93448, 2.40483]],
    1: [[-0.22758, 0.69541, 0.6828], [-2.52822, 1.95426, 0.58146]],
    3: [[0.3685, 0.14988, 0.44284], [-2.52467, 1.76597, 0.35546]],
}
CONFIG = {
    "base_model_name_or_path": "waves",
    "d_model": 32,
    "num_hidden_layers": 4,
    "bias": True,
    "base_model_revision": None,
    "unembed_hash": "d80f977b46ffbb4785d29f402af092ab66d33bb1e64d26c2815c88a135900c7a",
    "lens_type": "linear_tuned_lens",
}


def waves(parameters: dict[str, torch.Tensor], size: float) -> None:
    """Numbers that need no random generator and no file."""
    for n, (name, tensor) in enumerate(sorted(parameters.items())):
        k = torch.arange(tensor.numel(), dtype=torch.float64)
        wave = size * torch.sin(k * (n + 1) * 0.7 + n) + (1.0 if "norm" in name else 0.0)
        tensor.data = wave.reshape(tensor.shape).float()


@pytest.fixture(scope="module")
def waves_model() -> Model:
    hf_model = tiny("llama")
    waves(dict(hf_model.named_parameters()), 0.5)
    return load(hf_model, name="waves")


@pytest.fixture
def their_folder(tmp_path: Path) -> Path:
    state = {}
    for layer in range(4):
        state |= {f"{layer}.weight": torch.empty(32, 32), f"{layer}.bias": torch.empty(32)}
    waves(state, 0.05)
    torch.save(state, tmp_path / "params.pt")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


@pytest.mark.parametrize("as_file", [False, True])
def test_their_lens_reads_as_in_their_package(
    waves_model: Model, their_folder: Path, as_file: bool
) -> None:
    place = their_folder / "params.pt" if as_file else their_folder
    lens = load_lens(place, waves_model)
    prompts = [Prompt(tokens=TOKENS, answer=p, candidates=(0, 13, 96)) for p in (1, 4)]
    readout = read(prompts, lens, layers=[*THEIRS])
    ours = readout.candidate_logprobs[0]
    theirs = torch.tensor([*THEIRS.values()])
    # Log-probabilities are logits but for a constant.
    torch.testing.assert_close(ours - ours[..., :1], theirs - theirs[..., :1], atol=1e-4, rtol=1e-4)
    assert lens.about["config"]["base_model_name_or_path"] == "waves"


def test_their_lens_without_bias(waves_model: Model, their_folder: Path) -> None:
    state = torch.load(their_folder / "params.pt", weights_only=True)
    torch.save({k: v for k, v in state.items() if "weight" in k}, their_folder / "params.pt")
    with pytest.raises(ValueError, match="does not hold the 8 tensors"):
        load_lens(their_folder, waves_model)
    (their_folder / "config.json").write_text(json.dumps(CONFIG | {"bias": False}))
    assert not load_lens(their_folder, waves_model).maps.bias.any()


def test_their_lens_of_another_model_is_refused(
    waves_model: Model, tiny_llama: Model, their_folder: Path
) -> None:
    with pytest.raises(ValueError, match="'waves' with another unembedding.*'tiny-llama'"):
        load_lens(their_folder, tiny_llama)
    assert load_lens(their_folder, tiny_llama, strict=False).maps.layers == (0, 1, 2, 3)
    (their_folder / "config.json").write_text(json.dumps(CONFIG | {"d_model": 64}))
    with pytest.raises(ValueError, match="'waves' with {'d_model': 64}; 'waves' has"):
        load_lens(their_folder, waves_model)


def test_a_pickle_that_could_run_something_is_refused(
    waves_model: Model, their_folder: Path
) -> None:
    torch.save({"0.weight": pytest.Item}, their_folder / "params.pt")
    with pytest.raises(ValueError, match=r"params\.pt does not say what it should"):
        load_lens(their_folder, waves_model)
    (their_folder / "params.pt").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match=r"params\.pt does not say what it should"):
        load_lens(their_folder, waves_model)
    (their_folder / "params.pt").unlink()
    with pytest.raises(FileNotFoundError, match=r"no params\.pt"):
        load_lens(their_folder, waves_model)


@pytest.mark.parametrize("lost", ["model", "layers", "name", "fit", "tensors_sha256"])
def test_a_description_that_lacks_something_is_named(
    tiny_llama: Model, tmp_path: Path, lost: str
) -> None:
    path = some_lens(tiny_llama).save(tmp_path) / "lens.json"
    content = json.loads(path.read_text())
    del content[lost]
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"(lens\.json|The lens in).*again"):
        load_lens(tmp_path, tiny_llama)
