"""Readouts: every figure against its definition on dense logits, the table, the grid, errors."""

from typing import Any

import pandas as pd
import pytest
import torch
from reference import logits
from scipy.special import log_softmax
from scipy.stats import entropy
from tiny import ARCHITECTURES, tiny

from spade_lens import (
    Keep,
    LogitLens,
    Model,
    Patch,
    Prompt,
    Settings,
    Spade,
    capture,
    load,
    read,
    tasks,
)
from spade_lens.lenses import Reading

EXACT = {"atol": 1e-4, "rtol": 0.0}
PROMPTS = [
    Prompt(tokens=(1, 8, 40, 7, 30), target=12, candidates=(5, 9, 12)),
    Prompt(tokens=(1, 60, 3, 3, 3, 3, 9, 20, 11), target=4, candidates=(4, 8)),
    Prompt(tokens=(1, 33), answer=0),
]


@torch.no_grad()
def dense(lens: Any, prompts: list[Prompt]) -> torch.Tensor:
    """Logits [layer prompt d_vocab] of a lens, for the definitions."""
    model = lens.model
    readings = [Reading(i, p.answer, tuple(lens.keep(p, p.answer))) for i, p in enumerate(prompts)]
    residuals = capture(model, prompts)
    finals = lens.final_residuals(residuals, readings, residuals.layers)
    return model.unembed(model.final_norm(finals).flatten(0, 1)).unflatten(0, finals.shape[:2])


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_every_figure_is_its_definition(name: str) -> None:
    hf_model = tiny(name)
    model = load(hf_model)
    lenses = [LogitLens(model), Spade(model)]
    readout = read(PROMPTS, lenses, top_k=3)
    own = torch.stack([logits(hf_model, p.tokens)[p.answer] for p in PROMPTS])
    for n, lens in enumerate(lenses):
        values = dense(lens, PROMPTS)
        logprobs = torch.from_numpy(log_softmax(values.numpy(), axis=-1))
        top = logprobs.topk(3)
        assert torch.equal(readout.top_tokens[n], top.indices)
        torch.testing.assert_close(readout.top_logprobs[n], top.values, **EXACT)
        nats = torch.from_numpy(entropy(logprobs.exp().numpy(), axis=-1))
        torch.testing.assert_close(readout.entropy[n], nats, **EXACT)
        own_probs = own.softmax(-1).expand_as(logprobs)
        kl = torch.from_numpy(entropy(own_probs.numpy(), logprobs.exp().numpy(), axis=-1))
        torch.testing.assert_close(readout.kl[n], kl, **EXACT)
        assert torch.equal(readout.agrees[n], top.indices[..., 0] == own.argmax(-1))
        for i, prompt in enumerate(PROMPTS[:2]):
            at_target = logprobs[:, i, prompt.target]
            torch.testing.assert_close(readout.target_logprob[n, :, i], at_target, **EXACT)
            rank = (logprobs[:, i] > at_target[:, None]).sum(-1)
            assert torch.equal(readout.target_rank[n, :, i], rank)
            k = len(prompt.candidates)
            torch.testing.assert_close(
                readout.candidate_logprobs[n, :, i, :k],
                logprobs[:, i, list(prompt.candidates)],
                **EXACT,
            )
    assert readout.target[2] == -1 and readout.target_logprob[:, :, 2].isnan().all()
    assert readout.candidates[1].tolist() == [4, 8, -1]
    assert readout.candidate_logprobs[:, :, 1, 2].isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_last_layer_agrees_with_itself_in_every_precision(dtype: torch.dtype) -> None:
    hf_model = tiny("llama").to(dtype)
    hf_model.lm_head.weight.data = hf_model.lm_head.weight.data.round(decimals=1)
    hf_model.lm_head.weight.data[40:80] = hf_model.lm_head.weight.data[:40]  # every token twice
    model = load(hf_model)
    prompts = [Prompt(tokens=(1, *((7 * i + k) % 90 + 3 for i in range(9)))) for k in range(40)]
    readout = read(prompts, [LogitLens(model), Spade(model)], layers=[model.n_layers])
    assert readout.agrees.all()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_last_layer_is_the_models_own_output(name: str) -> None:
    hf_model = tiny(name)
    model = load(hf_model)
    readout = read(PROMPTS, [LogitLens(model), Spade(model)], layers=[model.n_layers])
    assert readout.agrees.all() and (readout.kl < 1e-6).all()
    for i, prompt in enumerate(PROMPTS):
        own = logits(hf_model, prompt.tokens)[prompt.answer].log_softmax(-1)
        expected = own.topk(5).values.expand(2, 1, 5)
        torch.testing.assert_close(readout.top_logprobs[:, :, i], expected, **EXACT)


