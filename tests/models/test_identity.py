"""Nothing made with one model is taken for another's."""

import functools
from collections.abc import Callable
from pathlib import Path
from types import MethodType, SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch
from gguf import GGUFReader
from tiny import tiny, tiny_tokenizer

import spade_lens as sl
from spade_lens.icl import RuleVectors
from spade_lens.lenses import load_lens
from spade_lens.lenses.linear import AffineMaps, TunedLens
from spade_lens.models.catalogue import CATALOG, fetch_model_files
from spade_lens.models.identity import hooks_of, identity_of, run_identity, tokenizer_sha256
from spade_lens.models.precision import of_gguf, precision_of
from spade_lens.storage.origin import provenance
from spade_lens.storage.parts import in_parts
from spade_lens.studies.fit import fit_lens, lens_folder

HOOKS = [("blocks.1.hook_resid_post", lambda x, hook: x * 0)]


def loaded(name: str = "llama", **changed: Any) -> sl.Model:
    """A tiny model whose weights are always the same, and whose configuration differs."""
    made = tiny(name)
    config = made.config
    config.update(changed)
    torch.manual_seed(0)
    other = type(made)(config).eval()
    other.load_state_dict(made.state_dict())
    return sl.load(other, name="m")


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("llama", {"rms_norm_eps": 1e-3}),
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e3}}),
        ("llama", {"hidden_act": "gelu"}),
        ("gemma2", {"final_logit_softcapping": 0.25}),
        ("gemma2", {"attn_logit_softcapping": 0.25}),
        ("mistral", {"sliding_window": 3}),
    ],
)
def test_a_configuration_outside_the_weights_counts(
    tmp_path: Path, name: str, changed: dict[str, Any]
) -> None:
    model, other = loaded(name), loaded(name, **changed)
    assert model.sha256 == other.sha256
    assert identity_of(model) == identity_of(loaded(name))
    TunedLens(model, AffineMaps.identity(range(4), 32)).save(tmp_path)
    RuleVectors(torch.ones(1, 1, 1, 32), model=model).save(tmp_path / "v.safetensors")
    load_lens(tmp_path, loaded(name))
    for load in (load_lens, lambda at, m: RuleVectors.load(at / "v.safetensors", m)):
        with pytest.raises(ValueError, match="differ in configuration"):
            load(tmp_path, other)
    assert lens_folder(model, "tuned") != lens_folder(other, "tuned")


def test_what_is_changed_by_hand_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    def epsilon(model: Any) -> None:
        model.model.norm.variance_epsilon = 1e-2

    def rope(model: Any) -> None:
        model.model.rotary_emb.inv_freq[-1] = 0

    def patched(model: Any) -> None:
        model.model.norm.forward = lambda x: x

    def patched_as_a_method(model: Any) -> None:
        model.model.norm.forward = MethodType(lambda self, x: x, model.model.norm)

    def patched_in_part(model: Any) -> None:
        model.model.norm.forward = functools.partial(lambda factor, x: factor * x, 2)

    def patched_class(model: Any) -> None:
        monkeypatch.setattr(type(model.model.norm), "forward", lambda self, x: 3 * x)

    plain = identity_of(loaded())
    for change in (epsilon, rope, patched, patched_as_a_method, patched_in_part, patched_class):
        model = loaded()
        change(model.original)
        assert identity_of(model)["architecture"] != plain["architecture"], change


def test_a_tokenizer_counts_and_its_use_does_not() -> None:
    tokenizer, other = tiny_tokenizer(), tiny_tokenizer()
    before = tokenizer_sha256(tokenizer)
    assert tokenizer_sha256(other) == before != tokenizer_sha256(None)
    tokenizer(["a", "bcd"], padding=True, truncation=True, max_length=2)
    assert tokenizer_sha256(tokenizer) == before
    other.add_tokens(["xyz"])
    assert tokenizer_sha256(other) != before


def _parts(model: sl.Model, folder: Path, made: list[str]) -> None:
    def make(name: str) -> pd.DataFrame:
        made.append(name)
        return pd.DataFrame({"x": [1]})

    config = {"model": run_identity(model)}
    in_parts(["a"], make, folder=folder, config=config, desc="", model=model)


