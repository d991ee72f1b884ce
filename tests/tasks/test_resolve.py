"""One way to a task: names, files, what is in memory, and a user's own."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import spade_lens as sl
from spade_lens.prompts import Template
from spade_lens.tasks import DecisionTask, Episode, RuleTask, Task, WordPairTask, task, task_names
from spade_lens.tasks.episodes import draw_episodes
from spade_lens.tasks.resolve import as_decisions, as_episodic

TIGHT = Template(pair="{input}>{output}", query="{input}>", separator=";")


class Upper:
    """A task of a user's own: a name and episodes, and nothing else."""

    name = "upper"

    def episodes(self, n: int, *, shots: int = 16, seed: int = 0) -> list[Episode]:
        letters = "abcdefgh"
        turned = [letters[(seed + i) % 8 :] + letters[: (seed + i) % 8] for i in range(n)]
        pairs = [tuple((c, c.upper()) for c in word) for word in turned]
        return [
            Episode("upper", shown[1 : 1 + shots], *shown[0], foil=shown[-1][1]) for shown in pairs
        ]


# --- names --------------------------------------------------------------------------------------


def test_a_name_means_one_task() -> None:
    counts = Counter([*task_names(), *task_names("category")])
    assert max(counts.values()) == 1
    assert task_names() == [*task_names("pairs"), *task_names("rule"), *task_names("decision")]


def test_every_kind_has_one_verb() -> None:
    assert isinstance(task("antonym"), WordPairTask)
    assert isinstance(task("string-length"), RuleTask)
    assert isinstance(task("animal/country/fruit"), RuleTask)
    assert task("antonym") is sl.task("antonym") is sl.tasks.task("antonym")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("antonyms", "no task 'antonyms'. Did you mean 'antonym'"),
        ("Present_Past", "Did you mean 'present-past'"),
        ("sst_2", "Did you mean 'sst2'"),
        ("string_lenght", "Did you mean 'string-length'"),
        ("animals/country", "no category 'animals'. Did you mean 'animal'"),
        ("", "There is no task ''"),
    ],
)
def test_an_unknown_name_offers_the_nearest_of_all_kinds(given: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        task(given)


def test_only_decisions_have_a_source(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="source='hub' was given for 'antonym'; only decisions"):
        task("antonym", source="hub")
    with pytest.raises(ValueError, match="kind='words' was given; expected one of pairs, rule"):
        task_names("words")


# --- files --------------------------------------------------------------------------------------

QUESTIONS = [{"question": f"is {i} odd", "answer": ["no", "yes"][i % 2]} for i in range(20)]


@pytest.mark.parametrize(
    ("file", "content", "kind"),
    [
        ("mine.csv", "input,output\none,un\ntwo,deux\n", WordPairTask),
        ("mine.csv", "input,class\none,x\ntwo,y\n", RuleTask),
        ("mine.csv", "question,answer\nis it,no\nwas it,yes\nhas it,no\n", DecisionTask),
        ("mine.json", '[["one", "un"], ["two", "deux"]]', WordPairTask),
        ("mine.json", '{"pairs": [["one", "un"]]}', WordPairTask),
        ("mine.json", '{"x": ["one"], "y": ["two"]}', RuleTask),
        ("mine.json", json.dumps(QUESTIONS), DecisionTask),
        ("mine.jsonl", "\n".join(map(json.dumps, QUESTIONS)), DecisionTask),
    ],
)
def test_a_file_is_the_task_that_its_columns_say(
    tmp_path: Path, file: str, content: str, kind: type
) -> None:
    (tmp_path / file).write_text(content)
    for path in (tmp_path / file, str(tmp_path / file)):
        found = task(path)
        assert type(found) is kind and found.name == "mine"
    assert task(tmp_path / file, name="other").name == "other"


def test_answers_without_options_are_the_labels(tmp_path: Path) -> None:
    (tmp_path / "odd.json").write_text(json.dumps(QUESTIONS))
    found = task(tmp_path / "odd.json")
    assert isinstance(found, DecisionTask)
    assert found.template.labels == ("no", "yes")
    query = found.splits["test"][0]
    assert found.template.text([], query) == f"Question: {query.question}\nAnswer:"
    assert found.template.right(query) == QUESTIONS[int(query.question.split()[1])]["answer"]
    assert task(QUESTIONS, name="odd").splits == found.splits  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        (
            "mine.csv",
            "word,label\none,un\n",
            "found the columns 'label', 'word'; expected 'input' and 'output' for word pairs",
        ),
        ("mine.txt", "one un", "'.txt' cannot be read; expected one of .json"),
        ("mine.json", "3", "expected pairs, classes or rows .* got 3"),
    ],
)
def test_a_file_of_no_kind_says_what_is_expected(
    tmp_path: Path, file: str, content: str, message: str
) -> None:
    (tmp_path / file).write_text(content)
    with pytest.raises(ValueError, match=message):
        task(tmp_path / file)
    with pytest.raises(FileNotFoundError, match="absent.csv"):
        task("absent.csv")


