"""Texts of tokens, start tokens, special tokens in words, and first tokens that say little."""

import pickle
from typing import Any

import pytest
import transformers as hf
from tiny import tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

import spade_lens as sl
from spade_lens.models import Model
from spade_lens.prompts import Template, TokenWarning, few_shot_prompt
from spade_lens.prompts.answers import answer_ids
from spade_lens.prompts.prompt import encode, token_text
from spade_lens.tasks import WordPairTask
from spade_lens.tasks.episodes import write_episodes

TIGHT = Template(pair="{input}>{output}", query="{input}>", separator=";")
PIECES = ["<unk>", "<s>", "</s>", "▁", "A", "▁A", "▁▁", "B", "▁B", "▁A▁B"]


def metaspace(decoder: Any) -> Any:
    """Llama-2's kind: a space is a sign of its own, and is dropped where a text begins."""
    merges = [("▁", "A"), ("▁", "B"), ("▁", "▁"), ("▁A", "▁B")]
    vocabulary = {piece: i for i, piece in enumerate(PIECES)}
    built = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>"))
    built.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    built.decoder = decoder
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return hf.PreTrainedTokenizerFast(tokenizer_object=built, **names)


STRIPPING = decoders.Sequence(
    [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
)


@pytest.mark.parametrize("decoder", [STRIPPING, decoders.Metaspace()])
def test_tokens_of_sentencepiece_keep_their_space(decoder: Any) -> None:
    tokenizer = metaspace(decoder)
    assert tokenizer.decode([5]) == tokenizer.decode([4]) == "A"  # what must not be shown alike
    texts = [token_text(tokenizer, i) for i in range(len(PIECES))]
    assert texts == ["<unk>", "<s>", "</s>", " ", "A", " A", "  ", "B", " B", " A B"]


def test_tokens_of_bytes_are_as_they_are() -> None:
    signs = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {sign: i for i, sign in enumerate([*signs, "ĠA", "Ġ."])}
    built = Tokenizer(models.BPE(vocab=vocabulary, merges=[("Ġ", "A"), ("Ġ", ".")]))
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = decoders.ByteLevel()
    tokenizer = hf.PreTrainedTokenizerFast(
        tokenizer_object=built, clean_up_tokenization_spaces=True
    )
    for text in ("A", " A", ".", " .", " ", "\n"):
        [token] = tokenizer(text)["input_ids"]
        assert token_text(tokenizer, token) == text


def test_tables_show_the_space(tiny_llama: Model) -> None:
    class Spaced(Model):
        tokenizer = metaspace(STRIPPING)

        def __init__(self) -> None: ...

    assert [Spaced().word(token) for token in (4, 5)] == ["A", " A"]
    readout = sl.read("ab", "logit", model=tiny_llama)
    assert pickle.loads(pickle.dumps(readout)).words == readout.words


@pytest.mark.parametrize(("bos", "first"), [(True, 1), ("</s>", 2), (2, 2), (0, 0), (False, 67)])
def test_start_tokens(tiny_llama: Model, bos: Any, first: int) -> None:
    assert tiny_llama.prompt("ab", bos=bos).tokens[0] == first
    assert encode(tiny_llama.tokenizer, "ab", bos=bos)[0] == first
    template = Template(pair="{input}>{output}", query="{input}>", separator=";", bos=bos)
    prompt = few_shot_prompt(tiny_llama.tokenizer, [("a", "A")], "b", template=template)
    assert prompt.tokens[0] == first


@pytest.mark.parametrize("text", ["a</s>b", "<pad>", "x<s>"])
def test_special_tokens_in_text_are_announced(tiny_llama: Model, text: str) -> None:
    tokenizer = tiny_llama.tokenizer
    for call in (
        lambda: tiny_llama.prompt(text),
        lambda: tiny_llama.prompts([text]),
        lambda: encode(tokenizer, text),
        lambda: few_shot_prompt(tokenizer, [("a", text), ("b", "c")], "d", template=TIGHT),
        lambda: few_shot_prompt(tokenizer, [("b", "c")], text, template=TIGHT),
    ):
        with pytest.warns(TokenWarning, match="holds the special tokens"):
            call()


def test_special_tokens_of_the_template_and_the_start_are_not(tiny_llama: Model) -> None:
    tiny_llama.prompt("<s>ab")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<s>{{ m.role }}:{{ m.content }}</s>{% endfor %}"
    )
    chat = [{"role": "user", "content": "ab"}]
    sl.prompts.inputs.as_prompts(tokenizer, chat)
    with pytest.warns(TokenWarning, match="holds the special tokens"):
        sl.prompts.inputs.as_prompts(tokenizer, [{"role": "user", "content": "a</s>b"}])
    ended = Template(pair="{input}>{output}", query="{input}>", separator="</s>")
    few_shot_prompt(tokenizer, [("a", "b")], "c", template=ended)


