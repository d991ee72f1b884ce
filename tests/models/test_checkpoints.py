"""A checkpoint is read whole, or refused with the list of what is missing or left over."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub.utils.tqdm import are_progress_bars_disabled
from safetensors.torch import load_file, save_file
from tiny import tiny, tiny_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils.logging import set_tqdm_hook

import spade_lens
from spade_lens import Model, UnsupportedModelError, load
from spade_lens.models.identity import identity_of

Weights = dict[str, torch.Tensor]


def saved(folder: Path, name: str = "llama", change: Callable[[Weights], Weights] | None = None):
    """A folder with a tiny model, its weights changed."""
    tiny(name).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    if change is not None:
        path = folder / "model.safetensors"
        save_file(change(load_file(path)), path, metadata={"format": "pt"})
    return folder


def configured(folder: Path, **changes: object) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def prefixed(prefix: str) -> Callable[[Weights], Weights]:
    return lambda weights: {prefix + name: weight for name, weight in weights.items()}


def same_weights(folder: Path, name: str = "llama") -> bool:
    ours, theirs = load(folder).original.state_dict(), tiny(name).state_dict()
    return all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "mixtral"])
def test_what_was_saved_is_loaded(tmp_path: Path, name: str) -> None:
    assert same_weights(saved(tmp_path, name), name)


@pytest.mark.parametrize(
    "prefix", ["_orig_mod.", "module.", "base_model.model.", "module._orig_mod.", "policy."]
)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_wrappers_prefix_is_taken_off_and_told(tmp_path: Path, prefix: str, name: str) -> None:
    saved(tmp_path, name, prefixed(prefix))
    with pytest.warns(UserWarning, match="carry the prefix of a wrapper") as told:
        assert same_weights(tmp_path, name)
    assert told[0].filename == __file__


def test_a_wrapper_around_one_block_is_taken_off(tmp_path: Path) -> None:
    saved(
        tmp_path,
        change=lambda weights: {
            name.replace("layers.1.", "layers.1._orig_mod."): x for name, x in weights.items()
        },
    )
    with pytest.warns(UserWarning, match="carry the prefix of a wrapper"):
        assert same_weights(tmp_path)


def test_a_prefix_in_an_old_file_of_torch(tmp_path: Path) -> None:
    saved(tmp_path)
    weights = prefixed("module.")(load_file(tmp_path / "model.safetensors"))
    torch.save(weights, tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.warns(UserWarning, match="carry the prefix of a wrapper"):
        assert same_weights(tmp_path)


def test_several_files(tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path, max_shard_size="20KB")
    tiny_tokenizer().save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    assert same_weights(tmp_path)
    next(tmp_path.glob("model-00002*")).unlink()
    with pytest.raises((ValueError, OSError), match="model-00002"):
        load(tmp_path)


def test_buffers_of_old_checkpoints_may_be_left_over(tmp_path: Path) -> None:
    saved(
        tmp_path,
        change=lambda weights: (
            weights | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
        ),
    )
    assert same_weights(tmp_path)


def without(part: str) -> Callable[[Weights], Weights]:
    return lambda weights: {name: x for name, x in weights.items() if part not in name}


@pytest.mark.parametrize(
    ("change", "settings", "message"),
    [
        (without("layers.2.mlp"), {}, r"3 missing \(model\.layers\.2\.mlp\.down_proj\.weight, "),
        (without("lm_head"), {}, r"1 missing \(lm_head\.weight\)"),
        (None, {"num_hidden_layers": 6}, r"18 missing \(model\.layers\.4\..* and 14 more"),
        (None, {"num_hidden_layers": 2}, r"18 unexpected \(model\.layers\.2\."),
        (None, {"intermediate_size": 40}, r"12 of another shape .*\[32, 48\] in the file"),
        (lambda w: w | {"v_head.weight": torch.ones(3)}, {}, r"1 unexpected \(v_head\.weight\)"),
        (
            lambda w: prefixed("a.")(w) | prefixed("b.")({k: x.clone() for k, x in w.items()}),
            {},
            r"missing .* unexpected \(a\.",
        ),
        (lambda w: without("norm")(prefixed("module.")(w)), {}, r"9 missing \(model\."),
        (None, {"intermediate_size": 10**7}, r"are \d+ numbers, and by its config\.json"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_list(
    tmp_path: Path,
    change: Callable[[Weights], Weights] | None,
    settings: dict[str, object],
    message: str,
) -> None:
    configured(saved(tmp_path, change=change), **settings)
    with pytest.raises(ValueError, match=message) as told:
        load(tmp_path)
    assert "Give the whole checkpoint" in str(told.value)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.bool])
def test_whole_numbers_are_not_taken_for_weights(tmp_path: Path, dtype: torch.dtype) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    saved(tmp_path, change=lambda w: w | {name: (w[name] * 100).to(dtype)})
    with pytest.raises(ValueError, match=r"whole numbers \(model\.layers\.1\.mlp"):
        load(tmp_path)
    configured(tmp_path, quantization_config={"quant_method": "mine"})
    with pytest.raises(ValueError, match="a quantisation that transformers does not know"):
        load(tmp_path)


@pytest.mark.parametrize(
    "settings",
    [
        {"num_hidden_layers": "4"},
        {"num_attention_heads": 0},
        {"rope_parameters": {"rope_type": "linear"}},
    ]
    + [{"dtype": "float9"}, {"bos_token_id": [1]}, {"architectures": "LlamaForCausalLM"}],
)
def test_a_wrong_setting_is_named(tmp_path: Path, settings: dict[str, object]) -> None:
    configured(saved(tmp_path), **settings)
    with pytest.raises(ValueError, match=r"holds no model that|expected a list"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["a/b/c", "a b", "-x", "org/name@main", "smollm2-135m-instruct/"])
def test_what_no_model_can_be_called_is_answered_with_names(name: str) -> None:
    with pytest.raises(ValueError, match="nearest known names"):
        load(name)


def test_a_folder_without_a_tokenizer_takes_the_users(tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path)
    configured(tmp_path, architectures=None)  # its type says as much
    with pytest.raises(ValueError, match="tokenizer of .* cannot be read"):
        load(tmp_path)
    assert load(tmp_path, tokenizer=tiny_tokenizer()).prompt("ab").tokens[0] == 1


def test_tied_weights_are_not_missing(tmp_path: Path) -> None:
    saved(tmp_path, "gpt2")
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    assert load(tmp_path).d_vocab == 97


@pytest.mark.parametrize("with_base", [False, True])
def test_an_adapter_is_refused_with_what_to_do(tmp_path: Path, with_base: bool) -> None:
    if with_base:
        saved(tmp_path)
    adapter = {"base_model_name_or_path": "some/model", "peft_type": "LORA"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(adapter))
    with pytest.raises(UnsupportedModelError, match=r"PEFT adapter .*merge_and_unload"):
        load(tmp_path)


def test_a_base_model_is_called_that(tmp_path: Path) -> None:
    saved(tmp_path)
    configured(tmp_path, architectures=["LlamaModel"])
    with pytest.raises(
        UnsupportedModelError, match=r"LlamaModel is a base model.*LlamaForCausalLM"
    ):
        load(tmp_path)


def test_float64_is_exact(tmp_path: Path) -> None:
    tokens = torch.tensor([[1, 17, 4, 80, 9]])
    model = load(saved(tmp_path), dtype=torch.float64)
    with torch.no_grad():
        at = torch.arange(5)[None]
        resid = model.run_blocks(model.embed(tokens), at, 0, model.n_layers)
        ours = model.unembed(model.final_norm(resid)[0])
        theirs = tiny("llama").double()(tokens).logits[0]
    assert ours.dtype == torch.float64
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0.0)


@pytest.mark.parametrize("progress", [True, False])
def test_bars_of_a_load_follow_the_settings(
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    progress: bool,
) -> None:
    silent = []
    config = AutoConfig.from_pretrained

    def seen(*args: object, **options: object) -> object:
        silent.append(are_progress_bars_disabled())
        return config(*args, **options)

    def users(factory: object, args: object, options: object) -> None:
        raise AssertionError("the user's own hook was asked")

    monkeypatch.setattr(AutoConfig, "from_pretrained", seen)
    saved(tmp_path)
    capfd.readouterr()
    before = set_tqdm_hook(users)
    try:
        with spade_lens.Settings(progress=progress):
            load(tmp_path)
    finally:
        assert set_tqdm_hook(before) is users
    assert capfd.readouterr().err == ""  # no bar before two seconds
    assert set(silent) == {not progress}
    assert not are_progress_bars_disabled()


def test_where_a_model_lies_is_not_part_of_it(tmp_path: Path) -> None:
    model = load(saved(tmp_path / "here"), name="m")
    (tmp_path / "here").rename(tmp_path / "there")
    assert identity_of(load(tmp_path / "there", name="m")) == identity_of(model)


def test_a_model_is_called_by_its_folder(tmp_path: Path) -> None:
    hf_model = AutoModelForCausalLM.from_pretrained(saved(tmp_path / "mine"))
    assert load(hf_model, tokenizer=tiny_tokenizer()).name == load(tmp_path / "mine").name == "mine"


@pytest.mark.download
def test_a_model_of_a_gguf_file_may_be_saved(tmp_path: Path, smollm2: Model) -> None:
    smollm2.original.save_pretrained(tmp_path)
    smollm2.tokenizer.save_pretrained(tmp_path)
    assert identity_of(load(tmp_path, name=smollm2.name)) == identity_of(smollm2)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_one_file_of_a_model_is_answered_with_its_folder(tmp_path: Path, name: str) -> None:
    saved(tmp_path)
    with pytest.raises(ValueError, match=rf"{name} is one file of a model\. Give the folder"):
        load(tmp_path / name)


def test_a_folder_without_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"^{tmp_path} holds no model that transformers can read"):
        load(tmp_path)
