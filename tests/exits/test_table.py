"""Exit tables come back from disk to the bit, and go on after an interruption to the bit."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch

from spade_lens import Keep, LogitLens, Model, Prompt, Spade, calibrate
from spade_lens.columns import COLUMNS
from spade_lens.exits import (
    Confidence,
    ExitTable,
    ExitTrace,
    FixedLayer,
    Oracle,
    Patience,
    SpadeExit,
    Threshold,
    exit_tables,
    sweep,
)
from spade_lens.lenses.linear import AffineMaps, LinearSpade
from spade_lens.storage.records import made_of

LAYERS = [1, 2, 3]


def some_prompts(n: int, *, candidates: bool = False) -> list[Prompt]:
    return [
        Prompt(
            tokens=(1, *((7 * i + 5 * k) % 90 + 3 for i in range(4 + k % 5))),
            answer=-2 if k % 7 == 3 else -1,
            target=None if k % 4 == 3 else 5 + k % 90,
            candidates=(5, 6, 40 + k % 50) if candidates else (),
            spans={"labels": (1, 2)},
        )
        for k in range(n)
    ]


def some_tables(model: Model, n: int = 6) -> list[ExitTable]:
    spade = Spade(model, keep=Keep(spans=("labels",)))
    checks = [Confidence(LogitLens(model), "margin"), spade]
    prompts = some_prompts(n, candidates=True)
    return exit_tables(model, prompts, checks, answerers=spade, layers=LAYERS)


def same(one: Any, other: Any) -> None:
    """Two records are equal in every field, tensors in dtype too; NaN is NaN."""
    assert type(one) is type(other)
    for field in fields(one):
        a, b = getattr(one, field.name), getattr(other, field.name)
        if isinstance(a, torch.Tensor):
            torch.testing.assert_close(b, a, rtol=0, atol=0, equal_nan=True)
        elif field.name == "prices":
            same(a, b)
        else:
            assert type(a) is type(b) and a == b, field.name


# -- on disk


def test_round_trip_is_exact(tiny_llama: Model, tmp_path: Path) -> None:
    tables = some_tables(tiny_llama)
    assert [table.prices.shared for table in tables] == [False, True]
    for i, table in enumerate([*tables, tables[0].of([4, 1])]):
        folder = table.save(tmp_path / "tables" / str(i))
        assert sorted(p.name for p in folder.iterdir()) == ["table.json", "table.safetensors"]
        back = ExitTable.load(folder)
        same(back, table)
        for policy in (Threshold(0.3), Threshold({1: 0.2}), Patience(2), FixedLayer(2), Oracle()):
            same(back.simulate(policy), table.simulate(policy))


def test_saving_again_replaces_and_two_names_for_one_tensor_are_saved(
    tiny_llama: Model, tmp_path: Path
) -> None:
    first, second = some_tables(tiny_llama)
    first.save(tmp_path)
    own = replace(second, target=second.final_answer)
    own.save(str(tmp_path))
    same(ExitTable.load(str(tmp_path)), own)
    assert ExitTable.load(tmp_path).accuracy == 1


def test_files_that_do_not_belong_together_are_refused(tiny_llama: Model, tmp_path: Path) -> None:
    first, second = some_tables(tiny_llama)
    first.save(tmp_path / "one")
    second.save(tmp_path / "two")
    (tmp_path / "one/table.safetensors").replace(tmp_path / "two/table.safetensors")
    with pytest.raises(ValueError, match=r"is not the file that table\.json beside it"):
        ExitTable.load(tmp_path / "two")
    with pytest.raises(FileNotFoundError, match=r"no table\.safetensors"):
        ExitTable.load(tmp_path / "one")


def test_damaged_tensors_are_refused(tiny_llama: Model, tmp_path: Path) -> None:
    path = some_tables(tiny_llama)[0].save(tmp_path) / "table.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="may be damaged"):
        ExitTable.load(tmp_path)


def test_what_is_no_table_is_refused(tiny_llama: Model, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"There is no table\.json"):
        ExitTable.load(tmp_path)
    some_tables(tiny_llama)[0].save(tmp_path)
    content = json.loads((tmp_path / "table.json").read_text())
    del content["fields"]["n_layers"], content["fields"]["layers"]
    edited = json.dumps(content)
    del content["sha256"]
    content["format"] = 4  # which has no hash
    for text, message in [
        ("{", "is no JSON"),
        ('{"kind": "L-SPADE", "format": 1}', "a 'L-SPADE', format 1; expected 'table'"),
        ('{"kind": "table", "format": 6}', "format 6.*another version"),
        (edited, "not what was written"),
        (json.dumps(content), r"of another type are \['layers', 'n_layers'\]"),
    ]:
        (tmp_path / "table.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            ExitTable.load(tmp_path)


def test_features_and_traces_come_back_too(tiny_llama: Model, tmp_path: Path) -> None:
    def features(finals: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        return torch.stack([finals[:, 0], logits.amax(dim=-1)], dim=1)

    check = Confidence(LogitLens(tiny_llama), "margin", features=features)
    [table] = exit_tables(tiny_llama, some_prompts(6), check, layers=LAYERS)
    assert table.features.shape == (3, 6, 2)
    same(ExitTable.load(table.save(tmp_path)), table)
    same(table.of([4, 1]).of([1]), table.of([1]))
    engine = SpadeExit(tiny_llama, check, Threshold(0.1), layers=LAYERS)
    for trace in (table.simulate(Patience(2)), engine.run(some_prompts(6))):
        same(ExitTrace.load(trace.save(tmp_path)), trace)
        pd.testing.assert_frame_equal(ExitTrace.load(tmp_path).to_frame(), trace.to_frame())
    with pytest.raises(FileNotFoundError, match=r"There is no trace\.json"):
        ExitTrace.load(tmp_path / "another")


def test_frames_have_text_and_ids_and_are_in_the_vocabulary_of_columns(tiny_llama: Model) -> None:
    prompts = [*some_prompts(4, candidates=True), *some_prompts(3)]
    [table] = exit_tables(tiny_llama, prompts, "logit", layers=LAYERS)
    trace = table.simulate(FixedLayer(2))
    for frame in (table.to_frame(), trace.to_frame()):
        assert set(frame.columns) <= set(COLUMNS)
        assert frame["among"].tolist()[:7] == ["candidates"] * 4 + ["vocabulary"] * 3
        answer = "answer" if "answer" in frame else "exit_answer"
        decode = tiny_llama.tokenizer.decode
        assert frame[answer].tolist() == [decode([i]) for i in frame[f"{answer}_id"]]
        with_target = frame.dropna(subset=["target_id"])
        assert 0 < len(with_target) < len(frame)
        assert with_target["target"].tolist() == [decode([i]) for i in with_target["target_id"]]
        right = with_target[f"{answer}_id"] == with_target["target_id"]
        assert with_target["correct"].tolist() == right.tolist()
    assert set(sweep(table, [FixedLayer(2)]).columns) <= {
        *COLUMNS,
        *(f"{n}_{end}" for n in COLUMNS for end in ("low", "high")),
    }


def test_what_is_printed_is_short(tiny_llama: Model) -> None:
    [table] = exit_tables(tiny_llama, some_prompts(6), "logit", layers=LAYERS)
    assert repr(table) == (
        "ExitTable('tiny-llama', check='logit lens, entropy', keep='SPADE', 6 prompts, "
        "layers [1, 2, 3] of 4)"
    )
    text = repr(table.simulate(FixedLayer(2)))
    assert text.startswith("ExitTrace('layer 2', 6 prompts, 100% early, accuracy 0.")
    assert "tensor" not in text and len(text) < 120


# -- interruption


class Interrupted(Exception):
    pass


@contextmanager
def noting(*, at: int | None = None) -> Iterator[Any]:
    """Note the prompts that the logit lens reads, and fail at one part of them."""
    notes = SimpleNamespace(read=[], parts=[])
    whole = LogitLens.final_residuals

    def part(lens: LogitLens, residuals: Any, readings: Any, layers: Sequence[int]) -> Any:
        if len(layers) > 1:  # one layer alone is asked for where a lens is priced
            if len(notes.parts) == at:
                raise Interrupted
            notes.parts.append(len(readings))
            notes.read += [residuals.prompts[r.prompt] for r in readings]
        return whole(lens, residuals, readings, layers)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(LogitLens, "final_residuals", part)
        yield notes


@pytest.fixture
def every_part(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Notes are taken after every part."""
    monkeypatch.setattr("spade_lens.storage.checkpoint._SECONDS_BETWEEN", 0.0)
    yield


