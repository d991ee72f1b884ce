"""K-shot prompts: spans that decode back to the words, whatever the tokenizer; clear errors.

The tokenizers are real ones of four kinds, trained on the spot from our own pairs, and the
embedded model's, read from its GGUF.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast

from spade_lens.models.catalogue import fetch_model_files
from spade_lens.prompts import Template, few_shot_prompt
from spade_lens.prompts.prompt import Prompt
from spade_lens.tasks import task, task_names

# Small tokenizers of a few hundred pieces begin many words alike.
pytestmark = pytest.mark.filterwarnings("ignore::spade_lens.prompts.TokenWarning")

# --- tokenizers ---------------------------------------------------------------------------------


def corpus() -> Iterator[str]:
    """Every line our tasks can write, so that the vocabularies hold whole words of them."""
    for name in task_names("pairs"):
        for given, output in task(name).pairs:
            yield f"{given} -> {output}"
            yield f"Q: {given} A: {output}; {given} = {output}"


def byte_level(trim_offsets: bool) -> Tokenizer:
    """GPT-2's and SmolLM2's kind; offsets with or without the space that tokens start with."""
    built = Tokenizer(models.BPE())
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = decoders.ByteLevel()
    built.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    trainer = trainers.BpeTrainer(
        vocab_size=700,  # small: many words take several tokens, accents are cut in bytes
        special_tokens=["<s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    built.train_from_iterator(corpus(), trainer)
    return built


def word_piece() -> Tokenizer:
    """BERT's kind: no token knows of spaces, newlines vanish."""
    built = Tokenizer(models.WordPiece(unk_token="<unk>"))
    built.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    built.decoder = decoders.WordPiece(cleanup=False)
    special = ["<s>", "<unk>"]
    trainer = trainers.WordPieceTrainer(vocab_size=500, special_tokens=special, show_progress=False)
    built.train_from_iterator(corpus(), trainer)
    return built


def unigram() -> Tokenizer:
    """T5's kind: spaces become the first character of the word's token, newlines stand apart."""
    built = Tokenizer(models.Unigram())
    built.normalizer = normalizers.NFC()
    built.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex("\n"), "isolated"), pre_tokenizers.Metaspace()]
    )
    built.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=600,
        special_tokens=["<s>", "<unk>"],
        unk_token="<unk>",
        initial_alphabet=["\n"],
        show_progress=False,
    )
    built.train_from_iterator(corpus(), trainer)
    return built


def llama_like() -> Tokenizer:
    """Llama's kind: no words at all, a space put before the text, newlines by byte fallback."""
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    built = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    built.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation()]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=["<s>", "<unk>", *fallback], show_progress=False
    )
    built.train_from_iterator(corpus(), trainer)
    state = json.loads(built.to_str())
    state["pre_tokenizer"] = None  # as in Llama's file; only training needs borders
    # Byte tokens are vocabulary here, not strings that a text could name.
    state["added_tokens"] = [t for t in state["added_tokens"] if t["content"] in ("<s>", "<unk>")]
    built = Tokenizer.from_str(json.dumps(state))
    built.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    built.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return built


@cache
def smollm2() -> Any:
    """The embedded model's own tokenizer, read from the file that carries it."""
    path = fetch_model_files("smollm2-135m-instruct")[0]
    return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


KINDS: dict[str, Callable[[], Any]] = {
    "byte-level": lambda: byte_level(trim_offsets=True),
    "byte-level, offsets with spaces": lambda: byte_level(trim_offsets=False),
    "WordPiece": word_piece,
    "Unigram": unigram,
    "Llama-like": llama_like,
    "SmolLM2": smollm2,
}


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request: pytest.FixtureRequest) -> Any:
    built = KINDS[request.param]()
    if not isinstance(built, Tokenizer):
        return built
    return PreTrainedTokenizerFast(tokenizer_object=built, bos_token="<s>")


