"""What is at hand becomes prompts: texts, chats with the start token once, prompts, several."""

from typing import Any

import pytest
from transformers import AutoTokenizer

import spade_lens as sl
from spade_lens.models.catalogue import fetch_model_files
from spade_lens.prompts import Prompt
from spade_lens.prompts.inputs import as_prompts

WRITES_BOS = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'] + "
    "' [/INST]' }}{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
"""Llama 2's."""

WRITES_NONE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
"""Zephyr's and TinyLlama's."""

EPISODE = sl.tasks.Episode("t", (("a", "b"),), "c", "d", foil="b")
ASKED = [{"role": "user", "content": "Hi there"}]
BEGUN = [*ASKED, {"role": "assistant", "content": "Well, hello"}]


def from_gguf(name: str) -> Any:
    path = fetch_model_files(name)[0]
    return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


@pytest.fixture(scope="module")
def smollm2_tokenizer() -> Any:
    return from_gguf("smollm2-135m-instruct")


@pytest.fixture(scope="module")
def llama_tokenizer() -> Any:
    """A real Llama tokenizer, which comes without a chat template."""
    return sl.load("stories15m").tokenizer


# --- chats, with real tokenizers ----------------------------------------------------------------


@pytest.mark.download
def test_a_template_whose_turns_begin_with_bos(smollm2_tokenizer: Any) -> None:
    [prompt] = as_prompts(smollm2_tokenizer, ASKED)
    assert prompt.text.startswith("<|im_start|>system\n")
    assert prompt.text.endswith("<|im_start|>user\nHi there<|im_end|>\n<|im_start|>assistant\n")
    # Three turns, and the first one's start is the start token.
    assert prompt.tokens.count(smollm2_tokenizer.bos_token_id) == 3
    assert prompt.tokens[0] == smollm2_tokenizer.bos_token_id != prompt.tokens[1]


@pytest.mark.download
@pytest.mark.parametrize("template", [WRITES_BOS, WRITES_NONE])
def test_the_start_token_stands_there_once(llama_tokenizer: Any, template: str) -> None:
    llama_tokenizer.chat_template = template
    for chat in (ASKED, BEGUN):
        [prompt] = as_prompts(llama_tokenizer, chat)
        assert prompt.tokens[0] == llama_tokenizer.bos_token_id
        assert prompt.tokens.count(llama_tokenizer.bos_token_id) == 1
        text = prompt.text.removeprefix("<s>")
        assert llama_tokenizer.decode(prompt.tokens[1:]).split() == text.split()


@pytest.mark.slow
@pytest.mark.download
def test_tinyllamas_own_template() -> None:
    tokenizer = from_gguf("tinyllama-1.1b-chat")
    [prompt] = as_prompts(tokenizer, ASKED)
    assert prompt.text == "<|user|>\nHi there</s>\n<|assistant|>\n"
    assert prompt.tokens[0] == tokenizer.bos_token_id and prompt.tokens.count(1) == 1


@pytest.mark.download
def test_an_answer_that_has_begun_is_read_at_its_end(smollm2_tokenizer: Any) -> None:
    [prompt] = as_prompts(smollm2_tokenizer, BEGUN)
    assert prompt.text.endswith("<|im_start|>assistant\nWell, hello")
    assert smollm2_tokenizer.decode([prompt.tokens[prompt.answer]]) == " hello"


@pytest.mark.download
def test_a_chat_among_texts_and_prompts(smollm2_tokenizer: Any) -> None:
    given = Prompt(tokens=(1, 2, 3))
    text, chat, same = as_prompts(smollm2_tokenizer, iter(["Hi there", ASKED, given]))
    assert same is given
    assert chat == as_prompts(smollm2_tokenizer, ASKED)[0]
    assert text.tokens == (1, *smollm2_tokenizer("Hi there").input_ids)


# --- bad input ----------------------------------------------------------------------------------


class Words:
    """As much of a tokenizer as a text needs; it has no start token."""

    bos_token_id, eos_token, chat_template = None, "</s>", None

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [len(word) for word in text.split()]}


class Chats(Words):
    chat_template = "a template"

    def apply_chat_template(self, messages: list[dict[str, str]], **_: Any) -> str:
        if messages[0]["role"] == "system":
            raise RuntimeError("System role not supported")
        return "user " + messages[0]["content"]


def test_a_chat_needs_no_start_token_that_the_tokenizer_lacks() -> None:
    assert as_prompts(Chats(), ASKED)[0].tokens == (4, 2, 5)


@pytest.mark.parametrize(
    ("tokenizer", "given", "error", "message"),
    [
        (Words(), "text", ValueError, "The prompt: .* no BOS token. Pass bos=False .*'</s>'"),
        (Words(), [Prompt(tokens=(1,)), "text"], ValueError, "Prompt 1: The start token"),
        (Words(), ["a", ""], ValueError, "Prompt 0: The start token"),
        (Words(), [""], ValueError, "Prompt 0: The prompt is empty"),
        (Words(), ASKED, ValueError, "has no chat template"),
        (
            Chats(),
            [{"role": "system", "content": "x"}],
            ValueError,
            "refuses .* roles system .*Sys",
        ),
        (None, "text", ValueError, "loaded without a tokenizer"),
        (Words(), [], ValueError, "No prompts were given"),
        (Words(), (), ValueError, "No prompts were given"),
        (Words(), 3, TypeError, "type int was given; expected a string"),
        (Words(), {"role": "user"}, TypeError, "type dict was given; expected a string"),
        (Words(), [{"content": "x"}], TypeError, "Prompt 0 is of type dict; expected"),
        (Words(), [3], TypeError, "Prompt 0 is of type int.*Token ids become a prompt"),
        (Words(), [EPISODE], TypeError, r"type Episode.*one.prompt\(model.tokenizer\)"),
        (Words(), [(1, 2)], TypeError, "Token ids become a prompt by Prompt"),
        (Words(), b"text", TypeError, "type bytes was given"),
        ("gpt2", "text", TypeError, "tokenizer of type str was given; .*model.tokenizer"),
    ],
)
def test_what_is_no_prompt_is_named(tokenizer: Any, given: Any, error: Any, message: str) -> None:
    # Types are checked by hand here, as users have no type checker at run time.
    with pytest.raises(error, match=message):
        getattr(as_prompts, "__wrapped__", as_prompts)(tokenizer, given)
