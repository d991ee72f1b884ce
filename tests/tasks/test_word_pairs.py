"""Word-pair tasks: facts that are whole, prompts fixed by their seed, files read or refused."""

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from spade_lens.prompts import Template
from spade_lens.tasks import WordPairTask, task, task_names
from spade_lens.tasks.resolve import task as make_task

NAMES = [
    "antonym",
    "capitalize",
    "country-capital",
    "english-french",
    "present-past",
    "singular-plural",
]

# --- the tasks that come with the library -------------------------------------------------------


def test_names_are_those_of_the_brief() -> None:
    assert task_names("pairs") == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_task_is_large_clean_and_described(name: str) -> None:
    found = task(name)
    assert found.name == name
    assert found.description.endswith(".")
    assert len(found.pairs) >= 60
    assert len({given for given, _ in found.pairs}) == len(found.pairs)
    assert all(given != output for given, output in found.pairs)


@pytest.mark.parametrize(
    ("name", "given", "output"),
    [
        ("country-capital", "Japan", "Tokyo"),
        ("present-past", "go", "went"),
        ("singular-plural", "mouse", "mice"),
        ("antonym", "hot", "cold"),
        ("capitalize", "apple", "Apple"),
        ("english-french", "star", "étoile"),
    ],
)
def test_task_knows_its_rule(name: str, given: str, output: str) -> None:
    assert dict(task(name).pairs)[given] == output


def test_capitalize_keeps_its_rule_everywhere() -> None:
    assert all(output == given.capitalize() for given, output in task("capitalize").pairs)


# --- sampling -----------------------------------------------------------------------------------

SMALL = WordPairTask("small", tuple((f"in{i}", f"out{i}") for i in range(7)))


@pytest.mark.parametrize("shots", [0, 1, 6])
def test_demonstrations_are_distinct_and_without_the_query(shots: int) -> None:
    for shown, query in SMALL.sample(50, shots=shots, seed=1):
        assert len(set(shown)) == shots
        assert query not in shown


def test_queries_cycle_without_repetition() -> None:
    queries = [query for _, query in SMALL.sample(21, shots=2)]
    for cycle in range(3):
        assert sorted(queries[7 * cycle : 7 * cycle + 7]) == sorted(SMALL.pairs)
    assert queries[:7] != queries[7:14]


@pytest.mark.parametrize(
    ("left", "right"),
    [
        pytest.param(
            SMALL.sample(20, shots=3)[:9], SMALL.sample(9, shots=3), id="n changes nothing"
        ),
        pytest.param(
            [(shown[:2], query) for shown, query in SMALL.sample(9, shots=6)],
            SMALL.sample(9, shots=2),
            id="more shots extend fewer",
        ),
        pytest.param(
            WordPairTask("small", SMALL.pairs, "other words").sample(9, shots=3),
            SMALL.sample(9, shots=3),
            id="the description takes no part",
        ),
    ],
)
def test_same_prompts(left: Any, right: Any) -> None:
    assert left == right


@pytest.mark.parametrize(
    "other",
    [
        pytest.param(SMALL.sample(9, shots=3, seed=1), id="seed"),
        pytest.param(WordPairTask("large", SMALL.pairs).sample(9, shots=3), id="name"),
    ],
)
def test_other_prompts(other: Any) -> None:
    assert other != SMALL.sample(9, shots=3)


def test_prompts_stay_the_same_between_processes_and_versions() -> None:
    drawn = [(query[0], [i for i, _ in shown]) for shown, query in SMALL.sample(3, shots=3)]
    assert drawn == [
        ("in4", ["in6", "in1", "in5"]),
        ("in3", ["in4", "in0", "in2"]),
        ("in5", ["in0", "in2", "in6"]),
    ]