def run(model: Model, lens: LogitLens, prompts: list[Prompt], **how: Any) -> list[ExitTable]:
    spades = [Spade(model), Spade(model, keep=Keep(last=2))]
    checks = [Confidence(lens, "margin"), Confidence(lens, "top-1")]
    how = {"answerers": spades, "layers": LAYERS, **how}
    return exit_tables(model, prompts, checks, **how)


@pytest.mark.parametrize("part", [0, 1, 2])
def test_resumed_is_uninterrupted(
    tiny_llama: Model, tmp_path: Path, every_part: None, part: int
) -> None:
    prompts = some_prompts(150)  # parts of 64, 64 and 22
    whole = run(tiny_llama, LogitLens(tiny_llama), prompts)
    with noting(at=part), pytest.raises(Interrupted):
        run(tiny_llama, LogitLens(tiny_llama), prompts, checkpoint=tmp_path)
    with noting() as notes:
        resumed = run(tiny_llama, LogitLens(tiny_llama), prompts, checkpoint=str(tmp_path))
    assert notes.parts == [64, 64, 22][part:]
    assert notes.read == prompts[64 * part :]
    assert len(resumed) == len(whole) == 4
    for one, other in zip(resumed, whole, strict=True):
        same(one, other)
    assert list(tmp_path.iterdir()) == []


