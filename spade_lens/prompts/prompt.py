"""A prompt with known positions: tokens, the position that is read, and named spans.

This is the one type that text and tasks hand to models and lenses. It knows a Hugging Face
tokenizer and nothing of models. The start token (BOS) is explicit: many tokenizers, SmolLM2's
among them, do not add it by themselves, and SPADE keeps it in every reduced prompt.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, TypeAlias

from spade_lens.checks import as_plain, as_several, is_whole, warn, whole_numbers

StartToken: TypeAlias = bool | str | int
"""True for the tokenizer's own start token, False for none, or the text or id of a token."""

_REPR_CHARACTERS = 48
"""How much of a long text the ``repr`` of a prompt shows, from both ends."""


class TokenWarning(UserWarning):
    """Tokens of a prompt that are perhaps not what was meant; the message says which and why."""


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
        target: The token id that would be right there, if it is known: of an answer of several
            tokens the first.
        candidates: Token ids among which a decision is made, if there are any: of answers of
            several tokens the first of each.
        spans: Named positions, for example ``{"query": (7, 8), "labels": (3, 6)}``.
        text: The text that the tokens came from, for people.
        ambiguous: Whether the target's token also begins another answer, or the query: then who
            says the token need not know the answer. :func:`few_shot_prompt` and tasks find out.
            ``shares_first_token`` also sees another candidate that begins with it.
        target_tokens: All tokens of the right answer, of which ``target`` is the first. By default
            it is the only one.
        candidate_tokens: All tokens of every candidate. Their first tokens, each once, are
            ``candidates``. By default every candidate is one token.

    ``dataclasses.replace`` keeps whole answers. Give both to change one:
    ``replace(prompt, target=8, target_tokens=())``, and candidates alike.

    Raises:
        TypeError: If tokens, candidates or positions are not whole numbers, or the text is none.
        ValueError: If there are no tokens, ``answer`` or a span lies outside them, a candidate
            is given twice, or ``target`` and ``candidates`` are not the first tokens of the whole
            answers.
    """

    tokens: tuple[int, ...]
    answer: int = -1
    target: int | None = None
    candidates: tuple[int, ...] = ()
    spans: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    text: str = ""
    ambiguous: bool = False
    target_tokens: tuple[int, ...] = ()
    candidate_tokens: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.tokens, str):
            raise TypeError(
                f"The text {self.tokens!r} was given for tokens; expected token ids. "
                "model.prompt(text) makes a prompt of a text."
            )
        expected = "token ids, at least that of the start token"
        tokens = whole_numbers(self.tokens, "tokens=", expected, distinct=False)
        for name in ("answer", "target"):
            number = as_plain(getattr(self, name))
            if not is_whole(number) and not (name == "target" and number is None):
                raise TypeError(f"{name}={number!r} was given; expected a whole number.")
        n = len(tokens)
        if not -n <= self.answer < n:
            raise ValueError(
                f"The answer position {self.answer} lies outside the prompt's {n} tokens; "
                f"expected -{n} to {n - 1}."
            )
        if not isinstance(self.text, str):
            raise TypeError(f"text={self.text!r} was given; expected a string.")
        if not isinstance(self.spans, Mapping):
            raise TypeError(f"spans={self.spans!r} was given; expected {_SPANS}.")
        if not isinstance(self.ambiguous, bool):
            raise TypeError(f"ambiguous={self.ambiguous!r} was given; expected True or False.")
        each = "token ids, such as (7, 8), each once: a choice between the same cannot be told"
        candidates = tuple(whole_numbers(self.candidates, "candidates=", each, empty=True))
        spans = {
            name: tuple(whole_numbers(at, f"spans[{name!r}]=", _SPANS, distinct=False, empty=True))
            for name, at in self.spans.items()
        }
        object.__setattr__(self, "tokens", tuple(tokens))
        object.__setattr__(self, "answer", int(self.answer) % n)
        target = as_plain(self.target)
        object.__setattr__(self, "target", None if target is None else int(target))
        object.__setattr__(self, "candidates", candidates)
        object.__setattr__(self, "spans", spans)
        self._check_whole_answers()
        for name, positions in spans.items():
            outside = [position for position in positions if not 0 <= position < n]
            if outside:
                raise ValueError(
                    f"Span {name!r} has positions {outside} outside the prompt's {n} tokens; "
                    f"expected 0 to {n - 1}."
                )

    def _check_whole_answers(self) -> None:
        """Set the whole answers; raise if their first tokens are others than those given."""
        whole = tuple(whole_numbers(self.target_tokens, "target_tokens=", _IDS, **_MANY))
        if not whole:
            whole = () if self.target is None else (self.target,)
        elif self.target != whole[0]:
            raise ValueError(
                f"target_tokens={whole} was given with target={self.target}; expected its first "
                f"token, target={whole[0]}. Give both, or target_tokens=() for one token alone."
            )
        given = as_several(self.candidate_tokens)
        if given is None:
            raise TypeError(
                f"candidate_tokens={self.candidate_tokens!r} was given; expected the token ids of "
                "every candidate, such as ((7, 8), (9,))."
            )
        each = tuple(
            tuple(whole_numbers(one, f"candidate_tokens[{i}]=", _IDS, **_MANY))
            for i, one in enumerate(given)
        )
        each = each or tuple((token,) for token in self.candidates)
        first = tuple(dict.fromkeys(one[0] for one in each if one))
        if first != self.candidates or not all(each) or len(set(each)) < len(each):
            raise ValueError(
                f"candidate_tokens={each} was given with candidates={self.candidates}; expected "
                "different answers of at least one token each, and their first tokens, each once, "
                f"as candidates={first}. Give both, or candidate_tokens=() for one token each."
            )
        object.__setattr__(self, "target_tokens", whole)
        object.__setattr__(self, "candidate_tokens", each)

    @property
    def shares_first_token(self) -> bool:
        """Whether the target's token begins another answer: see ``ambiguous``, and candidates."""
        whole = self.target_tokens
        alike = [one for one in self.candidate_tokens if one[0] == self.target and one != whole]
        return self.ambiguous or (whole in self.candidate_tokens and bool(alike))

    def deciding(self) -> dict[str, Any]:
        """Return what tells this prompt from others: whole answers only where they say more."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        if len(self.target_tokens) < 2:
            del values["target_tokens"]
        if all(len(one) == 1 for one in self.candidate_tokens):
            del values["candidate_tokens"]
        return values

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
            several = len(self.target_tokens) > 1
            parts.append(f"target={self.target_tokens if several else self.target}")
        if self.candidates:
            parts.append(f"{len(self.candidates)} candidates")
        if self.spans:
            parts.append(f"{len(self.spans)} spans")
        return f"Prompt({', '.join(parts)})"


_SPANS = "names of spans with their positions, such as {'query': (7, 8)}"
_IDS = "token ids, such as (7, 8)"
_MANY: dict[str, Any] = {"distinct": False, "empty": True}


def prompt_from_json(content: Mapping[str, Any]) -> Prompt:
    """Return the prompt whose fields these are, with JSON's lists as tuples again."""
    flat = ("tokens", "candidates", "target_tokens")
    tuples: dict[str, Any] = {name: tuple(content[name]) for name in flat if name in content}
    if "candidate_tokens" in content:
        tuples["candidate_tokens"] = tuple(map(tuple, content["candidate_tokens"]))
    spans = {name: tuple(positions) for name, positions in content["spans"].items()}
    return Prompt(**{**content, **tuples, "spans": spans})


