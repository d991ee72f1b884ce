"""What is answered and by how much, against dense logits."""

from typing import Any

import pytest
import torch
from tiny import tiny

from spade_lens import Model, Prompt, Settings, load
from spade_lens.lenses.answers import full_answers, own_answers, read_answers

PROMPTS = [
    Prompt(tokens=(1, *(4 + (5 * i + n) % 90 for i in range(n))), target=5, candidates=(5, 7, 9))
    for n in (11, 3, 25)
]
PROMPTS.append(Prompt(tokens=PROMPTS[0].tokens, answer=6, target=5, candidates=(5, 7)))


def test_answers_are_those_of_the_logits(tiny_llama: Model) -> None:
    answers = full_answers(tiny_llama, PROMPTS, settings=Settings(batch_size=3))
    for i, prompt in enumerate(PROMPTS):
        tokens = torch.tensor([prompt.tokens[: prompt.answer + 1]])
        logits = tiny_llama.original(tokens).logits[0, -1].detach()
        wrong = max(float(logits[t]) for t in prompt.candidates if t != prompt.target)
        diff = float(logits[prompt.target]) - wrong
        assert float(answers.logit_diff[i]) == pytest.approx(diff, abs=1e-4)
        assert bool(answers.prefers[i]) == (diff > 0)
        assert bool(answers.correct[i]) == (int(logits.argmax()) == prompt.target)
    assert list(answers.to_frame()) == ["correct", "prefers", "logit_diff", "ambiguous"]


@pytest.mark.parametrize("wrong", [{}, {"target": 3}, {"target": 3, "candidates": (3,)}])
def test_answers_need_something_to_compare(tiny_llama: Model, wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="Prompt 0 has target .* at least one other candidate"):
        full_answers(tiny_llama, [Prompt(tokens=(1, 2), **wrong)])
    with pytest.raises(ValueError, match="1 rows were given for 4 prompts"):
        read_answers(tiny_llama, torch.zeros(1, 32), PROMPTS)
    with pytest.raises(ValueError, match=r"Prompts \[0\] have no target"):
        read_answers(tiny_llama, torch.zeros(1, 32), [Prompt(tokens=(1, 2))])


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_every_measure_is_its_definition_with_and_without_candidates(name: str) -> None:
    model = load(tiny(name))
    final = torch.randn(4, model.d_model)
    prompts = [PROMPTS[0], Prompt(tokens=(1, 2), target=9), PROMPTS[3], Prompt(tokens=(1, 2))]
    tokens = torch.tensor([5, 9, 7, 60])
    whole = read_answers(model, final, prompts, tokens=tokens)
    for size in (1, 3):
        with Settings(batch_size=size):
            parts = read_answers(model, final, prompts, tokens=tokens)
        torch.testing.assert_close(vars(parts), vars(whole), atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        logits = model.unembed(model.final_norm(final))
    for i, (prompt, token) in enumerate(zip(prompts, tokens.tolist(), strict=True)):
        options = list(prompt.candidates) or list(range(model.d_vocab))
        among = logits[i, options]
        assert int(whole.top[i]) == int(logits[i].argmax())
        assert int(whole.choice[i]) == options[int(among.argmax())]
        assert bool(whole.correct[i]) == (int(logits[i].argmax()) == token)
        expected = {
            "logprob": logits[i].log_softmax(-1)[token],
            "option_logprob": logits[i, token] - among.logsumexp(-1),
            "logit_diff": logits[i, token] - logits[i, [o for o in options if o != token]].max(),
        }
        for field, value in expected.items():
            assert float(getattr(whole, field)[i]) == pytest.approx(float(value), abs=1e-4), field


def test_own_answers_are_measured_at_the_likeliest_option(tiny_llama: Model) -> None:
    final = torch.randn(4, 32)
    own = own_answers(tiny_llama, final, PROMPTS)
    again = read_answers(tiny_llama, final, PROMPTS, tokens=own.choice)
    assert own.prefers.all()
    torch.testing.assert_close(vars(own), vars(again))
    assert repr(own).startswith("Answers(4 rows, ") and len(repr(own)) < 80


def test_the_only_option_is_infinitely_preferred(tiny_llama: Model) -> None:
    alone = own_answers(tiny_llama, torch.randn(1, 32), [Prompt((1, 2), candidates=(3,))])
    assert alone.choice.tolist() == [3] and alone.logit_diff.tolist() == [float("inf")]
    assert alone.option_logprob.tolist() == [0.0]
