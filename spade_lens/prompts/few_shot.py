"""Few-shot prompts of ``input -> output`` lines, with the position of every piece.

A template writes the text. The text is tokenised as a whole, so that the tokens are exactly those
a user gets from the text. Every token then belongs to the piece of its first visible character.
This module knows tokenizers; it knows nothing of models, nor of where the pairs come from.
"""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from string import Formatter
from typing import Any, Literal

from spade_lens.checks import as_several, checked
from spade_lens.prompts.answers import FirstTokens, answer_tokens, with_answer
from spade_lens.prompts.prompt import (
    Prompt,
    StartToken,
    check_bos,
    check_text,
    check_tokenizer,
    warn_of_special_tokens,
    with_start,
)

Piece = Literal["input", "arrow", "output", "separator"]

_PLURAL: Mapping[Piece, str] = {
    "input": "inputs",
    "arrow": "arrows",
    "output": "outputs",
    "separator": "separators",
}


def parse_pattern(pattern: str, name: str) -> tuple[list[str], list[str]]:
    """Return the plain texts of a template's pattern, and its fields.

    A field with a format carries it, so it is none of those that a template may have.
    """
    literals, names = [""], []
    try:
        for literal, field, spec, conversion in Formatter().parse(pattern):
            literals[-1] += literal
            if field is not None:
                names.append(f"{field}{conversion or ''}{spec or ''}")
                literals.append("")
    except ValueError as error:
        raise ValueError(f"The template's {name} {pattern!r} is no pattern: {error}.") from None
    return literals, names


def _literals(pattern: str, fields: tuple[str, ...], name: str) -> list[str]:
    """Return the plain text before, between and after the fields of a template's pattern."""
    literals, names = parse_pattern(pattern, name)
    if tuple(names) != fields:
        needed = " and then ".join(f"{{{field}}}" for field in fields)
        raise ValueError(f"The template's {name} must hold {needed}, each once; got {pattern!r}.")
    return literals


@dataclass(frozen=True)
class Template:
    r"""The layout of a demonstration and of the query, and the start token.

    Example:
        >>> Template().text([("apple", "Apple")], "pear")
        'apple -> Apple\npear ->'
        >>> Template(pair="Q: {input} A: {output}", query="Q: {input} A:").text([], "pear")
        'Q: pear A:'

    Args:
        pair: A demonstration, with ``{input}`` and then ``{output}``.
        separator: The text after every demonstration.
        query: The query, with ``{input}``. It must be how ``pair`` begins. It best ends without
            a space: in most vocabularies the space belongs to the answer's token.
        bos: The start token: ``True`` for the tokenizer's own, ``False`` for none, or the text or
            id of a token, for a tokenizer that has no start token.

    Raises:
        TypeError: If a pattern is no text, or ``bos`` something else.
        ValueError: If a field is missing, unknown or out of order, if ``query`` is not how
            ``pair`` begins, or if nothing would tell the pieces apart.
    """

    pair: str = "{input} -> {output}"
    separator: str = "\n"
    query: str = "{input} ->"
    bos: StartToken = True

    def __post_init__(self) -> None:
        check_bos(self.bos)
        for name in ("pair", "separator", "query"):
            if not isinstance(getattr(self, name), str):
                raise TypeError(f"{name}={getattr(self, name)!r} was given; expected a text.")
        _, middle, tail = _literals(self.pair, ("input", "output"), "pair")
        _literals(self.query, ("input",), "query")
        if not self.pair.startswith(self.query):
            raise ValueError(
                f"The template's query {self.query!r} must be how its pair {self.pair!r} begins, "
                "or the query would not look like the demonstrations."
            )
        if not middle:
            raise ValueError(
                f"The template's pair {self.pair!r} has nothing between {{input}} and {{output}}."
            )
        if not tail + self.separator:
            raise ValueError(
                "The template's separator is empty, so nothing would stand between demonstrations. "
                "Give one, for example separator='\\n'."
            )

    def text(self, demonstrations: Sequence[tuple[str, str]], query: str) -> str:
        """Return the prompt's text: the demonstrations, then the query without its answer."""
        lines = [self.pair.format(input=i, output=o) + self.separator for i, o in demonstrations]
        return "".join(lines) + self.query.format(input=query)

    def answer(self, output: str) -> str:
        """Return the answer as it follows the query, leading space included.

        Example:
            >>> Template().answer("Paris")
            ' Paris'
        """
        return self.pair[len(self.query) :].format(output=output)