def encode(tokenizer: Any, text: str, *, bos: StartToken = True) -> tuple[int, ...]:
    """Turn text into token ids, with or without a start token.

    ``bos=True`` puts the tokenizer's BOS first (once, even if the text begins with it); ``False``
    puts none; the text or id of another token puts that.
    """
    ids = token_ids(tokenizer, text)
    warn_of_special_tokens(tokenizer, text)
    return with_start(tokenizer, ids, bos)


def token_ids(tokenizer: Any, text: str) -> tuple[int, ...]:
    """Return the token ids of a text without a start token, once it is seen to be one."""
    check_tokenizer(tokenizer)
    check_text(text)
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def check_text(text: Any) -> None:
    """Raise if this is no text that a tokenizer takes."""
    if not isinstance(text, str):
        raise TypeError(f"{text!r} was given for a text; expected a string.")
    if not text:
        raise ValueError("The prompt is empty. Give a text with at least one character.")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError(
            f"The text {text!r:.60} has lone surrogates, which stand for bytes that are not UTF-8. "
            "Give valid Unicode."
        )


def warn_of_special_tokens(tokenizer: Any, *texts: str) -> None:
    """Warn if special tokens stand in texts: the tokenizer reads them as such, not as text.

    Args:
        tokenizer: A Hugging Face tokenizer.
        texts: What a user wrote. The start token may open a text.
    """
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    special = {token.content for token in added if token.special}
    special |= set(getattr(tokenizer, "all_special_tokens", ()))
    start = getattr(tokenizer, "bos_token", None) or ""
    whole = "\n".join(text.removeprefix(start) for text in texts)
    inside = sorted(token for token in special if token and token in whole)
    if inside:
        where = next(text for text in texts if inside[0] in text)
        warn(
            f"The text {where[:60]!r} holds the special tokens {inside}, which the tokenizer reads "
            "as such and not as text. Write them otherwise if that is not what you mean.",
            TokenWarning,
        )


