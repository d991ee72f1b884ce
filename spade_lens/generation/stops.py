"""Where a text ends: token ids and strings."""

from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

from spade_lens.checks import as_several, is_whole
from spade_lens.models.model import Model
from spade_lens.prompts.prompt import check_text

StopLike: TypeAlias = str | int | Iterable[str | int] | None
"""Token ids and strings, one or several; None for the model's own end of text."""


class Stops:
    """What ends a text.

    Args:
        model: The model.
        stop: Token ids and strings; None for the model's own end of text.

    Raises:
        TypeError: If something else is given.
        ValueError: If a string is empty, a token is outside the vocabulary, or strings are given
            and the model has no tokenizer.
    """

    def __init__(self, model: Model, stop: StopLike) -> None:
        self._tokenizer = model.tokenizer
        given: Any = [stop] if isinstance(stop, str) or is_whole(stop) else as_several(stop)
        if stop is None:
            given = sorted(end_tokens(model))
        if given is None or not all(isinstance(one, str) or is_whole(one) for one in given):
            raise TypeError(
                f"stop={stop!r} was given; expected token ids and strings, one or several, such as "
                "stop='\\n', or None for the model's own end of text."
            )
        self.tokens = {int(one) for one in given if not isinstance(one, str)}
        self.strings = tuple(one for one in given if isinstance(one, str))
        for string in filter(None, self.strings):
            check_text(string)
        outside = [token for token in self.tokens if not 0 <= token < model.d_vocab]
        if outside or "" in self.strings:
            raise ValueError(
                f"stop={stop!r} was given; expected token ids below {model.d_vocab}, and strings "
                "of at least one character."
            )
        if self.strings and self._tokenizer is None:
            raise ValueError(
                f"stop={stop!r} was given, and {model.name} was loaded without a tokenizer. Give "
                "load(..., tokenizer=...), or token ids."
            )

    def text(self, tokens: Sequence[int]) -> str:
        """Return the text of new tokens; the numbers without a tokenizer."""
        return text_of(self._tokenizer, tokens)

    def ends(self, tokens: Sequence[int]) -> str:
        """Return what ends a text at the last of its new tokens; nothing if it goes on."""
        if tokens[-1] in self.tokens:
            return "stop token"
        if self.strings:
            text = self.text(tokens)
            if any(string in text for string in self.strings):
                return "stop string"
        return ""

    def cut(self, text: str) -> str:
        """Return a text up to its first stop string."""
        return cut(text, self.strings)


def cut(text: str, strings: Sequence[str]) -> str:
    """Return a text up to the first of some strings."""
    return text[: min((at for at in map(text.find, strings) if at >= 0), default=len(text))]


def text_of(tokenizer: Any, tokens: Sequence[int]) -> str:
    """Return the text of tokens without special ones; their numbers without a tokenizer."""
    if tokenizer is None:
        return " ".join(map(str, tokens))
    options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    text = str(tokenizer.decode(list(tokens), **options))
    # SentencePiece tokenizers drop the space before the first word.
    piece = str(tokenizer.convert_ids_to_tokens(tokens[0]) or "") if tokens else ""
    return f" {text}" if piece.startswith("\u2581") and not text.startswith(" ") else text


def end_tokens(model: Model) -> set[int]:
    """Return the tokens with which a model ends its texts, as Hugging Face's ``generate`` does."""
    named: Any = None
    for of in (getattr(model.original, "generation_config", None), model.tokenizer):
        named = getattr(of, "eos_token_id", None) if named is None else named
    several = [] if named is None else [named] if is_whole(named) else list(named)
    return {int(token) for token in several if 0 <= int(token) < model.d_vocab}
