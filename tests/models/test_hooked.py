"""A HookedTransformer of TransformerLens 3.9: exact, not slowed down, and left alone."""

import itertools
from typing import Any

import pytest
import torch
from tiny import tiny

from spade_lens import Keep, Prompt, Spade, UnsupportedModelError, capture, load, read
from spade_lens.icl.attention.heads import head_contributions, head_outputs
from spade_lens.lenses import Reading

try:  # gone in transformer-lens 4
    from transformer_lens import HookedTransformer, HookedTransformerConfig
except ImportError:
    pytest.skip("transformer-lens 4 has no HookedTransformer", allow_module_level=True)
from transformer_lens.pretrained.weight_conversions import (
    convert_gpt2_weights,
    convert_llama_weights,
)


def hooked_of(hf_model: Any) -> Any:
    """A HookedTransformer with the weights of a tiny Llama or GPT-2."""
    config = hf_model.config
    llama = config.model_type == "llama"
    heads = config.num_attention_heads
    cfg = HookedTransformerConfig(
        n_layers=config.num_hidden_layers,
        d_model=config.hidden_size,
        n_heads=heads,
        n_key_value_heads=config.num_key_value_heads if llama else None,
        d_head=config.hidden_size // heads,
        d_mlp=config.intermediate_size if llama else 4 * config.hidden_size,
        d_vocab=config.vocab_size,
        n_ctx=config.max_position_embeddings,
        act_fn="silu" if llama else "gelu_new",
        gated_mlp=llama,
        normalization_type="RMS" if llama else "LN",
        final_rms=llama,
        eps=config.rms_norm_eps if llama else config.layer_norm_epsilon,
        positional_embedding_type="rotary" if llama else "standard",
        rotary_dim=config.hidden_size // heads if llama else None,
        rotary_adjacent_pairs=False,
        rotary_base=10000,
        original_architecture=type(hf_model).__name__,
        device="cpu",
    )
    hooked = HookedTransformer(cfg)
    convert = convert_llama_weights if llama else convert_gpt2_weights
    hooked.load_and_process_state_dict(
        convert(hf_model, cfg),
        fold_ln=False,
        center_writing_weights=False,
        center_unembed=False,
        fold_value_biases=False,
    )
    return hooked.eval()


PROMPTS = [Prompt(tokens=(1, *(5 + 3 * i for i in range(n)))) for n in (20, 7)]


def final(lens: Spade) -> torch.Tensor:
    model = lens.model
    readings = [Reading(i, p.answer, tuple(lens.keep(p, p.answer))) for i, p in enumerate(PROMPTS)]
    residuals = capture(model, PROMPTS)
    finals = lens.final_residuals(residuals, readings, residuals.layers)
    return model.unembed(model.final_norm(finals).flatten(0, 1))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("positions", ["keep", "reset"])
