"""Rule tasks and episodes: balance, seeds, spans for the real tokenizer, controls, bad input."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from spade_lens import Model
from spade_lens.prompts import Template
from spade_lens.tasks import Episode, RuleTask, WordPairTask, task, task_names
from spade_lens.tasks.categories import category

ALL = [*task_names("rule"), "animal/country", "country/vehicle", "fruit/number"]
SMALL = RuleTask("small", {"x": tuple("abcdefgh"), "y": tuple("ijklmnop")})
TIGHT = Template(pair="{input}>{output}", query="{input}>", separator=";")

# --- the tasks that come with the library -------------------------------------------------------


def test_categories_are_large_and_share_no_word() -> None:
    names = task_names("category")
    words = [word.lower() for name in names for word in category(name)]
    assert all(len(category(name)) >= 40 for name in names)
    assert len(set(words)) == len(words)


@pytest.mark.parametrize("name", ALL)
def test_task_is_large_and_described(name: str) -> None:
    found = task(name)
    assert (found.name, len(found.classes)) == (name, 2)
    assert found.description.endswith(".")
    assert all(len(words) >= 40 for words in found.classes.values())


@pytest.mark.parametrize(
    ("name", "given", "kind"),
    [
        ("string-length", 5, "short"),
        ("string-length", 6, "long"),
        ("number-parity", "37", "odd"),
        ("number-size", "548", "low"),
        ("number-size", "550", "high"),
        ("first-letter", "monkey", "a-m"),
        ("first-letter", "nurse", "n-z"),
        ("vowel-count", "dog", "few"),
        ("vowel-count", "elephant", "many"),
    ],
)
def test_task_knows_its_rule(name: str, given: Any, kind: str) -> None:
    of = {w: key for key, words in task(name).classes.items() for w in words}
    found = {key for w, key in of.items() if given in (w, len(w))}
    assert found == {kind}


# --- drawing ------------------------------------------------------------------------------------


def class_of(task: RuleTask, word: str) -> str:
    return next(key for key, words in task.classes.items() if word in words)


@pytest.mark.parametrize("name", ALL)
def test_labels_follow_the_rule_and_classes_are_balanced(name: str) -> None:
    found = task(name)
    for episode in found.episodes(12, shots=6, seed=2):
        inputs = [given for given, _ in episode.demonstrations]
        queries = [e.query for e in episode.every_class()]
        assert len({*inputs, *queries}) == 8
        label = {class_of(found, given): out for given, out in episode.demonstrations}
        assert sorted(label.values()) == ["A", "B"]
        assert all(label[class_of(found, g)] == out for g, out in episode.demonstrations)
        for asked in (*episode.every_class(), *episode.opposite().opposite().every_class()):
            assert label[class_of(found, asked.query)] == asked.answer
        assert sorted(e.answer for e in episode.every_class()) == ["A", "B"]
        for pair in range(3):
            assert len({out for _, out in episode.demonstrations[2 * pair : 2 * pair + 2]}) == 2


def test_every_class_is_asked_under_every_mapping_equally_often() -> None:
    episodes = SMALL.episodes(40, shots=2)
    assert set(Counter((class_of(SMALL, e.query), e.answer) for e in episodes).values()) == {10}
    three = RuleTask("three", {"x": ("a", "b"), "y": ("c", "d"), "z": ("e", "f")})
    drawn = three.episodes(90, shots=3)
    assert set(Counter((class_of(three, e.query), e.answer) for e in drawn).values()) == {10}
    assert len({e.rule for e in drawn}) == 6


def test_fixed_mapping_and_own_labels() -> None:
    episodes = replace(SMALL, labels=("yes", "no"), mapping="fixed").episodes(8, shots=4)
    assert {e.rule for e in episodes} == {"x: yes, y: no"}
    assert {e.choices for e in episodes} == {("yes", "no")}


def test_unbalanced_demonstrations_differ_in_number() -> None:
    counts = {
        sum(out == "A" for _, out in e.demonstrations)
        for e in replace(SMALL, balance=False).episodes(60, shots=4)
    }
    assert len(counts) > 2


@pytest.mark.parametrize(
    ("left", "right"),
    [
        pytest.param(SMALL.episodes(20, shots=3)[:9], SMALL.episodes(9, shots=3), id="n"),
        pytest.param(
            [e.first(2) for e in SMALL.episodes(9, shots=7)], SMALL.episodes(9, shots=2), id="shots"
        ),
        pytest.param(
            [e.query for e in SMALL.episodes(9, shots=5)],
            [e.query for e in SMALL.episodes(9, shots=0)],
            id="zero shots",
        ),
    ],
)
def test_same_episodes(left: Any, right: Any) -> None:
    assert left == right


def test_other_seed_other_episodes() -> None:
    assert SMALL.episodes(9, shots=3, seed=1) != SMALL.episodes(9, shots=3)


@pytest.mark.parametrize("name", task_names("pairs"))
def test_knowledge_has_a_foil_that_begins_otherwise(name: str) -> None:
    for episode in task(name).episodes(20, shots=8):
        assert episode.foil[0].lower() != episode.answer[0].lower()
        assert episode.foil not in {out for _, out in episode.demonstrations}
        assert episode.choices == (episode.answer, episode.foil)


# --- relatives of an episode --------------------------------------------------------------------


def test_opposite_flips_everything() -> None:
    for episode in SMALL.episodes(8, shots=4):
        flipped = episode.opposite()
        assert flipped.answer != episode.answer
        for (given, out), (same, other) in zip(
            episode.demonstrations, flipped.demonstrations, strict=True
        ):
            assert given == same and {out, other} == {"A", "B"}
        assert flipped.opposite().demonstrations == episode.demonstrations


@pytest.mark.parametrize("shots", [2, 4, 7, 8])
def test_shuffled_labels_say_nothing_of_the_rule(shots: int) -> None:
    for seed, episode in enumerate(SMALL.episodes(20, shots=shots)):
        shuffled = episode.shuffled(seed)
        assert [g for g, _ in shuffled.demonstrations] == [g for g, _ in episode.demonstrations]
        pairs = zip(episode.demonstrations, shuffled.demonstrations, strict=True)
        kept = sum(before == after for before, after in pairs)
        assert abs(2 * kept - shots) <= 2
        assert shuffled == episode.shuffled(seed)


def test_shuffled_knowledge_keeps_no_output() -> None:
    for seed, episode in enumerate(task("antonym").episodes(10, shots=5)):
        before = [out for _, out in episode.demonstrations]
        after = [out for _, out in episode.shuffled(seed).demonstrations]
        assert sorted(before) == sorted(after)
        assert all(one != other for one, other in zip(before, after, strict=True))


def test_dummy_and_zero_shot() -> None:
    episode = SMALL.episodes(1, shots=3)[0]
    assert episode.dummy(("u", "v"), ("A", "B")).demonstrations == (
        ("u", "A"),
        ("v", "B"),
        ("u", "A"),
    )
    assert episode.dummy().answer == episode.answer
    assert episode.zero_shot() == episode.first(0)


# --- prompts ------------------------------------------------------------------------------------


@pytest.mark.download
@pytest.mark.parametrize("name", ALL)
def test_spans_decode_back_to_the_words(smollm2: Model, name: str) -> None:
    tokenizer = smollm2.tokenizer
    labels = {" A", " B"}
    for form in (Episode.opposite, Episode.shuffled, Episode.dummy, Episode.zero_shot):
        for drawn in task(name).episodes(6, shots=5, seed=1):
            for episode in (drawn, form(drawn)):
                prompt = episode.prompt(tokenizer)

                def read(span: str, prompt: Any = prompt) -> str:
                    return tokenizer.decode([prompt.tokens[p] for p in prompt.spans[span]])

                assert read("query").strip() == episode.query
                for i, (given, out) in enumerate(episode.demonstrations):
                    assert read(f"demo{i}/input").strip() == given
                    assert read(f"demo{i}/output").strip() == out
                    last = prompt.spans["labels"][i]
                    assert tokenizer.decode([prompt.tokens[last]]).strip() == out
                assert {tokenizer.decode([c]) for c in prompt.candidates} == labels
                assert tokenizer.decode([prompt.target]) == f" {episode.answer}"


def test_tiny_prompts(tiny_llama: Model) -> None:
    prompts = SMALL.prompts(tiny_llama.tokenizer, 4, shots=2, template=TIGHT)
    for prompt, episode in zip(prompts, SMALL.episodes(4, shots=2), strict=True):
        assert tiny_llama.tokenizer.decode(prompt.tokens[1:]) == prompt.text
        words = [tiny_llama.tokenizer.decode([c]) for c in prompt.candidates]
        assert words == ["A", "B"]
        assert words[prompt.candidates.index(prompt.target)] == episode.answer


# --- a user's own task --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "content", "name"),
    [
        ("a.json", '{"x": ["one", "two"], "y": ["sea"]}', "a"),
        ("a.json", '{"name": "b", "classes": {"x": ["one", "two"], "y": ["sea"]}}', "b"),
        ("a.csv", "input,class\none,x\nsea,y\ntwo,x\n", "a"),
        ("a.csv", "\ufeffclass, note, input\r\nx,, one\r\nx,, two\r\ny, wet, sea\r\n", "a"),
    ],
)
def test_from_file(tmp_path: Path, file: str, content: str, name: str) -> None:
    (tmp_path / file).write_bytes(content.encode())
    found = task(tmp_path / file)
    assert found == RuleTask(name, {"x": ("one", "two"), "y": ("sea",)})
    assert hash(found) == hash(RuleTask(name, {"x": ("one", "two"), "y": ("sea",)}))


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("a.csv", "word,class\none,x\n", "found the columns 'class', 'word'; expected"),
        ("a.csv", "input,class\none,x\n", "rule needs two at least"),
        ("a.json", "[", "not a valid .json file"),
        ("a.json", '["one"]', "got 'one'"),
        (
            "a.json",
            '{"x": ["one"], "y": "two"}',
            "'y' of task 'a' is 'two'; expected several inputs",
        ),
        ("a.json", '{"x": ["one"], "y": ["one"]}', "the input 'one' twice, in 'x' and 'y'"),
        ("a.json", '{"x": ["one"], "y": [" two"]}', "the input ' two'; expected"),
        ("a.json", '{"x": ["one"], "y": []}', "Class 'y' of task 'a' has no inputs"),
        ("a.txt", "one", "'.txt' cannot be read; expected one of .json"),
    ],
)
def test_bad_file_is_refused(tmp_path: Path, file: str, content: str, message: str) -> None:
    (tmp_path / file).write_text(content, encoding="utf-8")
    with pytest.raises(ValueError) as error:
        task(tmp_path / file)
    assert message in str(error.value)


# --- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"n": 0}, "n=0 was given; expected a whole number, 1 or more"),
        ({"n": 1, "shots": -1}, "shots=-1"),
        ({"n": 1, "seed": -1}, "seed=-1"),
        ({"n": 1, "shots": 15}, "may need 9 inputs of a class .* {'x': 8, 'y': 8}"),
    ],
)
def test_bad_drawing_is_refused(asked: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SMALL.episodes(**asked)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"labels": ("A",)}, "at least two, all distinct"),
        ({"labels": ("A", "A")}, "at least two, all distinct"),
        ({"labels": ("A", "B", "C")}, "2 classes .* one label for each"),
        ({"labels": (" A", " B")}, "white space around them"),
        ({"mapping": "random"}, "mapping='random' was given"),
    ],
)
def test_bad_labels_are_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **changed)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("string_lenght", "Did you mean 'string-length'"),
        ("animals/country", "Did you mean 'animal'"),
        ("zzz", "There is no task 'zzz'. The tasks are .*first-letter"),
    ],
)
def test_unknown_task_offers_the_nearest(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        task(name)


def test_bad_labels_for_the_tokenizer_are_refused(tiny_llama: Model) -> None:
    tokenizer = tiny_llama.tokenizer
    with pytest.raises(ValueError, match="'Aa' is not a single token .* but 2: "):
        replace(SMALL, labels=("Aa", "B")).prompts(tokenizer, 1, shots=2, template=TIGHT)
    # The tiny tokenizer knows no space, so each label would begin with the unknown token.
    with pytest.raises(ValueError, match="'A' is not a single token"):
        SMALL.prompts(tokenizer, 1, shots=2)
    pair = Episode("t", (), "a", "xy", foil="xz")
    with pytest.raises(ValueError, match="not distinct"):
        pair.prompt(tokenizer, template=TIGHT)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Episode("t", (("a", "A"),), "a", "A", labels=("A", "B")), "among its own demon"),
        (
            lambda: Episode(
                "t", (("a", "A"),), "b", "A", labels=("A", "B"), contrast=(("a", "B"),)
            ),
            "query 'a' of task 't' stands among",
        ),
        (lambda: Episode("t", (), "a", "C", labels=("A", "B")), "'C' of task 't' is none of its"),
        (lambda: Episode("t", (), "a", "b"), "needs a wrong answer"),
        (lambda: Episode("t", (), "a", "b", foil="b"), "needs a wrong answer"),
        (lambda: Episode("t", (), "a", "b", foil="c").opposite(), "has no labels"),
        (lambda: Episode("t", (("x", "y"),), "a", "b", foil="c").shuffled(), "at least two"),
        (
            lambda: Episode("t", (("x", "y"),), "a", "b", foil="c").first(2),
            r"shots=\[2\] was given",
        ),
        (lambda: Episode("t", (("x", "y"),), "a", "b", foil="c").dummy(("a",)), "'a' .* among its"),
        (lambda: Episode("t", (("x", "y"),), "a", "b", foil="c").dummy(()), "at least one input"),
        (
            lambda: WordPairTask("t", (("a", "x"), ("b", "xy"))).episodes(1, shots=1),
            "no output left",
        ),
    ],
)
def test_bad_episodes_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