def test_a_warning_says_a_thing_once_and_points_at_the_users_line(tiny_llama: Model) -> None:
    young = WordPairTask("young", (("pig", "piglet"), ("hen", "chick")))
    with pytest.warns(TokenWarning) as told:
        young.prompts(tiny_llama.tokenizer, 6, shots=1, template=TIGHT)
        tiny_llama.prompt("a</s>b")
        sl.read("a</s>b", model=tiny_llama)
    assert [warning.filename for warning in told] == [__file__] * 3
    assert str(told[0].message).count("'piglet'") == 1
    assert str(told[0].message).startswith("3 of 6 answers")


def test_an_answer_after_a_space_is_refused_without_a_word_of_templates() -> None:
    tokenizer = metaspace(STRIPPING)
    advice = r"^target='A' does not .* Drop the white space at the end of the text, .*target=' A'"
    with pytest.raises(ValueError, match=advice):
        answer_ids(tokenizer, "A ", "A", "target")
    assert answer_ids(tokenizer, "A", " A", "target") == (5,)
    with pytest.raises(ValueError, match="End the text elsewhere, or give token ids"):
        answer_ids(tokenizer, "A", " B", "target")


def test_episodes_are_warned_of_once(tiny_llama: Model) -> None:
    young = WordPairTask("young", (("pig", "piglet"), ("hen", "chick"), ("cat", "kitten")))
    with pytest.warns(TokenWarning, match="1 of 3 answers .*'piglet' like 'pig'") as told:
        prompts = write_episodes(
            tiny_llama.tokenizer, young.episodes(3, shots=1, seed=1), template=TIGHT
        )
    assert len(told) == 1 and [p.ambiguous for p in prompts].count(True) == 1
    assert [p.target_tokens for p in prompts] == [p.candidate_tokens[0] for p in prompts]
    assert {tiny_llama.tokenizer.decode(p.target_tokens) for p in prompts} == {
        "piglet",
        "chick",
        "kitten",
    }


def test_first_tokens_that_say_little_are_announced_and_marked(tiny_llama: Model) -> None:
    words = [("q", "12"), ("r", "13"), ("s", "14"), ("t", "15")]
    alike = WordPairTask("alike", tuple(words))
    with pytest.warns(TokenWarning, match="3 of 3 answers .*: '12' like '13' .'1'.") as told:
        prompts = alike.prompts(tiny_llama.tokenizer, 3, shots=2, template=TIGHT)
    assert len(told) == 1 and "score_answers" in str(told[0].message)
    frame = sl.read(prompts, "logit", model=tiny_llama, layers=[1, 4]).to_frame()
    assert frame["ambiguous"].all() and len(frame) == 6
    some = WordPairTask("some", (*words[:2], ("s", "24"), ("t", "35")))
    with pytest.warns(TokenWarning, match="2 of 4 answers"):
        prompts = some.prompts(tiny_llama.tokenizer, 4, shots=2, template=TIGHT)
    frame = sl.read(prompts, "logit", model=tiny_llama, layers=4).to_frame()
    assert (frame["ambiguous"] == (frame["target"] == "1")).all() and frame["ambiguous"].sum() == 2
    with pytest.warns(TokenWarning, match=r"1 of 1 answers .*: 'cats' like 'cat' \('c'\)"):
        prompt = few_shot_prompt(
            tiny_llama.tokenizer, [("a", "xs")], "cat", answer="cats", template=TIGHT
        )
    everywhere = sl.read(prompt, "logit", model=tiny_llama, layers=4, positions="all").to_frame()
    assert everywhere["ambiguous"].tolist() == [False] * (len(prompt) - 1) + [True]
