"""One example of a decision task, and how it is written as text.

The layout is a pattern that anyone can read and edit. This module knows no tokenizer: the text
becomes a prompt in `spade_lens.prompts.few_shot`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any

from spade_lens.checks import as_several, check_fields, is_whole
from spade_lens.prompts.few_shot import Template, parse_pattern
from spade_lens.prompts.prompt import StartToken, check_bos

_NO_YES = ("false", "true")


@dataclass(frozen=True)
class Example:
    """A question with the index of its right answer among the choices.

    Example:
        >>> Example("Which one barks?", 1, options=("cat", "dog")).options[1]
        'dog'

    Args:
        question: What is asked, or the text that is judged.
        answer: The index of the right choice, from 0: among ``options`` if there are any, else
            among the template's labels.
        passage: A text that the question is about.
        options: The choices that come with this question.

    Raises:
        ValueError: If the question or an option is empty, or the answer is not one of the options.
    """

    question: str
    answer: int
    passage: str = ""
    options: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        options = as_several(self.options)
        if options is None or not all(
            isinstance(text, str) for text in (self.question, self.passage, *options)
        ):
            raise TypeError(
                f"question={self.question!r}, passage={self.passage!r} and options="
                f"{self.options!r} were given; expected texts, and several as options."
            )
        if not is_whole(self.answer):
            raise TypeError(f"answer={self.answer!r} was given; expected the index of a choice.")
        object.__setattr__(self, "options", tuple(options))
        if not self.question.strip():
            raise ValueError("An example has an empty question.")
        if not all(option.strip() for option in self.options):
            raise ValueError(f"{self.question!r} has an empty option among {self.options}.")
        if self.answer < 0 or (self.options and self.answer >= len(self.options)):
            raise ValueError(
                f"{self.question!r} has answer {self.answer}, but options {self.options}. An "
                "answer is an index, counted from 0."
            )

    @classmethod
    def from_row(cls, row: Mapping[str, Any], *, labels: Sequence[str] = ()) -> "Example":
        """Make an example of a row of a table.

        Example:
            >>> row = {"question": "is snow white", "answer": "yes"}
            >>> Example.from_row(row, labels=("no", "yes"))
            Example(question='is snow white', answer=1, passage='', options=())

        Args:
            row: ``question``, ``answer`` and, if there are any, ``passage`` and ``options`` (a
                list). The answer is an index counted from 0, a label, an option's text, or true or
                false where the labels are no and yes.
            labels: The template's labels.

        Raises:
            TypeError: If the row is no mapping.
            ValueError: If a column is absent or of the wrong kind, or the answer is no choice.
        """
        if not isinstance(row, Mapping):
            raise TypeError(
                f"{row!r} was given; expected an Example, or a mapping with 'question' and "
                "'answer'."
            )
        absent = [key for key in ("question", "answer") if key not in row]
        if absent:
            raise ValueError(
                f"No {' and no '.join(map(repr, absent))} among the columns {sorted(row)}."
            )
        given = row.get("options")
        options = () if given is None else as_several(given)
        if options is None or not all(isinstance(option, str) for option in options):
            raise ValueError(f"The options must be a list of texts, got {given!r}.")
        passage, question = row.get("passage") or "", row["question"]
        if not isinstance(question, str) or not isinstance(passage, str):
            raise ValueError(f"The question and the passage must be texts, got {question!r}.")
        options = tuple(option.strip() for option in options)
        answer = _index(row["answer"], options, labels)
        return cls(question.strip(), answer, passage.strip(), options)


def _index(answer: Any, options: Sequence[str], labels: Sequence[str]) -> int:
    """Return the index that an answer means, however it is written."""
    if isinstance(answer, str):
        for choices in (options, labels):
            if answer.strip() in choices:
                return list(choices).index(answer.strip())
        if answer.strip().isdecimal():
            return int(answer)
        if answer.strip().lower() in _NO_YES and tuple(labels) == ("no", "yes"):
            return _NO_YES.index(answer.strip().lower())
    elif isinstance(answer, Integral):  # a bool means no and yes
        return int(answer)
    choices = [*options, *labels]
    raise ValueError(f"The answer {answer!r} is no index and none of the choices {choices}.")


@dataclass(frozen=True)
class DecisionTemplate:
    r"""The layout of a question, its passage and its options, and the words that answer it.

    Example:
        >>> template = DecisionTemplate(labels=("A", "B"))
        >>> print(template.text([], Example("Which one barks?", 1, options=("cat", "dog"))))
        Question: Which one barks?
        A. cat
        B. dog
        Answer:

    Args:
        example: The layout: ``{question}``, and ``{passage}`` and ``{options}`` if they are to be
            shown. The text after the last field is the cue; the answer is read at its end, which
            is best no space.
        passage: How a passage is written; nothing stands there if an example has none.
        option: How one option is written, with ``{label}`` and ``{option}``.
        labels: The label words. Without any, the answer is the right option's own text, and a
            decision is made among the first tokens of the options.
        separator: The text after every demonstration.
        bos: The start token, as in :class:`spade_lens.prompts.Template`.

    Raises:
        ValueError: If a field is missing, unknown or comes twice, there is no cue, or the labels
            are not different words.
    """

    example: str = "{passage}Question: {question}\n{options}Answer:"
    passage: str = "{passage}\n"
    option: str = "{label}. {option}\n"
    labels: tuple[str, ...] = ()
    separator: str = "\n\n"
    bos: StartToken = True

    def __post_init__(self) -> None:
        check_fields(self)
        check_bos(self.bos)
        labels = as_several(self.labels)
        if labels is None or not all(isinstance(label, str) for label in labels):
            raise TypeError(f"labels={self.labels!r} was given; expected words: ('no', 'yes').")
        object.__setattr__(self, "labels", tuple(labels))
        _fields(self.example, "example", must=("question",), may=("passage", "options"))
        _fields(self.passage, "passage", must=("passage",))
        _fields(self.option, "option", must=("option",), may=("label",))
        if not self.cue.strip() or self.cue != self.cue.rstrip():
            raise ValueError(
                f"The template's example {self.example!r} must end with a cue that asks for the "
                "answer, such as 'Answer:', and no white space after it."
            )
        if any(not label.strip() or label != label.strip() for label in self.labels):
            raise ValueError(
                f"The labels {self.labels} must be words without white space around them; the "
                "template writes the space before them."
            )
        if len(set(self.labels)) != len(self.labels) or len(self.labels) == 1:
            raise ValueError(
                f"The labels {self.labels} are not at least two different words, so there is "
                "nothing to decide."
            )

    @property
    def cue(self) -> str:
        r"""The text after the last field of the layout.

        Example:
            >>> DecisionTemplate(example="Review: {question}\nSentiment:").cue
            '\nSentiment:'
        """
        return parse_pattern(self.example, "example")[0][-1]

    @property
    def line(self) -> Template:
        """The few-shot template whose input is all text before the cue."""
        query = "{input}" + self._written_cue
        return Template(query + " {output}", self.separator, query, self.bos)

    def choices(self, example: Example) -> tuple[str, ...]:
        """Return the words between which an example decides.

        Args:
            example: The example.

        Raises:
            ValueError: If it has more options than there are labels, or there are neither.
        """
        if not self.labels:
            if len(example.options) < 2:
                raise ValueError(
                    f"{example.question!r} has {len(example.options)} options and the template has "
                    "no labels, so there is nothing to decide. Give labels, for example "
                    "labels=('no', 'yes')."
                )
            return example.options
        if len(example.options) > len(self.labels):
            raise ValueError(
                f"{example.question!r} has {len(example.options)} options, but the template has "
                f"only the labels {self.labels}. Give more labels."
            )
        return self.labels[: len(example.options)] if example.options else self.labels

    def given(self, example: Example) -> str:
        """Return the text before the cue: the passage, the question and its options."""
        # Without labels an option is written without one, should the layout show options at all.
        labels = self.labels or ("",) * len(example.options)
        shown = [
            self.option.format(label=label, option=option)
            for label, option in zip(labels, example.options, strict=False)
        ]
        pattern = self.example.removesuffix(self._written_cue)
        passage = self.passage.format(passage=example.passage) if example.passage else ""
        return pattern.format(question=example.question, passage=passage, options="".join(shown))

    def right(self, example: Example) -> str:
        """Return the word that answers an example."""
        return self.choices(example)[example.answer]

    def text(self, demonstrations: Sequence[Example], query: Example) -> str:
        """Return the text of a prompt: the demonstrations, then the query unanswered."""
        shown = [(self.given(example), self.right(example)) for example in demonstrations]
        return self.line.text(shown, self.given(query))

    @property
    def _written_cue(self) -> str:
        """The cue as it is written in the pattern, where braces are doubled."""
        return self.cue.replace("{", "{{").replace("}", "}}")


def _fields(pattern: str, name: str, *, must: Sequence[str], may: Sequence[str] = ()) -> None:
    """Raise if the fields of a pattern are not those it must and may have, each once."""
    _, found = parse_pattern(pattern, name)
    if not set(must) <= set(found) <= {*must, *may} or len(set(found)) < len(found):
        optional = f" and may have {', '.join(f'{{{field}}}' for field in may)}" if may else ""
        raise ValueError(
            f"The template's {name} must have {', '.join(f'{{{field}}}' for field in must)}"
            f"{optional}, each once; got {pattern!r}."
        )


LETTERS = DecisionTemplate(labels=("A", "B", "C", "D", "E"))
"""Options under letters, and a letter is the answer."""

WORDS = DecisionTemplate(example="{passage}Question: {question}\nAnswer:")
"""No options are shown; the answer is the right one's own text, decided by its first token."""


def default_template(rows: Sequence[Example | Mapping[str, Any]]) -> DecisionTemplate:
    """Return the template of rows that come without one.

    Options stand under letters. Without options the answers, in alphabetical order, are the labels.
    """
    fields = [vars(row) if isinstance(row, Example) else row for row in rows]
    if any(row.get("options") for row in fields):
        return LETTERS
    absent = next((n for n, row in enumerate(fields, start=1) if "answer" not in row), None)
    if absent is not None:
        raise ValueError(f"row {absent} has no 'answer': {sorted(fields[absent - 1])}. Add one.")
    answers = {str(row["answer"]).strip() for row in fields}
    return replace(LETTERS, labels=tuple(sorted(answers)))
