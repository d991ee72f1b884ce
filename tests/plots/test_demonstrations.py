"""Figures by shots, of patching and of contributions hold what tiny runs of them found."""

from typing import Any

import numpy as np
import pandas as pd
import pytest
from figures import assert_readable, corners, legend, line, titles
from scipy.stats import ttest_1samp

from spade_lens import Model, icl, prompts, stats
from spade_lens.plots.demonstrations import (
    plot_by_demonstration,
    plot_by_shots,
    plot_effective_number,
    plot_patching,
)
from spade_lens.plots.maps import plot_contributions
from spade_lens.tasks import RuleTask
from spade_lens.tasks.resolve import task as make_task

pytestmark = pytest.mark.filterwarnings("ignore:On task .* there is nothing to explain")

TIGHT = prompts.Template(pair="{input}>{output}", query="{input}>", separator=";")
SETUP = icl.PromptSetup(TIGHT)
RULE = RuleTask("x/y", {"x": tuple("abcdefghijklm"), "y": tuple("nopqrstuvwxyz")})
PAIRS = make_task([[c, c.upper()] for c in "abcdefghijklmnopqrstuvwxyz"], name="upper")
KINDS = {"upper": "knowledge", "x/y": "rule"}
PATCHED = (
    "labels",
    "labels to the top, random",
    "labels to the top",
    "labels to the top, opposite",
    "final position",
)
LAYERS = [0, 2, 4]


@pytest.fixture(scope="module")
def by_shots(tiny_llama: Model) -> pd.DataFrame:
    tasks = [PAIRS, RULE]
    frame = icl.accuracy_by_shots(tiny_llama, tasks, n=8, shots=[0, 1, 4, 16], setup=SETUP)
    summary = stats.summarise(frame, by=("task", "shots"))
    return summary.assign(kind=summary["task"].map(KINDS))


@pytest.fixture(scope="module")
def patching(tiny_llama: Model) -> pd.DataFrame:
    episodes = RULE.episodes(8, shots=4)
    every = icl.default_conditions(episodes)
    frame = icl.patch_sweep(
        tiny_llama,
        episodes,
        conditions=[next(c for c in every if c.name == name) for name in PATCHED],
        layers=LAYERS,
        setup=SETUP,
    )
    return stats.summarise(frame)


@pytest.fixture(scope="module")
def contributions(tiny_llama: Model) -> pd.DataFrame:
    return icl.measure_contributions(
        tiny_llama,
        RULE.episodes(12, shots=4),
        layers=LAYERS,
        setup=SETUP,
    )


def test_every_task_is_a_line_by_shots(by_shots: pd.DataFrame) -> None:
    figure = plot_by_shots(by_shots, "preference", chance=0.5)
    (panel,) = figure.axes
    assert legend(figure) == ["upper", "x/y", "chance"]
    for task in KINDS:
        rows = by_shots.query("task == @task and measure == 'preference'")
        np.testing.assert_array_equal(line(panel, task).get_xdata(), [0, 1, 4, 16])
        np.testing.assert_array_equal(line(panel, task).get_ydata(), rows["mean"])
        assert set(rows[["low", "high"]].to_numpy().round(9).ravel()) <= corners(panel)
    assert line(panel, "chance").get_ydata()[0] == 0.5
    assert_readable(figure)
    ticks = [t.get_text() for t in panel.get_xticklabels() if t.get_text()]
    assert ticks == ["0", "1", "4", "16"]
    # 0 to 1 is one step, 1 to 4 are two, 4 to 16 two.
    at = panel.transData.transform([(x, 0) for x in (0, 1, 4, 16)])[:, 0]
    np.testing.assert_allclose(np.diff(at) / (at[1] - at[0]), [1, 2, 2])


def test_panels_and_chance_by_kind(by_shots: pd.DataFrame) -> None:
    figure = plot_by_shots(by_shots, panels="kind", chance={"knowledge": 0.25, "rule": 0.5})
    assert titles(figure) == ["knowledge", "rule"]
    assert [line(panel, "chance").get_ydata()[0] for panel in figure.axes] == [0.25, 0.5]
    with pytest.raises(ValueError, match=r"chance= has .*the panels \['rule'\] are not there"):
        plot_by_shots(by_shots, panels="kind", chance={"knowledge": 0.25})


