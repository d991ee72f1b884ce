"""Files that are damaged, foreign or cannot be written give a message of ours, for every result."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

import spade_lens as sl
from spade_lens.checks import visible
from spade_lens.exits import ExitTable, ExitTrace, FixedLayer, exit_tables
from spade_lens.icl import PatchSweep, RuleVectors
from spade_lens.lenses import Readout, load_lens
from spade_lens.lenses.linear import AffineMaps, TunedLens
from spade_lens.lenses.patched import Patched
from spade_lens.models.residuals import Residuals
from spade_lens.storage.checkpoint import Checkpoint
from spade_lens.storage.files import as_path, file_stem, output_folder, write_csv, write_json
from spade_lens.storage.parts import in_parts

CPU = torch.device("cpu")
PROMPTS = [sl.Prompt((1, 5, 9, 4), candidates=(3, 4)), sl.Prompt((1, 7, 6), candidates=(3, 4))]

Kind = tuple[Callable[[sl.Model, Path], Any], Callable[[Path, sl.Model], Any], str, str]


def _table(model: sl.Model) -> ExitTable:
    return exit_tables(model, PROMPTS, "logit", layers=[1, 2])[0]


def _sweep(path: Path) -> Path:
    row: dict[str, Any] = {"task": "t", "condition": "own", "layer": 1, "prompt": 0}
    frame = pd.DataFrame([row | {"correct": True, "prefers": False, "logit_diff": 0.5}] * 40)
    return PatchSweep(frame, {"model": {"name": "m"}}).save(path)


def _patched(model: sl.Model) -> Patched:
    return sl.patch(PROMPTS, [sl.Patch(1, positions="last", values=torch.ones(32))], model=model)


KINDS: dict[str, Kind] = {
    # How it is saved and loaded, and the names of its JSON and of the other file.
    "residuals": (
        lambda model, at: sl.capture(model, PROMPTS).save(at),
        lambda at, _: Residuals.load(at),
        "residuals.json",
        "residuals.safetensors",
    ),
    "readout": (
        lambda model, at: sl.read(PROMPTS, model=model).save(at),
        lambda at, _: Readout.load(at),
        "readout.json",
        "readout.safetensors",
    ),
    "patched": (
        lambda model, at: _patched(model).save(at),
        lambda at, _: Patched.load(at),
        "patched.json",
        "patched.safetensors",
    ),
    "table": (
        lambda model, at: _table(model).save(at),
        lambda at, _: ExitTable.load(at),
        "table.json",
        "table.safetensors",
    ),
    "trace": (
        lambda model, at: _table(model).simulate(FixedLayer(1)).save(at),
        lambda at, _: ExitTrace.load(at),
        "trace.json",
        "trace.safetensors",
    ),
    "lens": (
        lambda model, at: TunedLens(model, AffineMaps.identity(range(4), 32)).save(at),
        lambda at, model: load_lens(at, model),
        "lens.json",
        "lens.safetensors",
    ),
    "vectors": (
        lambda model, at: RuleVectors(torch.ones(2, 1, 3, 32), model=model).save(
            at / "v.safetensors"
        ),
        lambda at, model: RuleVectors.load(at / "v.safetensors", model),
        "v.json",
        "v.safetensors",
    ),
    "sweep": (
        lambda _, at: _sweep(at / "s.csv"),
        lambda at, _: PatchSweep.load(at / "s.csv"),
        "s.json",
        "s.csv",
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_result_says_what_is_wrong_with_its_files(
    tiny_llama: sl.Model, tmp_path: Path, kind: str
) -> None:
    save, load, *names = KINDS[kind]

    def refused(what: str) -> None:
        with pytest.raises(ValueError, match=r"again|give|expected|other|damaged"):
            load(tmp_path, tiny_llama)
            pytest.fail(f"{kind} was loaded though its files were {what}")

    save(tiny_llama, tmp_path)
    load(tmp_path, tiny_llama)
    whole = {name: (tmp_path / name).read_bytes() for name in names}
    for name, content in whole.items():
        path = tmp_path / name
        path.unlink()
        with pytest.raises(FileNotFoundError, match=f"no {name} in"):
            load(tmp_path, tiny_llama)
        path.mkdir()
        with pytest.raises(FileNotFoundError, match=f"no {name} in"):
            load(tmp_path, tiny_llama)
        path.rmdir()
        junk = (b"", content[: len(content) // 2], content[:-3], b"\xff\x00" * 20, b"[" * 100_000)
        for wrong in (*junk, b"{}", b"[1]", b"null", b'{"kind": 3, "format": {}}'):
            path.write_bytes(wrong)
            refused(f"{name} with {wrong[:10]!r}")
        path.write_bytes(content)

    text = json.loads(whole[names[0]])
    path = tmp_path / names[0]
    for key in [key for key in text if key not in ("versions", "packages")]:
        for value in (None, 7, "word", [], {}, [{}], {"0": [1.5]}):
            # An empty list of prompts or rules, or another word for a name, is a value too.
            if key in ("task", "name", "prompts", "rules") or type(value) is type(text[key]):
                continue
            path.write_text(json.dumps(text | {key: value}))
            refused(f"{key} = {value!r}")
        path.write_text(json.dumps({k: v for k, v in text.items() if k != key}))
        refused(f"without {key}")
    if "format" in text:
        path.write_text(json.dumps(text | {"format": text["format"] + 1}))
        refused("of a newer format")
    path.write_bytes(whole[names[0]])
    load(tmp_path, tiny_llama)


def test_a_record_with_a_field_of_another_type_is_refused(
    tiny_llama: sl.Model, tmp_path: Path
) -> None:
    path = sl.read(PROMPTS, model=tiny_llama).save(tmp_path) / "readout.json"
    text = json.loads(path.read_text())
    for field, value in (("layers", [0.5]), ("lenses", "spade"), ("model", 3), ("words", ["a"])):
        wrong = text | {"fields": text["fields"] | {field: value}}
        path.write_text(json.dumps(wrong))
        with pytest.raises(ValueError, match=r"readout\.json.*again"):
            Readout.load(tmp_path)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "sweep"])
def test_not_a_single_digit_of_the_json_can_change(
    tiny_llama: sl.Model, tmp_path: Path, kind: str
) -> None:
    save, load, name, _ = KINDS[kind]
    save(tiny_llama, tmp_path)
    path = tmp_path / name
    text = path.read_text()
    digits = [m.start() for m in re.finditer(r"\d", text)]
    for at in digits[:: max(1, len(digits) // 12)]:
        path.write_text(text[:at] + str(9 - int(text[at])) + text[at + 1 :])
        with pytest.raises(ValueError, match=r"again|other"):
            load(tmp_path, tiny_llama)
            pytest.fail(f"{kind} was loaded with another digit at {at}")


def test_a_checkpoint_with_another_number_is_set_aside(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path, {"seed": 0})
    checkpoint.save("fit", {"b": torch.zeros(2), "a": torch.ones(2)}, now=True)
    assert checkpoint.load("fit", CPU) is not None
    path = tmp_path / "unfinished-fit.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.warns(UserWarning, match="not those that were written.*set aside"):
        assert checkpoint.load("fit", CPU) is None


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[: len(content) // 2],
        lambda content: b"[]",
        lambda content: b'{"run": 1}',
        lambda content: content.replace(b"[", b"[1,", 1),
        lambda content: content.replace(b"0.1", b"0.2", 1),
    ],
)
def test_a_damaged_part_is_set_aside_and_made_again(
    tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    made = []

    def make(name: str) -> pd.DataFrame:
        made.append(name)
        return pd.DataFrame({"name": [name], "x": [0.1]})

    def run() -> pd.DataFrame:
        return in_parts(["a", "b"], make, folder=tmp_path, config={"seed": 0}, desc="")

    whole = run()
    part = tmp_path / "b.json"
    part.write_bytes(damage(part.read_bytes()))
    with pytest.warns(UserWarning, match=r"b\.json is damaged.*set aside as 'b\.json\.damaged'"):
        pd.testing.assert_frame_equal(run(), whole)
    assert made == ["a", "b", "b"] and (tmp_path / "b.json.damaged").is_file()
    pd.testing.assert_frame_equal(run(), whole)
    (tmp_path / "config.json").write_text("{")
    with pytest.warns(UserWarning, match=r"config\.json is damaged"):
        pd.testing.assert_frame_equal(run(), whole)
    assert made == ["a", "b", "b"]


def test_a_part_of_another_run_is_refused_even_without_the_folders_config(tmp_path: Path) -> None:
    frame = pd.DataFrame({"x": [1]})
    in_parts(["a"], lambda _: frame, folder=tmp_path, config={"seed": 0}, desc="")
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match="another run"):
        in_parts(["a"], lambda _: frame, folder=tmp_path, config={"seed": 1}, desc="")


@pytest.mark.parametrize("content", [b"", b"junk" * 9, b"\x00" * 64])
def test_a_junk_checkpoint_is_set_aside(tmp_path: Path, content: bytes) -> None:
    checkpoint = Checkpoint(tmp_path, {"seed": 0})
    (tmp_path / "unfinished-fit.safetensors").write_bytes(content)
    with pytest.warns(UserWarning, match="set aside"):
        assert checkpoint.load("fit", CPU) is None
    checkpoint.save("fit", {"a": torch.ones(2)}, now=True)
    path = tmp_path / "unfinished-fit.safetensors"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.warns(UserWarning, match="set aside"):
        assert checkpoint.load("fit", CPU) is None
    assert [p.name for p in tmp_path.iterdir()] == ["unfinished-fit.safetensors.damaged"]


def test_names_that_look_alike_have_files_of_their_own(tmp_path: Path) -> None:
    names = ["a/b", "a:b", "a_b", "A_b", "a b", "..", "a" * 300, "a" * 301, "é", "config", "nul"]
    assert len({file_stem(name).casefold() for name in names}) == len(names)
    for _ in range(2):
        frame = in_parts(
            names, lambda n: pd.DataFrame({"n": [n]}), folder=tmp_path, config={}, desc=""
        )
        assert frame["n"].tolist() == names
    assert len(list(tmp_path.iterdir())) == len(names) + 1
    with pytest.raises(ValueError, match="more than once"):
        in_parts(["a", "a"], lambda n: frame, folder=None, config={}, desc="")


@pytest.mark.parametrize(
    "name", ["a" * 300, "a\0b", "a\x1b[31mb", "a\nb", "~nobody-of-this-name/x"]
)
def test_paths_that_no_file_can_have_are_refused(name: str, tiny_llama: sl.Model) -> None:
    for call in (
        lambda: as_path(name),
        lambda: output_folder(name),
        lambda: write_csv(name, pd.DataFrame()),
        lambda: load_lens(name, tiny_llama),
        lambda: sl.read(PROMPTS, model=tiny_llama).save(name),
        lambda: sl.studies.LensPlan(["antonym"], out=name),
        lambda: sl.task(Path(name)),
    ):
        with pytest.raises(ValueError, match=r"expected names|Give it in full") as told:
            call()
        assert visible(str(told.value)) == str(told.value)


def test_a_file_where_a_folder_is_wanted(tiny_llama: sl.Model, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for save, *_ in KINDS.values():
        with pytest.raises(ValueError, match=r"cannot be written.*[Cc]hoose"):
            save(tiny_llama, tmp_path / "file")
    (tmp_path / "x.csv").mkdir()
    for call in (
        lambda: write_csv(tmp_path / "x.csv", pd.DataFrame()),
        lambda: write_json(tmp_path / "file" / "x.json", {}),
        lambda: write_json(tmp_path / "none" / "x.json", {}),
    ):
        with pytest.raises(ValueError, match=r"cannot be written.*Choose"):
            call()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "x.csv"]


_FULL = """
import resource, sys, tempfile
from pathlib import Path
import pandas as pd, torch
from spade_lens.storage.checkpoint import Checkpoint
from spade_lens.storage.files import write_csv, write_json, write_tensors
from spade_lens.storage.parts import in_parts

