"""Every experiment on a tiny model: what is reported is what the building blocks give."""

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure
from tiny import tiny, tiny_tokenizer

from spade_lens import Model, UnsupportedModelError, load
from spade_lens.icl import (
    Condition,
    PromptSetup,
    accuracy_by_shots,
    default_conditions,
    function_vector_sweep,
    head_effects,
    knockout,
    patch_sweep,
    rule_vectors,
    saliency_flows,
    sufficiency_map,
    top_heads,
)
from spade_lens.prompts import Prompt, Template
from spade_lens.report.tables import grid, spread
from spade_lens.stats import choose_layer, summarise
from spade_lens.studies import Findings, IclPlan, experiment, study
from spade_lens.studies.base import StudyResult
from spade_lens.studies.icl import registry
from spade_lens.studies.icl.demonstrations import at_chosen_layers
from spade_lens.tasks import RuleTask
from spade_lens.tasks.resolve import task as make_task

pytestmark = pytest.mark.filterwarnings("ignore:(?s).*there is nothing to explain")

TIGHT = Template(pair="{input}>{output}", query="{input}>", separator=";")
SETUP = PromptSetup(TIGHT)
TASK = RuleTask(
    "t",
    {
        "x": ("a", "bb", "ccc", "d", "ee", "v", "W"),
        "y": ("ff", "g", "hhh", "i", "jj", "X", "Z"),
    },
)
OTHER = RuleTask("u", {"x": tuple("pqrst"), "y": tuple("klmno")})
EXPERIMENTS = (
    *("shots", "patching", "contributions", "heads", "knockout", "saliency", "geometry"),
    *("sufficiency", "reading"),
)
SMALL: dict[str, Any] = {
    "samples": 40,
    "shots": 2,
    "few": 3,
    "other": OTHER,
    "template": TIGHT,
    "layers": (1, 3),
}


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("icl")


@pytest.fixture(scope="module")
def found(tiny_llama: Model, out: Path) -> StudyResult:
    return run(tiny_llama, "all", out)


def run(model: Model, experiments: str | list[str], out: Path, **other: Any) -> StudyResult:
    options = {"task": TASK, **SMALL, **other}
    return study(model, IclPlan(options.pop("task"), experiments, out=out, **options))


def test_every_experiment_writes_what_it_found(found: StudyResult, out: Path) -> None:
    for name in EXPERIMENTS:
        text = (out / f"{name}.txt").read_text()
        assert text.startswith("t: 40 prompts of 2 demonstrations, seed 0; tiny-llama")
        about = json.loads((out / f"{name}.json").read_text())
        assert about["experiment"] == name
        assert about["config"]["other"] == "u"
        written = {p.name for p in out.iterdir() if p.stem.split("-")[0] == name}
        assert set(about["files"]) == written - {f"{name}.json"}
        if name != "reading":
            assert (out / f"{name}.png").exists() and (out / f"{name}.pdf").exists()
    assert {name.split("-")[0] for name in found.tables} == set(EXPERIMENTS)
    for name, frame in found.tables.items():
        on_disk = pd.read_csv(
            out / f"{name}.csv", keep_default_na=False, na_values=[""], lineterminator="\n"
        )
        assert len(on_disk) == len(frame) > 0


def test_tables_are_those_of_the_building_blocks(tiny_llama: Model, found: StudyResult) -> None:
    episodes = TASK.episodes(40, shots=2)
    prompts = [e.prompt(tiny_llama.tokenizer, template=TIGHT) for e in episodes]
    expected = {
        "shots": accuracy_by_shots(tiny_llama, [TASK], n=40, shots=[0, 1, 2], setup=SETUP),
        "patching": patch_sweep(
            tiny_llama,
            episodes,
            conditions=default_conditions(episodes, other=OTHER.episodes(40, shots=2)),
            layers=[1, 3],
            setup=SETUP,
        ).to_frame(),
        "heads": head_effects(tiny_llama, episodes[:20], n=3, setup=SETUP),
        "knockout": knockout(tiny_llama, prompts),
        "saliency": saliency_flows(tiny_llama, prompts),
        "sufficiency": sufficiency_map(tiny_llama, prompts, layers=[1, 3]),
    }
    for name, frame in expected.items():
        order = [c for c in frame.columns if not c.startswith("top_")]
        by = [c for c in order if frame[c].dtype != float]
        got = found.tables[name][order].sort_values(by, ignore_index=True)
        frame = frame[order].sort_values(by, ignore_index=True)
        pd.testing.assert_frame_equal(got, frame, check_dtype=False, rtol=1e-3, atol=1e-4)


