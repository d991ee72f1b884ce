"""How a decision is written: layout, cue, labels, rows."""

from dataclasses import replace

import numpy as np
import pytest

from spade_lens.tasks import DecisionTemplate, Example
from spade_lens.tasks.decisions.template import LETTERS, WORDS

BARK = Example("Which barks?", 1, options=("cat", "dog"))


def test_a_prompt_with_letters_is_what_it_says():
    text = LETTERS.text([Example("Which flies?", 0, options=("bee", "ant"))], BARK)
    assert text == (
        "Question: Which flies?\nA. bee\nB. ant\nAnswer: A\n\n"
        "Question: Which barks?\nA. cat\nB. dog\nAnswer:"
    )


def test_without_labels_the_answer_is_the_option_itself():
    text = WORDS.text([BARK], replace(BARK, passage="Of pets."))
    assert text == (
        "Question: Which barks?\nAnswer: dog\n\nOf pets.\nQuestion: Which barks?\nAnswer:"
    )
    assert WORDS.choices(BARK) == ("cat", "dog")


def test_options_can_be_shown_without_labels():
    listed = DecisionTemplate(example="{question} ({options}):", option="{option};")
    assert listed.given(BARK) + listed.cue == "Which barks? (cat;dog;):"


def test_a_passage_that_the_layout_leaves_out_is_not_shown():
    plain = DecisionTemplate(example="{question}?", labels=("no", "yes"))
    assert plain.text([], Example("is it", 0, passage="long")) == "is it?"


@pytest.mark.parametrize(
    ("example", "cue"),
    [
        ("{question}\nAnswer:", "\nAnswer:"),
        ("{question}{options}A {{b}} c:", "A {b} c:"),
        ("{{x}} {question} ->", " ->"),
    ],
)
def test_the_cue_is_all_that_follows_the_last_field(example, cue):
    template = DecisionTemplate(example=example, labels=("no", "yes"))
    assert template.cue == cue
    query = Example("q {odd} braces", 1)
    assert template.text([], query) == template.given(query) + cue
    assert template.text([query], query).startswith(f"{template.given(query)}{cue} yes\n\n")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"example": "Answer:"}, r"example must have \{question\} and may have"),
        ({"example": "{question} {question}:"}, "each once"),
        ({"example": "{question} {colour}:"}, "each once"),
        ({"example": "{question!r}:"}, "each once"),
        ({"example": "{question:"}, "is no pattern"),
        ({"example": "Answer: {question}"}, "must end with a cue"),
        ({"example": "{question}\nAnswer: "}, "no white space after it"),
        ({"passage": "a passage"}, r"passage must have \{passage\}"),
        ({"option": "{label}"}, r"option must have \{option\} and may have \{label\}"),
        ({"labels": ("A", "A")}, "not at least two different words"),
        ({"labels": ("A",)}, "not at least two different words"),
        ({"labels": (" A", "B")}, "white space around"),
        ({"separator": ""}, "separator is empty"),
    ],
)
def test_a_template_that_cannot_work_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        _ = replace(LETTERS, **change).line


def test_more_options_than_labels_are_refused():
    with pytest.raises(ValueError, match="3 options, but the template has only the labels"):
        DecisionTemplate(labels=("A", "B")).choices(Example("q", 0, options=("a", "b", "c")))


def test_nothing_to_decide_is_refused():
    with pytest.raises(ValueError, match="has no labels, so there is nothing to decide"):
        WORDS.choices(Example("q", 0))


@pytest.mark.parametrize(
    ("answer", "place"),
    [(1, 1), ("1", 1), ("dog", 1), (" dog ", 1), ("B", 1), (np.int64(1), 1), (True, 1)],
)
def test_a_row_says_its_answer_in_any_way(answer, place):
    row = {"question": " Which? ", "answer": answer, "options": ["cat", "dog"], "passage": None}
    example = Example.from_row(row, labels=("A", "B"))
    assert example == Example("Which?", place, options=("cat", "dog"))


def test_true_and_false_are_yes_and_no_and_nothing_else():
    row = {"question": "q", "answer": "True"}
    assert Example.from_row(row, labels=("no", "yes")).answer == 1
    with pytest.raises(ValueError, match="'True' is no index and none of the choices"):
        Example.from_row(row, labels=("negative", "positive"))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "q"}, "No 'answer' among the columns"),
        ({"text": "q"}, "No 'question' and no 'answer' among"),
        ({"question": "", "answer": 0}, "empty question"),
        ({"question": 3, "answer": 0}, "must be texts"),
        ({"question": "q", "answer": 2, "options": ["a", "b"]}, "answer 2, but options"),
        ({"question": "q", "answer": -1}, "answer -1"),
        ({"question": "q", "answer": 0, "options": ["a", " "]}, "empty option"),
        ({"question": "q", "answer": 0, "options": "ab"}, "must be a list of texts"),
        ({"question": "q", "answer": "C", "options": ["a", "b"]}, "none of the choices"),
        ({"question": "q", "answer": 1.5}, "is no index"),
    ],
)
def test_a_row_that_is_no_example_is_refused(row, message):
    with pytest.raises(ValueError, match=message):
        Example.from_row(row)
