"""What ``load`` takes, what it refuses, and that the pieces are the model."""

import copy
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as hf
from reference import logits
from tiny import ARCHITECTURES, D_VOCAB, MORE_ARCHITECTURES, TL39, tiny, tiny_tokenizer
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources import build_bridge_from_module

from spade_lens import Model, Prompt, UnsupportedModelError, load
from spade_lens.models.windows import longest_prompt
from spade_lens.prompts import TokenWarning
from spade_lens.settings import one_call

TOKENS = [1, 17, 4, 80, 9, 33, 5, 61, 12, 12, 7, 90]


def own_logits(model: Model, tokens: list[int] = TOKENS) -> torch.Tensor:
    with torch.no_grad():
        at = torch.arange(len(tokens))[None]
        resid = model.run_blocks(model.embed(torch.tensor([tokens])), at, 0, model.n_layers)
        return model.unembed(model.final_norm(resid)[0])


@pytest.fixture
def llama_folder(tmp_path: Path) -> Path:
    tiny("llama").save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", MORE_ARCHITECTURES)
def test_the_pieces_put_together_are_the_model(name: str) -> None:
    hf_model = tiny(name)
    torch.testing.assert_close(
        own_logits(load(hf_model)), logits(hf_model, TOKENS), atol=1e-5, rtol=0.0
    )


NOT_BRIDGED = "deepseek-v3" if TL39 else None
"""Of this model TransformerLens' own form is another."""


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_bridge_loads_and_equals_the_model_it_wraps(name: str) -> None:
    hf_model = tiny(name)
    expected = logits(hf_model, TOKENS)
    bridge = build_bridge_from_module(
        copy.deepcopy(hf_model), type(hf_model).__name__, hf_config=hf_model.config
    )
    assert isinstance(bridge, TransformerBridge)
    if name == NOT_BRIDGED:
        with pytest.raises(UnsupportedModelError, match="differ from the model's own logits"):
            load(bridge)
        return
    torch.testing.assert_close(own_logits(load(bridge)), expected, atol=1e-5, rtol=0.0)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_loading_and_using_leaves_the_users_model_alone(name: str) -> None:
    hf_model = tiny(name)
    before = {key: value.clone() for key, value in hf_model.state_dict().items()}
    modules = [(path, id(module)) for path, module in hf_model.named_modules()]
    model = load(hf_model)
    own_logits(model)
    refused = pytest.raises(UnsupportedModelError, match="Hooks cannot act on")
    with (
        refused if name == NOT_BRIDGED else nullcontext(),
        model.hooks([("blocks.1.hook_resid_post", lambda x, hook: x * 0)]),
    ):
        own_logits(model)
    assert modules == [(path, id(module)) for path, module in hf_model.named_modules()]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in hf_model.modules())
    for key, value in hf_model.state_dict().items():
        torch.testing.assert_close(value, before[key], atol=0.0, rtol=0.0)


def test_a_folder_loads_with_its_tokenizer(llama_folder: Path) -> None:
    model = load(llama_folder)
    assert model.prompt("ab").tokens == (1, *(ord(c) - 33 + 3 for c in "ab"))
    torch.testing.assert_close(own_logits(model), own_logits(load(tiny("llama"))))


