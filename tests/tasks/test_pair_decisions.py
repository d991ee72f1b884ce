"""Word pairs as decisions: options that are none of the right answers, prompts to the token."""

import string
import warnings
from dataclasses import replace
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from spade_lens.models.catalogue import fetch_model_files
from spade_lens.prompts import few_shot_prompt
from spade_lens.prompts.few_shot import ARROW
from spade_lens.tasks import (
    DecisionTask,
    Example,
    SkippedExamplesWarning,
    WordPairTask,
    task,
    task_names,
)


def numbered(n: int, name: str = "numbered") -> WordPairTask:
    """Outputs of which no two begin alike."""
    letters = string.ascii_lowercase
    words = [f"{letters[i % 26]}{letters[i // 26]}{letters[i % 26]}s" for i in range(n)]
    return WordPairTask(name, tuple((f"in{i}", word) for i, word in enumerate(words)))


def examples(found: DecisionTask) -> dict[str, Example]:
    return {e.question: e for held in found.splits.values() for e in held}


def words_tokenizer(pairs: WordPairTask) -> Any:
    """Every word is a token together with the space before it, as byte-level BPE writes them."""
    words = dict.fromkeys(word for pair in pairs.pairs for word in (pair[0], f" {pair[1]}"))
    vocabulary = {t: i for i, t in enumerate(["<s>", "\n", " ->", *words])}
    built = Tokenizer(models.WordLevel(vocabulary, unk_token="<s>"))
    built.pre_tokenizer = pre_tokenizers.Split(Regex(r" ?\S+|\n"), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=built, bos_token="<s>")


# -- the options


@pytest.mark.parametrize("name", task_names("pairs"))
@pytest.mark.parametrize("n_options", [2, 8, 20])
def test_every_pair_is_asked_once_with_options_of_which_one_is_right(
    name: str, n_options: int
) -> None:
    pairs = dict(task(name).pairs)
    found = examples(task(name).decisions(with_input=False, n_options=n_options))
    assert found.keys() == pairs.keys()
    for given, example in found.items():
        assert example.options[example.answer] == pairs[given]
        assert len({option.casefold() for option in example.options}) == n_options
        assert set(example.options) <= set(pairs.values())


@pytest.mark.parametrize("name", task_names("pairs"))
def test_no_two_options_begin_alike_where_there_are_enough(name: str) -> None:
    for example in examples(task(name).decisions(with_input=False)).values():
        assert len({option.casefold()[:3] for option in example.options}) == 8


def test_options_that_begin_alike_are_taken_where_there_are_too_few() -> None:
    words = ["abc1", "abc2", "ABC3", "xyz1", "xyz2", "q"]
    alike = WordPairTask("alike", tuple((f"in{i}", word) for i, word in enumerate(words)))
    few = examples(alike.decisions(with_input=False, n_options=3, shots=1))
    for example in few.values():
        assert len({option.casefold()[:3] for option in example.options}) == 3
    for example in examples(alike.decisions(with_input=False, n_options=5, shots=1)).values():
        assert len({option.casefold()[:3] for option in example.options}) == 3
        assert len(set(example.options)) == 5


def test_no_option_is_another_right_answer() -> None:
    same = (("big", "small"), ("Big", "little"), ("huge", "Small"))
    shared = WordPairTask("shared", (*same, ("up", "down"), ("hot", "cold")))
    found = examples(shared.decisions(with_input=False, n_options=3, shots=0))
    assert {o.casefold() for o in found["big"].options} == {"small", "down", "cold"}
    assert {o.casefold() for o in found["Big"].options} == {"little", "down", "cold"}
    assert {o.casefold() for o in found["huge"].options} <= {"small", "little", "down", "cold"}
    assert found["huge"].options[found["huge"].answer] == "Small"


@pytest.mark.parametrize("name", task_names("pairs"))
def test_the_input_is_an_option_where_it_is_not_right(name: str) -> None:
    for given, example in examples(task(name).decisions()).items():
        assert len(set(example.options)) == 8
        right = example.options[example.answer]
        assert (given in example.options) and (right == dict(task(name).pairs)[given])
    same = WordPairTask("same", (("sheep", "sheep"), *numbered(12).pairs))
    options = examples(same.decisions(shots=2))["sheep"].options
    assert options.count("sheep") == 1


