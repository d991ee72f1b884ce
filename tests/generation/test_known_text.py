"""Rounds counted from a known text are those of the real loop, for every setting."""

from itertools import product
from typing import Any

import pytest
import torch
from tiny import tiny

import spade_lens as sl
from spade_lens.generation import Kangaroo, LayerExit, PromptLookup, Speculate
from spade_lens.generation.drafters import Drafter
from spade_lens.generation.kangaroo import Adapter
from spade_lens.generation.known_text import KnownText, record_drafts, rounds_of
from spade_lens.generation.rows import Rows, Run
from spade_lens.prompts import Prompt

PROMPTS = [
    Prompt(tokens=tuple(tokens))
    for tokens in ((1, *range(5, 14)), (1, *[30, 31, 32, 33] * 5), (1,), (1, 40, 41, 40))
]
NEW = 12


class Remembers:
    """A drafter with a state: it adds the mean residual of what it was fed so far."""

    name, layer = "remembers", 2

    def begin(self, rows: Rows) -> "_Sum":
        return _Sum(rows)


class _Sum:
    cost = 0.5

    def __init__(self, rows: Rows) -> None:
        self._fed: list[list[torch.Tensor]] = [[] for _ in rows.tokens]
        self._head = rows.logits

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._head(hidden)

    def feed(self, run: Run) -> torch.Tensor:
        for row, count in enumerate(run.counts):
            self._fed[row] += list(run.resid[row, :count])
        means = torch.stack([torch.stack(fed).mean(dim=0) for fed in self._fed])
        return run.last() + 2 * means

    def crop(self, lengths: Any) -> None:
        self._fed = [fed[:length] for fed, length in zip(self._fed, lengths, strict=True)]

    def select(self, rows: Any) -> None:
        self._fed = [self._fed[row] for row in rows]


def check(model: sl.Model, drafters: list[Drafter], settings: list[Any], stop: Any = ()) -> None:
    """Hold what is counted for every draft length and eta against what the real loop does."""
    plain = sl.generate(PROMPTS, NEW, model=model, stop=stop)
    texts = [KnownText(p.tokens, t, NEW) for p, t in zip(PROMPTS, plain.tokens, strict=True)]
    recorded: list[Any] = [None] * len(texts)
    if drafters[-1].layer:
        # For longer drafts and a smaller eta than are asked for.
        recorded = record_drafts(drafters[-1], texts, model=model, draft_tokens=9, eta=0.0105)
    for d, eta in settings:
        ours = []
        for i, (text, drafts) in enumerate(zip(texts, recorded, strict=True)):
            rounds = rounds_of(text, drafters, d, eta, drafts, model.d_vocab)
            assert sum(written for _, _, written in rounds) == len(text.new)
            ours += [(i, drafted, accepted) for drafted, accepted, _ in rounds]
        strategy = Speculate(drafters, d, eta, adaptive=False)
        real = sl.generate(PROMPTS, NEW, model=model, stop=stop, strategy=strategy)
        assert real.tokens == plain.tokens
        rounds_of_all = [tuple(r) for r in real.rounds.tolist()]
        assert ours == sorted(rounds_of_all, key=lambda r: r[0]), (d, eta)


@pytest.mark.parametrize("layer", [1, 2, 3])
def test_rounds_of_an_exit(tiny_llama: sl.Model, layer: int) -> None:
    check(tiny_llama, [LayerExit(layer)], list(product((1, 2, 5), (0.0, 0.011, 0.013, 1.0))))


@pytest.mark.parametrize(
    "drafters",
    [[PromptLookup(2)], [PromptLookup(2), LayerExit(3)], [Remembers()]],
    ids=["lookup", "lookup, exit", "state"],
)
def test_rounds_of_other_drafters(tiny_llama: sl.Model, drafters: list[Drafter]) -> None:
    check(tiny_llama, drafters, [(4, 0.0), (4, 0.012)])


def test_drafts_are_recorded_in_a_batch_as_alone(tiny_llama: sl.Model) -> None:
    """A small vocabulary grows by a text's own prompt alone."""
    torch.manual_seed(0)
    kangaroo = Kangaroo(tiny_llama, 2, Adapter(32, 1), torch.arange(60, 70))
    check(tiny_llama, [kangaroo], [(3, 0.0), (3, 0.05)])
    plain = sl.generate(PROMPTS, NEW, model=tiny_llama, stop=())
    texts = [KnownText(p.tokens, t, NEW) for p, t in zip(PROMPTS, plain.tokens, strict=True)]
    settings: dict[str, Any] = {"model": tiny_llama, "draft_tokens": 3}
    together = record_drafts(kangaroo, texts, **settings)
    for text, drafts in zip(texts, together, strict=True):
        assert record_drafts(kangaroo, [text], **settings)[0].tokens == drafts.tokens
        assert {*drafts.tokens} <= {*text.prompt, *range(60, 70)}


def test_texts_that_stop(tiny_llama: sl.Model) -> None:
    plain = sl.generate(PROMPTS, NEW, model=tiny_llama, stop=())
    stop = sorted({tokens[n] for n, tokens in zip((3, 5, 8, 11), plain.tokens, strict=True)})
    lengths = {len(t) for t in sl.generate(PROMPTS, NEW, model=tiny_llama, stop=stop).tokens}
    assert len(lengths) > 1  # they end at different times
    check(tiny_llama, [LayerExit(3)], [(2, 0.0), (9, 0.0), (9, 0.011)], stop)


def test_confidences_are_what_the_exit_reads() -> None:
    model = sl.load(tiny("gpt2"))
    plain = sl.generate(PROMPTS, NEW, model=model, stop=())
    texts = [KnownText(p.tokens, t, NEW) for p, t in zip(PROMPTS, plain.tokens, strict=True)]
    recorded = record_drafts(LayerExit(2), texts, model=model, draft_tokens=1)
    for text, drafts in zip(texts, recorded, strict=True):
        whole = Prompt(tokens=(*text.prompt, *text.new[:-1]))
        at = range(len(text.prompt) - 1, len(whole))
        read = sl.read(whole, "logit", model=model, layers=2, positions=list(at), top_k=1)
        frame = read.to_frame()
        assert frame["top_1_id"].tolist() == drafts.tokens
        sure = frame["top_1_logprob"].to_numpy()
        assert torch.tensor(drafts.confidence).log().numpy() == pytest.approx(sure, abs=1e-3)
        assert not any(drafts.beyond)
