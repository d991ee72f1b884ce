"""A prompt with known positions: tokens, the position that is read, and named spans.

This is the one type that text and tasks hand to models and lenses. It knows a Hugging Face
tokenizer and nothing of models. The start token (BOS) is explicit: many tokenizers, SmolLM2's
among them, do not add it by themselves, and SPADE keeps it in every reduced prompt.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any

_REPR_CHARACTERS = 48
"""How much of a long text the ``repr`` of a prompt shows, from both ends."""


@dataclass(frozen=True, repr=False)
class Prompt:
    """Token ids of one prompt, the position whose next token is read, and named positions.

    Example:
        >>> prompt = Prompt(tokens=(1, 50, 60), target=70, text="ab")
        >>> prompt
        Prompt('ab', 3 tokens, target=70)
        >>> prompt.answer
        2

    Args:
        tokens: The token ids, the start token included.
        answer: The position whose next-token prediction is read; negative counts from the
            end. The last position by default. We take the token there for what SPADE's paper
            calls the answer token.
        target: The token id that would be right, if it is known.
        candidates: Token ids among which a decision is made, if there are any.
        spans: Named positions, for example ``{"query": (7, 8), "labels": (3, 6)}``.
        text: The text that the tokens came from, for people.

    Raises:
        TypeError: If tokens, candidates or positions are not whole numbers, or the text is none.
        ValueError: If there are no tokens, or ``answer`` or a span lies outside them.
    """

    tokens: tuple[int, ...]
    answer: int = -1
    target: int | None = None
    candidates: tuple[int, ...] = ()
    spans: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    text: str = ""

    def __post_init__(self) -> None:
        if isinstance(self.tokens, str):
            raise TypeError(
                f"The text {self.tokens!r} was given for tokens; expected token ids. "
                "model.prompt(text) makes a prompt of a text."
            )
        tokens = tuple(self.tokens) if isinstance(self.tokens, Iterable) else (self.tokens,)
        numbers = (*tokens, self.answer, *(() if self.target is None else (self.target,)))
        if not all(isinstance(number, Integral) for number in numbers):
            raise TypeError(
                f"tokens={tokens[:8]}, answer={self.answer!r} and target={self.target!r} were "
                "given; expected whole numbers. A tensor becomes such by ids.tolist()."
            )
        n = len(tokens)
        if n == 0:
            raise ValueError("A prompt has no tokens. Give it at least the start token.")
        if not -n <= self.answer < n:
            raise ValueError(
                f"The answer position {self.answer} lies outside the prompt's {n} tokens; "
                f"expected -{n} to {n - 1}."
            )
        if not isinstance(self.text, str):
            raise TypeError(f"text={self.text!r} was given; expected a string.")
        if not isinstance(self.spans, Mapping):
            raise TypeError(f"spans={self.spans!r} was given; expected {_SPANS}.")
        candidates = _whole(self.candidates, "candidates", "token ids, such as (7, 8)")
        spans = {name: _whole(at, f"spans[{name!r}]", _SPANS) for name, at in self.spans.items()}
        object.__setattr__(self, "tokens", tuple(map(int, tokens)))
        object.__setattr__(self, "answer", int(self.answer) % n)
        object.__setattr__(self, "target", None if self.target is None else int(self.target))
        object.__setattr__(self, "candidates", candidates)
        object.__setattr__(self, "spans", spans)
        for name, positions in spans.items():
            outside = [position for position in positions if not 0 <= position < n]
            if outside:
                raise ValueError(
                    f"Span {name!r} has positions {outside} outside the prompt's {n} tokens; "
                    f"expected 0 to {n - 1}."
                )

    def __len__(self) -> int:
        return len(self.tokens)

    def __repr__(self) -> str:
        text, half = self.text, _REPR_CHARACTERS // 2
        if len(text) > _REPR_CHARACTERS:
            text = f"{text[:half]} ... {text[-half:]}"
        parts = [repr(text)] if text else []
        parts.append(f"{len(self)} tokens" if text or len(self) > 8 else f"tokens={self.tokens}")
        if self.answer != len(self) - 1:
            parts.append(f"answer={self.answer}")
        if self.target is not None:
            parts.append(f"target={self.target}")
        if self.candidates:
            parts.append(f"{len(self.candidates)} candidates")
        if self.spans:
            parts.append(f"{len(self.spans)} spans")
        return f"Prompt({', '.join(parts)})"


_SPANS = "names of spans with their positions, such as {'query': (7, 8)}"


def _whole(given: Any, name: str, expected: str) -> tuple[int, ...]:
    """Return several whole numbers as plain ones, which JSON knows."""
    if not isinstance(given, Iterable) or not all(isinstance(n, Integral) for n in given):
        raise TypeError(f"{name}={given!r} was given; expected {expected}.")
    return tuple(int(n) for n in given)


def prompt_from_json(content: Mapping[str, Any]) -> Prompt:
    """Return the prompt whose fields these are, with JSON's lists as tuples again."""
    tuples = {name: tuple(content[name]) for name in ("tokens", "candidates")}
    spans = {name: tuple(positions) for name, positions in content["spans"].items()}
    return Prompt(**{**content, **tuples, "spans": spans})