@pytest.fixture(scope="module")
def gpt_like() -> Any:
    return PreTrainedTokenizerFast(tokenizer_object=byte_level(True), bos_token="<s>")


# --- spans --------------------------------------------------------------------------------------

TEMPLATES = {
    "arrow": Template(),
    "words": Template(pair="Q: {input}\nA: {output}", query="Q: {input}\nA:", separator="\n\n"),
    "one line": Template(pair="{input} = {output}", query="{input} =", separator="; "),
}
ARROWS = {"arrow": "->", "words": "A:", "one line": "="}


def squeeze(text: str) -> str:
    """Without white space, which tokenizers keep, drop or move."""
    return "".join(text.split())


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("style", TEMPLATES)
@pytest.mark.parametrize("name", ["country-capital", "english-french"])
def test_spans_decode_back_to_the_words(tokenizer: Any, name: str, style: str, bos: bool) -> None:
    rule, template, shots = task(name), replace(TEMPLATES[style], bos=bos), 5
    prompts = rule.prompts(tokenizer, 30, shots=shots, seed=3, template=template)
    words = rule.sample(30, shots=shots, seed=3)
    for prompt, (shown, (query, answer)) in zip(prompts, words, strict=True):

        def read(span: str, prompt: Prompt = prompt) -> str:
            return squeeze(tokenizer.decode([prompt.tokens[p] for p in prompt.spans[span]]))

        assert prompt.text == template.text(shown, query)
        assert read("query") == squeeze(query)
        assert squeeze(ARROWS[style]) == read("arrow")
        for i, (given, output) in enumerate(shown):
            assert read(f"demo{i}/input") == squeeze(given)
            assert read(f"demo{i}/arrow") == squeeze(ARROWS[style])
            assert read(f"demo{i}/output") == squeeze(output)
        assert prompt.target is not None
        assert squeeze(answer).startswith(squeeze(tokenizer.decode([prompt.target])).rstrip("�"))
        # The query's arrow is last, and its last token is what is read.
        assert prompt.spans["arrow"][-1] == prompt.answer == len(prompt) - 1
        # The start token is nobody's, and shifts the rest by one.
        assert (prompt.tokens[0] == tokenizer.bos_token_id) is bos
        assert not bos or all(0 not in span for span in prompt.spans.values())


@pytest.mark.parametrize("style", TEMPLATES)
def test_pieces_share_no_token_and_miss_none(tokenizer: Any, style: str) -> None:
    for prompt in task("country-capital").prompts(
        tokenizer, 10, shots=4, template=replace(TEMPLATES[style], bos=False)
    ):
        spans = prompt.spans
        pieces = [p for name, span in spans.items() if "/" in name for p in span]
        pieces += [*spans["query"], *spans["arrow"]]
        assert len(set(pieces)) == len(pieces)
        # Only what the template writes before the first input is nobody's.
        assert sorted(pieces) == list(range(spans["demo0/input"][0], len(prompt)))
        for kind in ("input", "arrow", "output", "separator"):
            assert spans[f"{kind}s"] == sum((spans[f"demo{i}/{kind}"] for i in range(4)), ())
        assert spans["labels"] == tuple(spans[f"demo{i}/output"][-1] for i in range(4))


def test_separators_are_theirs_alone(gpt_like: Any) -> None:
    prompt = task("antonym").prompts(gpt_like, 1, shots=3)[0]
    assert [gpt_like.decode([prompt.tokens[p]]) for p in prompt.spans["separators"]] == ["\n"] * 3


