"""Decoded tokens: each method equals the lens or the patched run that it stands for."""

from dataclasses import replace
from typing import Any

import pytest
from tiny import tiny

from spade_lens import Keep, LogitLens, Model, Patch, Prompt, Spade, capture, icl, load, read
from spade_lens.icl.decoded_tokens import identity_prompt

LAYERS = [0, 2, 4]
PROMPTS = [Prompt(tokens=(1, *((11 * k + 17 * i) % 90 + 5 for k in range(9)))) for i in range(2)]
LABELS = (4, 7)


def rule_vectors(model: Model, *, known: bool = False) -> icl.RuleVectors:
    """With or without the prompts, which tell the positions."""
    residuals = capture(model, PROMPTS, layers=LAYERS, positions=[LABELS] * 2)
    prompts = [replace(prompt, spans={"labels": LABELS}) for prompt in PROMPTS]
    stack = residuals.stack.unflatten(1, (2, 2))
    return icl.RuleVectors(stack, tuple(LAYERS), tuple(prompts) if known else ())


@pytest.mark.parametrize("method", ["SPADE", "logit lens"])
def test_equals_the_lens_at_the_label(tiny_llama: Model, method: str) -> None:
    frame = icl.decoded_tokens(
        tiny_llama,
        rule_vectors(tiny_llama, known=True),
        methods=[method],
        top_k=3,
    )
    frame = frame[~frame["control"]]
    for demo, label in enumerate(LABELS):
        at_label = [Prompt(tokens=p.tokens, answer=label) for p in PROMPTS]
        lens = Spade(tiny_llama, keep=Keep()) if method == "SPADE" else LogitLens(tiny_llama)
        expected = read(at_label, lens, layers=LAYERS, top_k=3).to_frame()
        found = frame[frame["demo"] == demo].reset_index()
        for k in (1, 2, 3):
            assert found[f"top_{k}"].tolist() == expected[f"top_{k}"].tolist()
            assert found[f"top_{k}_logprob"].to_numpy() == pytest.approx(
                expected[f"top_{k}_logprob"].to_numpy(), abs=1e-3
            )


def test_a_patchscope_is_a_patched_run(tiny_llama: Model) -> None:
    target, vectors = identity_prompt(tiny_llama), rule_vectors(tiny_llama)
    frame = icl.decoded_tokens(tiny_llama, vectors, methods=["patchscope"], top_k=1)
    frame = frame[~frame["control"]]
    assert [target.text[-4:], len(target.spans["query"])] == ["? ->", 1]
    for row in frame.itertuples():
        vector = vectors.at(row.layer).tensor[0, row.prompt, row.demo]
        patch = Patch(row.layer, prompts=(0,), positions=target.spans["query"], values=vector)
        expected = read([target], LogitLens(tiny_llama), layers=[4], top_k=1, patches=[patch])
        assert row.top_1_logprob == pytest.approx(
            float(expected.top_logprobs[0, 0, 0, 0]), abs=1e-3
        )
        assert row.top_1 == expected.words[int(expected.top_tokens[0, 0, 0, 0])]


def test_controls_have_the_norm_and_nothing_else(tiny_llama: Model) -> None:
    vectors = rule_vectors(tiny_llama)
    frame = icl.decoded_tokens(tiny_llama, vectors, top_k=2)
    assert len(frame) == 3 * 2 * 3 * 4
    again = icl.decoded_tokens(tiny_llama, vectors, top_k=2)
    assert frame.equals(again)
    # The logit lens' norm makes a random vector's reading the same at any length of it.
    thrice = replace(vectors, tensor=3 * vectors.tensor)
    larger = icl.decoded_tokens(tiny_llama, thrice, methods=["logit lens"])
    control = frame[(frame["method"] == "logit lens") & frame["control"]]
    assert larger[larger["control"]]["top_1"].tolist() == control["top_1"].tolist()
    own = frame[(frame["method"] == "logit lens") & ~frame["control"]]
    assert own["top_1"].tolist() != control["top_1"].tolist()


def test_without_a_tokenizer_words_are_numbers() -> None:
    model = load(tiny())
    frame = icl.decoded_tokens(
        model,
        rule_vectors(model),
        target=Prompt((1, 5, 6, 7), spans={"query": (2,)}),
    )
    assert frame["top_1"].tolist() == [str(token) for token in frame["top_1_id"]]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"methods": ["tuned lens"]}, r"methods=\['tuned lens'\] and top_k=5 were given"),
        ({"methods": []}, r"methods=\[\]"),
        ({"top_k": 0}, "top_k=0"),
        ({"layers": (0, 1, 9)}, r"\[9\] lie outside"),
        ({}, "no prompt can be written for the patchscope, and SPADE's start token is not known"),
        ({"target": Prompt((1, 2, 3))}, "no place for a vector"),
    ],
)
def test_bad_input_is_refused(changed: dict[str, Any], message: str) -> None:
    model = load(tiny())
    vectors = replace(rule_vectors(model), layers=changed.pop("layers", tuple(LAYERS)))
    with pytest.raises(ValueError, match=message):
        icl.decoded_tokens(model, vectors, **changed)
