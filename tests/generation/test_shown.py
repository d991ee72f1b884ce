"""Texts show themselves: as HTML that stays text, and beside plain text with their speed."""

from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import pytest
import torch

import spade_lens as sl
from spade_lens.generation import ExitPrefill, Generated, PromptLookup, Speculate, compare
from spade_lens.generation.comparison import Comparison, Difference
from spade_lens.generation.marked import pieces

REPEATS = "abcdabcdabcdabcd"
HOSTILE = "</div><script>alert('x')</script><mark>&amp;\x1b[31m"


class Read(HTMLParser):
    """What a browser would show, and the tags it would obey."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.text, self.marked, self.tags = "", "", []
        self._inside: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, sorted(name for name, _ in attrs)))
        self._inside.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._inside.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        self.marked += data if "mark" in self._inside else ""


@pytest.fixture(scope="module")
def drafted(tiny_llama: sl.Model) -> Generated:
    strategy = Speculate(PromptLookup(1))
    written = sl.generate([REPEATS, "ab"], 24, model=tiny_llama, strategy=strategy, stop=())
    assert 0 < int(written.accepted.sum()) < len(written.token)
    return written


@pytest.mark.parametrize(
    ("text", "words", "expected"),
    [
        ("a b", ["a", " b"], ["a", " b"]),
        ("3 14", ["3", "14"], ["3", " 14"]),  # numbers, where there is no tokenizer
        ("ab", ["a", "b", "</s>"], ["a", "b", ""]),
        ("ab", ["a", "b\n", "c"], ["a", "b", ""]),  # cut at a stop string
        ("\u00e9\u00e9!", ["\ufffd", "\ufffd", "\ufffd", "\ufffd", "!"], [*[""] * 3, "éé", "!"]),
        ("a\ufffd", ["a", "\ufffd"], ["a", "\ufffd"]),
        ("", ["</s>"], [""]),
        ("xyz", ["a", "b"], ["xyz", ""]),
    ],
)
def test_tokens_together_are_the_text(text: str, words: list[str], expected: list[str]) -> None:
    assert pieces(text, words) == expected
    assert "".join(pieces(text, words)) == text


def test_accepted_drafts_are_marked(drafted: Generated) -> None:
    read = Read(drafted._repr_html_())
    for prompt, text in zip(drafted.prompts, drafted.texts, strict=True):
        assert prompt + text in read.text
    rows = drafted.to_frame()
    shown = rows["accepted"] & ~rows["token"].isin(["<pad>", "<s>", "</s>"])
    assert read.marked == "".join(rows.loc[shown, "token"])
    assert f"{int(drafted.rounds[:, 2].sum())} of {int(drafted.rounds[:, 1].sum())}" in read.text


def test_hostile_text_stays_text(drafted: Generated) -> None:
    words = dict.fromkeys(drafted.words, HOSTILE)
    hostile = replace(
        drafted,
        model=HOSTILE,
        strategy=HOSTILE,
        prompts=(HOSTILE,) * 2,
        words=words,
        texts=tuple(HOSTILE * len(tokens) for tokens in drafted.tokens),
    )
    read = Read(hostile._repr_html_())
    allowed = {("div", ()), ("div", ("style",)), ("span", ("style",)), ("span", ("title",))}
    allowed |= {("mark", ("style", "title"))}
    assert {(tag, tuple(names)) for tag, names in read.tags} == allowed
    assert "\x1b" not in read.text
    assert read.text.count(HOSTILE.replace("\x1b", "\\x1b")) == len(drafted.token) + 4


def test_many_texts_are_counted(tiny_llama: sl.Model) -> None:
    html = sl.generate(["ab"] * 12, 2, model=tiny_llama)._repr_html_()
    assert html.endswith("<div>... 2 more</div>") and html.count(">ab<") == 10


def test_a_comparison_finds_the_same_tokens(tiny_llama: sl.Model) -> None:
    both = compare([REPEATS, "ab"], Speculate(PromptLookup(2)), 16, model=tiny_llama, stop=())
    assert both.difference is None and both.plain.tokens == both.written.tokens
    assert len(both.ratios) == 3 and all(ratio > 0 for ratio in both.ratios)
    lines = str(both).splitlines()
    assert lines[0] == "lookup of 2, up to 11 drafts beside plain greedy text, 32 tokens"
    assert lines[1].split() == ["tokens", "identical"]
    assert f"{both.written.acceptance:.2f} (" in lines[2]
    assert lines[4].endswith(both.verdict) and lines[4].strip().startswith("CPU time")


def test_a_comparison_shows_the_first_difference(tiny_llama: sl.Model) -> None:
    both = compare([REPEATS, "abcabc"], ExitPrefill(1), 8, model=tiny_llama, stop=(), rounds=1)
    assert both.difference is not None
    i, step = both.difference.prompt, both.difference.step
    plain, other = both.plain.tokens[i], both.written.tokens[i]
    assert plain[:step] == other[:step] and plain[step] != other[step]
    prompt = tiny_llama.prompts([REPEATS, "abcabc"])[i]
    with torch.no_grad():
        tokens = torch.tensor([[*prompt.tokens, *plain[:step]]])
        logits = tiny_llama.original(tokens).logits[0, -1]
    gap = float(logits[plain[step]] - logits[other[step]])
    assert both.difference.nats == pytest.approx(gap, abs=1e-4) and gap > 0
    assert f"new token {step} of prompt {i}" in str(both) and "nothing was drafted" in str(both)


def test_a_tie_of_rounding_is_called_one() -> None:
    assert str(Difference(0, 3, 2e-5)).endswith("a tie but for rounding")
    assert "tie" not in str(Difference(0, 3, 0.2))


@pytest.mark.parametrize(
    ("ratios", "verdict"),
    [((0.5, 0.6, 0.9), "slower"), ((1.2, 1.1, 1.5), "faster"), ((0.9, 1.2, 1.1), "undecided")],
)
def test_slower_is_said(drafted: Generated, ratios: Any, verdict: str) -> None:
    both = Comparison(drafted, drafted, None, ratios, "CPU time")
    assert both.verdict == verdict and str(both).endswith(f"3 rounds: {verdict}")