def test_heads_are_chosen_on_other_prompts(tiny_llama: Model, found: StudyResult) -> None:
    best = top_heads(found.tables["heads"], 4)  # a quarter of 16
    means = found.tables["heads-summary"]
    marked = means[means["chosen"]]
    assert set(zip(marked["block"], marked["head"], strict=True)) == set(best)
    sweep = function_vector_sweep(
        tiny_llama, TASK.episodes(40, shots=2), best, layers=[1, 3], setup=SETUP
    ).to_frame()
    assert "function vector, opposite" in set(sweep["condition"])
    pd.testing.assert_frame_equal(
        found.tables["heads-vectors"], sweep, check_dtype=False, rtol=1e-3, atol=1e-4
    )
    layer, rest = choose_layer(found.tables["heads-vectors"], "function vector")
    assert sorted(rest["prompt"].unique()) == list(range(20, 40))
    chosen = found.tables["heads-chosen"]
    assert (chosen["n"] == 20).all() and set(chosen["layer"]) == {-1, layer}
    pd.testing.assert_frame_equal(chosen, summarise(rest[rest["layer"].isin([-1, layer])]))


def test_heads_in_parts_are_the_same(
    tiny_llama: Model,
    found: StudyResult,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("spade_lens.studies.icl.attention._BLOCKS", 3)
    again = run(tiny_llama, "heads", tmp_path).tables["heads"]
    assert len(list(tmp_path.glob("parts/head-effects-*/blocks-*.json"))) == 2
    pd.testing.assert_frame_equal(again, found.tables["heads"], atol=1e-4, rtol=0)


def test_a_model_without_function_vectors_is_refused_at_once(tmp_path: Path) -> None:
    model = load(tiny("gemma2"), tokenizer=tiny_tokenizer())
    with pytest.raises(UnsupportedModelError, match="a norm comes between"):
        run(model, "heads", tmp_path)
    assert not list(tmp_path.glob("parts/head-effects-*"))


def test_what_a_model_can_do_is_not_lost_to_what_it_cannot(tmp_path: Path) -> None:
    model = load(tiny("gemma2"), tokenizer=tiny_tokenizer())
    with pytest.warns(UserWarning, match="heads is left out: .*a norm comes between"):
        result = run(model, ["heads", "shots"], tmp_path)
    assert list(result.tables) == ["shots", "shots-summary"]
    assert (tmp_path / "shots.csv").exists() and not (tmp_path / "heads.csv").exists()
    with pytest.raises(UnsupportedModelError, match="a norm comes between"):
        run(model, ["heads"], tmp_path)


def test_contributions_and_reading_are_of_few_prompts(found: StudyResult) -> None:
    shares = found.tables["contributions"]
    assert sorted(shares["prompt"].unique()) == [0, 1, 2]
    assert sorted(shares["layer"].unique()) == [1, 3]
    total = shares.groupby(["prompt", "layer"])["shapley"].sum()
    once = shares.drop_duplicates(["prompt", "layer"]).set_index(["prompt", "layer"])
    torch.testing.assert_close(
        torch.tensor(total.to_numpy()), torch.tensor((once["all"] - once["none"]).to_numpy())
    )
    assert found.tables["sufficiency-smallest"]["prompt"].nunique() == 3


def test_reading_tells_the_label_from_other_tokens(tiny_llama: Model, found: StudyResult) -> None:
    prompts = [
        e.prompt(tiny_llama.tokenizer, template=TIGHT) for e in TASK.episodes(40, shots=2)[:3]
    ]
    frame = found.tables["reading"]
    lens = frame[(frame["method"] == "logit lens") & ~frame["control"] & (frame["layer"] == 3)]
    vectors = rule_vectors(tiny_llama, prompts, layers=[3]).tensor[0].flatten(0, 1)
    top = tiny_llama.unembed(tiny_llama.final_norm(vectors)).argmax(dim=-1)
    labels = torch.tensor([[p.tokens[at] for at in p.spans["labels"]] for p in prompts])
    assert lens["first_is_label"].tolist() == (top == labels.flatten()).tolist()
    assert set(frame["label"]) == {"A", "B"}


def test_geometry_probes_rule_label_and_class(found: StudyResult) -> None:
    probes = found.tables["geometry-probes"]
    assert set(probes["probed"]) == {"rule", "label", "class of the input"}
    assert set(found.tables["geometry-factors"]["factor"]) >= {"rule", "label", "demo", "rest"}
    # The label is the very token at the vector's place.
    label = probes[(probes["probed"] == "label") & ~probes["control"]]
    assert label["mean"].min() > 0.9
    # The class of the input is told of words that the probe has not seen: all fourteen are.
    n = probes.groupby("probed")["n"].unique()
    assert n["label"] == [40] and n["rule"] == [40] and n["class of the input"] == [14]


def test_figures_stand_beside_the_tables(found: StudyResult, out: Path) -> None:
    figures = {
        "contributions": ("by-demonstration", "effective-number"),
        "geometry": ("probes", "factors", "projections"),
        "sufficiency": ("accuracy", "smallest", "copying"),
    }
    for name, parts in figures.items():
        for part in parts:
            assert (out / f"{name}-{part}.png").exists()
            assert found.files[f"{name}-{part} (PDF)"] == out / f"{name}-{part}.pdf"
    shown = found.tables["geometry-projections"]
    assert set(shown["factor"]) == {"rule", "label", "demo", "rule x label"}
    assert shown["prompt"].nunique() == 20
    assert "Copied, or carried?" in found.text
    assert "query+other labels" in set(found.tables["sufficiency"]["of"])


def test_layers_are_chosen_on_other_prompts(found: StudyResult) -> None:
    frame = found.tables["patching"]
    conditions = default_conditions(TASK.episodes(40, shots=2), other=OTHER.episodes(40, shots=2))
    rows = at_chosen_layers(frame, conditions)
    assert sorted(rows["prompt"].unique()) == list(range(20, 40))
    layer, rest = choose_layer(frame, "labels to the top")
    for name in (
        "labels to the top",
        "labels to the top, random",
        "labels to the top, opposite",
        "labels to the top, other task",
    ):
        mine = rows[rows["condition"] == name]
        assert mine["layer"].unique().tolist() == [layer]
        same = rest[(rest["condition"] == name) & (rest["layer"] == layer)]
        assert mine["logit_diff"].tolist() == same["logit_diff"].tolist()
    chosen = found.tables["patching-chosen"]
    pd.testing.assert_frame_equal(chosen, summarise(rows))
    alone = frame[frame["condition"].isin(["few-shot", "labels to the top, random"])]
    own = at_chosen_layers(
        alone, [Condition("labels to the top, random", source="random", window=None)]
    )
    assert own.loc[own["layer"] >= 0, "condition"].unique().tolist() == [
        "labels to the top, random"
    ]


def test_what_is_finished_is_not_run_again(
    tiny_llama: Model, found: StudyResult, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("run again")

    package = "spade_lens.studies.icl"
    monkeypatch.setattr(sys.modules[f"{package}.attention"], "cut_edges", never)
    monkeypatch.setattr(sys.modules[f"{package}.vectors"], "rule_vectors", never)
    monkeypatch.setattr(sys.modules[f"{package}.positions"], "sufficiency_map", never)
    monkeypatch.setattr(sys.modules["spade_lens.icl.patching.sweep"], "capture_for_replay", never)
    again = run(tiny_llama, ["knockout", "geometry", "patching", "reading", "sufficiency"], out)
    for name, frame in again.tables.items():
        pd.testing.assert_frame_equal(frame, found.tables[name])
    with pytest.raises(AssertionError, match="run again"):
        run(tiny_llama, "knockout", out, seed=1)


def test_a_model_at_chance_is_said_to_be(tiny_llama: Model, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="NOT clearly above chance"):
        result = run(tiny_llama, "shots", tmp_path, samples=4)
    assert "nothing to explain" in result.text
    assert json.loads((tmp_path / "shots.json").read_text())["at_chance"] is True


@pytest.mark.parametrize("experiment", ["patching", "contributions", "geometry", "reading"])
def test_word_pairs(tiny_llama: Model, tmp_path: Path, experiment: str) -> None:
    pairs = make_task([[c, c.upper()] for c in "abcdefgh"], name="upper")
    other = make_task([[c, chr(ord(c) + 1)] for c in "ijklmnop"], name="next")
    result = run(tiny_llama, experiment, tmp_path, task=pairs, other=other, samples=12)
    if experiment == "geometry":
        # One mapping only: the other task is the second rule, and there is no label to tell.
        assert "across rules" in set(result.tables["geometry"]["comparison"])
        assert set(result.tables["geometry-probes"]["probed"]) == {"rule"}
        assert "geometry-factors" not in result.tables
    if experiment == "patching":
        assert "labels to the top, other task" in set(result.tables["patching"]["condition"])


def test_labels_of_ones_own(tiny_llama: Model, tmp_path: Path) -> None:
    result = run(tiny_llama, "contributions", tmp_path, labels=("P", "Q"), samples=8)
    assert set(result.tables["contributions"]["label"]) == {"P", "Q"}


def test_settings_of_experiments_are_fields_of_the_plan(
    tiny_llama: Model, found: StudyResult, out: Path
) -> None:
    # In the same folder: another setting makes other parts.
    result = run(tiny_llama, ["heads", "reading"], out, heads=2, top_k=3)
    assert int(result.tables["heads-summary"]["chosen"].sum()) == 2
    assert int(found.tables["heads-summary"]["chosen"].sum()) == 4
    assert "top_3" in result.tables["reading"] and "top_4" not in result.tables["reading"]


@pytest.fixture
def lengths() -> Iterator[list[int]]:
    """An experiment of a user's own, which counts its calls."""
    calls: list[int] = []

    @experiment("lengths", check=_refuse_one_shot)
    def lengths(study: Any) -> Findings:
        def measure(prompts: Sequence[Prompt]) -> pd.DataFrame:
            calls.append(len(prompts))
            return pd.DataFrame({"prompt": range(len(prompts)), "length": [*map(len, prompts)]})

        frame = study.by_prompts("lengths", measure)
        figure = Figure()
        figure.subplots().hist(frame["length"])
        return Findings({"": frame}, {"": figure}, f"{frame['length'].mean():.1f} tokens")

    yield calls
    del registry._EXPERIMENTS["lengths"]


def _refuse_one_shot(plan: IclPlan) -> None:
    if plan.shots < 2:
        raise ValueError("lengths need two demonstrations")


def test_an_experiment_of_ones_own(tiny_llama: Model, tmp_path: Path, lengths: list[int]) -> None:
    result = run(tiny_llama, ["lengths", "shots"], tmp_path)
    assert lengths == [16, 16, 8]
    frame = result.tables["lengths"]
    assert frame["prompt"].tolist() == list(range(40)) and set(frame["task"]) == {"t"}
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "lengths.csv"), frame)
    assert (tmp_path / "lengths.png").exists() and (tmp_path / "lengths.json").exists()
    assert f"{frame['length'].mean():.1f} tokens" in (tmp_path / "lengths.txt").read_text()
    # One part is lost: it alone is made again.
    next(tmp_path.glob("parts/lengths-*/prompts-0016.json")).unlink()
    pd.testing.assert_frame_equal(run(tiny_llama, "lengths", tmp_path).tables["lengths"], frame)
    assert lengths == [16, 16, 8, 16]
    with pytest.raises(ValueError, match="two demonstrations"):
        IclPlan(TASK, "lengths", **SMALL | {"shots": 1}, out=tmp_path)


def test_what_an_experiment_returns_is_checked(tiny_llama: Model, tmp_path: Path) -> None:
    experiment("nothing")(lambda _: None)  # type: ignore[arg-type,return-value]
    try:
        with pytest.raises(TypeError, match="'nothing' returned a NoneType; expected Findings"):
            run(tiny_llama, "nothing", tmp_path)
    finally:
        del registry._EXPERIMENTS["nothing"]


def test_text() -> None:
    means = pd.DataFrame(
        {
            "layer": [1, 2],
            "what": ["one", "other"],
            "mean": [0.5, -1.0],
            "low": [0.25, float("nan")],
            "high": [0.75, float("nan")],
        }
    )
    lines = grid(means, ["layer"], "what", signed=True).splitlines()
    assert lines[1].split() == ["1", "+0.50", "[+0.25,", "+0.75]", "-"]
    assert lines[2].split() == ["2", "-", "-1.00"]
    assert spread([3]) == [3]
    assert spread(range(7)) == [0, 2, 4, 6]
