"""Turn what a user has at hand into prompts: strings, chat messages, prompts, one or several.

This module knows Hugging Face tokenizers and nothing of models.
"""

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from spade_lens.prompts.prompt import Prompt, encode, start_token_id

ChatMessage: TypeAlias = Mapping[str, Any]
"""One message of a chat: ``{"role": "user", "content": "..."}``."""

PromptLike: TypeAlias = str | Prompt | Sequence[ChatMessage]
"""One prompt as a user may give it: a text, a prompt, or the messages of a chat."""

PromptsLike: TypeAlias = PromptLike | Sequence[PromptLike]
"""One prompt or several."""

_EXPECTED = (
    "expected a string, chat messages ({'role': ..., 'content': ...}), a Prompt, or a list of these"
)


def as_prompts(tokenizer: Any, given: PromptsLike) -> list[Prompt]:
    """Return prompts of whatever a user has at hand.

    Example:
        >>> [len(prompt) for prompt in as_prompts(model.tokenizer, ["ab", "abc"])]
        [3, 4]

    Args:
        tokenizer: A Hugging Face tokenizer; None where only prompts are given.
        given: A string, the messages of a chat, a prompt, or several of these.

    Raises:
        TypeError: If something else is given; the message says what.
        ValueError: If there are no prompts, a text is empty, or a text or chat is given where
            there is no tokenizer, start token or chat template for it.
    """
    if isinstance(given, str | Prompt) or _is_chat(given):
        return [_as_prompt(tokenizer, given, "The prompt")]
    if isinstance(given, Mapping) or not isinstance(given, Sequence):
        raise TypeError(f"A prompt of type {type(given).__name__} was given; {_EXPECTED}.")
    if not given:
        raise ValueError("No prompts were given. Give at least one.")
    return [_as_prompt(tokenizer, one, f"Prompt {i}") for i, one in enumerate(given)]


def _as_prompt(tokenizer: Any, one: Any, name: str) -> Prompt:
    if isinstance(one, Prompt):
        return one
    if not isinstance(one, str) and not _is_chat(one):
        hint = ""
        if isinstance(one, int) or (isinstance(one, Sequence) and one and isinstance(one[0], int)):
            hint = " Token ids become a prompt by Prompt(tokens=(...))."
        raise TypeError(f"{name} is of type {type(one).__name__}; {_EXPECTED}.{hint}")
    if tokenizer is None:
        raise ValueError(
            f"{name} is text, but the model was loaded without a tokenizer. Give "
            "load(..., tokenizer=...), or make the Prompt of token ids."
        )
    if isinstance(one, str):
        return Prompt(tokens=encode(tokenizer, one), text=one)
    return _of_chat(tokenizer, one)


def _is_chat(given: Any) -> bool:
    return (
        isinstance(given, Sequence)
        and not isinstance(given, str)
        and len(given) > 0
        and all(isinstance(message, Mapping) and "role" in message for message in given)
    )


def _of_chat(tokenizer: Any, messages: Sequence[ChatMessage]) -> Prompt:
    """Write a chat by the tokenizer's template, up to where the assistant's answer begins."""
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            "Chat messages were given, but this tokenizer has no chat template. Give a string, or "
            "set tokenizer.chat_template."
        )
    text = tokenizer.apply_chat_template(
        [dict(message) for message in messages], tokenize=False, add_generation_prompt=True
    )
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    # Templates differ in whether they write the start token; it stands there once.
    if tokenizer.bos_token_id is not None and ids[:1] != [tokenizer.bos_token_id]:
        ids = [start_token_id(tokenizer), *ids]
    return Prompt(tokens=tuple(ids), text=text)