def test_spade_equals_spade_on_the_hugging_face_model(name: str, positions: Any) -> None:
    hf_model = tiny(name)
    on_hf = Spade(load(hf_model), keep=Keep(last=2), positions=positions)
    on_hooked = Spade(load(hooked_of(hf_model)), keep=Keep(last=2), positions=positions)
    torch.testing.assert_close(final(on_hooked), final(on_hf), atol=1e-4, rtol=0.0)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_heads_are_those_of_the_hugging_face_model(name: str) -> None:
    on_hf, on_hooked = load(tiny(name)), load(hooked_of(tiny(name)))
    expected = head_outputs(on_hf, PROMPTS)
    torch.testing.assert_close(head_outputs(on_hooked, PROMPTS), expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(
        head_contributions(on_hooked, expected),
        head_contributions(on_hf, expected),
        atol=1e-5,
        rtol=1e-4,
    )


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_relayout_is_identical_to_the_bit(name: str) -> None:
    hooked = hooked_of(tiny(name))
    tokens = torch.tensor([[1, 8, 40, 3]])
    twin = load(hooked)._visits.backbone.hooked
    for (key, ours), theirs in zip(twin.named_parameters(), hooked.parameters(), strict=True):
        assert torch.equal(ours, theirs), key
    with torch.no_grad():
        resid = hooked.embed(tokens)
        for ours, theirs in zip(twin.blocks, hooked.blocks, strict=True):
            assert torch.equal(ours.mlp(resid), theirs.mlp(resid))


def test_a_forward_copies_no_weights() -> None:
    hooked = hooked_of(tiny("llama"))
    model = load(hooked)
    weights = sum(p.numel() for p in hooked.blocks.parameters()) * 4
    resid, at = torch.randn(1, 2, model.d_model), torch.tensor([[0, 9]])

    def copied(run: Any) -> int:
        with torch.no_grad(), torch.profiler.profile(profile_memory=True) as profile:
            run()
        events = [e for e in profile.events() if e.name in ("aten::clone", "aten::contiguous")]
        return sum(max(0, e.self_cpu_memory_usage) for e in events) + sum(
            max(0, e.cpu_memory_usage) for e in events if e.name == "aten::clone"
        )

    ours = copied(lambda: model.run_blocks(resid, at, 0, model.n_layers))
    theirs = copied(lambda: hooked(resid, start_at_layer=0, stop_at_layer=model.n_layers))
    assert theirs > weights / 2
    assert ours < weights / 10


def test_the_users_model_is_left_alone() -> None:
    hooked = hooked_of(tiny("llama"))
    strides = [p.stride() for p in hooked.parameters()]
    tokens = torch.tensor([[1, 8, 40, 3]])
    with torch.no_grad():
        before = hooked(tokens)
        model = load(hooked)
        with model.hooks([("blocks.0.hook_resid_post", lambda x, hook: x * 0)]):
            capture(model, PROMPTS)
        assert torch.equal(hooked(tokens), before)
    assert strides == [p.stride() for p in hooked.parameters()]


def test_hooks_fire_by_their_names() -> None:
    model = load(hooked_of(tiny("llama")))
    seen = []
    with model.hooks([("blocks.1.attn.hook_pattern", lambda x, hook: seen.append(x.shape))]):
        capture(model, PROMPTS[:1])
    assert [tuple(shape) for shape in seen] == [(1, 4, 21, 21)]


def test_other_positions_are_refused() -> None:
    hooked = hooked_of(tiny("gpt2"))
    hooked.cfg.positional_embedding_type = "shortformer"
    with pytest.raises(UnsupportedModelError, match="'shortformer' positions"):
        load(hooked)


def test_a_hooked_transformer_that_changes_is_seen() -> None:
    hooked = hooked_of(tiny("llama"))
    model = load(hooked)

    def now() -> torch.Tensor:
        return read([Prompt((1, 9, 8, 7, 6))] * 2, Spade(model)).entropy

    def fresh() -> torch.Tensor:
        return read([Prompt((1, 9, 8, 7, 6))] * 2, Spade(load(hooked))).entropy

    seen = [now()]
    attention, mlp = hooked.blocks[1].attn, hooked.blocks[2].mlp
    attention.W_O.data[1] = 0  # a head
    seen.append(now())
    torch.testing.assert_close(seen[-1], fresh(), atol=1e-6, rtol=0.0)
    mlp.W_in.data[3, 5] += 40  # one number of a matrix that the twin stores once more
    seen.append(now())
    torch.testing.assert_close(seen[-1], fresh(), atol=1e-6, rtol=0.0)
    mlp.W_out = torch.nn.Parameter(mlp.W_out.detach() * -3)
    seen.append(now())
    torch.testing.assert_close(seen[-1], fresh(), atol=1e-6, rtol=0.0)
    hooked.cfg.attn_scores_soft_cap = 0.5  # of which the twin has a copy
    seen.append(now())
    torch.testing.assert_close(seen[-1], fresh(), atol=1e-6, rtol=0.0)
    hooked.add_hook("blocks.1.hook_resid_post", lambda x, hook: x * 1.5)
    seen.append(now())
    torch.testing.assert_close(seen[-1], fresh(), atol=1e-6, rtol=0.0)
    assert not any(torch.allclose(a, b, atol=1e-4) for a, b in itertools.pairwise(seen))
    hooked.reset_hooks()
    torch.testing.assert_close(now(), seen[-2], atol=0.0, rtol=0.0)


def test_hooks_act_on_a_batch_as_on_each_prompt_alone() -> None:
    model = load(hooked_of(tiny("llama")), name="hooked")
    prompts = [Prompt(tokens=tuple(range(3, 3 + n))) for n in (7, 4, 4, 9)]

    def push(resid: torch.Tensor, hook: Any) -> torch.Tensor:
        resid[:, -1] += torch.linspace(-2, 2, resid.shape[-1])
        return resid

    def last(some: list[Prompt]) -> torch.Tensor:
        return capture(model, some, layers=4, positions="last").stack[0]

    with model.hooks([("blocks.1.hook_resid_post", push)]):
        expected = torch.cat([last([prompt]) for prompt in prompts])
        torch.testing.assert_close(last(prompts), expected, atol=1e-4, rtol=0.0)
    assert not torch.allclose(last(prompts), expected, atol=1e-2)
    assert not any("hook_result" in name for name in model.hook_names)
    with (
        pytest.raises(ValueError, match="original.set_use_attn_result"),
        model.hooks([("blocks.0.attn.hook_result", push)]),
    ):
        pass


def test_a_hook_may_run_the_model_in_the_middle_of_a_run() -> None:
    model = load(hooked_of(tiny("llama")))
    expected = capture(model, PROMPTS).stack
    inner = []

    def runs(resid: torch.Tensor, hook: Any) -> None:
        if not inner:
            inner.append(None)
            capture(model, [Prompt(tokens=(1, 5, 6))])

    with model.hooks([("blocks.1.hook_resid_post", runs)]):
        got = capture(model, PROMPTS).stack
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


def test_it_has_no_bridge() -> None:
    model = load(hooked_of(tiny("llama")))
    with pytest.raises(UnsupportedModelError, match="TransformerBridge wraps Hugging Face models"):
        _ = model.bridge
