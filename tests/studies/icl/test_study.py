"""Every experiment on a tiny model: what is reported is what the building blocks give."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
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
from spade_lens.prompts import Template
from spade_lens.report.grid import grid, spread
from spade_lens.stats import choose_layer, summarise
from spade_lens.studies import EXPERIMENTS, IclResult, icl_study, plan_icl, run_icl
from spade_lens.studies.icl.demonstrations import at_chosen_layers
from spade_lens.tasks import Episode, RuleTask, WordPairTask

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
def found(tiny_llama: Model, out: Path) -> dict[str, IclResult]:
    options = {k: v for k, v in SMALL.items() if k != "progress"}
    return run_icl(tiny_llama, plan_icl(TASK, out=out, **options))


def test_every_experiment_writes_what_it_found(found: dict[str, IclResult], out: Path) -> None:
    assert tuple(found) == EXPERIMENTS
    for name, result in found.items():
        assert (out / f"{name}.txt").read_text() == result.table + "\n"
        assert result.table.startswith("t: 40 prompts of 2 demonstrations, seed 0; tiny-llama")
        about = json.loads((out / f"{name}.json").read_text())
        assert about["config"]["experiment"] == name
        assert about["config"]["other"] == "u"
        assert set(about["files"]) == {p.name for p in result.files.values()} - {f"{name}.json"}
        for part, frame in result.tables.items():
            on_disk = pd.read_csv(
                out / f"{name}{'-' if part else ''}{part}.csv",
                keep_default_na=False,
                na_values=[""],
                lineterminator="\n",
            )
            assert len(on_disk) == len(frame) > 0
        if name != "reading":
            assert (out / f"{name}.png").exists() and (out / f"{name}.pdf").exists()


def test_tables_are_those_of_the_building_blocks(
    tiny_llama: Model, found: dict[str, IclResult]
) -> None:
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
        got = found[name].tables[""][order].sort_values(by, ignore_index=True)
        frame = frame[order].sort_values(by, ignore_index=True)
        pd.testing.assert_frame_equal(got, frame, check_dtype=False, rtol=1e-3, atol=1e-4)


def test_heads_are_chosen_on_other_prompts(tiny_llama: Model, found: dict[str, IclResult]) -> None:
    tables = found["heads"].tables
    best = top_heads(tables[""], 4)  # a quarter of 16
    means = tables["summary"]
    marked = means[means["chosen"]]
    assert set(zip(marked["block"], marked["head"], strict=True)) == set(best)
    sweep = function_vector_sweep(
        tiny_llama, TASK.episodes(40, shots=2), best, layers=[1, 3], setup=SETUP
    ).to_frame()
    assert "function vector, opposite" in set(sweep["condition"])
    pd.testing.assert_frame_equal(tables["vectors"], sweep, check_dtype=False, rtol=1e-3, atol=1e-4)
    layer, rest = choose_layer(tables["vectors"], "function vector")
    assert sorted(rest["prompt"].unique()) == list(range(20, 40))
    chosen = tables["chosen"]
    assert (chosen["n"] == 20).all() and set(chosen["layer"]) == {-1, layer}
    pd.testing.assert_frame_equal(chosen, summarise(rest[rest["layer"].isin([-1, layer])]))


def test_heads_in_parts_are_the_same(
    tiny_llama: Model,
    found: dict[str, IclResult],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("spade_lens.studies.icl.heads._BLOCKS_AT_ONCE", 3)
    again = icl_study(tiny_llama, TASK, "heads", out=tmp_path, **SMALL).tables[""]
    assert len(list(tmp_path.glob("parts/head-effects-*/blocks-*.json"))) == 2
    pd.testing.assert_frame_equal(again, found["heads"].tables[""], atol=1e-4, rtol=0)


def test_a_model_without_function_vectors_is_refused_at_once(tmp_path: Path) -> None:
    model = load(tiny("gemma2"), tokenizer=tiny_tokenizer())
    with pytest.raises(UnsupportedModelError, match="a norm comes between"):
        icl_study(model, TASK, "heads", out=tmp_path, **SMALL)
    assert not list(tmp_path.glob("parts/head-effects-*"))


def test_what_a_model_can_do_is_not_lost_to_what_it_cannot(tmp_path: Path) -> None:
    model = load(tiny("gemma2"), tokenizer=tiny_tokenizer())
    options = {k: v for k, v in SMALL.items() if k != "progress"}
    plan = plan_icl(TASK, ["heads", "shots"], out=tmp_path, **options)
    with pytest.warns(UserWarning, match="heads is left out: .*a norm comes between"):
        assert list(run_icl(model, plan)) == ["shots"]
    assert (tmp_path / "shots.csv").exists() and not (tmp_path / "heads.csv").exists()
    with pytest.raises(UnsupportedModelError, match="a norm comes between"):
        run_icl(model, plan_icl(TASK, ["heads"], out=tmp_path, **options))


def test_contributions_and_reading_are_of_few_prompts(found: dict[str, IclResult]) -> None:
    shares = found["contributions"].tables[""]
    assert sorted(shares["prompt"].unique()) == [0, 1, 2]
    assert sorted(shares["layer"].unique()) == [1, 3]
    total = shares.groupby(["prompt", "layer"])["shapley"].sum()
    once = shares.drop_duplicates(["prompt", "layer"]).set_index(["prompt", "layer"])
    torch.testing.assert_close(
        torch.tensor(total.to_numpy()), torch.tensor((once["all"] - once["none"]).to_numpy())
    )
    assert found["sufficiency"].tables["smallest"]["prompt"].nunique() == 3


def test_reading_tells_the_label_from_other_tokens(
    tiny_llama: Model, found: dict[str, IclResult]
) -> None:
    prompts = [
        e.prompt(tiny_llama.tokenizer, template=TIGHT) for e in TASK.episodes(40, shots=2)[:3]
    ]
    frame = found["reading"].tables[""]
    lens = frame[(frame["method"] == "logit lens") & ~frame["control"] & (frame["layer"] == 3)]
    vectors = rule_vectors(tiny_llama, prompts, layers=[3]).tensor[0].flatten(0, 1)
    top = tiny_llama.unembed(tiny_llama.final_norm(vectors)).argmax(dim=-1)
    labels = torch.tensor([[p.tokens[at] for at in p.spans["labels"]] for p in prompts])
    assert lens["first_is_label"].tolist() == (top == labels.flatten()).tolist()
    assert set(frame["label"]) == {"A", "B"}
    assert set(found["reading"].tables["means"]["of"]) >= {"A, where x: A, y: B"}


def test_geometry_probes_rule_label_and_class(found: dict[str, IclResult]) -> None:
    probes = found["geometry"].tables["probes"]
    assert set(probes["probed"]) == {"rule", "label", "class of the input"}
    assert set(found["geometry"].tables["factors"]["factor"]) >= {"rule", "label", "demo", "rest"}
    # The label is the very token at the vector's place.
    label = probes[(probes["probed"] == "label") & ~probes["control"]]
    assert label["mean"].min() > 0.9
    # The class of the input is told of words that the probe has not seen: all fourteen are.
    n = probes.groupby("probed")["n"].unique()
    assert n["label"] == [40] and n["rule"] == [40] and n["class of the input"] == [14]


def test_figures_stand_beside_the_tables(found: dict[str, IclResult], out: Path) -> None:
    figures = {
        "contributions": ("by-demonstration", "effective-number"),
        "geometry": ("probes", "factors", "projections"),
        "sufficiency": ("accuracy", "smallest", "copying"),
    }
    for name, parts in figures.items():
        for part in parts:
            assert (out / f"{name}-{part}.png").exists()
            assert found[name].files[f"{name}-{part} (PDF)"] == out / f"{name}-{part}.pdf"
    shown = found["geometry"].tables["projections"]
    assert set(shown["factor"]) == {"rule", "label", "demo", "rule x label"}
    assert shown["prompt"].nunique() == 20
    assert "Copied, or carried?" in found["sufficiency"].table
    assert "query+other labels" in set(found["sufficiency"].tables[""]["of"])


def test_layers_are_chosen_on_other_prompts(found: dict[str, IclResult]) -> None:
    frame = found["patching"].tables[""]
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
    chosen = found["patching"].tables["chosen"]
    pd.testing.assert_frame_equal(chosen, summarise(rows))
    alone = frame[frame["condition"].isin(["few-shot", "labels to the top, random"])]
    own = at_chosen_layers(
        alone, [Condition("labels to the top, random", source="random", window=None)]
    )
    assert own.loc[own["layer"] >= 0, "condition"].unique().tolist() == [
        "labels to the top, random"
    ]


def test_what_is_finished_is_not_run_again(
    tiny_llama: Model, found: dict[str, IclResult], out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("run again")

    package = "spade_lens.studies.icl"
    monkeypatch.setattr(sys.modules[f"{package}.attention"], "cut_edges", never)
    monkeypatch.setattr(sys.modules[f"{package}.likeness"], "rule_vectors", never)
    monkeypatch.setattr(sys.modules[f"{package}.positions"], "sufficiency_map", never)
    monkeypatch.setattr(sys.modules["spade_lens.icl.patching.sweep"], "capture_for_replay", never)
    for name in ("knockout", "geometry", "patching", "reading", "sufficiency"):
        again = icl_study(tiny_llama, TASK, name, out=out, **SMALL)
        for part, frame in again.tables.items():
            pd.testing.assert_frame_equal(frame, found[name].tables[part])
    with pytest.raises(AssertionError, match="run again"):
        icl_study(tiny_llama, TASK, "knockout", out=out, **SMALL | {"seed": 1})


def test_a_model_at_chance_is_said_to_be(tiny_llama: Model, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="NOT clearly above chance"):
        result = icl_study(tiny_llama, TASK, "shots", out=tmp_path, **SMALL | {"samples": 4})
    assert "nothing to explain" in result.table
    assert json.loads((tmp_path / "shots.json").read_text())["at_chance"] is True


@pytest.mark.parametrize("experiment", ["patching", "contributions", "geometry", "reading"])
def test_word_pairs(tiny_llama: Model, tmp_path: Path, experiment: str) -> None:
    pairs = WordPairTask.from_pairs([[c, c.upper()] for c in "abcdefgh"], name="upper")
    other = WordPairTask.from_pairs([[c, c + c] for c in "ijklmnop"], name="double")
    small = SMALL | {"other": other, "samples": 12}
    result = icl_study(tiny_llama, pairs, experiment, out=tmp_path, **small)
    if experiment == "geometry":
        # One mapping only: the other task is the second rule, and there is no label to tell.
        assert "across rules" in set(result.tables[""]["comparison"])
        assert set(result.tables["probes"]["probed"]) == {"rule"}
        assert "factors" not in result.tables
        _check_beside_others(tiny_llama, result.tables["others"], pairs, other)
        assert (tmp_path / "geometry-others.png").exists()
    if experiment == "patching":
        assert "labels to the top, other task" in set(result.tables[""]["condition"])


def _check_beside_others(
    model: Model, frame: pd.DataFrame, pairs: WordPairTask, other: WordPairTask
) -> None:
    """Every row, against vectors and pairs of its own."""
    episodes = pairs.episodes(12, shots=2)

    def vectors(some: Sequence[Episode]) -> torch.Tensor:
        prompts = [e.prompt(model.tokenizer, template=TIGHT) for e in some]
        return rule_vectors(model, prompts, layers=[3]).tensor[0].double()

    def within(some: torch.Tensor) -> float:
        return float(torch.cosine_similarity(some[:, 0], some[:, 1], dim=-1).mean())

    own = vectors(episodes)
    shuffled, third = (
        vectors([e.shuffled(first + i) for i, e in enumerate(episodes)]) for first in (0, 12)
    )
    middle = third.mean(dim=(0, 1))
    another = vectors(other.episodes(12, shots=2)).flatten(0, 1)
    across = torch.cosine_similarity(own.flatten(0, 1)[:, None], another[None], dim=-1).mean()
    expected = {
        ("own", "within a prompt", "nothing"): within(own),
        ("outputs shuffled", "within a prompt", "nothing"): within(shuffled),
        ("own less shuffled", "within a prompt", "nothing"): within(own) - within(shuffled),
        ("own and another task's", "across rules", "nothing"): float(across),
        ("own", "within a prompt", "mean of shuffled"): within(own - middle),
        ("outputs shuffled", "within a prompt", "mean of shuffled"): within(shuffled - middle),
    }
    at_layer = frame[frame["layer"] == 3].set_index(["prompts", "comparison", "center"])["mean"]
    for key, value in expected.items():
        assert at_layer[key] == pytest.approx(value, abs=1e-5), key


def test_labels_of_ones_own(tiny_llama: Model, tmp_path: Path) -> None:
    small = SMALL | {"labels": ("P", "Q"), "samples": 8}
    result = icl_study(tiny_llama, TASK, "contributions", out=tmp_path, **small)
    assert set(result.tables[""]["label"]) == {"P", "Q"}


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
