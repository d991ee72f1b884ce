"""Text as Hugging Face writes it: batched, cached, stopped, steered, captured, sampled."""

from typing import Any

import pytest
import torch
from tiny import ARCHITECTURES, tiny, tiny_tokenizer

import spade_lens as sl
from spade_lens.generation import Generated, Sampling, score_text
from spade_lens.prompts import Prompt

PROMPTS = [Prompt(tokens=(1, *(5 + 7 * i % 90 for i in range(n)))) for n in (9, 1, 20)]


def by_hugging_face(hf_model: Any, prompt: Prompt, n: int, **options: Any) -> tuple[int, ...]:
    ids = torch.tensor([prompt.tokens])
    out = hf_model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, do_sample=False, **options
    )
    return tuple(out[0, ids.shape[1] :].tolist())


def largest_gap(hf_model: Any, prompt: Prompt, ours: tuple[int, ...]) -> float:
    """How far our tokens are from the likeliest, by a plain forward pass over all of them."""
    tokens = torch.tensor([[*prompt.tokens, *ours]])
    with torch.no_grad():
        logits = hf_model(tokens).logits[0, len(prompt) - 1 : -1]
    chosen = logits.gather(1, torch.tensor(ours)[:, None])[:, 0]
    return float((logits.max(dim=-1).values - chosen).max())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_greedy_text_is_hugging_faces(name: str) -> None:
    hf_model = tiny(name)
    model = sl.load(hf_model)
    written = sl.generate(PROMPTS, 12, model=model, stop=())
    for prompt, tokens in zip(PROMPTS, written.tokens, strict=True):
        assert len(tokens) == 12
        assert largest_gap(hf_model, prompt, tokens) < 1e-4
        alone = sl.generate(prompt, 12, model=model, stop=())
        assert alone.tokens[0] == tokens
    assert by_hugging_face(hf_model, PROMPTS[0], 12, eos_token_id=None) == written.tokens[0]


def test_log_probabilities_are_the_models(tiny_llama: sl.Model) -> None:
    written = sl.generate(PROMPTS, 6, model=tiny_llama, stop=())
    for prompt, tokens in zip(PROMPTS, written.tokens, strict=True):
        whole = torch.tensor([[*prompt.tokens, *tokens]])
        logits = tiny_llama.original(whole).logits[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0]
        frame = written.to_frame().query("prompt == @PROMPTS.index(@prompt)")
        torch.testing.assert_close(
            torch.tensor(frame["logprob"].to_numpy()), expected.detach(), atol=1e-4, rtol=0
        )


def test_the_real_models_text(smollm2: sl.Model) -> None:
    texts = ["The capital of France is", "def fibonacci(n):", "Once upon a time,"]
    written = sl.generate(texts, 24, model=smollm2)
    for text, tokens in zip(texts, written.tokens, strict=True):
        prompt = smollm2.prompt(text)
        assert by_hugging_face(smollm2.original, prompt, 24, pad_token_id=0) == tokens
    assert written.texts[0].startswith(" Paris")


# -- where texts end


def test_rows_end_at_different_times(tiny_llama: sl.Model) -> None:
    free = sl.generate(PROMPTS, 20, model=tiny_llama, stop=())
    stop = free.tokens[0][3]
    written = sl.generate(PROMPTS, 20, model=tiny_llama, stop=[stop])
    for tokens, whole in zip(written.tokens, free.tokens, strict=True):
        n = whole.index(stop) + 1 if stop in whole else 20
        assert tokens == whole[:n]
    assert written.ended[0] == "stop token"
    assert len(written.tokens[0]) <= 4


def test_the_models_own_end_of_text(tiny_llama: sl.Model) -> None:
    # The end of text is the model's: token 2.
    eos = 2
    with torch.no_grad():
        pull = tiny_llama.original.lm_head.weight[eos] * 100
    patch = sl.Patch(tiny_llama.n_layers, values=pull)
    written = sl.generate(PROMPTS[:1], 5, model=tiny_llama, patches=[patch])
    assert written.tokens == ((eos,),)
    assert written.ended == ("stop token",)
    assert len(sl.generate(PROMPTS[0], 5, model=tiny_llama, patches=[patch], stop=()).token) == 5


