"""A prompt says in a line what it is, and refuses what it cannot be."""

from typing import Any

import pytest

from spade_lens.prompts import Prompt


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
    ],
)
def test_what_no_prompt_can_be(fields: dict[str, Any], error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        Prompt(**fields)