def test_prompts_are_those_of_the_sample() -> None:
    vocabulary = [w for pair in SMALL.pairs for w in pair]
    ids = {w: i for i, w in enumerate(["<s>", "<unk>", "->", *vocabulary])}
    built = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    built.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=built, bos_token="<s>")
    prompts = SMALL.prompts(tokenizer, 4, shots=2)
    drawn = SMALL.sample(4, shots=2)
    assert [p.text for p in prompts] == [Template().text(shown, q[0]) for shown, q in drawn]
    assert [p.target for p in prompts] == [ids[q[1]] for _, q in drawn]


# --- a user's own pairs -------------------------------------------------------------------------

OWN = (("one", "un"), ("sea, open", "mer"))


@pytest.mark.parametrize(
    ("file", "content", "name"),
    [
        (
            "a.json",
            '[{"input": "one", "output": "un"}, {"input": "sea, open", "output": "mer"}]',
            "a",
        ),
        ("a.json", '[["one", "un"], ["sea, open", "mer"]]', "a"),
        ("a.json", '{"one": "un", "sea, open": "mer"}', "a"),
        ("a.json", '{"name": "b", "pairs": [["one", "un"], ["sea, open", "mer"]]}', "b"),
        ("a.csv", 'input,output\none,un\n"sea, open",mer\n', "a"),
        ("a.CSV", '\ufeffoutput, note, input\r\nun,, one\r\nmer, wet, "sea, open"\r\n', "a"),
    ],
)
def test_from_file(tmp_path: Path, file: str, content: str, name: str) -> None:
    (tmp_path / file).write_bytes(content.encode())
    found = task(tmp_path / file)
    assert (found.name, found.pairs) == (name, OWN)
    assert task(str(tmp_path / file), name="mine").name == "mine"


def test_pairs_take_every_form_and_a_task_is_hashable() -> None:
    mapping = {"input": "sea, open", "output": "mer"}
    found = make_task({"pairs": [["one", "un"], mapping], "description": "Words."}, name="a")
    assert found == WordPairTask("a", OWN, "Words.")
    assert hash(found) == hash(WordPairTask("a", OWN, "Words."))


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        (
            "a.csv",
            "country,capital\nFrance,Paris\n",
            "found the columns 'capital', 'country'; expected 'input' and 'output'",
        ),
        ("a.csv", "", "has no pairs"),
        ("a.csv", "input,output\none,un\ntwo\n", "line 3 has fewer cells than the 2 columns"),
        ("a.csv", "input,output\nsea, open,mer\n", "line 2 has more cells than the 2 columns"),
        (
            "a.csv",
            'input,output\n"one,un\n',
            ".csv file (line 2: unexpected end of data)",
        ),
        ("a.csv", "input,output\n", "has no pairs"),
        ("a.csv", "input,output\none,un\none,une\n", "occur twice: 'one'"),
        ("a.csv", "input,output,input\none,un,1\n", "line 1 names the columns"),
        ("a.csv", "input,output,\none,un,\n", "line 1 names the columns"),
        ("a.csv", "input,output\none,un\n ,deux\n", "line 3 has nothing in 'input'"),
        ("a.csv", "input,output\none,un\x00\n", "line 2 holds a NUL"),
        ("a.csv", "input,output\none,un\n\ufefftwo,deux\n", "line 3 holds a byte-order mark"),
        ("a.csv", 'input,output\n"sea\u2028a",mer,x\n', "line 2 has more cells"),
        ("a.json", '{"one": "un",\n"two": "deux",\n"one": "une"}', "'one' occurs twice, in line 3"),
        (
            "a.json",
            '[{"input": "a", "input": "b", "output": "c"}]',
            "'input' occurs twice",
        ),
        ("a.jsonl", '["a", "b"]\n{"input": "a",', "line 2: "),
        ("a.jsonl", '["a", "b"]\n{"input": "a", "input": "b"}', "'input' occurs twice, in line 2"),
        ("a.jsonl", '{"input": "a", "output": ""}', "line 1 has nothing in 'output'"),
        ("a.json", '[{"input": "a", "output": null}]', "row 1 has nothing in 'output'"),
        ("a.json", "[", "not a valid .json file"),
        ("a.json", "{}", "has no pairs"),
        ("a.json", '{"one": 1}', "the output must be a text that is not empty, got 1"),
        ("a.json", '[["a", "b"], {"in": "one", "output": "un"}]', "pair 1: no 'input' in"),
        ("a.json", '["on"]', "expected (input, output) or a mapping, got 'on'"),
        ("a.json", '[["one", "un", "une"]]', "expected (input, output) or a mapping, got ["),
        ("a.json", '[["one", 1]]', "the output must be a text that is not empty, got 1"),
        ("a.json", '[["one", " un"]]', "the output ' un' has white space around it"),
        ("a.json", r'[["one", "u\ud800"]]', "has control characters, or nothing to see"),
        ("a.json", r'[["one\u0000", "un"]]', "has control characters, or nothing to see"),
        (
            "a.csv",
            "input,output\n\u200b,un\n",
            "has control characters, or nothing to see",
        ),
        ("a.json", '{"pairs": [["a", "b"]], "classes": {"x": ["a"]}}', "expected 'pairs' or 'cla"),
        ("a.json", '{"classes": {"x": ["a"], "y": ["b"]}, "labels": ["A", "B"]}', "'labels'; exp"),
        ("a.json", '{"name": "n", "description": "d"}', "expected 'pairs' or 'classes'"),
        ("a.json", '[{"input": "a", "class": "x"}, {"input": "b"}]', "row 2 is {'input': 'b'}"),
        ("a.json", '[{"input": "a", "class": ["x"]}]', "row 1 is {"),
        (
            "a.json",
            '[{"input": "a", "class": 1}, {"input": "b", "class": "1"}]',
            "row 2 has the class '1'",
        ),
        ("a.csv", "question\nwhy\n", "row 1 has no 'answer'"),
        ("a.jsonl", '{"question": "q", "answer": 0, "options": 3}', "options must be a list of"),
        ("a.txt", "one un", "'.txt' cannot be read; expected one of .json"),
    ],
)
def test_bad_file_is_refused(tmp_path: Path, file: str, content: str, message: str) -> None:
    (tmp_path / file).write_text(content, encoding="utf-8")
    with pytest.raises(ValueError) as error:
        task(tmp_path / file)
    assert message in str(error.value)


