"""Saliency against autograd through Hugging Face's own attentions; flows against their formula."""

from typing import Any

import pytest
import torch
from tiny import tiny
from torch import Tensor

from spade_lens import Model, Prompt, Settings, UnsupportedModelError, icl, load
from spade_lens.icl.attention.saliency import attention_saliency, flows

SPANS = {
    "query": (9, 10),
    "arrow": (11,),
    "labels": (4, 8),
    "demo0/input": (1, 2),
    "demo1/input": (6,),
}


def prompts_of(n: int = 3) -> list[Prompt]:
    found = []
    for i in range(n):
        tokens = (1, *((11 * k + 17 * i) % 90 + 5 for k in range(11 + 2 * i)))
        found.append(Prompt(tokens=tokens, answer=11, target=9 + i, spans=SPANS))
    return found


def by_hand(hf_model: Any, prompt: Prompt, heads: str) -> Tensor:
    """The same of one prompt, with the attentions that Hugging Face returns."""
    hf_model.config._attn_implementation = "eager"
    out = hf_model(torch.tensor([prompt.tokens]), output_attentions=True, use_cache=False)
    loss = -out.logits[0, prompt.answer].log_softmax(dim=-1)[prompt.target]
    slopes = torch.autograd.grad(loss, out.attentions)
    felt = [(a * g)[0] for a, g in zip(out.attentions, slopes, strict=True)]
    return torch.stack([f.sum(0).abs() if heads == "sum" else f.abs().sum(0) for f in felt])


@pytest.mark.parametrize("heads", ["sum", "abs"])
@pytest.mark.parametrize("name", ["llama-eager", "gpt2", "gpt-neox", "qwen3", "gemma2"])
def test_equals_autograd_through_hugging_face(name: str, heads: str) -> None:
    prompts = prompts_of()
    model = load(tiny(name))
    ours = attention_saliency(model, prompts, heads=heads, settings=Settings(batch_size=2))
    hf_model = tiny(name)
    for prompt, found in zip(prompts, ours, strict=True):
        expected = by_hand(hf_model, prompt, heads)
        torch.testing.assert_close(found, expected.detach(), atol=1e-4, rtol=1e-3)
        assert found.max() > 1e-3
    assert all(p.grad is None for p in model.original.parameters())


def test_weights_that_ask_for_no_gradient_do_not_matter(tiny_llama: Model) -> None:
    frozen = tiny().requires_grad_(False)
    ours = attention_saliency(load(frozen), prompts_of(1))[0]
    with torch.no_grad():
        expected = attention_saliency(tiny_llama, prompts_of(1))[0]
    torch.testing.assert_close(ours, expected)


def test_flows_are_the_means_of_the_formula(tiny_llama: Model) -> None:
    prompts = prompts_of(2)
    frame = icl.saliency_flows(tiny_llama, prompts, draws=2)
    saliency = attention_saliency(tiny_llama, prompts)
    for row in frame[~frame["control"]].itertuples():
        at = saliency[row.prompt][row.block]
        labels, final = SPANS["labels"], 11
        pairs = {(q, k) for q in range(12) for k in range(q)}
        to_label = {(p, j) for p in labels for j in range(p)}
        to_final = {(final, p) for p in labels}
        wanted = {
            "words -> label": to_label,
            "label -> final": to_final,
            "rest": pairs - to_label - to_final,
            "own input -> label": {(4, 1), (4, 2), (8, 6)},
            "other input -> label": {(8, 1), (8, 2)},
        }[row.flow]
        assert row.pairs == len(wanted)
        assert row.saliency == pytest.approx(sum(float(at[q, k]) for q, k in wanted) / len(wanted))
    assert set(frame[frame["control"]]["draw"]) == {0, 1}
    assert len(frame) == 2 * 4 * (5 + 2 * 3)


def test_the_start_token_can_be_left_out() -> None:
    prompt = prompts_of(1)[0]
    with_start, without = (flows(prompt, [4, 8], start=s) for s in (True, False))
    for flow, mask in with_start.items():
        mask[:, 0] = False
        assert torch.equal(mask, without[flow])


def test_what_cannot_be_is_refused(tiny_llama: Model) -> None:
    with pytest.raises(ValueError, match=r"Prompts \[0\] have no target"):
        attention_saliency(tiny_llama, [Prompt((1, 2, 3))])
    with pytest.raises(ValueError, match="heads='mean'"):
        attention_saliency(tiny_llama, prompts_of(1), heads="mean")
    with pytest.raises(ValueError, match=r"Prompts \[0\] have no labels"):
        icl.saliency_flows(tiny_llama, [Prompt((1, 2, 3), target=4, spans={"labels": ()})])
    with pytest.raises(ValueError, match="draws=-1"):
        icl.saliency_flows(tiny_llama, prompts_of(1), draws=-1)
    with pytest.raises(UnsupportedModelError, match="cannot be differentiated"):
        attention_saliency(load(tiny("opt")), prompts_of(1))
