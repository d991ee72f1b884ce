"""A prompt with known positions: tokens, the position that is read, and named spans.

This is the one type that text and tasks hand to models and lenses. It knows a Hugging Face
tokenizer and nothing of models. The start token (BOS) is explicit: many tokenizers, SmolLM2's
among them, do not add it by themselves, and SPADE's start token is the point.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Prompt:
    """Token ids of one prompt, the position whose next token is read, and what is where.

    Example:
        >>> Prompt(tokens=(1, 50, 60), target=70).answer
        2

    Args:
        tokens: The token ids, the start token included.
        answer: The position whose next-token prediction is read; negative counts from the
            end. The last position by default. We take the token there for what SPADE's paper
            calls the answer token.
        target: The token id that would be right, where one is known.
        candidates: Token ids among which a decision is made, where the task has such.
        spans: Named positions, for example ``{"query": (7, 8), "labels": (3, 6)}``.
        text: The text that the tokens came from, for people.

    Raises:
        ValueError: If there are no tokens, or ``answer`` or a span lies outside them.
    """

    tokens: tuple[int, ...]
    answer: int = -1
    target: int | None = None
    candidates: tuple[int, ...] = ()
    spans: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    text: str = ""

    def __post_init__(self) -> None:
        n = len(self.tokens)
        if n == 0:
            raise ValueError("A prompt has no tokens. Give it at least the start token.")
        if not -n <= self.answer < n:
            raise ValueError(
                f"The answer position {self.answer} lies outside the prompt's {n} tokens; "
                f"expected -{n} to {n - 1}."
            )
        object.__setattr__(self, "answer", self.answer % n)
        for name, positions in self.spans.items():
            outside = [p for p in positions if not 0 <= p < n]
            if outside:
                raise ValueError(
                    f"Span {name!r} has positions {outside} outside the prompt's {n} tokens."
                )

    def __len__(self) -> int:
        return len(self.tokens)


def encode(tokenizer: Any, text: str, *, bos: bool | str = True) -> tuple[int, ...]:
    """Turn text into token ids with the start token visibly decided.

    Args:
        tokenizer: A Hugging Face tokenizer.
        text: The text; special tokens written in it are recognised as the tokenizer does.
        bos: ``True`` puts the tokenizer's BOS first (once, also where the tokenizer adds one by
            itself); ``False`` puts none; a string names another token to start with.

    Returns:
        The token ids.

    Raises:
        ValueError: If the text is empty, the tokenizer has no BOS and one is asked for, or
            ``bos`` names a token that the tokenizer does not have.
    """
    if not text:
        raise ValueError("The prompt is empty. Give a text with at least one character.")
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if bos is False:
        return tuple(ids)
    start = start_token_id(tokenizer, bos=bos)
    return tuple(ids) if ids and ids[0] == start else (start, *ids)


def start_token_id(tokenizer: Any, *, bos: bool | str = True) -> int:
    """The id of the token that prompts start with.

    Args:
        tokenizer: A Hugging Face tokenizer.
        bos: ``True`` for the tokenizer's own BOS, a string for another token.

    Raises:
        ValueError: If there is no such token.
    """
    if isinstance(bos, str):
        found = tokenizer.get_vocab().get(bos)
        if found is None:
            raise ValueError(f"bos={bos!r} is not a token of this tokenizer's vocabulary.")
        return int(found)
    if tokenizer.bos_token_id is None:
        raise ValueError(
            "The start token is needed, but this tokenizer has no BOS token. Pass bos=False to "
            "let the prompt's first token be the start token, or name a token, for example "
            f"bos={tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)!r}."
        )
    return int(tokenizer.bos_token_id)


def single_token(tokenizer: Any, text: str) -> int:
    """The id of the one token that ``text`` is.

    Args:
        tokenizer: A Hugging Face tokenizer.
        text: For example ``" Paris"``; mind the leading space that most vocabularies want.

    Raises:
        ValueError: If the text is not exactly one token; the message lists which it is.
    """
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        tokens = tokenizer.convert_ids_to_tokens(ids)
        raise ValueError(
            f"{text!r} is not a single token but {len(ids)}: {tokens}. Choose a text that is "
            "one token (a leading space often matters), or give the token id itself."
        )
    return int(ids[0])


def first_token(tokenizer: Any, text: str) -> int:
    """The id of the first token of ``text``, for answers that may take several tokens.

    Args:
        tokenizer: A Hugging Face tokenizer.
        text: The answer as it follows the prompt, leading space included.

    Raises:
        ValueError: If the text has no token at all.
    """
    ids: Sequence[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise ValueError(f"{text!r} has no tokens, so it cannot be an answer.")
    return int(ids[0])
