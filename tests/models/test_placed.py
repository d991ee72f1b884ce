"""Models whose weights are elsewhere: moved by accelerate, offloaded, on two devices."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from accelerate.hooks import AlignDevicesHook, ModelHook, add_hook_to_module
from logical import LogicalDevices, There
from tiny import spanned_prompts, tiny, tiny_tokenizer

from spade_lens import Keep, Model, Spade, UnsupportedModelError, capture, fit, load, read
from spade_lens.exits import Confidence, Patience, SpadeExit
from spade_lens.icl import PromptSetup, patch_sweep
from spade_lens.lenses.fitting.text import calibration_text
from spade_lens.models.identity import identity_of
from spade_lens.models.unembedding import unembedding_rows
from spade_lens.prompts import Template
from spade_lens.tasks import RuleTask

PROMPTS = spanned_prompts(3)
BASES = {"llama": ("model", "layers", "lm_head"), "gpt2": ("transformer", "h", None)}


def root_hooked(model: Any) -> Any:
    hook = AlignDevicesHook("cpu", io_same_device=True, place_submodules=True)
    return add_hook_to_module(model, hook)


def base_and_block_hooked(model: Any) -> Any:
    base = model.base_model
    for module in (base, base.get_submodule(BASES[model.config.model_type][1])[1]):
        add_hook_to_module(module, ModelHook())
    return model


def cpu_offloaded(model: Any) -> Any:
    return cpu_offload(model, execution_device=torch.device("cpu"))


def map_of(model: Any) -> dict[str, Any]:
    """Two blocks and the unembedding on disk."""
    base, blocks, head = BASES[model.config.model_type]
    places = {f"{base}.{name}": "cpu" for name, _ in model.base_model.named_children()}
    del places[f"{base}.{blocks}"]
    places |= {f"{base}.{blocks}.{i}": "disk" if i % 2 else "cpu" for i in range(4)}
    return places | {"lm_head": "disk" if head else "cpu"}


def disk_offloaded(model: Any) -> Any:
    return dispatch_model(model, map_of(model), main_device="cpu", offload_dir=tempfile.mkdtemp())


def numbers(model: Model) -> list[torch.Tensor]:
    written = model.generate(PROMPTS[:1], 3).to_frame()["token_id"].tolist()
    kl = read(PROMPTS, Spade(model, keep=Keep(spans=("labels",)))).kl
    return [capture(model, PROMPTS).stack, kl, torch.tensor(written)]


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize(
    "change", [root_hooked, base_and_block_hooked, cpu_offloaded, disk_offloaded]
)
def test_what_accelerate_moves_is_the_same_model(name: str, change: Callable[[Any], Any]) -> None:
    plain, hf_model = load(tiny(name), name="m"), change(tiny(name))
    absent = sum(weight.is_meta for weight in hf_model.parameters())
    model = load(hf_model, name="m")
    for own, expected in zip(numbers(model), numbers(plain), strict=True):
        assert torch.equal(own, expected)
    assert identity_of(model) == identity_of(plain)
    assert (unembedding_rows(model) is None) == (unembedding_rows(plain) is None)
    # What was moved in is moved out again, also after runs that end inside a block.
    assert sum(weight.is_meta for weight in hf_model.parameters()) == absent
    assert absent > 0 or "offloaded" not in change.__name__


def test_a_change_of_an_offloaded_weight_is_seen() -> None:
    hf_model = cpu_offloaded(tiny("llama"))
    model = load(hf_model, name="m")
    before, digest = capture(model, PROMPTS).stack, model.sha256
    linear = hf_model.model.layers[1].mlp.down_proj
    linear._hf_hook.weights_map["weight"].mul_(2)
    assert not torch.equal(capture(model, PROMPTS).stack, before) and model.sha256 != digest
    linear._hf_hook.weights_map["weight"][0, 0] = torch.nan
    with pytest.raises(UnsupportedModelError, match=r"infinite weights \(at model\.layers\.1\.mlp"):
        load(hf_model)


def test_a_forward_of_the_users_own_below_accelerate_counts() -> None:
    hf_model = tiny("llama")
    head = hf_model.lm_head
    forward = head.forward
    head.forward = lambda x: 2 * forward(x)
    add_hook_to_module(head, ModelHook())
    model = load(hf_model)
    assert unembedding_rows(model) is None
    assert identity_of(model) != identity_of(load(tiny("llama")))


def test_a_forward_of_the_users_own_counts_the_same_wherever_the_model_is() -> None:
    def doubled(self: Any, x: torch.Tensor) -> torch.Tensor:
        return 2 * type(self).forward(self, x)

    plain, moved = tiny("llama"), tiny("llama")
    for hf_model in (plain, moved):
        hf_model.lm_head.forward = MethodType(doubled, hf_model.lm_head)
    add_hook_to_module(moved.lm_head, ModelHook())
    assert identity_of(load(moved, name="m")) == identity_of(load(plain, name="m"))


# -- load(..., device_map=...)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("model")
    tiny("llama").save_pretrained(place)
    tiny_tokenizer().save_pretrained(place)
    return place


def test_a_device_map_with_a_disk(folder: Path) -> None:
    plain = load(folder, name="m")
    model = load(folder, name="m", device_map=map_of(tiny("llama")))
    assert sum(weight.is_meta for weight in model.original.parameters()) == 19
    for own, expected in zip(numbers(model), numbers(plain), strict=True):
        assert torch.equal(own, expected)
    assert model.sha256 == plain.sha256


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device_map": {"model": "cpu"}}, r"no device for 1 weights \(lm_head\.weight\)"),
        ({"device_map": {"": "cpu", "model.layer.0": "cpu"}}, r"not there \(model\.layer\.0\)"),
        ({"device_map": {"": "tpu"}}, r"device_map: a device='tpu' .*expected 'cpu' or 'cuda', '"),
        ({"device_map": "everywhere"}, r"'everywhere' was given; expected 'auto', 'balanced'"),
        ({"device_map": "auto", "device": "cpu"}, r"device and device_map were given, and each"),
        ({"tp_plan": "auto"}, r"no process of torchrun"),
        ({"tp_plan": "colwise"}, r"tp_plan='colwise' was given; expected 'auto'"),
        ({"revision": "main"}, r"revision was given, and .* is not on the hub"),
        ({"token": "hf_x", "revision": "main"}, r"revision and token were given"),
    ],
)
def test_where_weights_cannot_go(folder: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(folder, **options)


def test_a_family_without_a_plan(tmp_path: Path) -> None:
    tiny("gpt2").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no tensor-parallel plan for a GPT2LMHeadModel"):
        load(tmp_path, tp_plan="auto")


def test_a_catalogue_model_is_on_one_device() -> None:
    with pytest.raises(ValueError, match="device_map was given, and stories15m is a catalogue"):
        load("stories15m", device_map="auto")
    with pytest.raises(ValueError, match=r"device_map was given, for names.*stays as it is"):
        load(tiny("llama"), device_map="auto")


def test_half_precision_on_a_cpu_warns(folder: Path) -> None:
    with pytest.warns(UserWarning, match="float16 was given for a CPU, where it is many times"):
        assert load(folder, dtype=torch.float16).dtype == torch.float16


# -- two devices

HERE, THERE = torch.device("lazy:0"), torch.device("lazy:1")
AWAY = ("model.layers.1", "model.layers.2", "model.norm")
"""What is on the other device: blocks in the middle, and the norm behind them."""


def on_two_devices(hf_model: Any) -> Any:
    """Move a model as accelerate does for a device map."""
    hooked = ("model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head")
    hooked += tuple(f"model.layers.{i}" for i in range(4))
    for name, module in hf_model.named_modules():
        at = THERE if name.startswith(AWAY) else HERE
        for key, weight in module._parameters.items():
            if weight is not None:
                module._parameters[key] = torch.nn.Parameter(There(weight.data, at), False)
        for key, buffer in module._buffers.items():
            module._buffers[key] = There(buffer, at)
        if name in hooked:
            add_hook_to_module(module, AlignDevicesHook(at, skip_keys=["past_key_values"]))
    return add_hook_to_module(hf_model, AlignDevicesHook(io_same_device=True))


def captured(model: Model) -> Any:
    return capture(model, PROMPTS).stack


def grid(model: Model) -> Any:
    return read(PROMPTS, Spade(model, keep=Keep(last=2)), positions="all").kl


def generated(model: Model) -> Any:
    return torch.tensor(model.generate(PROMPTS, 4).to_frame()["token_id"].tolist())


def exited(model: Model) -> Any:
    spade = Spade(model, keep=Keep(spans=("labels",)))
    confidence, policy = Confidence(spade, "margin"), Patience(2)
    trace = SpadeExit(model, confidence, policy, answerer=spade, layers=[1, 2, 3]).run(PROMPTS)
    return torch.stack([trace.exit_layer, trace.answer])


def fitted(model: Model) -> Any:
    text = calibration_text(load(tiny("llama")), n_pieces=8, n_tokens=16)
    lens = fit("l-spade", model, text, per_piece="all", ridges=[0.1], held_out=0.25)
    return next(iter(lens.maps.tensors.values()))


def swept(model: Model) -> Any:
    task = RuleTask("t", {"x": ("a", "bb", "ccc"), "y": ("d", "ee", "fff")})
    tight = Template(pair="{input}>{output}", query="{input}>", separator=";")
    setup = PromptSetup(tight, ("z",))
    sweep = patch_sweep(model, task.episodes(4, shots=2), layers=[1, 3], setup=setup)
    return torch.tensor(sweep.frame["logit_diff"].tolist())


@pytest.fixture(scope="module")
def alone() -> Model:
    return load(tiny("llama-eager"), tokenizer=tiny_tokenizer(), name="m")


@pytest.fixture(scope="module")
def apart() -> Model:
    with LogicalDevices():
        return load(on_two_devices(tiny("llama-eager")), tokenizer=tiny_tokenizer(), name="m")


@pytest.mark.filterwarnings("ignore:On task .* there is nothing to explain")
@pytest.mark.parametrize("job", [captured, grid, generated, exited, fitted, swept])
def test_no_operation_mixes_devices(alone: Model, apart: Model, job: Callable[..., Any]) -> None:
    with LogicalDevices():
        assert apart.device == HERE and apart.sha256 == alone.sha256
        own = job(apart).cpu()
    assert torch.equal(own, job(alone))


def test_devices_that_are_mixed_are_seen() -> None:
    with LogicalDevices(), pytest.raises(RuntimeError, match="several devices"):
        torch.ones(2, device=HERE) + torch.ones(2, device=THERE)
    hf_model = on_two_devices(tiny("llama-eager"))
    for module in hf_model.modules():
        for key in ("forward", "_hf_hook", "_old_forward"):
            vars(module).pop(key, None)
    with LogicalDevices(), pytest.raises(UnsupportedModelError, match="nothing moves its inputs"):
        load(hf_model)
