"""Keep rules: one way to name them, for our own and for a user's."""

from functools import partial
from typing import Any

import pytest

from spade_lens import Keep, Model, Prompt, Spade
from spade_lens.lenses import RandomSet
from spade_lens.lenses.keep import ClassLabels, last_labels, name_of


def ends(prompt: Prompt, answer: int) -> list[int]:
    return [0, answer]


class Odd:
    """A rule of a user's own, with a name of its own."""

    name = "odd positions"

    def __call__(self, prompt: Prompt, answer: int) -> list[int]:
        return [p for p in range(answer + 1) if p % 2]


@pytest.mark.parametrize(
    ("rule", "name"),
    [
        (Keep(), "start+answer"),
        (Keep(start=False, last=3), "last 3"),
        (Keep(spans=("query",), positions=(-2,)), "start+answer+query+-2"),
        (Keep(places=(("", -2), ("query", None))), "start+answer+prompt[-2]+query"),
        (Keep(last=9, name="all"), "all"),
        (last_labels(1), "last label"),
        (last_labels(4, query=True), "query+last 4 labels"),
        (ClassLabels(same=False), "query+other labels"),
        (RandomSet(ends), "random, as many as ends"),
        (RandomSet(Keep(name="x"), "query"), "query+random, as many as x"),
        (ends, "ends"),
        (Odd(), "odd positions"),
        (partial(ends), "own rule"),
    ],
)
def test_every_rule_has_a_name(tiny_llama: Model, rule: Any, name: str) -> None:
    assert name_of(rule) == name
    assert Spade(tiny_llama, keep=rule).name == (
        "SPADE" if name == "start+answer" else f"SPADE ({name})"
    )


@pytest.mark.parametrize(
    "keep",
    [Keep(), Keep(last=4), Keep(start=False, spans=("a",), name="mine"), Keep(places=(("", -2),))],
)
def test_repr_can_be_pasted_back(keep: Keep) -> None:
    back = eval(repr(keep), {"Keep": Keep})
    assert back == keep and back.name == keep.name
    assert "start=True" not in repr(keep) and len(repr(keep)) < 60


def test_what_is_kept_and_not_its_name_makes_two_rules_equal() -> None:
    assert Keep(last=2, name="pair") == Keep(last=2) != Keep(last=3)
    assert hash(Keep(last=2, name="pair")) == hash(Keep(last=2))


def test_one_span_and_one_position_need_no_tuple() -> None:
    prompt = Prompt(tokens=tuple(range(9)), spans={"labels": (2, 4)})
    assert Keep(spans="labels") == Keep(spans=("labels",)) == Keep(spans=["labels"])
    assert Keep(spans="labels", positions=-2)(prompt, 8) == (0, 2, 4, 7, 8)
    assert Keep(spans="labels").name == "start+answer+labels"
