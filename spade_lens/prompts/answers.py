"""Whole answers: their tokens after a prompt, and which of their first tokens say little."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from spade_lens.checks import warn, whole_numbers
from spade_lens.prompts.prompt import Prompt, TokenWarning, token_ids, token_text

_ADVICE = (
    "Where an answer counts as right by its first token, such a prompt says little; the column "
    "'ambiguous' marks it. Score whole answers (spade_lens.generation.score_answers), or choose "
    "other words."
)


def with_answer(
    prompt: Prompt, target: Sequence[int], candidates: Sequence[Sequence[int]] = ()
) -> Prompt:
    """Return a prompt with a whole answer, and whole candidates.

    Args:
        prompt: The prompt.
        target: All tokens of the right answer; none if it is not known.
        candidates: All tokens of every candidate.
    """
    return replace(
        prompt,
        target=target[0] if target else None,
        target_tokens=tuple(target),
        candidates=tuple(dict.fromkeys(one[0] for one in candidates)),
        candidate_tokens=tuple(map(tuple, candidates)),
    )


def answer_ids(tokenizer: Any, text: str, given: Any, name: str) -> tuple[int, ...]:
    """Return the token ids of an answer to a text, given as a text, an id or several.

    Raises:
        TypeError: If it is something else.
        ValueError: If it is empty, or has no tokens of its own after the text.

    Warns:
        TokenWarning: If an answer of several tokens follows a word without a space.
    """
    if not isinstance(given, str):
        expected = "a text with its leading space, a token id or several"
        return tuple(whole_numbers(given, f"{name}=", expected, distinct=False))
    if not given:
        raise ValueError(f"{name}='' was given; expected a text of at least one character.")
    tokens = _tokens_after(tokenizer, text, given)
    if not tokens:
        spaced = f" {given.lstrip()}"
        advice = f"Drop the white space at the end of the text, and give {name}={spaced!r}."
        if not text[-1:].isspace():
            advice = "End the text elsewhere, or give token ids."
        raise ValueError(
            f"{name}={given!r} does not start with a token of its own after {text[-12:]!r}. "
            f"{advice}"
        )
    glued = (text[-1:].isalnum() or text[-1:] in (":", ".", ",")) and given[0].isalnum()
    if glued and len(tokens) > 1:
        warn(
            f"{name}={given!r} has {len(tokens)} tokens and follows {text[-12:]!r} without a "
            f"space. Give {f' {given}'!r} if it is a word of its own.",
            TokenWarning,
        )
    return tokens


def warn_of_candidates(tokenizer: Any, prompt: Prompt) -> None:
    """Warn of a prompt whose target begins as another candidate does."""
    words = ["".join(token_text(tokenizer, t) for t in one) for one in prompt.candidate_tokens]
    first = token_text(tokenizer, prompt.target_tokens[0])
    warn(f"Others of {words} begin with {first!r} as the target does. {_ADVICE}", TokenWarning)


class FirstTokens:
    """First tokens of answers, and of which prompts they say little; one warning counts these.

    Args:
        tokenizer: A fast Hugging Face tokenizer.
        before: A text that an answer may follow.
        write: Returns an answer as it follows the text.
    """

    def __init__(self, tokenizer: Any, before: str, write: Callable[[str], str]) -> None:
        self._tokenizer, self._before, self._write = tokenizer, before, write
        self._first: dict[str, int] = {}
        self._alike: dict[tuple[str, str], int] = {}
        self._n_alike = self._n = 0

    def of(self, word: str) -> int:
        """Return the first token of an answer."""
        if word not in self._first:
            whole = answer_tokens(self._tokenizer, self._before, self._write(word))
            self._first[word] = whole[0]
        return self._first[word]

    def flag(self, prompt: Prompt, query: str, answer: str, outputs: Iterable[str]) -> Prompt:
        """Return a prompt that says whether its target also begins another answer or the query.

        Args:
            prompt: The prompt.
            query: The input that is asked.
            answer: The right output.
            outputs: All outputs that might be said.
        """
        token = self.of(answer)
        alike = [word for word in (query, *outputs) if word != answer and self.of(word) == token]
        self._n += 1
        if alike:
            self._n_alike += 1
            self._alike[answer, alike[0]] = token
        return replace(prompt, ambiguous=self.of(query) == token or bool(alike))

    def warn(self) -> None:
        """Warn of the prompts that were flagged, if there are any."""
        if not self._n_alike:
            return
        shown = [
            f"{answer!r} like {other!r} ({token_text(self._tokenizer, token)!r})"
            for (answer, other), token in self._alike.items()
        ]
        more = ", ..." if len(shown) > 3 else ""
        warn(
            f"{self._n_alike} of {self._n} answers begin with the same token as the query or "
            f"another answer: {', '.join(shown[:3])}{more}. {_ADVICE}",
            TokenWarning,
        )


def answer_tokens(tokenizer: Any, text: str, answer: str) -> tuple[int, ...]:
    """Return the tokens of an answer as the tokenizer writes them after a template's query.

    The answer has its leading space; the text best has none at its end.
    """
    tokens = _tokens_after(tokenizer, text, answer)
    if not tokens:
        raise ValueError(
            f"With this tokenizer the answer {answer.strip()!r} does not start with a token of its "
            f"own after {text[-12:]!r}. End the template's query elsewhere (often: without a "
            "space)."
        )
    return tokens


def _tokens_after(tokenizer: Any, text: str, answer: str) -> tuple[int, ...]:
    """Return the tokens of an answer after a text; none where it has none of its own.

    Some tokenizers write a word alone otherwise than within a text, so this tokenises the whole.
    """
    before, whole = token_ids(tokenizer, text), token_ids(tokenizer, text + answer)
    return whole[len(before) :] if whole[: len(before)] == before else ()