@pytest.mark.parametrize("measure", ["accuracy", "logit_diff"])
def test_a_condition_stands_beside_its_controls(patching: pd.DataFrame, measure: Any) -> None:
    figure = plot_patching(patching, measure)
    assert titles(figure) == ["labels", "labels to the top", "final position"]
    expected = ["own vectors", "random", "opposite", "few-shot", "dummy", "zero-shot"]
    assert legend(figure) == expected
    drawn = [{x.get_label() for x in panel.lines} & set(expected) for panel in figure.axes]
    assert [lines - set(expected[3:]) for lines in drawn] == [
        {"own vectors"},
        {"own vectors", "random", "opposite"},
        {"own vectors"},
    ]
    means = patching[patching["measure"] == measure].set_index(["condition", "layer"])["mean"]
    floors = ["zero-shot", "dummy", "few-shot"]
    for panel in figure.axes:
        levels = [line(panel, name).get_ydata()[0] for name in floors]
        np.testing.assert_array_equal(levels, [means[name, -1] for name in floors])
        own = line(panel, "own vectors")
        np.testing.assert_array_equal(own.get_xdata(), LAYERS)
        np.testing.assert_array_equal(own.get_ydata(), means[panel.get_title()][LAYERS])
    up = figure.axes[1]
    for label in ("random", "opposite"):
        np.testing.assert_array_equal(
            line(up, label).get_ydata(), means[f"labels to the top, {label}"][LAYERS]
        )
    assert_readable(figure)


def test_patching_of_some_conditions_and_two_tasks(patching: pd.DataFrame) -> None:
    one, two = (patching.assign(task=task) for task in ("one", "two"))
    both = pd.concat([one, two.query("condition != 'zero-shot'")])
    figure = plot_patching(
        both, conditions=["final position", "labels to the top", "labels to the top, opposite"]
    )
    assert titles(figure) == ["final position", "labels to the top", "", ""]
    assert [panel.get_ylabel() for panel in figure.axes] == ["one", "", "two", ""]
    floors = [sum(x.get_label() == "zero-shot" for x in panel.lines) for panel in figure.axes]
    assert floors == [1, 1, 0, 0]
    assert_readable(figure)


def test_the_heat_map_is_the_mean_over_prompts(contributions: pd.DataFrame) -> None:
    # In a random model no demonstration does anything for sure, so one is made to.
    here = (contributions["layer"] == 2) & (contributions["demo"] == 1)
    contributions = contributions.assign(
        shapley=contributions["shapley"] + 5 * contributions["shapley"].std() * here
    )
    figure = plot_contributions(contributions)
    panel, bar = figure.axes
    (mesh,) = panel.collections
    cells = contributions.groupby(["demo", "layer"])["shapley"]
    means = cells.mean().unstack()
    np.testing.assert_allclose(mesh.get_array(), means)
    most = means.abs().max().max()
    np.testing.assert_allclose(mesh.get_clim(), (-most, most))
    assert "Shapley value" in bar.get_ylabel()
    assert panel.get_ylim() == (3.5, -0.5)
    figure.draw_without_rendering()
    assert [t.get_text() for t in panel.get_xticklabels()] == ["0", "2", "4"]
    assert legend(figure) == ["95% interval excludes 0"]
    assert_readable(figure)
    (dots,) = panel.lines
    drawn = {
        (LAYERS[int(x)], int(y)) for x, y in zip(dots.get_xdata(), dots.get_ydata(), strict=True)
    }
    sure = {(layer, demo) for (demo, layer), x in cells if ttest_1samp(x, 0).pvalue < 0.05}
    assert drawn == sure and (2, 1) in sure and len(sure) < 12


def test_panels_of_the_heat_map_have_one_scale(contributions: pd.DataFrame) -> None:
    one = contributions.assign(task="one")
    both = pd.concat([one, one.assign(task="two", shapley=0.1)])
    figure = plot_contributions(both, by_answer=True)
    names = ["label is the answer", "label is another"]
    assert titles(figure)[:-1] == [f"{task}, {name}" for task in ("one", "two") for name in names]
    assert len({panel.collections[0].get_clim() for panel in figure.axes[:-1]}) == 1
    own, others = (figure.axes[k].collections[0].get_array() for k in (0, 1))
    means = one.groupby(["same_label", "demo", "layer"])["shapley"].mean()
    np.testing.assert_allclose(own, means[True].unstack())
    np.testing.assert_allclose(others, means[False].unstack())
    # Where a demonstration's label is never the answer, its row is empty.
    first = both[both["same_label"] != (both["demo"] == 1)]
    empty = np.ma.getmaskarray(
        plot_contributions(first, by_answer=True).axes[0].collections[0].get_array()
    )
    assert empty.all(axis=1).tolist() == [False, True, False, False]
    left_out = plot_contributions(contributions, "leave_one_out").axes[0].collections[0]
    cells = contributions.groupby(["demo", "layer"])["leave_one_out"].mean().unstack()
    np.testing.assert_allclose(left_out.get_array(), cells)