ARROW = Template()
"""The default template: lines of ``input -> output``."""


@checked
def few_shot_prompt(
    tokenizer: Any,
    demonstrations: Sequence[tuple[str, str]],
    query: str,
    *,
    answer: str | None = None,
    template: Template = ARROW,
) -> Prompt:
    """Write demonstrations and a query as one prompt with named spans.

    The spans, positions in ``Prompt.tokens``:

    ==================  ================================================================
    ``query``           the query's input
    ``arrow``           the text after it; its last token is the final position
    ``inputs``          the inputs of all demonstrations
    ``arrows``          the text between input and output, of all demonstrations
    ``outputs``         the outputs of all demonstrations
    ``labels``          the last token of every demonstration's output
    ``separators``      the text after every demonstration
    ``demo0/input``     and ``/arrow``, ``/output``, ``/separator``, of each demonstration
    ==================  ================================================================

    A token belongs to the piece of its first visible character, so ``" Paris"`` is output though
    its space follows the arrow. A token that is a space alone belongs to the output it precedes,
    elsewhere to the piece it stands in. A separator's span is empty where the tokenizer drops it,
    as WordPiece does with newlines.

    Args:
        tokenizer: A fast Hugging Face tokenizer (one that gives character offsets).
        demonstrations: Pairs of input and output; none is zero-shot.
        query: The input that is asked.
        answer: The right output, if it is known. Its tokens, as the tokenizer writes them after
            this prompt, become ``Prompt.target_tokens``, and the first of them ``Prompt.target``.
            If a tokenizer gives the space a token of its own, the target is that space.
        template: How a line is written, and the start token.

    Returns:
        The prompt, read at the last token of the query's arrow.

    Raises:
        TypeError: If the demonstrations are not pairs of texts, or the query is no text.
        ValueError: If the tokenizer is not a fast one, if it merges a piece into another's token
            so that the piece has no token of its own, or if the answer's first token would include
            the end of the prompt.

    Warns:
        TokenWarning: If special tokens stand in the words, or the answer's first token says
            little: the query or another output begins with it as well.
    """
    demonstrations = _checked_words(demonstrations, query, answer)
    prompt = write_prompt(tokenizer, demonstrations, query, answer=answer, template=template)
    if answer is None:
        return prompt
    first = first_tokens(tokenizer, template)
    prompt = first.flag(prompt, query, answer, [output for _, output in demonstrations])
    first.warn()
    return prompt


def write_prompt(
    tokenizer: Any,
    demonstrations: Sequence[tuple[str, str]],
    query: str,
    *,
    answer: str | None = None,
    template: Template = ARROW,
) -> Prompt:
    """Return what :func:`few_shot_prompt` does, without a look at other answers.

    Args:
        tokenizer: A fast Hugging Face tokenizer.
        demonstrations: Pairs of input and output.
        query: The input that is asked.
        answer: The right output, if it is known.
        template: How a line is written, and the start token.

    Raises:
        ValueError: As :func:`few_shot_prompt` does.
    """
    text = template.text(demonstrations, query)
    ids, offsets = _offsets(tokenizer, text)
    tokens = with_start(tokenizer, ids, template.bos)
    shift = len(tokens) - len(ids)  # 1 where a start token was put first
    spans = _spans(text, offsets, shift, demonstrations, query, template)

    words = (word for pair in (*demonstrations, (query, answer or "")) for word in pair)
    warn_of_special_tokens(tokenizer, *words)
    whole: tuple[int, ...] = ()
    if answer is not None:
        whole = answer_tokens(tokenizer, text, template.answer(answer))
    return with_answer(Prompt(tokens=tokens, spans=spans, text=text), whole)


def first_tokens(tokenizer: Any, template: Template) -> FirstTokens:
    """Return what finds the answers whose first token says little."""
    return FirstTokens(tokenizer, template.query.format(input="x"), template.answer)