def encode(tokenizer: Any, text: str, *, bos: bool | str = True) -> tuple[int, ...]:
    """Turn text into token ids, with or without a start token.

    ``bos=True`` puts the tokenizer's BOS first (once, even if the text begins with it); ``False``
    puts none; a string names another token to start with.
    """
    check_tokenizer(tokenizer)
    if not isinstance(text, str):
        raise TypeError(f"{text!r} was given for a text; expected a string.")
    if not text:
        raise ValueError("The prompt is empty. Give a text with at least one character.")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError(
            f"The text {text!r:.60} has lone surrogates, which stand for bytes that are not UTF-8. "
            "Give valid Unicode."
        )
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return with_start(tokenizer, ids, bos)


def check_tokenizer(tokenizer: Any) -> None:
    """Raise if this is no tokenizer, but for example the model itself."""
    if not callable(tokenizer) or not hasattr(tokenizer, "bos_token_id"):
        raise TypeError(
            f"A tokenizer of type {type(tokenizer).__name__} was given; expected a Hugging Face "
            "tokenizer, for example model.tokenizer."
        )


def with_start(tokenizer: Any, ids: Sequence[int], bos: bool | str = True) -> tuple[int, ...]:
    """Return token ids with the start token first, once; see :func:`encode`."""
    start = None if bos is False else start_token_id(tokenizer, bos=bos)
    return tuple(ids) if start is None or list(ids[:1]) == [start] else (start, *ids)


def start_token_id(tokenizer: Any, *, bos: bool | str = True) -> int:
    """Return the id of the token that prompts start with: the BOS, or that which ``bos`` names."""
    if isinstance(bos, str):
        token = tokenizer.get_vocab().get(bos)
        if token is None:
            raise ValueError(f"bos={bos!r} is not a token of this tokenizer's vocabulary.")
        return int(token)
    if tokenizer.bos_token_id is None:
        raise ValueError(
            "The start token is needed, but this tokenizer has no BOS token. Pass bos=False to "
            "let the prompt's first token be the start token, or name a token, for example "
            f"bos={tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)!r}: in "
            "model.prompt(text, bos=...) or Template(bos=...)."
        )
    return int(tokenizer.bos_token_id)


def single_token(tokenizer: Any, text: str) -> int:
    """Return the id of the one token that ``text`` is; mind the space before most words."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        tokens = tokenizer.convert_ids_to_tokens(ids)
        raise ValueError(
            f"{text!r} is not a single token but {len(ids)}: {tokens}. Choose a text that is "
            "one token (a leading space often matters), or give the token id itself."
        )
    return int(ids[0])