def test_words_may_be_called_as_the_keys_of_a_description(tmp_path: Path) -> None:
    file = tmp_path / "french.json"
    file.write_text('{"name": "nom", "pairs": "paires", "dog": "chien"}')
    found = task(file)
    assert found.name == "french" and found.pairs[0] == ("name", "nom") and len(found.pairs) == 3


def test_other_encodings_and_no_file_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes("input,output\nstar,étoile\n".encode("latin-1"))
    with pytest.raises(ValueError, match="Save it as UTF-8"):
        task(tmp_path / "a.csv")
    with pytest.raises(FileNotFoundError, match="absent.csv"):
        task(tmp_path / "absent.csv")


# --- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("country-capitals", "Did you mean 'country-capital'"),
        ("Present_Past", "Did you mean 'present-past'?"),
        ("zzz", "There is no task 'zzz'. The tasks are antonym, capitalize,"),
    ],
)
def test_unknown_task_offers_the_nearest(name: str, message: str) -> None:
    with pytest.raises(ValueError) as error:
        task(name)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"n": 0}, "n=0 was given; expected a whole number, 1 or more"),
        ({"n": -2}, "n=-2"),
        ({"n": 1, "shots": -1}, "shots=-1"),
        ({"n": 1, "shots": 7}, "shots=7 needs 8 pairs with the query, but task 'small' has 7"),
        ({"n": 1, "shots": 2, "seed": -1}, "seed=-1"),
    ],
)
def test_bad_sampling_is_refused_before_tokenising(asked: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError) as error:
        SMALL.prompts(None, **asked)
    assert message in str(error.value)