@pytest.mark.parametrize("keep", [Keep(), Keep(start=False), Keep(last=3)], ids=str)
def test_the_grid_is_a_reading_at_every_position(tiny_llama: Model, keep: Keep) -> None:
    tokens = PROMPTS[1].tokens
    lens = Spade(tiny_llama, keep=keep)
    grid = read(Prompt(tokens=tokens), lens, positions="all", top_k=1)
    each = [
        Prompt(tokens=tokens, answer=p, target=following)
        for p, following in enumerate([*tokens[1:], None])
    ]
    one_by_one = read(each, lens, top_k=1)
    for field in ("top_logprobs", "entropy", "kl", "target_logprob"):
        torch.testing.assert_close(
            getattr(grid, field), getattr(one_by_one, field), equal_nan=True, **EXACT
        )
    assert torch.equal(grid.target_rank, one_by_one.target_rank)
    assert grid.position.tolist() == list(range(len(tokens)))


def test_small_chunks_equal_one(tiny_llama: Model) -> None:
    patch = Patch(2, prompts=(1,), positions=(5,), values=torch.ones(32), mode="add")
    lenses = [LogitLens(tiny_llama), Spade(tiny_llama)]
    whole = read(PROMPTS, lenses, patches=[patch]).to_frame()
    grid = read(PROMPTS[1], lenses, positions="all", top_k=1).to_frame()
    one = Settings(batch_size=1)
    chunked = read(PROMPTS, lenses, patches=[patch], settings=one).to_frame()
    in_order = ["lens", "layer", "prompt"]
    pd.testing.assert_frame_equal(
        chunked.sort_values(in_order, ignore_index=True),
        whole.sort_values(in_order, ignore_index=True),
        atol=1e-4,
    )
    chunked = read(PROMPTS[1], lenses, positions="all", top_k=1, settings=one).to_frame()
    pd.testing.assert_frame_equal(chunked, grid, atol=1e-4)


def test_the_table_is_tidy(tiny_llama: Model) -> None:
    prompts = [tiny_llama.prompt("ab->A", target="B", candidates=("B", "C")), PROMPTS[1]]
    frame = read(prompts, [LogitLens(tiny_llama), Spade(tiny_llama)], top_k=2).to_frame()
    assert len(frame) == 2 * (tiny_llama.n_layers + 1) * 2
    first = ["model", "lens", "layer", "prompt", "position"]
    assert list(frame.columns[:5]) == first
    assert not frame.duplicated(first).any()
    row = frame.query("lens == 'SPADE' and layer == 4 and prompt == 0").iloc[0]
    assert (row.position, row.target, row.candidate_1, row.candidate_2) == (5, "B", "B", "C")
    assert row.choice in ("B", "C")
    assert row.correct == (row.top_1 == "B")


def test_ablations_are_one_line_each(tiny_llama: Model) -> None:
    frame = read(
        PROMPTS[:2],
        [
            Spade(tiny_llama),
            Spade(tiny_llama, keep=Keep(start=False)),
            Spade(tiny_llama, keep=Keep(last=0, positions=(1,))),
            Spade(tiny_llama, positions="reset"),
        ],
    ).to_frame()
    assert frame.lens.unique().tolist() == [
        "SPADE",
        "SPADE (answer)",
        "SPADE (start+1)",
        "SPADE (start+answer, reset)",
    ]


