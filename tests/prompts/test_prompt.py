"""A prompt says in a line what it is, and refuses what it cannot be."""

import json
from dataclasses import asdict, replace
from typing import Any

import pytest

from spade_lens.prompts import Prompt
from spade_lens.prompts.prompt import prompt_from_json
from spade_lens.storage.content import content_sha256


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        (Prompt(tokens=(1, 5)), "Prompt(tokens=(1, 5))"),
        (Prompt(tokens=tuple(range(500))), "Prompt(500 tokens)"),
        (Prompt(tokens=(1, 5), text="ab"), "Prompt('ab', 2 tokens)"),
        (
            Prompt(tokens=(1, 5, 6), answer=1, target=7, candidates=(7, 8), spans={"query": (1,)}),
            "Prompt(tokens=(1, 5, 6), answer=1, target=7, 2 candidates, 1 spans)",
        ),
        (
            Prompt(tokens=(1,), target=7, target_tokens=(7, 8)),
            "Prompt(tokens=(1,), target=(7, 8))",
        ),
        (
            Prompt(tokens=(1,) * 99, text="a" * 80 + "\n" + "b" * 80),
            f"Prompt('{'a' * 24} ... {'b' * 24}', 99 tokens)",
        ),
    ],
)
def test_the_repr_is_a_line(prompt: Prompt, text: str) -> None:
    assert repr(prompt) == text


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"tokens": ()}, ValueError, r"tokens=\[\] was given"),
        (
            {"tokens": (1, 2), "answer": 2},
            ValueError,
            "position 2 lies outside .* expected -2 to 1",
        ),
        ({"tokens": (1, 2), "spans": {"query": (2,)}}, ValueError, r"Span 'query' has positions"),
        ({"tokens": (1,), "target_tokens": (7, 8)}, ValueError, "expected its first.*target=7"),
        (
            {"tokens": (1,), "target": 8, "target_tokens": (7, 8)},
            ValueError,
            "expected its first.*target=7",
        ),
        (
            {"tokens": (1,), "candidates": (7,), "candidate_tokens": ((7, 8), (9, 1))},
            ValueError,
            r"each once, as candidates=\(7, 9\)",
        ),
        (
            {"tokens": (1,), "candidates": (7,), "candidate_tokens": ((7, 8), (7, 8))},
            ValueError,
            "different answers",
        ),
        ({"tokens": (1,), "candidate_tokens": ((7, 8), ())}, ValueError, "at least one token"),
    ],
)
def test_what_no_prompt_can_be(fields: dict[str, Any], error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        Prompt(**fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"target_tokens": (7,)},
        {"target": 5, "target_tokens": (7,)},
        {"candidates": (3,), "candidate_tokens": ((7,), (8,))},
        {"candidate_tokens": ((7,),)},
        {"candidates": (8, 7), "candidate_tokens": ((7,), (8,))},
    ],
)
def test_answers_of_one_token_that_disagree_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="Give both, or (target|candidate)_tokens=()"):
        Prompt((1, 2), **fields)


def test_an_answer_is_replaced_with_its_tokens() -> None:
    one = Prompt(tokens=(1,), target=7, candidates=(7, 8))
    assert one.target_tokens == (7,) and one.candidate_tokens == ((7,), (8,))
    assert replace(one, target=None, target_tokens=()).target_tokens == ()
    other = replace(one, candidates=(8, 9), candidate_tokens=())
    assert other.target_tokens == (7,) and other.candidate_tokens == ((8,), (9,))
    several = replace(one, target_tokens=(7, 5), candidate_tokens=((7, 5), (8,)))
    assert several.target == 7 and not several.shares_first_token
    for prompt in (one, several):
        for fields in ({"target": 8}, {"target": None}, {"candidates": (8, 9)}):
            with pytest.raises(ValueError, match="Give both, or"):
                replace(prompt, **fields)
    assert replace(several, target=8, target_tokens=()).target_tokens == (8,)


def test_a_candidate_that_begins_as_the_target_is_seen() -> None:
    whole = ((7, 5), (8,), (7, 6))
    fields: dict[str, Any] = {"tokens": (1,), "candidates": (7, 8), "candidate_tokens": whole}
    shared = Prompt(target=7, target_tokens=(7, 5), **fields)
    assert shared.shares_first_token
    assert not Prompt(target=8, **fields).shares_first_token
    others = replace(shared, candidate_tokens=((7, 5), (8,)))
    assert not others.shares_first_token  # it was seen, and is no more
    given = replace(others, ambiguous=True)
    assert replace(given, candidates=(7, 9), candidate_tokens=((7, 5), (9,))).shares_first_token


def test_whole_answers_decide_only_where_they_say_more() -> None:
    """A prompt whose answers are single tokens has the hash that it had before there were more."""
    one = Prompt(tokens=(1, 2), target=7, candidates=(7, 8))
    names = ["tokens", "answer", "target", "candidates", "spans", "text", "ambiguous"]
    assert list(one.deciding()) == names
    whole = replace(one, target_tokens=(7, 5))
    assert content_sha256(whole) != content_sha256(one)
    for prompt in (one, whole, replace(one, candidate_tokens=((7, 5), (8,)))):
        assert prompt_from_json(json.loads(json.dumps(asdict(prompt)))) == prompt
    old = {name: asdict(one)[name] for name in names}
    assert prompt_from_json(json.loads(json.dumps(old))) == one