def test_bf16_runs_and_is_near(llama_folder: Path) -> None:
    half = load(llama_folder, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    whole = own_logits(load(llama_folder))
    error = (own_logits(half).float() - whole).abs().max()
    assert error < 0.05 * whole.abs().max()


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_tl_hooks_fire_by_their_names_and_change_what_follows(name: str) -> None:
    model = load(tiny(name))
    plain, seen = own_logits(model), []

    def look(pattern: torch.Tensor, hook: Any) -> None:
        seen.append(tuple(pattern.shape))

    def wipe(resid: torch.Tensor, hook: Any) -> torch.Tensor:
        return torch.zeros_like(resid)

    with model.hooks([("blocks.2.attn.hook_pattern", look)]):
        torch.testing.assert_close(own_logits(model), plain, atol=1e-5, rtol=0.0)
    assert seen == [(1, 4, len(TOKENS), len(TOKENS))]
    with one_call(), model.hooks([("blocks.1.hook_resid_post", wipe)]):
        assert not torch.allclose(own_logits(model), plain, atol=1e-2)
        model.expect_rows(100)
        assert model.prefix(1) is None  # the hooks might change the start token too
    torch.testing.assert_close(own_logits(model), plain, atol=0.0, rtol=0.0)


def test_the_hash_tells_models_apart() -> None:
    one, other = tiny("llama"), tiny("llama")
    assert load(one).sha256 == load(other).sha256
    other.model.layers[0].mlp.up_proj.weight.data[0, 0] += 1
    assert load(one).sha256 != load(other).sha256


# -- refusals, each before compute is spent


def test_unknown_name_offers_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"No model 'smollm2-135m'.*smollm2-135m-instruct"):
        load("smollm2-135m")


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF\x03\x00\x00\x00" + b"\xff" * 40, b"no"])
def test_a_corrupt_gguf_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.gguf"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"broken\.gguf is not a whole GGUF file"):
        load(path)


@pytest.mark.download
def test_a_truncated_gguf_is_named(tmp_path: Path) -> None:
    from spade_lens.models.catalogue import fetch_model_files

    path = tmp_path / "truncated.gguf"
    path.write_bytes(fetch_model_files("smollm2-135m-instruct")[0].read_bytes()[:50_000_000])
    with pytest.raises(ValueError, match=r"truncated\.gguf is not a whole GGUF file"):
        load(path)


def test_a_path_that_leads_nowhere(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="There is no file or folder"):
        load(tmp_path / "absent.gguf")


@pytest.mark.parametrize("kind", ["encoder", "encoder-decoder"])
def test_encoders_are_refused_by_name(tmp_path: Path, kind: str) -> None:
    config: Any
    if kind == "encoder":
        config = hf.BertConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
        )
        config.architectures = ["BertForMaskedLM"]
    else:
        config = hf.T5Config(d_model=32, num_layers=2, num_heads=4, d_ff=48)
        config.architectures = ["T5ForConditionalGeneration"]
    config.save_pretrained(tmp_path)
    name = config.architectures[0]
    with pytest.raises(UnsupportedModelError, match=f"{name} is not a causal language model"):
        load(tmp_path)


def test_alibi_is_refused_and_not_half_supported() -> None:
    bloom = hf.BloomForCausalLM(
        hf.BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=D_VOCAB)
    ).eval()
    with pytest.raises(UnsupportedModelError, match="BloomForCausalLM adds ALiBi"):
        load(bloom)


def test_recurrent_models_are_refused() -> None:
    mamba = hf.MambaForCausalLM(
        hf.MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=D_VOCAB, state_size=4)
    ).eval()
    with pytest.raises(UnsupportedModelError, match="MambaForCausalLM"):
        load(mamba)


def test_longrope_is_taken_as_far_as_no_prompt_turns_the_keys_of_another() -> None:
    def made(longest: int) -> Any:
        rope = {
            "rope_type": "longrope",
            "rope_theta": 10_000.0,
            "short_factor": [1.0] * 4,
            "long_factor": [4.0] * 4,
        }
        options = tiny("phi3").config.to_dict() | {
            "rope_parameters": rope,
            "original_max_position_embeddings": longest,
            "sliding_window": None,
        }
        torch.manual_seed(0)
        return hf.Phi3ForCausalLM(hf.Phi3Config.from_dict(options)).eval()

    short, long = made(len(TOKENS)), made(len(TOKENS) - 1)
    expected = logits(short, TOKENS)
    torch.testing.assert_close(own_logits(load(short)), expected, atol=1e-5, rtol=0.0)
    # One token more than the short factors are for, and the same weights say something else.
    assert (logits(long, TOKENS) - expected).abs().max() > 1e-3
    load(short).check_prompts([Prompt(tuple(TOKENS))])
    with pytest.raises(ValueError, match=f"takes at most {len(TOKENS) - 1}"):
        load(long).check_prompts([Prompt(tuple(TOKENS))])
    kinds = {"full_attention": long.config.rope_parameters, "sliding_attention": {}}
    assert longest_prompt(SimpleNamespace(rope_parameters=kinds)) == len(TOKENS) - 1