# --- memory -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([("one", "un"), ["two", "deux"]], WordPairTask("m", (("one", "un"), ("two", "deux")))),
        ({"one": "un", "two": "deux"}, WordPairTask("m", (("one", "un"), ("two", "deux")))),
        (zip("ab", "AB", strict=True), WordPairTask("m", (("a", "A"), ("b", "B")))),
        ({"x": ["one"], "y": ("two",)}, RuleTask("m", {"x": ("one",), "y": ("two",)})),
    ],
)
def test_what_is_in_memory(given: Any, expected: Any) -> None:
    assert task(given, name="m") == expected


def test_memory_needs_a_name_and_something_in_it() -> None:
    with pytest.raises(ValueError, match="task in memory needs a name"):
        task([("one", "un")])
    with pytest.raises(ValueError, match="has no pairs"):
        task([], name="m")


# --- from one kind to another -------------------------------------------------------------------


def test_word_pairs_become_decisions_and_others_say_why_not() -> None:
    assert as_decisions("antonym", shots=4).shots == 4
    assert as_decisions("antonym").splits == task("antonym").decisions().splits  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="RuleTask.'animal/country'.* has no train, calibration"):
        as_decisions("animal/country")
    with pytest.raises(ValueError, match="'sst2' is a decision task and has no episodes"):
        as_episodic("sst2")


# --- a user's own -------------------------------------------------------------------------------


def test_a_task_of_ones_own_works_everywhere(tiny_llama: sl.Model, tmp_path: Path) -> None:
    own = Upper()
    assert isinstance(own, Task) and task(own) is own and as_episodic(own) is own
    frame = sl.icl.accuracy_by_shots(
        tiny_llama, [own], n=4, shots=(0, 2), setup=sl.icl.PromptSetup(TIGHT)
    )
    assert set(frame["task"]) == {"upper"} and len(frame) == 8
    plan = sl.studies.IclPlan(own, "shots", samples=4, shots=2, template=TIGHT, out=tmp_path)
    assert plan.chosen_task is own and [e.query for e in plan.episodes] == list("abcd")


@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        (lambda n, shots: None, TypeError, "'broken' returned None from episodes"),
        (lambda n, shots: [("a", "b")] * n, TypeError, "expected a list of Episode"),
        (lambda n, shots: Upper().episodes(n + 1, shots=shots), ValueError, "3 episodes; exp"),
        (lambda n, shots: Upper().episodes(n, shots=1), ValueError, r"with \[1\] demonstrations"),
    ],
)
def test_what_a_task_of_ones_own_returns_is_checked(answer: Any, error: Any, message: str) -> None:
    class Broken:
        name = "broken"

        def episodes(self, n: int, *, shots: int = 16, seed: int = 0) -> Any:
            return answer(n, shots)

    with pytest.raises(error, match=message):
        draw_episodes(Broken(), 2, shots=3)