def test_contributions_by_place_and_label(contributions: pd.DataFrame) -> None:
    figure = plot_by_demonstration(contributions)
    assert titles(figure) == ["layer 0", "layer 2", "layer 4"]
    assert legend(figure) == ["label is the answer", "label is another"]
    means = contributions.groupby(["layer", "same_label", "demo"])["shapley"].mean()
    for panel, layer in zip(figure.axes, LAYERS, strict=True):
        for label, same in [("label is the answer", True), ("label is another", False)]:
            np.testing.assert_array_equal(line(panel, label).get_xdata(), range(4))
            np.testing.assert_allclose(line(panel, label).get_ydata(), means[layer, same])
    middle = contributions[contributions["layer"] == 2]
    for _, values in middle.groupby(["same_label", "demo"])["shapley"]:
        ends = ttest_1samp(values, 0).confidence_interval()
        drawn = {round(end, 9) for end in ends} <= corners(figure.axes[1])
        assert drawn == (len(values) >= 5)
    few = contributions[contributions["prompt"] < 4]
    (bare,) = plot_by_demonstration(few, layers=[2]).axes
    assert len(bare.collections) == 2 and not any(c.get_paths() for c in bare.collections)
    assert_readable(figure)
    some = plot_by_demonstration(contributions, "add_one_in", layers=[4, 2])
    assert titles(some) == ["layer 4", "layer 2"]
    alone = contributions.groupby(["layer", "same_label", "demo"])["add_one_in"].mean()
    drawn = line(some.axes[0], "label is another").get_ydata()
    np.testing.assert_allclose(drawn, alone[4, False])


def test_concentration_lies_between_noise_and_all_alike(contributions: pd.DataFrame) -> None:
    found = stats.summarise(contributions, "effective")
    figure = plot_effective_number(found, shots=4)
    (panel,) = figure.axes
    assert legend(figure) == ["effective number", "all alike", "noise alone"]
    np.testing.assert_array_equal(line(panel, "effective number").get_ydata(), found["mean"])
    assert set(found[["low", "high"]].to_numpy().round(9).ravel()) <= corners(panel)
    assert line(panel, "all alike").get_ydata()[0] == 4
    noise = np.random.default_rng(0).normal(size=(100_000, 4))
    expected = (np.abs(noise).sum(axis=1) ** 2 / (noise**2).sum(axis=1)).mean()
    assert line(panel, "noise alone").get_ydata()[0] == pytest.approx(expected, abs=0.01)
    assert_readable(figure)
    assert legend(plot_effective_number(found)) == ["effective number"]


def test_what_is_not_there_is_said(
    by_shots: pd.DataFrame, patching: pd.DataFrame, contributions: pd.DataFrame
) -> None:
    with pytest.raises(ValueError, match=r"'flops' was asked for; .*\['accuracy'"):
        plot_by_shots(by_shots, "flops")
    with pytest.raises(
        ValueError, match=r"condition=\['label'\] was asked for; .*'labels to the top'"
    ):
        plot_patching(patching, conditions=["label"])
    with pytest.raises(ValueError, match=r"baselines \(layer -1\) alone; expected layers"):
        plot_patching(patching.query("layer < 0"))
    with pytest.raises(ValueError, match=r"layer=\[3\] was asked for; .*2"):
        plot_by_demonstration(contributions, layers=[3])
    with pytest.raises(ValueError, match="shots=0 was given"):
        plot_effective_number(stats.summarise(contributions, "effective"), shots=0)
    # No run gives a table of these columns, so this one is written by hand.
    for function, column in [
        (plot_by_shots, "shots"),
        (plot_patching, "condition"),
        (plot_contributions, "demo"),
        (plot_by_demonstration, "same_label"),
        (plot_effective_number, "mean"),
    ]:
        with pytest.raises(
            ValueError, match=f"needs the columns .*'{column}'.*spade_lens.(icl|stats)"
        ):
            function(pd.DataFrame({"layer": [1], "value": [0.5]}))
