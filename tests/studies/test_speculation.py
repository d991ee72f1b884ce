"""The sweep: its numbers are those of the real loop, it resumes, and bad input is refused."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from tiny import tiny, tiny_tokenizer

import spade_lens as sl
from spade_lens.generation import LayerExit, PromptLookup, Speculate
from spade_lens.models.clock import seconds_of
from spade_lens.studies import SpeculationPlan
from spade_lens.studies.base import StudyResult
from spade_lens.studies.speculation import costs as costs_module
from spade_lens.studies.speculation.costs import CostModel, measure_costs
from spade_lens.studies.speculation.points import geometric_mean, speeds, verdict
from spade_lens.studies.speculation.prompts import prompts_by_kind

PROMPTS = {"x": ["abababababab", "cdcdcd"], "y": ["qrst"]}
SHORT: dict[str, Any] = {"prompts": PROMPTS, "drafts": (1, 3), "max_new_tokens": 8, "rounds": 1}
SETTING = ["drafter", "layer", "draft_tokens", "eta", "adaptive"]


class Repeats:
    """Guesses that the last token comes again."""

    name, layer = "repeats", 0

    def draft(self, tokens: Any, most: int) -> list[int]:
        return [tokens[-1]] * most


@pytest.fixture(scope="module")
def swept(tiny_llama: sl.Model, tmp_path_factory: pytest.TempPathFactory) -> StudyResult:
    out = tmp_path_factory.mktemp("swept")
    plan = SpeculationPlan(
        **SHORT, eta=[0.0, 0.012], drafters=[Repeats(), [PromptLookup(2), LayerExit(3)]], out=out
    )
    return sl.study(tiny_llama, plan, settings=sl.Settings(progress=False))


def test_points_are_what_the_real_loop_counts(tiny_llama: sl.Model, swept: StudyResult) -> None:
    points = swept.tables["points"]
    prompts = tiny_llama.prompts(PROMPTS["x"])
    drafters: dict[tuple[str, int], Any] = {("exit", n): LayerExit(n) for n in (1, 2, 3)}
    drafters["lookups", 0] = Speculate().several
    drafters["repeats", 0] = Repeats()
    drafters["lookup of 2 + exit at 3", 3] = [PromptLookup(2), LayerExit(3)]
    assert set(zip(points["drafter"], points["layer"], strict=True)) == set(drafters)
    # Tests of known texts run every setting; here a few, for what is made of them.
    for row in points[points["kind"] == "x"].sample(12, random_state=0).to_dict("records"):
        drafter = drafters[row["drafter"], row["layer"]]
        strategy = Speculate(drafter, row["draft_tokens"], row["eta"], adaptive=row["adaptive"])
        texts = [sl.generate(p, 8, model=tiny_llama, strategy=strategy) for p in prompts]
        assert row["n"] == len(texts)
        every = np.nanmean([text.acceptance for text in texts] or [math.nan])
        assert row["acceptance"] == pytest.approx(every, abs=1e-6, nan_ok=True)
        n_rounds = sum(len(text.rounds) for text in texts)
        new = sum(len(text.token) for text in texts)
        assert row["tokens_per_round"] == pytest.approx(new / n_rounds)
        # A round writes one token more than it accepted, but where the text ended on a draft.
        more = sum(int((text.rounds[:, 2] >= 1).sum()) for text in texts)
        assert row["ctar_1"] == pytest.approx(more / n_rounds, abs=len(texts) / n_rounds)
        drafted = sum(int(text.rounds[:, 1].sum()) for text in texts) / n_rounds
        assert row["drafted_per_round"] == pytest.approx(drafted)
        accepted = sum(int(text.rounds[:, 2].sum()) for text in texts)
        pooled = accepted / (drafted * n_rounds) if drafted else math.nan
        assert row["pooled_acceptance"] == pytest.approx(pooled, nan_ok=True)
        layers_run = n_rounds * (drafted * row["layer"] + 4)
        assert row["layer_bound"] == pytest.approx(4 * new / layers_run)


def test_the_bound_of_lookups_is_their_tokens_per_round(swept: StudyResult) -> None:
    points = swept.tables["points"]
    lookups = points[points["layer"] == 0]
    assert lookups["acceptance"].notna().any()
    np.testing.assert_allclose(lookups["layer_bound"], lookups["tokens_per_round"])


def test_what_was_timed_has_a_verdict(swept: StudyResult) -> None:
    points = swept.tables["points"]
    timed = points[points["verdict"] != ""]
    best = {"lookups", "exit", "repeats", "lookup of 2 + exit at 3"}
    assert set(timed["drafter"]) == best
    assert set(timed["same_tokens"]) == {1.0}
    assert timed["adaptive"].any()
    # The adaptive setting is timed without a choice.
    assert set(timed[~timed["adaptive"]]["chosen_on"]) == {"these prompts"}
    assert set(points[(points["verdict"] == "") | points["adaptive"]]["chosen_on"]) == {""}
    assert "on these same prompts" in swept.text
    for row in timed.to_dict("records"):
        assert row["verdict"] == verdict(row["cpu_speedup_low"], row["cpu_speedup_high"])
    assert points[points["verdict"] == ""]["cpu_speedup"].isna().all()
    times = swept.tables["times"]
    assert (times[["wall_seconds", "cpu_seconds"]] > 0).all(axis=None) and times["same"].all()


def test_everything_is_written(swept: StudyResult, tiny_llama: sl.Model) -> None:
    folder = next(iter(swept.files.values())).parent
    names = {p.name for p in folder.iterdir()}
    tables = ("points", "by-prompt", "drafts", "costs", "times", "confidence")
    figures = {f"{n}.{e}" for n in ("acceptance", "confidence", "speed") for e in ("png", "pdf")}
    assert names == {f"{n}.csv" for n in tables} | figures | {"parts", "table.txt"} | {
        "speculate.json"
    }
    about = json.loads((folder / "speculate.json").read_text())
    assert about["config"]["eta"] == [0.0, 0.012] and about["kinds"] == ["x", "y"]
    assert about["model"]["sha256"] == tiny_llama.sha256
    assert max(map(len, swept.text.splitlines())) <= 120
    every = [prompt for several in PROMPTS.values() for prompt in several]
    n_new = len(sl.generate(every, 8, model=tiny_llama).token)
    assert len(swept.tables["drafts"]) == 4 * n_new


def test_it_resumes(tiny_llama: sl.Model, tmp_path: Path, capsys: Any) -> None:
    plan = SpeculationPlan(**SHORT, layers=[2], timed=1, out=tmp_path)
    first = sl.study(tiny_llama, plan)
    capsys.readouterr()
    again = sl.study(tiny_llama, plan)
    assert "not again: texts, exit at 2, lookups as long as pays, costs, times" in (
        capsys.readouterr().out
    )
    for name in ("points", "drafts", "times"):
        pd.testing.assert_frame_equal(first.tables[name], again.tables[name])
    fewer = SpeculationPlan(**SHORT, layers=[2], lookups=False, timed=0, out=tmp_path)
    points = sl.study(tiny_llama, fewer).tables["points"]
    assert "verdict" not in points and set(points["drafter"]) == {"exit"}


def test_one_prompt_and_one_token(tiny_llama: sl.Model, tmp_path: Path) -> None:
    plan = SpeculationPlan(
        prompts="ab", drafts=2, max_new_tokens=1, layers=1, rounds=1, out=tmp_path
    )
    points = sl.study(tiny_llama, plan).tables["points"]
    assert points["acceptance"].isna().all() and points["cpu_speedup"].isna().all()
    assert set(points["verdict"]) == {"undecided"} and set(points["tokens_per_round"]) == {1.0}


def test_costs_predict() -> None:
    rows = [("plain step", "", 0, 1, 10.0)]
    rows += [("pass", "", 0, n, 10.0 + n) for n in (1, 2, 3)]
    rows += [("head", "", 0, n, 2.0) for n in (1, 2, 3)]
    rows += [
        ("draft", "exit", 1, 1, 4.0),
        ("feed", "exit", 1, 1, 1.5),
        ("lookup", "lookups", 0, 1, 0.5),
    ]
    columns = ["part", "drafter", "layer", "n_tokens", "milliseconds"]
    costs = pd.DataFrame(rows, columns=columns)
    lookups = CostModel.of(costs, "lookups", 0, 4)
    assert lookups.rounds == (11.5, 12.5, 13.5)
    exits = CostModel.of(costs, "exit", 1, 4)
    # Two drafts, the run of the last, 3/4 of the blocks, and the head.
    assert exits.rounds[2] == pytest.approx(2 * 4 + 1.5 + 0.75 * (13 - 2) + 2)
    # At break-even a round of two drafts writes as many tokens as it costs plain steps.
    needed = exits.break_even([2, 2])
    assert 1 + 2 * needed == pytest.approx(exits.rounds[2] / 10)
    assert math.isnan(exits.break_even([0, 0]))
    # The fastest greedy text is the base, and noise makes no acceptance negative.
    slow = costs.assign(milliseconds=costs["milliseconds"].where(costs["part"] != "plain step", 15))
    assert CostModel.of(slow, "lookups", 0, 4).plain == 11.0
    even = costs.assign(milliseconds=costs["milliseconds"].where(costs["part"] != "pass", 9.0))
    assert CostModel.of(even, "lookups", 0, 4).break_even([2, 2]) == pytest.approx(0.5 / 9 / 2)
    less = even.assign(milliseconds=even["milliseconds"] - 0.2 * (even["n_tokens"] > 1))
    less.loc[less["part"] == "lookup", "milliseconds"] = 0.0
    assert CostModel.of(less, "lookups", 0, 4).break_even([2, 2]) == 0.0
    # Eleven tokens in two rounds of five and one in a third: the first step is left out of both.
    assert lookups.speedup([2, 2, 0], 11) == pytest.approx(100 / (13.5 + 13.5 + 11.5 - 10))
    assert math.isnan(lookups.speedup([0], 1))


def test_parts_take_turns_in_an_order_that_changes(
    tiny_llama: sl.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[Any] = []

    def noted(run: Any, *args: Any, **kwargs: Any) -> float:
        ran.append(run)
        return seconds_of(run, *args, **kwargs)

    monkeypatch.setattr(costs_module, "seconds_of", noted)
    several = {("repeats", 0): [Repeats()]}
    found = [measure_costs(tiny_llama, several, sl.Prompt((1, 2, 3)), 2) for _ in range(2)]
    turns = [tuple(ran[i : i + len(found[0])]) for i in range(0, len(ran), len(found[0]))]
    for of_call in (turns[: len(turns) // 2], turns[len(turns) // 2 :]):
        assert all(set(turn) == set(of_call[0]) for turn in of_call)
        assert len({turn[0] for turn in of_call}) > 2 and len(set(of_call)) == len(of_call)
    assert (found[0]["milliseconds"] > 0).all()
    keys = ["part", "drafter", "layer", "n_tokens"]
    pd.testing.assert_frame_equal(found[0][keys], found[1][keys])


def test_speeds_leave_the_prompt_out() -> None:
    plain = {"drafter": "", "layer": 0, "draft_tokens": 0, "eta": 0.0, "adaptive": False}
    ours = plain | {"drafter": "exit", "layer": 2, "draft_tokens": 3}
    rows = [
        setting | {"prompt": 0, "whole": whole, "wall_seconds": seconds, "cpu_seconds": 2 * seconds}
        for setting, pairs in ((plain, ((True, 11), (False, 1))), (ours, ((True, 7), (False, 2))))
        for whole, seconds in pairs
    ]
    [row] = speeds(pd.DataFrame(rows)).to_dict("records")
    assert row["wall_speedup"] == row["cpu_speedup"] == 2.0
    mean = geometric_mean("x", pd.Series([1.0, 4.0, math.nan]))
    assert mean["x"] == pytest.approx(2.0) and mean["x_low"] < 1 < mean["x_high"]
    said = [verdict(*ends) for ends in ((1.1, 1.2), (0.8, 0.9), (0.9, 1.1), (math.nan, math.nan))]
    assert said == ["faster", "slower", "undecided", "undecided"]


def test_prompts_of_a_file(tmp_path: Path) -> None:
    lines = tmp_path / "some.txt"
    lines.write_text("ab\n\ncd\n")
    assert prompts_by_kind(lines) == {"": ["ab", "cd"]}
    records = tmp_path / "some.jsonl"
    chat = [{"role": "user", "content": "hi"}]
    records.write_text(f'{{"prompt": {json.dumps(chat)}, "kind": "chat"}}\n"ab"\n')
    assert prompts_by_kind(records) == {"chat": [chat], "": ["ab"]}
    assert prompts_by_kind(chat) == {"": chat}
    own = prompts_by_kind(None)
    assert {kind: len(prompts) for kind, prompts in own.items()} == dict.fromkeys(own, 6)
    for wrong in ("{}", "3", '{"prompt": 3}', '{"prompt": ""}', '{"prompt": "a", "kind": 3}', "{"):
        records.write_text(f'"ab"\n{wrong}\n')
        with pytest.raises(ValueError, match=r"Line 2 of .* expected a text, or an object"):
            SpeculationPlan(prompts=records, out=tmp_path / "never")
    lines.write_text("\n")
    with pytest.raises(ValueError, match="no prompts; expected at least one"):
        prompts_by_kind(lines)
    with pytest.raises(FileNotFoundError, match="expected a file of prompts"):
        prompts_by_kind(tmp_path / "nowhere.txt")
    lines.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="cannot be read as text"):
        prompts_by_kind(lines)
    assert not (tmp_path / "never").exists()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"drafts": 0}, "expected numbers of tokens, 1 or more"),
        ({"drafts": []}, "expected numbers of tokens, 1 or more"),
        ({"drafts": [2, 2]}, "twice"),
        ({"eta": 1.5}, "expected numbers from 0 to 1"),
        ({"eta": [0.1, -0.1]}, "expected numbers from 0 to 1"),
        ({"eta": [math.nan]}, "expected numbers from 0 to 1"),
        ({"eta": [0.1, 0.1]}, "each once"),
        ({"eta": []}, "at least one number from 0 to 1"),
        ({"layers": []}, "at least one"),
        ({"layers": [1, 1]}, "twice"),
        ({"max_new_tokens": 0}, "1 or more"),
        ({"samples": 0}, "1 or more"),
        ({"timed": -1}, "0 or more"),
        ({"rounds": 0}, "1 or more"),
        ({"seed": -1}, "0 or more"),
        ({"prompts": {}}, "at least one prompt of each kind"),
        ({"drafters": [LayerExit(1), LayerExit(1)]}, "names of their own"),
    ],
)
def test_wrong_values_are_refused(wrong: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        SpeculationPlan(**(SHORT | wrong), out=tmp_path / "never")
    assert not (tmp_path / "never").exists()


def test_what_does_not_fit_the_model_is_refused(tiny_llama: sl.Model, tmp_path: Path) -> None:
    for wrong, message in (
        ({"layers": [0]}, "from 1 to 3"),
        ({"layers": [4]}, "from 1 to 3"),
        ({"drafters": LayerExit(4)}, "expected one below 4"),
        ({"drafters": LayerExit(9)}, "works at the layers"),
        ({"max_new_tokens": 500}, "do not fit the context"),
        ({"prompts": [sl.Prompt((999,))]}, "outside the vocabulary"),
    ):
        with pytest.raises(ValueError, match=message):
            sl.study(tiny_llama, SpeculationPlan(**(SHORT | wrong), out=tmp_path))
    assert not (tmp_path / "parts").exists()


def test_without_a_chat_template_chats_are_left_out(tmp_path: Path) -> None:
    model = sl.load(tiny("llama"), tokenizer=tiny_tokenizer(), name="tiny")
    from spade_lens.studies.speculation.study import SpeculationStudy

    study = SpeculationStudy(model, SpeculationPlan(samples=2, max_new_tokens=2, out=tmp_path))
    assert study.kind_of == ["free text"] * 2