place = Path(sys.argv[1])
frame = pd.DataFrame({"x": range(50_000)})
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
for call in (
    lambda: write_csv(place / "a.csv", frame),
    lambda: write_json(place / "a.json", {"x": list(range(50_000))}),
    lambda: write_tensors(place / "a.safetensors", {"x": torch.ones(50_000)}),
    lambda: Checkpoint(place, {}).save("fit", {"x": torch.ones(50_000)}, now=True),
    lambda: in_parts(["a"], lambda _: frame, folder=place / "parts", config={}, desc=""),
):
    try:
        call()
    except ValueError as error:
        assert "cannot be written" in str(error) and "make room" in str(error), error
    else:
        raise AssertionError("written")
"""


def test_a_disk_that_is_full_leaves_nothing_half_written(tmp_path: Path) -> None:
    pytest.importorskip("resource")
    done = subprocess.run(
        [sys.executable, "-c", _FULL, str(tmp_path)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["config.json", "parts"]


def test_what_a_terminal_would_obey_does_not_get_there(tiny_llama: sl.Model) -> None:
    bad = "\x1b[2Jx"
    pairs = (("a", "b"), ("c", "d"))
    for call in (
        lambda: sl.tasks.WordPairTask(bad, pairs),
        lambda: sl.tasks.RuleTask(bad, {"x": ("a", "b"), "y": ("c", "d")}),
        lambda: sl.task({"a": "b", "c": "d"}, name=bad),
        lambda: sl.Spade(tiny_llama, name=bad),
        lambda: TunedLens(tiny_llama, AffineMaps.identity([1], 32), name=bad),
        lambda: sl.icl.Condition(bad),
        lambda: sl.load(tiny_llama.original, tokenizer=tiny_llama.tokenizer, name=bad),
        lambda: RuleVectors(torch.ones(1, 1, 1, 32), task=bad),
        lambda: sl.tasks.WordPairTask("t", (("a", bad), ("c", "d"))),
        lambda: sl.tasks.RuleTask("t", {"x": ("a", bad), "y": ("c", "d")}),
    ):
        with pytest.raises(ValueError, match="control characters") as told:
            call()
        assert "\x1b" not in str(told.value)
    classes = sl.tasks.RuleTask("t", {bad: ("a", "b"), "y": ("c", "d")})
    episode = sl.tasks.Episode("t", (("a", bad),), "c", "A", labels=("A", "B"))
    for thing in (classes, episode):
        assert "\x1b" not in repr(thing)
    sweep = PatchSweep(pd.DataFrame({"task": [bad], "condition": "c", "layer": 1, "prompt": 0}), {})
    object.__setattr__(sweep, "about", {"model": {"name": bad}})
    assert "\x1b" not in repr(sweep)


def test_a_model_whose_files_are_damaged_is_named(tiny_llama: sl.Model, tmp_path: Path) -> None:
    tiny_llama.original.save_pretrained(tmp_path)
    tiny_llama.tokenizer.save_pretrained(tmp_path)
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        whole = (tmp_path / name).read_bytes()
        for wrong in (b"", whole[: len(whole) // 2], b"{}" * 9):
            (tmp_path / name).write_bytes(wrong)
            with pytest.raises(ValueError, match=str(tmp_path)):
                sl.load(str(tmp_path))
        (tmp_path / name).write_bytes(whole)
    for name in ("a" * 300, "a\0b", "a\x1b[31m"):
        with pytest.raises(ValueError, match="expected names"):
            sl.load(name)