def token_text(tokenizer: Any, token: int) -> str:
    """Return the text of a token id with its leading space; its number without a tokenizer."""
    if tokenizer is None:
        return str(token)
    text = str(tokenizer.decode([token], clean_up_tokenization_spaces=False))
    # SentencePiece tokenizers write a space as this sign, and drop it where a text begins.
    piece = str(tokenizer.convert_ids_to_tokens(token) or "")
    spaced = piece.replace("\u2581", " ")
    same = spaced != piece and spaced.replace(" ", "") == text.replace(" ", "")
    return spaced if same else text


def check_tokenizer(tokenizer: Any) -> None:
    """Raise if this is no tokenizer, but for example the model itself."""
    if not callable(tokenizer) or not hasattr(tokenizer, "bos_token_id"):
        raise TypeError(
            f"A tokenizer of type {type(tokenizer).__name__} was given; expected a Hugging Face "
            "tokenizer, for example model.tokenizer."
        )


def with_start(tokenizer: Any, ids: Sequence[int], bos: StartToken = True) -> tuple[int, ...]:
    """Return token ids with the start token first, once; see :func:`encode`."""
    check_bos(bos)
    start = None if bos is False else start_token_id(tokenizer, bos=bos)
    return tuple(ids) if start is None or list(ids[:1]) == [start] else (start, *ids)


def check_bos(bos: Any) -> None:
    """Raise if this names no start token, whatever the tokenizer."""
    if not isinstance(bos, bool | str) and not is_whole(bos):
        raise TypeError(
            f"bos={bos!r} was given; expected True for the tokenizer's own start token, False for "
            "none, or the text or id of a token."
        )


def start_token_id(tokenizer: Any, *, bos: StartToken = True) -> int:
    """Return the id of the token that prompts start with: the BOS, or that which ``bos`` names."""
    check_bos(bos)
    if not isinstance(bos, bool):
        token = tokenizer.get_vocab().get(bos) if isinstance(bos, str) else int(bos)
        if token is None or not 0 <= token < len(tokenizer):
            raise ValueError(
                f"bos={bos!r} is not a token of this tokenizer's vocabulary of {len(tokenizer)}; "
                "give the text of one, its id, True or False."
            )
        return int(token)
    if not bos:
        raise ValueError("bos=False was given where a start token is needed; give True or a token.")
    if tokenizer.bos_token_id is None:
        raise ValueError(
            "The start token is needed, but this tokenizer has no BOS token. Pass bos=False to "
            "let the prompt's first token be the start token, or name a token, for example "
            f"bos={tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)!r}: in "
            "model.prompt(text, bos=...) or Template(bos=...)."
        )
    return int(tokenizer.bos_token_id)