def test_spans_by_hand() -> None:
    """SmolLM2: <|im_start|> Az er bai jan _-> _Bak u \n Ser b ia _->."""
    built = smollm2()
    prompt = few_shot_prompt(built, [("Azerbaijan", "Baku")], "Serbia", answer="Belgrade")
    assert prompt.spans == {
        "query": (9, 10, 11),
        "arrow": (12,),
        "inputs": (1, 2, 3, 4),
        "arrows": (5,),
        "outputs": (6, 7),
        "labels": (7,),
        "separators": (8,),
        "demo0/input": (1, 2, 3, 4),
        "demo0/arrow": (5,),
        "demo0/output": (6, 7),
        "demo0/separator": (8,),
    }
    assert prompt.target == built(" Belgrade", add_special_tokens=False).input_ids[0]


def test_lone_space_goes_with_the_output() -> None:
    """SmolLM2 cuts digits off their space: _-> _ 7; the space opens the answer."""
    built = smollm2()
    prompt = few_shot_prompt(built, [("six", "7")], "one", answer="2")
    assert [built.decode([prompt.tokens[p]]) for p in prompt.spans["outputs"]] == [" ", "7"]
    assert [built.decode([prompt.tokens[p]]) for p in prompt.spans["arrows"]] == [" ->"]


def test_zero_shots_have_the_same_names(gpt_like: Any) -> None:
    prompt = task("antonym").prompts(gpt_like, 1, shots=0)[0]
    empty = {name for name, span in prompt.spans.items() if not span}
    assert empty == {"inputs", "arrows", "outputs", "labels", "separators"}
    assert set(prompt.spans) - empty == {"query", "arrow"}


def test_no_answer_no_target(gpt_like: Any) -> None:
    assert few_shot_prompt(gpt_like, [("hot", "cold")], "up").target is None


# --- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"pair": "{input} ->"}, "pair must hold {input} and then {output}, each once"),
        ({"pair": "{output} -> {input}"}, "pair must hold {input} and then {output}"),
        ({"pair": "{input} -> {output} {output}"}, "pair must hold"),
        ({"pair": "{} -> {output}"}, "pair must hold"),
        ({"pair": "{input} -> {output:>9}"}, "pair must hold"),
        ({"pair": "{input} -> {output"}, "expected '}' before end of string"),
        ({"query": "->"}, "query must hold {input}, each once; got '->'"),
        ({"query": "{input}:"}, "query '{input}:' must be how its pair"),
        ({"pair": "{input}{output}", "query": "{input}"}, "nothing between {input} and {output}"),
        ({"separator": ""}, "separator is empty"),
    ],
)
def test_bad_template_is_refused(changed: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError) as error:
        Template(**changed)
    assert message in str(error.value)


def test_slow_tokenizer_is_refused() -> None:
    with pytest.raises(ValueError, match="ByT5Tokenizer gives no character offsets"):
        few_shot_prompt(ByT5Tokenizer(), [("hot", "cold")], "up", template=Template(bos=False))


def test_merged_pieces_are_refused() -> None:
    built = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1}, unk_token="<unk>"))
    built.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words = PreTrainedTokenizerFast(tokenizer_object=built, bos_token="<s>")
    glued = Template(pair="{input}:{output}", query="{input}:")
    with pytest.raises(ValueError, match="arrow of demonstration 0 has no token of its own"):
        few_shot_prompt(words, [("hot", "cold")], "up", template=glued)


def test_token_of_two_pieces_belongs_to_the_first() -> None:
    built = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1}, unk_token="<unk>"))
    built.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words = PreTrainedTokenizerFast(tokenizer_object=built, bos_token="<s>")
    # <s> hot -> cold; up ->
    prompt = few_shot_prompt(words, [("hot", "cold")], "up", template=Template(separator="; "))
    assert prompt.spans["outputs"] == (3,)
    assert prompt.spans["separators"] == ()
    assert prompt.spans["query"] == (4,)


def test_answer_fused_with_the_prompt_is_refused(gpt_like: Any) -> None:
    template = Template(query="{input} -> ")  # the space belongs to the answer's token
    with pytest.raises(ValueError, match="does not start with a token of its own"):
        task("antonym").prompts(gpt_like, 1, shots=1, template=template)