def test_options_depend_on_seed_name_and_input_alone() -> None:
    small = numbered(40)
    found = examples(small.decisions())
    split: dict[str, Any] = {"split_seed": 1, "shots": 2, "fractions": (0.4, 0.3, 0.3)}
    assert examples(small.decisions(**split)) == found
    turned = WordPairTask(small.name, small.pairs[::-1])
    assert examples(turned.decisions()) == found
    assert examples(small.decisions(seed=1)) != found
    assert examples(numbered(40, "other").decisions()) != found


def test_options_stay_the_same_between_processes_and_versions() -> None:
    found = examples(task("antonym").decisions(with_input=False, n_options=4))
    assert found["hot"] == Example("hot", 2, options=("finish", "weak", "cold", "nothing"))
    found = examples(task("antonym").decisions(n_options=4))
    assert found["hot"] == Example("hot", 2, options=("nothing", "finish", "cold", "hot"))


def test_the_right_answer_stands_everywhere() -> None:
    places = [e.answer for e in examples(numbered(100).decisions(n_options=4)).values()]
    assert all(10 <= places.count(place) <= 40 for place in range(4))


# -- splits and prompts


def test_splits_by_share_and_seed() -> None:
    found = numbered(50).decisions(shots=3)
    assert found.split_sizes() == {"train": 10, "calibration": 15, "test": 25}
    assert found.shots == 3 and found.name == "numbered"
    assert found.rates("test").chance == 1 / 8
    assert numbered(50).decisions().splits == found.splits
    assert numbered(50).decisions(split_seed=1).splits != found.splits
    other = numbered(50).decisions(fractions=(0.4, 0.2, 0.4))
    assert other.split_sizes() == {"train": 20, "calibration": 10, "test": 20}


def same_as_word_pairs(found: DecisionTask, tokenizer: Any, pairs: WordPairTask, n: int) -> None:
    """Every prompt is, token by token, that of its demonstrations and its query."""
    outputs = dict(pairs.pairs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SkippedExamplesWarning)
        prompts = found.prompts(tokenizer, n, split="calibration")
    train = {example.question for example in found.splits["train"]}
    for prompt in prompts:
        *lines, query = prompt.text.split("\n")
        shown = [tuple(line.split(" -> ")) for line in lines]
        query = query.removesuffix(" ->")
        assert len(shown) == found.shots and {given for given, _ in shown} <= train
        assert all(outputs[given] == output for given, output in shown)
        expected = few_shot_prompt(tokenizer, shown, query, answer=outputs[query])
        assert len(prompt.candidates) == len(set(prompt.candidates)) == 8
        assert replace(prompt, candidates=(), candidate_tokens=()) == expected


def test_the_lines_are_those_of_word_pairs() -> None:
    assert task("antonym").decisions().template.line == ARROW


def test_prompts_are_those_of_word_pairs() -> None:
    same_as_word_pairs(numbered(60).decisions(), words_tokenizer(numbered(60)), numbered(60), 18)


@pytest.fixture(scope="module")
def real_tokenizer() -> Any:
    path = fetch_model_files("smollm2-135m-instruct")[0]
    return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


@pytest.mark.download
@pytest.mark.parametrize("name", task_names("pairs"))
def test_prompts_are_those_of_word_pairs_with_a_real_tokenizer(
    real_tokenizer: Any, name: str
) -> None:
    found = task(name).decisions()
    # At most a tenth has options that begin with the same token.
    n = round(0.9 * found.split_sizes()["calibration"])
    same_as_word_pairs(found, real_tokenizer, task(name), n)


# -- errors


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"n_options": 1}, "n_options=1: a decision takes at least two"),
        ({"n_options": 42}, "n_options=42: task 'numbered' has 39 other outputs for 'in0'. Ask fo"),
        ({"shots": -1}, "shots=-1"),
        ({"seed": -1}, "seed=-1"),
        ({"split_seed": -1}, "split_seed=-1"),
        ({"shots": 9}, "shots=9: of the 40 pairs of task 'numbered' only 8 are for demonstrations"),
        ({"fractions": (0.001, 0.4, 0.599)}, "needs examples in each of the splits train, calib"),
        ({"fractions": (0.0, 0.5, 0.5)}, "give three positive numbers"),
    ],
)
def test_what_cannot_be_is_refused(how: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        numbered(40).decisions(**how)
    assert message in str(error.value)