def test_stop_strings_cut_the_text(tiny_llama: sl.Model) -> None:
    free = sl.generate("ab", 8, model=tiny_llama, stop=())
    text = free.texts[0]
    stop = text[2:4]
    written = sl.generate("ab", 8, model=tiny_llama, stop=stop)
    assert written.texts[0] == text[: text.index(stop)]
    assert written.ended == ("stop string",)
    assert sl.generate("ab", 3, model=tiny_llama, stop="no such text").ended == ("length",)


# -- hooks, patches, captures


def test_hooks_act_on_all_of_the_text(tiny_llama: sl.Model) -> None:
    torch.manual_seed(1)
    push = torch.randn(32)

    def steer(resid: torch.Tensor, hook: Any) -> torch.Tensor:
        return resid + push

    with tiny_llama.hooks([("blocks.2.hook_resid_post", steer)], ragged=True):
        written = sl.generate(PROMPTS, 6, model=tiny_llama, stop=())
    patched = sl.generate(
        PROMPTS,
        6,
        model=tiny_llama,
        stop=(),
        patches=[sl.Patch(3, positions="all", values=push, mode="add")],
    )
    assert written.tokens == patched.tokens
    assert written.tokens != sl.generate(PROMPTS, 6, model=tiny_llama, stop=()).tokens


@pytest.mark.parametrize("positions", ["last", "prompt", "all"])
def test_patches_are_those_of_whole_runs(tiny_llama: sl.Model, positions: str) -> None:
    torch.manual_seed(2)
    push = 2 * torch.randn(32)
    patch = sl.Patch(2, positions=positions, values=push, mode="add")
    written = sl.generate(PROMPTS, 6, model=tiny_llama, stop=(), patches=[patch], layers=[2, 4])
    assert written.residuals is not None
    for i, (prompt, tokens) in enumerate(zip(PROMPTS, written.tokens, strict=True)):
        n = len(prompt)
        whole = Prompt(tokens=(*prompt.tokens, *tokens))
        first = {"last": n - 1, "prompt": 0, "all": 0}[positions]
        stop = n if positions == "prompt" else len(whole)
        by_hand = sl.Patch(2, positions=[list(range(first, stop))], values=push, mode="add")
        residuals = sl.capture(tiny_llama, whole, layers=[2, 4], patches=[by_hand])
        expected = residuals.at(0)[:, n - 1 : -1]
        torch.testing.assert_close(written.residuals.at(i), expected, atol=1e-4, rtol=1e-4)
        read = tiny_llama.logits(residuals.at(0)[1, n - 1 : -1]).argmax(-1)
        assert tuple(read.tolist()) == tokens


def test_what_was_written_is_saved(tiny_llama: sl.Model, tmp_path: Any) -> None:
    written = sl.generate(["ab", "abc"], 4, model=tiny_llama, layers=[1])
    written.save(tmp_path)
    loaded = Generated.load(tmp_path)
    assert loaded.to_frame().equals(written.to_frame())
    assert loaded.residuals is not None and written.residuals is not None
    assert torch.equal(loaded.residuals.stack, written.residuals.stack)
    assert loaded.ended == written.ended


def test_tokens_are_streamed_as_they_stand(tiny_llama: sl.Model) -> None:
    seen: list[tuple[int, int, str]] = []
    written = sl.generate(
        PROMPTS, 4, model=tiny_llama, stop=(), on_token=lambda *one: seen.append(one)
    )
    for i, tokens in enumerate(written.tokens):
        assert [token for prompt, token, _ in seen if prompt == i] == list(tokens)
    assert seen[0][2] == tiny_llama.word(seen[0][1])


# -- sampling


def test_a_seed_gives_a_text_whatever_the_batch(tiny_llama: sl.Model) -> None:
    sampling = Sampling(temperature=1.3, top_k=40, top_p=0.9, seed=3)
    prompts = [*PROMPTS, PROMPTS[0]]
    written = sl.generate(prompts, 10, model=tiny_llama, sampling=sampling, stop=())
    alone = [
        sl.generate(p, 10, model=tiny_llama, sampling=sampling, stop=()).tokens[0] for p in PROMPTS
    ]
    assert list(written.tokens[:3]) == alone
    assert written.tokens[3] != written.tokens[0]  # the same prompt once more is another draw
    other = sl.generate(PROMPTS, 10, model=tiny_llama, sampling=Sampling(seed=4), stop=())
    assert other.tokens != written.tokens[:3]


