"""Figures of in-context learning hold the tables they were given, and refuse what is none."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from figures import assert_readable, corners, legend, line, titles
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tiny import tiny_tokenizer

from spade_lens import Keep, Model, Prompt, capture, icl
from spade_lens.icl.attention.edges import EDGES
from spade_lens.icl.geometry.dpca_projections import factor_projections
from spade_lens.plots.attention import plot_knockout, plot_saliency
from spade_lens.plots.means import plot_means
from spade_lens.plots.sufficiency import plot_smallest, plot_sufficiency
from spade_lens.plots.vectors import (
    plot_convergence,
    plot_factors,
    plot_probes,
    plot_projections,
)
from spade_lens.prompts import few_shot_prompt
from spade_lens.stats import proportion_interval

N, SHOTS = 12, 2
RULE = torch.arange(N) % 2
LABEL = (torch.arange(N)[:, None] // 2 + torch.arange(SHOTS)) % 2

# The tiny tokenizer writes every space as one unknown token, with which all answers begin.
pytestmark = pytest.mark.filterwarnings("ignore::spade_lens.prompts.TokenWarning")


@pytest.fixture(scope="module")
def prompts() -> list[Prompt]:
    """Two rules: letters of lines are labelled one way or the other."""
    made = []
    for i in range(N):
        labels = "AB" if RULE[i] else "BA"
        pairs = [("abcdef"[(i + k) % 6], labels[LABEL[i, k]]) for k in range(SHOTS)]
        answer = labels[i % 2]
        made.append(few_shot_prompt(tiny_tokenizer(), pairs, "q", answer=answer))
    return made


@pytest.fixture(scope="module")
def knockouts(tiny_llama: Model, prompts: Sequence[Prompt]) -> pd.DataFrame:
    """All families, three windows, two draws of the control."""
    return icl.knockout(tiny_llama, prompts, windows=[(0, 2), (0, 4), (2, 4)], draws=2)


@pytest.fixture(scope="module")
def saliency(tiny_llama: Model, prompts: Sequence[Prompt]) -> pd.DataFrame:
    return icl.saliency_flows(tiny_llama, prompts, draws=2)


@pytest.fixture(scope="module")
def sufficiency(tiny_llama: Model, prompts: Sequence[Prompt]) -> pd.DataFrame:
    """Two sets with controls, one of them with two, and two without."""
    answer, labels = Keep(name="answer"), Keep(spans=("labels",), name="labels")
    both = Keep(spans=("query", "labels"), name="query+labels")
    sets = [answer, labels, both, Keep(last=100, name="all")]
    return icl.sufficiency_map(tiny_llama, prompts, sets=sets, draws=2)


@pytest.fixture(scope="module")
def vectors(tiny_llama: Model, prompts: Sequence[Prompt]) -> torch.Tensor:
    positions = [prompt.spans["labels"] for prompt in prompts]
    stack = capture(tiny_llama, prompts, positions=positions).stack
    return stack.unflatten(1, (N, SHOTS))


@pytest.fixture(scope="module")
def likeness(vectors: torch.Tensor) -> pd.DataFrame:
    return icl.convergence(vectors, rule=RULE, label=LABEL, shuffles=5)


@pytest.fixture(scope="module")
def probes(vectors: torch.Tensor) -> pd.DataFrame:
    return pd.concat(
        icl.probe(vectors[:3], some, folds=3).assign(probed=name)
        for name, some in [("rule", RULE), ("label", LABEL)]
    )


@pytest.fixture(scope="module")
def factors(vectors: torch.Tensor) -> pd.DataFrame:
    return icl.factor_variance(vectors, rule=RULE, label=LABEL, shuffles=4, splits=4)


@pytest.fixture(scope="module")
def projections(vectors: torch.Tensor) -> pd.DataFrame:
    parts = ("rule", "label", "demo", "rule x label")
    at = icl.RuleVectors(vectors[2:4], layers=(2, 3))
    return factor_projections(at, rule=RULE, label=LABEL, parts=parts)


@pytest.fixture(scope="module")
def smallest(tiny_llama: Model, prompts: Sequence[Prompt]) -> pd.DataFrame:
    return icl.smallest_sets(tiny_llama, prompts, layers=[0, 1, 3], units="pieces", most=8)


def control(panel: Axes, number: int = 0) -> Any:
    return [x for x in panel.lines if x.get_label() == "_control"][number]


def for_tasks(frame: pd.DataFrame) -> pd.DataFrame:
    return pd.concat([frame.assign(task=task) for task in ("one", "two")])


# -- attention


def test_knockout_is_the_mean_over_prompts_beside_its_control(knockouts: pd.DataFrame) -> None:
    figure = plot_knockout(knockouts)
    assert titles(figure) == list(EDGES)
    assert legend(figure) == ["cut", "as many random edges", "full model"]
    for panel, family in zip(figure.axes, EDGES, strict=True):
        rows = knockouts[knockouts["edges"] == family]
        means = rows.groupby(["control", "start", "stop"])["change"].mean()
        for drawn, among in [(line(panel, "cut"), means[False]), (control(panel), means[True])]:
            np.testing.assert_allclose(drawn.get_ydata(), among[[(0, 4), (0, 2), (2, 4)]])
        assert line(panel, "full model").get_ydata()[0] == 0
    assert_readable(figure)
    assert [t.get_text() for t in figure.axes[-1].get_xticklabels()] == ["0–4", "0–2", "2–4"]


def test_knockout_counts_prompts_and_not_draws(knockouts: pd.DataFrame) -> None:
    family = "label -> final position"
    (panel,) = plot_knockout(knockouts, "agrees", edges=[family]).axes
    rows = knockouts[(knockouts["edges"] == family) & ~knockouts["control"]]
    for _, some in rows.groupby(["start", "stop"]):
        ends = proportion_interval(int(some["agrees"].sum()), N)
        assert {round(end, 9) for end in ends} <= corners(panel)
    assert line(panel, "full model").get_ydata()[0] == 1
    assert panel.get_ylim() == (-0.03, 1.03)


def test_several_tasks_have_a_row_each(knockouts: pd.DataFrame) -> None:
    figure = plot_knockout(for_tasks(knockouts), edges=list(EDGES)[:3])
    assert titles(figure) == [*list(EDGES)[:3], "", "", ""]
    assert [panel.get_ylabel() for panel in figure.axes] == ["one", "", "", "two", "", ""]
    assert_readable(figure)


def test_saliency_is_the_mean_over_prompts(saliency: pd.DataFrame) -> None:
    figure = plot_saliency(saliency)
    assert titles(figure) == ["the three flows", "from inputs to labels"]
    three, inputs = figure.axes
    means = saliency.groupby(["flow", "control", "block"])["saliency"].mean()
    for number, flow in enumerate(["words -> label", "label -> final", "rest"]):
        np.testing.assert_allclose(line(three, flow).get_ydata(), means[flow, False])
        np.testing.assert_allclose(control(three, number).get_ydata(), means[flow, True])
    for flow in ("own input -> label", "other input -> label"):
        np.testing.assert_allclose(line(inputs, flow).get_ydata(), means[flow, False])
    assert legend(figure)[-1] == "random positions as labels"
    assert_readable(figure)
    assert titles(plot_saliency(saliency, flows=["rest"])) == ["the three flows"]


# -- rule vectors


def test_convergence_is_the_table(likeness: pd.DataFrame) -> None:
    figure = plot_convergence(likeness)
    assert titles(figure) == ["any two vectors", "of the same label", "of two labels"]
    for panel, labels in zip(figure.axes, ["any", "same", "different"], strict=True):
        rows = likeness[likeness["labels"] == labels]
        for comparison, own in rows[~rows["control"]].groupby("comparison"):
            np.testing.assert_array_equal(line(panel, str(comparison)).get_ydata(), own["mean"])
            assert set(own[["low", "high"]].to_numpy().round(9).ravel()) <= corners(panel)
        drawn = [x for x in panel.lines if x.get_label() == "_control"]
        assert len(drawn) == rows.loc[rows["control"], "comparison"].nunique() > 0
    assert legend(figure)[-1] == "rules shuffled"
    assert_readable(figure)
    assert titles(plot_convergence(likeness, labels=["same"])) == ["of the same label"]


def test_probes_stand_beside_shuffled_classes_and_chance(probes: pd.DataFrame) -> None:
    figure = plot_probes(probes)
    assert titles(figure) == ["rule", "label"]
    assert legend(figure) == ["probe", "classes shuffled", "most frequent class"]
    for panel, (_, rows) in zip(figure.axes, probes.groupby("probed", sort=False), strict=True):
        own, shuffled = rows[~rows["control"]], rows[rows["control"]]
        np.testing.assert_array_equal(line(panel, "probe").get_ydata(), own["mean"])
        np.testing.assert_array_equal(control(panel).get_ydata(), shuffled["mean"])
        assert line(panel, "most frequent class").get_ydata()[0] == rows["chance"].iloc[0]
    assert_readable(figure)
    with pytest.raises(ValueError, match="Several rows are of one place"):
        plot_probes(probes.drop(columns="probed"))


def test_factors_show_share_control_and_what_halves_agree_on(factors: pd.DataFrame) -> None:
    figure = plot_factors(factors)
    assert titles(figure) == [f for f in factors["factor"].unique() if f != "rest"]
    for panel in figure.axes:
        rows = factors[factors["factor"] == panel.get_title()]
        np.testing.assert_array_equal(line(panel, "fraction").get_ydata(), rows["fraction"])
        np.testing.assert_array_equal(control(panel).get_ydata(), rows["control"])
        agreed = line(panel, "fraction that two halves of the prompts agree on")
        np.testing.assert_array_equal(agreed.get_ydata(), rows["held_out"])
        assert panel.get_ylim()[0] < rows["held_out"].min()
    assert_readable(figure)


def test_factors_without_controls_and_the_rest(factors: pd.DataFrame) -> None:
    bare = factors[["layer", "factor", "fraction"]]
    figure = plot_factors(bare, factors=["rest", "rule"])
    assert titles(figure) == ["rest", "rule"] and legend(figure) == ["fraction"]
    rest = bare[bare["factor"] == "rest"]
    with pytest.raises(ValueError, match="the rest alone; give factors="):
        plot_factors(rest)
    assert titles(plot_factors(rest, factors=["rest"])) == ["rest"]


def test_projections_are_means_over_prompts(projections: pd.DataFrame) -> None:
    figure = plot_projections(projections, layer=3)
    assert titles(figure) == ["rule", "label", "demo", "rule x label"]
    lines = [f"rule {rule}; label {label}" for rule in (0, 1) for label in (0, 1)]
    assert legend(figure) == lines
    rows = projections[projections["layer"] == 3]
    means = rows.groupby(["factor", "rule", "label", "demo"])["value"].mean()
    for panel in figure.axes:
        drawn = [line(panel, name) for name in lines]
        for place, (rule, label) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)]):
            expected = means[panel.get_title(), rule, label]
            np.testing.assert_allclose(drawn[place].get_ydata(), expected)
            np.testing.assert_array_equal(drawn[place].get_xdata(), expected.index)
        # Rules have their colours, labels their dashes.
        colors = [x.get_color() for x in drawn]
        assert colors[0] == colors[1] != colors[2] == colors[3]
        dashes = [x._dash_pattern for x in drawn]
        assert dashes[0] == dashes[2] != dashes[1] == dashes[3]
    assert_readable(figure)
    named = projections.assign(rule=projections["rule"].map({0: "as is", 1: "turned"}))
    some = plot_projections(named, layer=2, factors=["label"])
    assert titles(some) == ["label"] and legend(some)[0] == "as is; label 0"
    with pytest.raises(ValueError, match=r"layer=None was given; expected one of \[2, 3\]"):
        plot_projections(projections)


# -- sufficiency


def test_smallest_sets_by_kind_size_and_luck(smallest: pd.DataFrame) -> None:
    figure = plot_smallest(smallest)
    kinds, size, luck = figure.axes
    assert titles(figure) == ["pieces of each kind", "size", "found, and found by luck"]
    found = smallest[smallest["sufficient"]]
    by_layer = found.groupby("layer")
    np.testing.assert_allclose(line(size, "pieces").get_ydata(), by_layer["units"].mean())
    np.testing.assert_allclose(line(size, "tokens").get_ydata(), by_layer["tokens"].mean())
    np.testing.assert_allclose(
        line(luck, "a set was found").get_ydata(), smallest.groupby("layer")["sufficient"].mean()
    )
    np.testing.assert_allclose(
        line(luck, "random sets of its size that suffice").get_ydata(),
        smallest.groupby("layer")["random"].mean(),
    )
    drawn = {x.get_label(): x.get_ydata() for x in kinds.lines if x.get_label()[0] != "_"}
    pieces = {"inputs": r"demo\d/input", "outputs": r"demo\d/output", "arrows": r"demo\d/arrow"}
    text = found["spans"].map(" ".join)
    for kind, pattern in pieces.items():
        means = text.str.count(pattern).groupby(found["layer"]).mean()
        np.testing.assert_allclose(drawn.get(kind, 0 * means), means)
    # Every piece is of one kind.
    np.testing.assert_allclose(sum(drawn.values()), by_layer["units"].mean())
    assert luck.get_ylim() == (-0.03, 1.03)
    assert min(map(min, map(corners, figure.axes))) >= 0 and max(corners(luck)) <= 1
    assert_readable(figure)
    from_file = plot_smallest(smallest.assign(spans=smallest["spans"].map(" ".join)))
    assert legend(from_file) == legend(figure)


def test_where_no_set_was_found_luck_stands_alone(smallest: pd.DataFrame) -> None:
    figure = plot_smallest(smallest.assign(sufficient=False, random=float("nan")))
    assert titles(figure) == ["found, and found by luck"]
    assert legend(figure) == ["a set was found"]


def test_every_set_stands_beside_its_controls_and_those_without(sufficiency: pd.DataFrame) -> None:
    figure = plot_sufficiency(sufficiency)
    assert titles(figure) == ["labels", "query+labels"]
    kinds = ["the set", "random", "query+random", "answer", "all"]
    assert legend(figure) == kinds
    means = sufficiency.groupby(["lens", "layer"])["agrees"].mean()
    labels, both = figure.axes
    for panel, name in [(labels, "labels"), (both, "query+labels")]:
        np.testing.assert_allclose(line(panel, "the set").get_ydata(), means[name])
        expected = means[f"random, as many as {name}"]
        np.testing.assert_allclose(line(panel, "random").get_ydata(), expected)
        np.testing.assert_allclose(line(panel, "answer").get_ydata(), means["answer"])
    expected = means["query+random, as many as query+labels"]
    np.testing.assert_allclose(line(both, "query+random").get_ydata(), expected)
    assert_readable(figure)


def test_sets_are_chosen_and_accuracy_too(sufficiency: pd.DataFrame) -> None:
    (panel,) = plot_sufficiency(sufficiency, "correct", sets=["query+labels"]).axes
    means = sufficiency.groupby(["lens", "layer"])["correct"].mean()
    np.testing.assert_allclose(line(panel, "the set").get_ydata(), means["query+labels"])
    bare = sufficiency[~sufficiency["control"]]
    assert titles(plot_sufficiency(bare)) == ["answer", "labels", "query+labels", "all"]


# -- bad input


@pytest.mark.parametrize(
    ("function", "column", "maker"),
    [
        (plot_knockout, "edges", "icl.knockout"),
        (plot_saliency, "flow", "icl.saliency_flows"),
        (plot_convergence, "comparison", "icl.convergence"),
        (plot_probes, "chance", "icl.probe"),
        (plot_factors, "factor", "icl.factor_variance"),
        (plot_projections, "factor", "factor_projections"),
        (plot_smallest, "units", "icl.smallest_sets"),
        (plot_sufficiency, "of", "icl.sufficiency_map"),
    ],
)
def test_another_table_is_refused(function: Callable[..., Figure], column: str, maker: str) -> None:
    with pytest.raises(ValueError, match=f"needs the columns .*'{column}'.*{maker}"):
        function(pd.DataFrame({"layer": [1], "value": [0.5]}))


def test_what_is_not_there_is_said(
    knockouts: pd.DataFrame, saliency: pd.DataFrame, sufficiency: pd.DataFrame
) -> None:
    with pytest.raises(ValueError, match="edges=.'nothing'. was asked for; .*'label -> final"):
        plot_knockout(knockouts, edges=["nothing"])
    with pytest.raises(ValueError, match="the uncut model alone; expected cut edges"):
        plot_knockout(knockouts[knockouts["edges"] == "nothing"])
    with pytest.raises(ValueError, match="of=.'inputs'. was asked for"):
        plot_sufficiency(sufficiency, sets=["inputs"])
    for plot, frame in [(plot_knockout, knockouts), (plot_saliency, saliency)]:
        other = frame.assign(model="another")
        with pytest.raises(ValueError, match=r"rows of the models \['tiny-llama', 'another'\]"):
            plot(pd.concat([frame, other]))


def test_means_of_odd_tables() -> None:
    rows = pd.DataFrame({"measure": ["a", "b"], "mean": [0.9, 0.7], "low": 0.5, "high": 0.95})
    several = pd.concat([rows.assign(task="x"), rows.assign(task=np.nan)])  # an index that repeats
    dots = [ax.lines[0].get_xydata().tolist() for ax in plot_means(several).axes]
    assert dots == [[[0.9, 0], [0.9, 1]], [[0.7, 0], [0.7, 1]]]
    numbered = plot_means(rows.assign(measure=[1, 2])).axes[0]
    assert [label.get_text() for label in numbered.get_yticklabels()] == ["1", "2"]
