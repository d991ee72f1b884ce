"""Sufficiency: everything kept is the model, sets are what they say, greedy sets suffice."""

from dataclasses import replace
from typing import Any

import pandas as pd
import pytest
import torch
from reference import hidden_states, logits, reduced_run
from tiny import tiny, tiny_tokenizer

from spade_lens import Keep, Model, Prompt, icl, lenses, stats, tasks
from spade_lens.icl.positions.smallest_sets import piece_units
from spade_lens.icl.positions.sufficiency import position_sets
from spade_lens.lenses.keep import ClassLabels, last_labels, name_of
from spade_lens.prompts import Template


def prompts_of(n: int = 4, *, candidates: tuple[int, ...] = ()) -> list[Prompt]:
    """Two demonstrations and a query, of random tokens, with the spans of few_shot_prompt."""
    found = []
    for i in range(n):
        tokens = (1, *((11 * k + 17 * i) % 90 + 5 for k in range(13)))
        spans = {
            "query": (9, 10),
            "arrow": (11, 12, 13),
            "inputs": (1, 5),
            "labels": (3, 7),
            "demo0/input": (1,),
            "demo0/output": (3,),
            "demo1/input": (5,),
            "demo1/output": (6, 7),
        }
        found.append(Prompt(tokens=tokens, target=7, spans=spans, candidates=candidates))
    return found


def test_all_positions_are_the_model_at_every_layer(tiny_llama: Model) -> None:
    frame = icl.sufficiency_map(tiny_llama, prompts_of())
    everything = frame[frame["lens"] == "all"]
    assert len(everything) == 4 * 5
    assert everything["agrees"].all()
    assert everything["kl"].max() < 1e-5
    assert (everything["kept"] == 14).all()


def test_controls_are_as_large_and_share_what_they_say() -> None:
    prompt = prompts_of(1)[0]
    rule = Keep(spans=("query", "labels"))
    for draw in range(20):
        free = lenses.RandomSet(rule, draw=draw)(prompt, 13)
        fixed = lenses.RandomSet(rule, "query", draw)(prompt, 13)
        assert len(free) == len(fixed) == 6
        assert {0, 13} <= set(free) & set(fixed)
        assert {9, 10} <= set(fixed)
    assert len({lenses.RandomSet(rule, draw=d)(prompt, 13) for d in range(20)}) > 10
    assert lenses.RandomSet(rule, draw=3)(prompt, 13) == lenses.RandomSet(rule, draw=3)(prompt, 13)


def test_the_sets_by_name(tiny_llama: Model) -> None:
    kept = {name_of(r): tuple(r(prompts_of(1)[0], 13)) for r in position_sets(prompts_of())}
    assert kept == {
        "answer": (0, 13),
        "query": (0, 9, 10, 13),
        "inputs": (0, 1, 5, 13),
        "labels": (0, 3, 7, 13),
        "query+inputs": (0, 1, 5, 9, 10, 13),
        "query+labels": (0, 3, 7, 9, 10, 13),
        "last label": (0, 7, 13),
        "query+last label": (0, 7, 9, 10, 13),
        "all": tuple(range(14)),
    }
    assert [name_of(r) for r in position_sets([Prompt((1, 2, 3))])] == ["answer", "all"]
    frame = icl.sufficiency_map(tiny_llama, prompts_of(), layers=[2], draws=2)
    controls = frame[frame["control"]].groupby("of")["lens"].unique()
    assert set(controls.index) == set(kept) - {"answer", "all"}
    assert list(controls["query+labels"]) == [
        "random, as many as query+labels",
        "query+random, as many as query+labels",
    ]
    sizes = frame.groupby("of")["kept"].nunique()
    assert (sizes == 1).all()
    assert len(frame[frame["lens"] == "random, as many as labels"]) == 2 * 4
    summary = stats.summarise(frame)
    assert set(summary["measure"]) == {"accuracy", "agreement"}
    assert set(summary["lens"]) == set(frame["lens"])