def test_resumed_after_the_last_part(
    tiny_llama: Model, tmp_path: Path, every_part: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = some_prompts(70)
    whole = run(tiny_llama, LogitLens(tiny_llama), prompts)

    def fails(*_: Any) -> None:
        raise Interrupted

    with monkeypatch.context() as patched, pytest.raises(Interrupted):
        patched.setattr("spade_lens.exits.table_pass.price", fails)
        run(tiny_llama, LogitLens(tiny_llama), prompts, checkpoint=tmp_path)
    with noting(at=0):
        resumed = run(tiny_llama, LogitLens(tiny_llama), prompts, checkpoint=tmp_path)
    for one, other in zip(resumed, whole, strict=True):
        same(one, other)
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_is_not_written_more_often_than_worth_the_time(
    tiny_llama: Model, tmp_path: Path
) -> None:
    with noting(at=1), pytest.raises(Interrupted):
        run(tiny_llama, LogitLens(tiny_llama), some_prompts(70), checkpoint=tmp_path / "new")
    assert list((tmp_path / "new").iterdir()) == []


@pytest.mark.parametrize(
    ("change", "different"),
    [
        ({"layers": [1, 2]}, "layers"),
        ({"names": ("a", "c")}, "answerers"),
        ({"positions": "reset"}, "answerers"),
        ({"prompt": {"tokens": (1, 9, 9, 9, 9)}}, "prompts"),
        ({"prompt": {"answer": 2}}, "prompts"),
        ({"prompt": {"candidates": (3, 4)}}, "prompts"),
        ({"prompt": {"spans": {"labels": (1, 3)}}}, "prompts"),
    ],
)
def test_a_checkpoint_of_another_call_is_refused(
    tiny_llama: Model, tmp_path: Path, every_part: None, change: dict[str, Any], different: str
) -> None:
    def call(
        lens: LogitLens,
        *,
        layers: Sequence[int] = LAYERS,
        names: Sequence[str] = ("a", "b"),
        positions: str = "keep",
        prompt: dict[str, Any] | None = None,
    ) -> None:
        prompts = some_prompts(70)
        prompts[66] = replace(prompts[66], **(prompt or {}))
        how: dict[str, Any] = {"keep": Keep(spans=("labels",)), "positions": positions}
        spades = [Spade(tiny_llama, name=name, **how) for name in names]
        run(tiny_llama, lens, prompts, answerers=spades, layers=layers, checkpoint=tmp_path)

    with noting(at=1), pytest.raises(Interrupted):
        call(LogitLens(tiny_llama))
    with pytest.raises(ValueError, match=rf"another run; different are \['{different}'\]"):
        call(LogitLens(tiny_llama), **change)
    call(LogitLens(tiny_llama))
    assert list(tmp_path.iterdir()) == []


def test_a_lens_is_known_by_its_maps_and_not_by_its_name_alone(
    tiny_llama: Model, tmp_path: Path, every_part: None
) -> None:
    prompts = some_prompts(70)
    size = tiny_llama.d_model

    def lens(scale: float) -> LinearSpade:
        maps = AffineMaps((1, 2, 3), torch.zeros(3, size, size), scale * torch.ones(3, size))
        return LinearSpade(tiny_llama, maps)

    def call(linear: LinearSpade, failing: LogitLens) -> list[ExitTable]:
        # The failing lens is read first, so that the first part is noted whole.
        checks = [failing, linear]
        return exit_tables(tiny_llama, prompts, checks, layers=LAYERS, checkpoint=tmp_path)

    with noting(at=1), pytest.raises(Interrupted):
        call(lens(1.0), LogitLens(tiny_llama))
    with pytest.raises(ValueError, match=r"another run; different are \['checks'\]"):
        call(lens(2.0), LogitLens(tiny_llama))
    call(lens(1.0), LogitLens(tiny_llama))


def test_a_calibration_resumes_too(tiny_llama: Model, tmp_path: Path, every_part: None) -> None:
    prompts = some_prompts(150)
    how: dict[str, Any] = {"keep": Keep(last=2), "layers": LAYERS}
    whole = calibrate(tiny_llama, prompts, checks=LogitLens(tiny_llama), **how)
    lens = LogitLens(tiny_llama)
    with noting(at=1), pytest.raises(Interrupted):
        calibrate(tiny_llama, prompts, checks=lens, checkpoint=tmp_path, **how)
    with noting() as notes:
        resumed = calibrate(tiny_llama, prompts, checks=lens, checkpoint=tmp_path, **how)
    assert notes.parts == [64, 22]
    for one, other in zip(resumed.tables, whole.tables, strict=True):
        same(one, other)


def test_shared_first_tokens_are_flagged(tiny_llama: Model) -> None:
    prompts = [replace(p, ambiguous=i % 2 == 0) for i, p in enumerate(some_prompts(6))]
    [table] = exit_tables(tiny_llama, prompts, "logit", layers=LAYERS)
    flags = [True, False] * 3
    assert table.to_frame()["ambiguous"].tolist() == flags * len(LAYERS)
    trace = SpadeExit(tiny_llama, "logit", FixedLayer(2), layers=LAYERS).run(prompts)
    for run in (trace, table.simulate(FixedLayer(2)), table.of([0, 1]).simulate(FixedLayer(2))):
        assert run.to_frame()["ambiguous"].tolist() == flags[: len(run)]


def test_traces_of_older_versions_have_no_flags(tiny_llama: Model) -> None:
    [table] = exit_tables(tiny_llama, some_prompts(3), "logit", layers=LAYERS)
    trace = table.simulate(FixedLayer(2))
    older = {f.name: getattr(trace, f.name) for f in fields(trace) if f.name != "ambiguous"}
    older["words"] = {str(token): word for token, word in trace.words.items()}  # as in JSON
    again = made_of(ExitTrace, older)
    assert again.ambiguous is None and "ambiguous" not in again.to_frame()
    with pytest.raises(TypeError, match="answer"):
        made_of(ExitTrace, {name: v for name, v in older.items() if name != "answer"})