def test_warped_probabilities() -> None:
    logits = torch.tensor([3.0, 2.0, 1.0, 0.0])
    p = logits.double().softmax(0)
    torch.testing.assert_close(Sampling().probabilities(logits), p)
    torch.testing.assert_close(
        Sampling(temperature=2.0).probabilities(logits), (logits.double() / 2).softmax(0)
    )
    assert (Sampling(top_k=2).probabilities(logits) > 0).tolist() == [True, True, False, False]
    # The likeliest has .64, the second .24: together they are the first to have .7.
    assert (Sampling(top_p=0.7).probabilities(logits) > 0).tolist() == [True, True, False, False]
    assert (Sampling(top_p=0.1).probabilities(logits) > 0).tolist() == [True, False, False, False]
    torch.testing.assert_close(
        Sampling(top_k=3, top_p=0.7).probabilities(logits).sum(), torch.tensor(1.0).double()
    )


def test_draws_have_the_models_distribution(tiny_llama: sl.Model) -> None:
    from scipy.stats import chisquare

    prompt, n = PROMPTS[1], 1500
    sampling = Sampling(top_k=8, seed=1)
    written = sl.generate([prompt] * n, 1, model=tiny_llama, sampling=sampling, stop=())
    logits = tiny_llama.original(torch.tensor([prompt.tokens])).logits[0, -1]
    expected = sampling.probabilities(logits.detach())
    counts = torch.bincount(written.token, minlength=len(expected))
    assert int(counts[expected == 0].sum()) == 0
    kept = expected > 0
    assert chisquare(counts[kept], n * expected[kept]).pvalue > 1e-3


# -- continuations


def test_scores_are_the_models(tiny_llama: sl.Model) -> None:
    written = sl.generate(PROMPTS, 5, model=tiny_llama, stop=())
    scores = score_text(PROMPTS, written.tokens, model=tiny_llama)
    assert scores["greedy"].all()
    sums = written.to_frame().groupby("prompt")["logprob"].sum()
    torch.testing.assert_close(
        torch.tensor(scores["logprob"].to_numpy()),
        torch.tensor(sums.to_numpy()).double(),
        atol=1e-4,
        rtol=0,
    )
    other = score_text(["ab", "abc"], ["xyz", "q"], model=tiny_llama)
    assert other["continuation"].tolist() == ["xyz", "q"]
    assert not other["greedy"].all()


# -- what is refused


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens=0"),
        ({"max_new_tokens": 200}, ValueError, "do not fit the context of 128"),
        ({"max_new_tokens": True}, TypeError, "max_new_tokens=True"),
        ({"stop": ""}, ValueError, "at least one character"),
        ({"stop": [97]}, ValueError, "below 97"),
        ({"sampling": 0.7}, TypeError, "sampling=0.7"),
        ({"layers": [9]}, ValueError, "layers"),
        ({"patches": [sl.Patch(9, values=torch.zeros(32))]}, ValueError, "layers"),
    ],
)
def test_bad_arguments_are_refused(
    tiny_llama: sl.Model, options: dict[str, Any], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        sl.generate("ab", **{"max_new_tokens": 2} | options, model=tiny_llama)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"temperature": 0}, "sampling=None"),
        ({"temperature": float("inf")}, "above 0"),
        ({"top_k": 0}, "top_k=0"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_bad_sampling_is_refused(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Sampling(**options)


def test_a_prompt_read_inside_is_refused(tiny_llama: sl.Model) -> None:
    with pytest.raises(ValueError, match="goes on after its last token"):
        sl.generate(Prompt(tokens=(1, 5, 6), answer=1), 2, model=tiny_llama)


def test_stop_strings_need_a_tokenizer() -> None:
    with pytest.raises(ValueError, match="without a tokenizer"):
        sl.generate(PROMPTS[0], 2, model=sl.load(tiny("llama")), stop="a")
    model = sl.load(tiny("llama"), tokenizer=tiny_tokenizer())
    assert len(sl.generate("ab", 2, model=model, stop=()).texts[0]) >= 1