def test_the_users_tokens_are_not_changed(tiny_llama: Model) -> None:
    before = [p.tokens for p in PROMPTS]
    read(PROMPTS, Spade(tiny_llama))
    assert [p.tokens for p in PROMPTS] == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lens": []}, "No lens was given"),
        ({"layers": [9]}, r"\[9\] lie outside"),
        ({"top_k": 0}, "top_k=0 was given"),
        ({"prompts": []}, "No prompts were given"),
        (
            {"patches": [Patch(1, prompts=(7,), positions=(0,), values=torch.zeros(32))]},
            r"prompts=\[7\] was given, and \[7\] lie outside",
        ),
        ({"prompts": [Prompt(tokens=(1, 500))]}, r"token ids \[500\] outside the vocabulary"),
        ({"prompts": [Prompt(tokens=(1, 5), target=97)]}, r"token ids \[97\] outside"),
    ],
)
def test_wrong_requests_are_named(
    tiny_llama: Model, arguments: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Model, "run_blocks", lambda *_, **__: pytest.fail("compute was spent"))
    call = {"lens": Spade(tiny_llama), "prompts": PROMPTS, **arguments}
    with pytest.raises(ValueError, match=message):
        read(**call)


def test_lenses_must_be_of_one_model_and_of_different_names(tiny_llama: Model) -> None:
    with pytest.raises(ValueError, match="different models"):
        read(PROMPTS, [Spade(tiny_llama), Spade(load(tiny("gpt2")))])
    with pytest.raises(ValueError, match="Two lenses have one name"):
        read(PROMPTS, [Spade(tiny_llama), Spade(tiny_llama)])


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ({"last": -1}, "last=-1 was given"),
        ({"start": False, "last": 0}, "keep set is empty"),
    ],
)
def test_wrong_keep_sets(keep: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Keep(**keep)


def test_keep_sets_that_do_not_fit_a_prompt(tiny_llama: Model) -> None:
    with pytest.raises(ValueError, match=r"names spans \['labels'\]; this prompt has \[\]"):
        read(PROMPTS, Spade(tiny_llama, keep=Keep(spans=("labels",))))
    with pytest.raises(ValueError, match="position 40 does not lie between"):
        read(PROMPTS, Spade(tiny_llama, keep=Keep(positions=(40,))))
    with pytest.raises(ValueError, match="positions='new' was given"):
        Spade(tiny_llama, positions="new")
    with pytest.raises(ValueError, match=r"keep rule .*: \[\] was given; .* answer token's, 4"):
        read(PROMPTS, Spade(tiny_llama, keep=lambda prompt, answer: []))
    with pytest.raises(ValueError, match=r"\[5\] lie outside; .* answer token's, 4"):
        read(PROMPTS, Spade(tiny_llama, keep=lambda prompt, answer: [0, answer + 1]))


@pytest.mark.download
class TestOnTheRealModel:
    def test_a_target_of_several_tokens_is_read_by_its_first(self, smollm2: Model) -> None:
        prompt = smollm2.prompt("The capital of Madagascar is", target=" Antananarivo")
        assert len(prompt.target_tokens) > 1 and prompt.target == prompt.target_tokens[0]
        assert smollm2.tokenizer.decode(prompt.target_tokens) == " Antananarivo"
        assert read(prompt, LogitLens(smollm2), layers=30).target.tolist() == [prompt.target]

    def test_spade_reads_the_answer_before_the_logit_lens(self, smollm2: Model) -> None:

        prompts = tasks.task("present-past").prompts(smollm2.tokenizer, 12, shots=8, seed=1)
        lenses = [LogitLens(smollm2), Spade(smollm2)]
        frame = read(prompts, lenses, layers=[24, 30]).to_frame()
        agreement = frame.groupby(["layer", "lens"])["agrees"].mean()
        assert agreement[24, "SPADE"] >= 0.75
        assert agreement[24, "logit lens"] <= 0.25
        assert agreement[30].min() == 1