def labelled_prompts(n: int = 4, shots: int = 4) -> list[Prompt]:
    """Of a rule task: letters are A or B."""
    classes = {"x": tuple("abcdefg"), "y": tuple("hijklmn")}
    template = Template(pair="{input}>{output}", query="{input}>", separator=";")
    task = tasks.RuleTask("t", classes)
    return task.prompts(tiny_tokenizer(), n, shots=shots, template=template)


def test_labels_of_the_answers_class_and_of_others(tiny_llama: Model) -> None:
    prompts = labelled_prompts()
    names = [name_of(r) for r in position_sets(prompts)]
    assert {"query+same labels", "query+other labels"} <= set(names)
    same, other = ClassLabels(same=True), ClassLabels(same=False)
    for prompt in prompts:
        at = prompt.spans["labels"]
        outer = {0, prompt.answer, *prompt.spans["query"]}
        kept = [set(rule(prompt, prompt.answer)) - outer for rule in (same, other)]
        assert kept[0] | kept[1] == set(at) and not kept[0] & kept[1]
        # As the text writes them: the right answer stands in one set and nowhere in the other.
        assert [{prompt.tokens[p] for p in k} == {prompt.target} for k in kept] == [True, False]
        assert len(kept[0]) == len(kept[1]) == 2
        bare = ClassLabels(same=True, query=False)(prompt, prompt.answer)
        assert set(bare) == {0, prompt.answer, *kept[0]}
    frame = icl.sufficiency_map(tiny_llama, prompts, layers=[2])
    controls = frame[frame["control"]].groupby("of")["lens"].unique()
    assert list(controls["query+other labels"]) == [
        "random, as many as query+other labels",
        "query+random, as many as query+other labels",
    ]
    assert frame.groupby("lens")["kept"].first()["query+other labels"] == 5


@pytest.mark.parametrize("case", ["word pairs", "one kind in a prompt", "no target"])
def test_without_classes_there_are_no_labels_of_a_class(case: str) -> None:
    prompts = labelled_prompts(8, shots=1 if case == "one kind in a prompt" else 4)
    if case == "word pairs":
        prompts = prompts_of(4, candidates=(7, 40))
    if case == "no target":
        prompts = [replace(p, target=None, target_tokens=()) for p in prompts]
    names = {name_of(rule) for rule in position_sets(prompts)}
    assert "query+labels" in names
    assert not {"query+same labels", "query+other labels"} & names


@pytest.mark.parametrize("candidates", [(), (7, 40, 60)])
def test_greedy_sets_suffice_and_cannot_be_smaller(
    tiny_llama: Model, candidates: tuple[int, ...]
) -> None:
    prompts = prompts_of(6, candidates=candidates)
    frame = icl.smallest_sets(tiny_llama, prompts, layers=[0, 1, 3], draws=4)
    assert frame["sufficient"].all()
    assert frame["units"].max() >= (1 if candidates else 2)
    assert frame["random"].between(0, 1).all()
    hf_model = tiny()
    options = list(candidates) or list(range(97))

    def answer(row: Any, kept: list[int]) -> int:
        stream = hidden_states(hf_model, prompts[row.prompt].tokens)
        return int(
            reduced_run(hf_model, stream[row.layer][kept], kept, row.layer)[options].argmax()
        )

    for row in frame.itertuples():
        own = int(logits(hf_model, prompts[row.prompt].tokens)[-1][options].argmax())
        assert len(row.kept) == row.units + 2 == row.tokens + 2
        assert answer(row, list(row.kept)) == own
        for p in row.kept[1:-1]:
            assert answer(row, [k for k in row.kept if k != p]) != own


def test_a_fraction_of_the_lead_asks_for_more(tiny_llama: Model) -> None:
    prompts = prompts_of(6, candidates=(7, 40))
    frames = {s: icl.smallest_sets(tiny_llama, prompts, layers=[1], fraction=s) for s in (0.0, 0.5)}
    assert (frames[0.5]["units"] >= frames[0.0]["units"]).all()
    assert frames[0.5]["units"].sum() > frames[0.0]["units"].sum()
    hf_model = tiny()
    for row in frames[0.5][frames[0.5]["sufficient"]].itertuples():
        full = logits(hf_model, prompts[row.prompt].tokens)[-1][[7, 40]]
        stream = hidden_states(hf_model, prompts[row.prompt].tokens)[1][list(row.kept)]
        found = reduced_run(hf_model, stream, row.kept, 1)[[7, 40]]
        assert (found[0] - found[1]) / (full[0] - full[1]) >= 0.499
    whole = icl.smallest_sets(tiny_llama, prompts, layers=[4], fraction=1.0)
    assert whole["sufficient"].all() and (whole["units"] == 0).all()