def test_a_model_that_is_not_its_pieces_is_refused() -> None:
    hf_model = tiny("llama")
    # A head that adds what the residual stream does not hold.
    hf_model.lm_head.register_forward_hook(lambda _m, _a, out: out + out.shape[1])
    with pytest.raises(UnsupportedModelError, match="differ from the model's own logits by"):
        load(hf_model)


def test_training_mode_is_refused() -> None:
    with pytest.raises(ValueError, match=r"training mode.*\.eval\(\)"):
        load(tiny("llama").train())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_cuda_asked_for_and_absent(llama_folder: Path) -> None:
    with pytest.raises(ValueError, match="torch sees no CUDA device"):
        load(llama_folder, device="cuda")


def test_other_dtypes_are_refused(llama_folder: Path) -> None:
    with pytest.raises(ValueError, match=r"expected torch\.float32, .*on a GPU, torch\.float16"):
        load(llama_folder, dtype=torch.int8)


def test_a_loaded_model_is_not_moved() -> None:
    with pytest.raises(ValueError, match="stays as it is"):
        load(tiny("llama"), device="cpu")


def test_what_is_no_model() -> None:
    with pytest.raises(TypeError, match="A int was given; expected a name"):
        load(7)


def test_a_tokenizer_without_bos_asks_for_a_choice() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = None
    model = load(tiny("llama"), tokenizer=tokenizer)
    with pytest.raises(ValueError, match=r"no BOS token. Pass bos=False"):
        model.prompt("ab")
    assert model.prompt("ab", bos=False).tokens == model.prompt("ab", bos="</s>").tokens[1:]


def test_prompts_are_checked() -> None:
    model = load(tiny("llama"), tokenizer=tiny_tokenizer())
    with pytest.raises(ValueError, match="The prompt is empty"):
        model.prompt("")
    with pytest.raises(ValueError, match="Prompt 0 has 201 tokens; .* takes at most 128"):
        model.prompt("a" * 200)
    with pytest.raises(ValueError, match="target='' was given; expected a text"):
        model.prompt("q", target="")
    with pytest.raises(ValueError, match="Prompt 0 has token ids .9999. outside"):
        model.prompt("q", target=[5, 9999])


def test_answers_of_several_tokens() -> None:
    model = load(tiny("llama"), tokenizer=tiny_tokenizer())
    a, b, c = (model.tokenizer.convert_tokens_to_ids(x) for x in "abc")
    prompt = model.prompt("q>", target="ab", candidates=("ab", "ca", (b, a), c))
    assert (prompt.target, prompt.target_tokens) == (a, (a, b))
    assert prompt.candidate_tokens == ((a, b), (c, a), (b, a), (c,))
    assert prompt.candidates == (a, c, b) and not prompt.shares_first_token
    assert model.prompt("q>", target=(a, b)).target_tokens == (a, b)
    with pytest.warns(TokenWarning, match="begin with 'a' as the target does.*score_answers"):
        assert model.prompt("q>", target="ab", candidates=("ab", "ac")).shares_first_token
    with pytest.warns(TokenWarning, match="'ab' has 2 tokens and follows 'q' without a space"):
        model.prompt("q", target="ab")


@pytest.mark.download
class TestTheCatalogue:
    """The real models."""

    def test_the_default(self, smollm2: Model) -> None:
        assert (smollm2.n_layers, smollm2.d_model, smollm2.d_vocab) == (30, 576, 49152)
        assert smollm2.prompt("Hi").tokens[0] == 1

    @pytest.mark.slow
    def test_stories15m(self) -> None:
        model = load("stories15m")
        assert (model.n_layers, model.d_model, model.d_vocab) == (6, 288, 32000)
        prompt = model.prompt("Once upon a")
        best = int(own_logits(model, list(prompt.tokens))[-1].argmax())
        assert model.tokenizer.decode([best]).strip() == "time"