def test_inside_hooks_without_a_name_nothing_is_kept_or_taken(tmp_path: Path) -> None:
    model, made = loaded(), []
    _parts(model, tmp_path, made)
    lens = TunedLens(model, AffineMaps.identity(range(4), 32))
    lens.save(tmp_path / "lens")
    with model.hooks(HOOKS):
        with pytest.warns(UserWarning, match="without a name"):
            _parts(model, tmp_path, made)
        with pytest.warns(UserWarning, match="without a name"):
            _parts(model, tmp_path / "new", made)
        calls: list[Callable[[], Any]] = [
            lambda: lens.save(tmp_path / "other"),
            lambda: load_lens(tmp_path / "lens", model),
            lambda: fit_lens(model, "tuned", out=tmp_path / "fitted"),
        ]
        vectors = sl.icl.rule_vectors(
            model, [sl.Prompt((1, 5, 6), spans={"labels": (1,)})], layers=[1]
        )
        for call in calls:
            with pytest.raises(ValueError, match="hooks"):
                call()
    assert made == ["a"] * 3
    with pytest.raises(ValueError, match="Name them"):  # they were taken inside the hooks
        vectors.save(tmp_path / "v.safetensors")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "config.json", "lens"]


def test_named_hooks_have_results_of_their_own(tmp_path: Path) -> None:
    model = loaded()
    plain = run_identity(model)
    with model.hooks(HOOKS, name="no head 3"):
        hooked = run_identity(model)
        assert run_identity(model) == hooked
    assert hooked == plain | {"hooks": hooked["hooks"]}
    assert hooked["hooks"].startswith("no head 3 (blocks.1.hook_out; ")

    def scaled(by: float) -> Any:
        return [("blocks.1.hook_out", lambda x, hook: x * by)]

    found = {hooked["hooks"]}
    others = ([("blocks.2.hook_out", HOOKS[0][1])], HOOKS * 4, HOOKS * 5, scaled(1.5), scaled(2.0))
    for hooks in (*others, scaled(1.5), HOOKS):
        with model.hooks(hooks, name="no head 3"):
            found.add(hooks_of(model))
    with model.hooks(HOOKS, name="no head 3"), model.hooks(HOOKS, name="again"):
        found.add(hooks_of(model))
    assert len(found) == 2 + len(others)


@pytest.mark.parametrize("name", ["", 3, "a\nb"])
def test_hooks_have_names_that_can_be_shown(tiny_llama: sl.Model, name: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="hooks"), tiny_llama.hooks(HOOKS, name=name):
        pass


def test_the_precision_that_was_stored_outlives_loading_and_saving(tmp_path: Path) -> None:
    plain = sl.load(tiny("llama"), name="m")
    assert plain.precision == "float32, 32 bits a weight"
    tiny("llama").bfloat16().save_pretrained(tmp_path / "half")
    tiny_tokenizer().save_pretrained(tmp_path / "half")
    half = sl.load(tmp_path / "half", name="m")
    assert half.dtype == torch.float32 and half.precision == "bfloat16, 16 bits a weight"
    assert repr(half).endswith("torch.float32, cpu, weights of bfloat16, 16 bits a weight)")
    assert provenance(half)["model"]["precision"] == half.precision
    half.original.save_pretrained(tmp_path / "again")
    again = sl.load(tmp_path / "again", tokenizer=tiny_tokenizer(), name="m")
    assert again.precision == half.precision and identity_of(again) == identity_of(half)
    half.original.config.stored_precision = "Q4_1, 5.7 bits a weight"
    assert identity_of(half) == identity_of(again)


def test_the_precision_of_quantised_weights() -> None:
    config = SimpleNamespace(quantization_config={"quant_method": "gptq", "bits": 3})
    assert precision_of(SimpleNamespace(config=config)) == "gptq, 3 bits a weight"
    config = SimpleNamespace(
        quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": 1}
    )
    assert precision_of(SimpleNamespace(config=config)) == "bitsandbytes, 4 bits a weight"


@pytest.mark.download
def test_a_gguf_file_says_its_precision(smollm2: sl.Model) -> None:
    [path] = fetch_model_files("smollm2-135m-instruct")
    entry = CATALOG["smollm2-135m-instruct"]
    assert of_gguf(GGUFReader(path).tensors) == entry.precision == smollm2.precision