def test_greedy_takes_pieces_whole(tiny_llama: Model) -> None:
    prompts = prompts_of(6)
    units = piece_units(prompts[0])
    assert units == [(1,), (3,), (5,), (6, 7), (9, 10), (11, 12)]
    frame = icl.smallest_sets(tiny_llama, prompts, layers=[1], units="pieces", most=6)
    for row in frame.itertuples():
        inside = [u for u in units if set(u) <= set(row.kept)]
        assert row.kept == tuple(sorted({0, 13, *(p for u in inside for p in u)}))
        assert row.units == len(inside)
        assert set(row.spans) <= {"query", "arrow", *(n for n in prompts[0].spans if "/" in n)}
    assert (frame["tokens"] > frame["units"]).any()


def test_greedy_stops_where_it_is_told(tiny_llama: Model) -> None:
    frame = icl.smallest_sets(tiny_llama, prompts_of(6), layers=[0], most=0, draws=0)
    assert (frame["units"] == 0).all()
    assert not frame["sufficient"].all()
    assert frame["random"].isna().all()
    last = icl.smallest_sets(tiny_llama, prompts_of(2), layers=[4])
    assert (last["units"] == 0).all() and last["sufficient"].all()


def test_search_does_not_depend_on_the_company(tiny_llama: Model) -> None:
    prompts = prompts_of(4)
    together = icl.smallest_sets(tiny_llama, prompts, layers=[1])
    alone = pd.concat([icl.smallest_sets(tiny_llama, [p], layers=[1]) for p in prompts])
    assert together["kept"].tolist() == alone["kept"].tolist()
    torch.testing.assert_close(together["random"].to_list(), alone["random"].to_list())


def test_bad_input_is_refused(tiny_llama: Model) -> None:
    prompts = prompts_of(2)
    with pytest.raises(ValueError, match="n=0 was given"):
        last_labels(0)
    with pytest.raises(ValueError, match=r"names spans \['labels'\]"):
        last_labels(1)(Prompt((1, 2)), 1)
    with pytest.raises(ValueError, match=r"names spans \['query', 'labels'\]"):
        ClassLabels(same=True)(Prompt((1, 2), target=2), 1)
    with pytest.raises(ValueError, match="this prompt has no target"):
        ClassLabels(same=True)(replace(prompts[0], target=None, target_tokens=()), 13)
    with pytest.raises(ValueError, match="draws=-1"):
        icl.sufficiency_map(tiny_llama, prompts, draws=-1)
    with pytest.raises(ValueError, match="Two sets have one name"):
        icl.sufficiency_map(tiny_llama, prompts, sets=[Keep(), Keep()])
    with pytest.raises(ValueError, match=r"names spans \['rule'\]"):
        icl.sufficiency_map(tiny_llama, prompts, sets=[Keep(spans=("rule",))])
    with pytest.raises(ValueError, match=r"fraction=1\.5"):
        icl.smallest_sets(tiny_llama, prompts, layers=[1], fraction=1.5)
    with pytest.raises(ValueError, match="most=-1"):
        icl.smallest_sets(tiny_llama, prompts, layers=[1], most=-1)
    with pytest.raises(ValueError, match=r"Units \[\(99,\)\] are not positions of prompt 0"):
        icl.smallest_sets(tiny_llama, prompts, layers=[1], units=lambda p: [(99,)])
    with pytest.raises(ValueError, match="no pieces to choose from"):
        piece_units(Prompt((1, 2, 3)))
    with pytest.raises(ValueError, match="layers 0"):
        icl.smallest_sets(tiny_llama, prompts, layers=[9])
