"""Confidences by hand, and candidates' rows against the whole unembedding."""

from inspect import unwrap  # past the type checks that run in tests only

import pytest
import torch
from tiny import ARCHITECTURES, D_VOCAB, tiny
from torch import nn

from spade_lens import LogitLens, Model, Prompt, load
from spade_lens.exits import Confidence, FixedLayer, SpadeExit
from spade_lens.exits.answer_head import AnswerHead
from spade_lens.exits.confidence import confidence_of


def test_by_hand() -> None:
    logits = torch.tensor([[0.7, 0.2, 0.1]]).log()
    probs = torch.tensor([0.7, 0.2, 0.1])
    entropy = float(-(probs * probs.log()).sum() / torch.tensor(3.0).log())
    assert confidence_of(logits, "entropy").item() == pytest.approx(1 - entropy)
    assert confidence_of(logits, "top-1").item() == pytest.approx(0.7)
    assert confidence_of(logits, "margin").item() == pytest.approx(0.5)


@pytest.mark.parametrize("measure", ["entropy", "top-1", "margin"])
def test_padding_and_shifts_change_nothing(measure: str) -> None:
    logits = torch.randn(5, 4)
    padded = torch.cat([logits, torch.full((5, 2), -torch.inf)], dim=1)
    expected = confidence_of(logits, measure)  # type: ignore[arg-type]
    torch.testing.assert_close(confidence_of(padded, measure), expected)  # type: ignore[arg-type]
    shifted = confidence_of(logits + 7, measure)  # type: ignore[arg-type]
    torch.testing.assert_close(shifted, expected)
    assert bool((0 <= expected).all() and (expected <= 1).all())


def test_one_option_is_certain() -> None:
    for measure in ("entropy", "top-1", "margin"):
        assert confidence_of(torch.zeros(1, 1), measure).item() == 1  # type: ignore[arg-type]


@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_candidates_rows_give_the_models_own_logits(name: str) -> None:
    model = load(tiny(name))
    head = AnswerHead(model)
    # A soft cap bends the logits, so there all rows are needed.
    assert head.narrow is (name != "gemma2")
    prompts = [
        Prompt(tokens=(1, 2), candidates=(4, 9, 50)),
        Prompt(tokens=(1, 2), candidates=(7, 8)),
        Prompt(tokens=(1, 2)),
    ]
    finals = torch.randn(3, model.d_model)
    with torch.no_grad():
        logits = model.unembed(model.final_norm(finals))
    lens = LogitLens(model)
    narrow = head.read(finals, prompts, Confidence(lens, "margin"))
    vocabulary = head.read(finals, prompts, Confidence(lens, "margin", "vocabulary"))
    answer, sure, wide = narrow.answer, narrow.confidence, vocabulary.confidence
    assert answer.tolist() == vocabulary.answer.tolist()
    assert answer.tolist() == head.read(finals, prompts).answer.tolist()
    for row, prompt in enumerate(prompts):
        options = list(prompt.candidates) or list(range(model.d_vocab))
        among = logits[row, options]
        assert int(answer[row]) == options[int(among.argmax())]
        torch.testing.assert_close(sure[row], confidence_of(among[None], "margin")[0])
        torch.testing.assert_close(wide[row], confidence_of(logits[row : row + 1], "margin")[0])
    assert head.unembeds(prompts[0]) == (3 if head.narrow else model.d_vocab)
    assert head.unembeds(prompts[0], "vocabulary") == model.d_vocab


def test_rows_of_the_matrix_are_not_enough_where_an_adapter_may_be_trained() -> None:
    class Adapter(nn.Module):
        """Adds nothing until it is trained."""

        def __init__(self, inner: nn.Linear) -> None:
            super().__init__()
            self.inner, self.added = inner, nn.Linear(32, D_VOCAB, bias=False)
            self.added.weight.data.zero_()

        @property
        def weight(self) -> torch.Tensor:
            return self.inner.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x) + self.added(x)

    hf_model = tiny("llama")
    hf_model.lm_head = Adapter(hf_model.lm_head).eval()
    model = load(hf_model)
    prompts = [Prompt((1, 9, 8, token), candidates=(5, 6, 7)) for token in range(10, 30)]
    engine = SpadeExit(model, None, FixedLayer(2))
    before = engine.run(prompts).answer
    torch.nn.init.normal_(hf_model.lm_head.added.weight)
    after = engine.run(prompts).answer
    assert not torch.equal(before, after)
    assert torch.equal(after, SpadeExit(load(hf_model), None, FixedLayer(2)).run(prompts).answer)


def test_clear_errors(tiny_llama: Model) -> None:
    lens = LogitLens(tiny_llama)
    with pytest.raises(ValueError, match="measure='sure'"):
        unwrap(confidence_of)(torch.zeros(1, 2), "sure")
    assert Confidence(lens, "top-1", "vocabulary").name == "logit lens, top-1 over vocabulary"