def _checked_words(demonstrations: Any, query: Any, answer: Any) -> list[tuple[str, str]]:
    for name, word in (("query", query), ("answer", "?" if answer is None else answer)):
        if not isinstance(word, str) or not word.strip():
            raise (ValueError if isinstance(word, str) else TypeError)(
                f"{name}={word!r} was given; expected a text that is not empty."
            )
    several = as_several(demonstrations)
    if several is None:
        raise TypeError(f"demonstrations={demonstrations!r} was given; expected pairs of texts.")
    for i, pair in enumerate(several):
        words = list(pair) if isinstance(pair, Sequence) and not isinstance(pair, str) else []
        if len(words) != 2 or not all(isinstance(word, str) for word in words):
            raise TypeError(
                f"Demonstration {i} is {pair!r}; expected a pair of texts (input, output)."
            )
    return [(given, output) for given, output in several]


def _spans(
    text: str,
    offsets: Sequence[tuple[int, int]],
    shift: int,
    demonstrations: Sequence[tuple[str, str]],
    query: str,
    template: Template,
) -> dict[str, tuple[int, ...]]:
    """Return the positions of every piece's tokens, by the piece's name."""
    starts, pieces = _layout(demonstrations, query, template)
    positions_of: list[list[int]] = [[] for _ in starts]
    for position, (start, end) in enumerate(offsets, start=shift):
        visible = len(text[start:end]) - len(text[start:end].lstrip())
        first = start + visible if start + visible < end else start
        piece = bisect_right(starts, first) - 1
        if piece >= 0:  # what a template writes before the first input belongs to no piece
            positions_of[piece].append(position)

    spans: dict[str, tuple[int, ...]] = {"query": (), "arrow": ()}
    for plural in ("inputs", "arrows", "outputs", "labels", "separators"):
        spans[plural] = ()
    for (demo, kind), positions in zip(pieces, positions_of, strict=True):
        if not positions and kind != "separator":
            where = "the query" if demo is None else f"demonstration {demo}"
            raise ValueError(
                f"With this tokenizer the {kind} of {where} has no token of its own in {text!r}; "
                "it is merged into a neighbour or dropped. Use a template or pairs that keep the "
                "pieces apart."
            )
        if demo is None:
            spans["query" if kind == "input" else "arrow"] = tuple(positions)
            continue
        spans[_PLURAL[kind]] += tuple(positions)
        spans[f"demo{demo}/{kind}"] = tuple(positions)
        if kind == "output":
            spans["labels"] += (positions[-1],)
    return spans


def _layout(
    demonstrations: Sequence[tuple[str, str]], query: str, template: Template
) -> tuple[list[int], list[tuple[int | None, Piece]]]:
    """Return where each piece starts in the text, in order, and its demonstration and kind.

    A piece ends where the next one starts. A query is a demonstration that stops early.
    """
    head, middle, _ = _literals(template.pair, ("input", "output"), "pair")
    arrow_gap = len(middle) - len(middle.rstrip())
    starts: list[int] = []
    pieces: list[tuple[int | None, Piece]] = []
    line = 0
    for i, (given, output) in enumerate(demonstrations):
        at_input = line + len(head)
        at_arrow = at_input + len(given)
        # Spaces before the output go with it: a token that is a lone space opens the word.
        # An arrow of nothing but white space stays whole, or it would have no characters.
        at_output = at_arrow + len(middle) - (arrow_gap if middle.strip() else 0)
        at_separator = at_arrow + len(middle) + len(output)
        starts += [at_input, at_arrow, at_output, at_separator]
        pieces += [(i, "input"), (i, "arrow"), (i, "output"), (i, "separator")]
        line += len(template.pair.format(input=given, output=output) + template.separator)
    starts += [line + len(head), line + len(head) + len(query)]
    pieces += [(None, "input"), (None, "arrow")]
    return starts, pieces


def _offsets(tokenizer: Any, text: str) -> tuple[tuple[int, ...], list[tuple[int, int]]]:
    """Return the token ids of ``text`` without a start token, and the characters of each."""
    check_tokenizer(tokenizer)
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"{type(tokenizer).__name__} gives no character offsets, so the words of a prompt "
            "cannot be located. Use the fast tokenizer of this model "
            "(transformers.AutoTokenizer with use_fast=True)."
        )
    check_text(text)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return tuple(encoded["input_ids"]), [(int(a), int(b)) for a, b in encoded["offset_mapping"]]
