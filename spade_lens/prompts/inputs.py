"""Turn what a user has at hand into prompts: strings, chat messages, prompts, one or several.

This module knows Hugging Face tokenizers and nothing of models.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from spade_lens.checks import as_plain
from spade_lens.prompts.prompt import Prompt, encode, warn_of_special_tokens, with_start

ChatMessage: TypeAlias = Mapping[str, Any]
"""One message of a chat: ``{"role": "user", "content": "..."}``."""

PromptLike: TypeAlias = str | Prompt | Sequence[ChatMessage]
"""One prompt as a user may give it: a text, a prompt, or the messages of a chat."""

PromptsLike: TypeAlias = PromptLike | Iterable[PromptLike]
"""One prompt or several."""

_EXPECTED = (
    "expected a string, chat messages ({'role': ..., 'content': ...}), a Prompt, or a list of these"
)


def as_prompts(tokenizer: Any, given: PromptsLike) -> list[Prompt]:
    """Return prompts of whatever a user has at hand.

    A chat is written by the tokenizer's template, up to where the assistant's answer begins. If
    its last message is the assistant's, the answer has begun with it and is read at its end.

    Example:
        >>> [len(prompt) for prompt in as_prompts(model.tokenizer, ["ab", "abc"])]
        [3, 4]
    """
    given = as_plain(given)
    if isinstance(given, str | Prompt) or _is_chat(given):
        return [_as_prompt(tokenizer, given, "The prompt")]
    table = hasattr(given, "columns")  # which would give the names of its columns
    if table or isinstance(given, Mapping | bytes) or not isinstance(given, Iterable):
        raise TypeError(f"A prompt of type {type(given).__name__} was given; {_EXPECTED}.")
    prompts = [_as_prompt(tokenizer, one, f"Prompt {i}") for i, one in enumerate(given)]
    if not prompts:
        raise ValueError("No prompts were given. Give at least one.")
    return prompts


def _as_prompt(tokenizer: Any, one: Any, name: str) -> Prompt:
    if isinstance(one, Prompt):
        return one
    if not isinstance(one, str) and not _is_chat(one):
        hint = ""
        if isinstance(one, int) or (isinstance(one, Sequence) and one and isinstance(one[0], int)):
            hint = " Token ids become a prompt by Prompt(tokens=(...))."
        elif callable(getattr(one, "prompt", None)):  # an episode of a task
            hint = " Make prompts by [one.prompt(model.tokenizer) for one in ...]."
        raise TypeError(f"{name} is of type {type(one).__name__}; {_EXPECTED}.{hint}")
    if tokenizer is None:
        raise ValueError(
            f"{name} is text, but the model was loaded without a tokenizer. Give "
            "load(..., tokenizer=...), or make the Prompt of token ids."
        )
    try:
        if isinstance(one, str):
            return Prompt(tokens=encode(tokenizer, one), text=one)
        return _of_chat(tokenizer, one)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _is_chat(given: Any) -> bool:
    return (
        isinstance(given, Sequence)
        and not isinstance(given, str)
        and len(given) > 0
        and all(isinstance(message, Mapping) and "role" in message for message in given)
    )


def _of_chat(tokenizer: Any, messages: Sequence[ChatMessage]) -> Prompt:
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            "Chat messages were given, but this tokenizer has no chat template. Give a string, or "
            "set tokenizer.chat_template."
        )
    for message in messages:
        content = message.get("content")
        called = content is None and "tool_calls" in message
        if not isinstance(message["role"], str) or not (isinstance(content, str | list) or called):
            raise ValueError(
                f"The chat message {dict(message)!r:.80} was given; expected a role and a content, "
                "such as {'role': 'user', 'content': 'Hello'}."
            )
    contents = [message.get("content") for message in messages]
    parts = [content if isinstance(content, list) else [content] for content in contents]
    texts = [part.get("text") if isinstance(part, Mapping) else part for p in parts for part in p]
    warn_of_special_tokens(tokenizer, *(text for text in texts if isinstance(text, str)))
    begun = messages[-1]["role"] == "assistant"
    try:
        text = tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            tokenize=False,
            add_generation_prompt=not begun,
            continue_final_message=begun,
        )
    except Exception as error:  # templates are programs, and raise errors of many classes
        roles = ", ".join(str(message["role"]) for message in messages)
        raise ValueError(
            f"The tokenizer's chat template refuses messages of the roles {roles} "
            f"({type(error).__name__}: {error})."
        ) from error
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    # Templates differ in whether they write the start token; it stands there once. A tokenizer
    # without one has chats that start as the template says.
    return Prompt(
        tokens=with_start(tokenizer, ids, bos=tokenizer.bos_token_id is not None), text=text
    )


def check_fit(prompts: Sequence[Prompt], *, n_ctx: int, d_vocab: int, name: str) -> None:
    """Raise if a prompt does not fit a model.

    Raises:
        ValueError: If one is longer than the context, or has a token id outside the vocabulary.
    """
    for i, prompt in enumerate(prompts):
        if len(prompt) > n_ctx:
            raise ValueError(
                f"Prompt {i} has {len(prompt)} tokens; {name} takes at most {n_ctx}. Shorten it, "
                "or use fewer demonstrations."
            )
        named = [*prompt.tokens, *prompt.target_tokens]
        named += [token for candidate in prompt.candidate_tokens for token in candidate]
        wrong = [token for token in named if not 0 <= token < d_vocab]
        if wrong:
            raise ValueError(
                f"Prompt {i} has token ids {wrong[:5]} outside the vocabulary of {d_vocab}; "
                f"expected 0 to {d_vocab - 1}. Was it made with another model's tokenizer?"
            )
