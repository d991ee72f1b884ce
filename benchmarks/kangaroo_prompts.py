"""Prompts after which a model writes the text that an adapter is trained on.

None of them is a held-out prompt: the user's requests are the model's own, and passages come from
WikiText-2's test part, while the held-out ones come from Spec-Bench and from its validation part.
"""

import random
from collections.abc import Sequence
from pathlib import Path

import spade_lens as sl
from spade_lens.training import own_text

KINDS = {"chat": 0.45, "document": 0.2, "copying": 0.1, "free text": 0.25}
"""Of every kind so many; a request, an instruction about a passage, or a passage cut short."""
_ABOUT = (
    "Summarize the following text in a few sentences:\n\n{}",
    "{}\n\nWrite a short summary of the text above.",
    "Give a headline and three key points for this article.\n\n{}",
    "Read the passage and answer: who or what is it about, and why does it matter?\n\n{}",
    "Passage: {}\n\nWhat are the main facts in the passage?",
    "Use the reference text to answer the question.\nText: {}\nQuestion: What happened?\nAnswer:",
    "Explain this text to a child:\n\n{}",
    "TL;DR of the following:\n\n{}",
)
_COPY = (
    "Copy this text exactly:\n\n{}",
    "{}\n\nWrite the same text again, without any change.",
    "Quote the following passage in full.\n\n{}",
    "Correct the spelling of this text and change nothing else:\n\n{}",
)
_REQUEST_TOKENS = 48


def training_prompts(
    model: sl.Model, data: Path, n: int, *, seed: int, at_once: int
) -> list[sl.Prompt]:
    """Prompts of all kinds in random order; any first part of them is a mixture."""
    draws = random.Random(seed)
    kinds = draws.choices(list(KINDS), weights=list(KINDS.values()), k=n)
    asked = iter(requests(model, kinds.count("chat"), seed=seed, at_once=at_once))
    lines = (data / "wikitext-2" / "test.txt").read_text(encoding="utf-8").split("\n")
    passages = [line.strip() for line in lines if len(line) > 400]
    made: list[sl.Prompt] = []
    for kind in kinds:
        passage = part(draws.choice(passages), draws.choice((200, 500, 900, 1600)), draws)
        if kind == "chat":
            made.append(next(asked))
        elif kind == "free text":
            made += model.prompts([passage])
        else:
            instruction = draws.choice(_ABOUT if kind == "document" else _COPY)
            passage = passage if kind == "document" else passage[:900]
            made += model.prompts([[{"role": "user", "content": instruction.format(passage)}]])
    return made


def part(text: str, n: int, draws: random.Random) -> str:
    """About ``n`` characters of a text, from the beginning of a word to the end of one."""
    first = draws.randrange(max(1, len(text) - n + 1))
    first = text.find(" ", first) + 1 if first else 0
    return text[first : first + n].rsplit(" ", 1)[0]


def requests(model: sl.Model, n: int, *, seed: int, at_once: int) -> list[sl.Prompt]:
    """What the model writes where the user speaks, closed as the user's turn.

    Source of the idea: Xu et al., Magpie (arXiv 2406.08464).
    """
    [whole] = model.prompts([[{"role": "user", "content": "\0"}]])
    before, after = whole.text.split("\0") if whole.text else ("", "")
    opening, closing = (_ids(model, text) for text in (before, after))
    beginnings = [sl.Prompt(tokens=tuple(opening))] * n
    written = own_text(
        model, beginnings, _REQUEST_TOKENS, temperatures=(1.0,), at_once=at_once, seed=seed
    )
    return [
        sl.Prompt(tokens=(*opening, *until(p.tokens[len(opening) :], closing[0]), *closing))
        for p in written.pieces
    ]


def until(tokens: Sequence[int], end: int) -> Sequence[int]:
    """The tokens before an end."""
    return tokens[: tokens.index(end)] if end in tokens else tokens


def _ids(model: sl.Model, text: str) -> list[int]:
    ids: list[int] = model.tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids
