"""Figures by shots, of patching and of contributions, of tables written by hand."""

from inspect import unwrap  # past the type checks that run in tests only
from typing import Any

import numpy as np
import pandas as pd
import pytest
from figures import assert_readable, corners, legend, line, titles

from spade_lens.plots import plot_by_shots, plot_contributions, plot_patching


def summary(**columns: Any) -> pd.DataFrame:
    frame = pd.DataFrame(columns)
    mean = np.linspace(0.2, 0.8, len(frame))
    return frame.assign(mean=mean, low=mean - 0.1, high=mean + 0.1, n=16)


BY_SHOTS = pd.concat(
    summary(task=task, shots=[0, 1, 4, 16], measure=measure, kind=kind)
    for task, kind in [("antonym", "knowledge"), ("animal/country", "rule")]
    for measure in ("accuracy", "preference", "flips", "logit_diff")
)


def test_every_task_is_a_line_by_shots() -> None:
    figure = plot_by_shots(BY_SHOTS, "preference", chance=0.5)
    (panel,) = figure.axes
    assert legend(figure) == ["antonym", "animal/country", "chance"]
    for task in ("antonym", "animal/country"):
        np.testing.assert_array_equal(line(panel, task).get_xdata(), [0, 1, 4, 16])
        np.testing.assert_allclose(line(panel, task).get_ydata(), [0.2, 0.4, 0.6, 0.8])
    assert {0.1, 0.3, 0.5, 0.7, 0.9} <= corners(panel)
    assert line(panel, "chance").get_ydata()[0] == 0.5
    assert_readable(figure)
    ticks = [t.get_text() for t in panel.get_xticklabels() if t.get_text()]
    assert ticks == ["0", "1", "4", "16"]
    # 0 to 1 is one step, 1 to 4 are two, 4 to 16 two.
    at = panel.transData.transform([(x, 0) for x in (0, 1, 4, 16)])[:, 0]
    np.testing.assert_allclose(np.diff(at) / (at[1] - at[0]), [1, 2, 2])


def test_panels_and_chance_by_kind() -> None:
    figure = plot_by_shots(BY_SHOTS, panels="kind", chance={"knowledge": 0.25, "rule": 0.5})
    assert titles(figure) == ["knowledge", "rule"]
    assert [line(panel, "chance").get_ydata()[0] for panel in figure.axes] == [0.25, 0.5]
    with pytest.raises(ValueError, match=r"chance= has .*the panels \['rule'\] are not there"):
        plot_by_shots(BY_SHOTS, panels="kind", chance={"knowledge": 0.25})


PATCHED = ("labels", "labels up, random", "labels up", "labels up, opposite", "arrow")


def patching(task: str = "t") -> pd.DataFrame:
    conditions = ["zero-shot", "dummy", "few-shot"]
    both = [
        summary(task=task, condition=conditions, layer=-1, measure=measure)
        for measure in ("accuracy", "logit_diff")
    ]
    both += [
        summary(task=task, condition=condition, layer=[0, 2, 4], measure=measure)
        for measure in ("accuracy", "logit_diff")
        for condition in PATCHED
    ]
    return pd.concat(both)


@pytest.mark.parametrize("measure", ["accuracy", "logit_diff"])
def test_a_condition_stands_beside_its_controls(measure: Any) -> None:
    figure = plot_patching(patching(), measure)
    assert titles(figure) == ["labels", "labels up", "arrow"]
    expected = ["as named", "random", "opposite", "few-shot", "dummy", "zero-shot"]
    assert legend(figure) == expected
    drawn = [{x.get_label() for x in panel.lines} & set(expected) for panel in figure.axes]
    assert [lines - set(expected[3:]) for lines in drawn] == [
        {"as named"},
        {"as named", "random", "opposite"},
        {"as named"},
    ]
    for panel in figure.axes:
        levels = [line(panel, x).get_ydata()[0] for x in ("zero-shot", "dummy", "few-shot")]
        np.testing.assert_allclose(levels, [0.2, 0.5, 0.8])
        np.testing.assert_array_equal(line(panel, "as named").get_xdata(), [0, 2, 4])
        np.testing.assert_allclose(line(panel, "as named").get_ydata(), [0.2, 0.5, 0.8])
    assert_readable(figure)


def test_patching_of_some_conditions_and_two_tasks() -> None:
    both = pd.concat([patching("one"), patching("two").query("condition != 'zero-shot'")])
    figure = plot_patching(both, conditions=["arrow", "labels up", "labels up, opposite"])
    assert titles(figure) == ["arrow", "labels up", "", ""]
    assert [panel.get_ylabel() for panel in figure.axes] == ["one", "", "two", ""]
    floors = [sum(x.get_label() == "zero-shot" for x in panel.lines) for panel in figure.axes]
    assert floors == [1, 1, 0, 0]
    assert_readable(figure)


def contributions() -> pd.DataFrame:
    """Demonstration 1 contributes at layer 6, alike in all prompts; nothing else for sure."""
    rng = np.random.default_rng(0)
    index = pd.MultiIndex.from_product([range(8), [3, 6, 12], range(4)])
    frame = index.to_frame(index=False, name=["prompt", "layer", "demo"])
    frame["shapley"] = rng.permuted(np.tile([-1.0, 1.0], 48))
    frame.loc[(frame["layer"] == 6) & (frame["demo"] == 1), "shapley"] = np.linspace(2, 3, 8)
    return frame.assign(same_label=frame["demo"] % 2 == 0, leave_one_out=0.0)


def test_the_heat_map_is_the_mean_over_prompts() -> None:
    frame = contributions()
    figure = plot_contributions(frame)
    panel, bar = figure.axes
    (mesh,) = panel.collections
    means = frame.groupby(["demo", "layer"])["shapley"].mean().unstack()
    np.testing.assert_allclose(mesh.get_array(), means)
    most = means.abs().max().max()
    assert mesh.get_clim() == (-most, most)
    assert "Shapley value" in bar.get_ylabel()
    assert panel.get_ylim() == (3.5, -0.5)
    figure.draw_without_rendering()
    assert [t.get_text() for t in panel.get_xticklabels()] == ["3", "6", "12"]
    assert legend(figure) == ["95% interval excludes 0"]
    assert_readable(figure)
    (dots,) = panel.lines
    assert (1.0, 1.0) in set(zip(dots.get_xdata(), dots.get_ydata(), strict=True))
    assert len(dots.get_xdata()) < 6  # type: ignore[arg-type]


def test_panels_of_the_heat_map_have_one_scale() -> None:
    frame = contributions()
    both = pd.concat([frame.assign(task="one"), frame.assign(task="two", shapley=0.1)])
    figure = plot_contributions(both, by_answer=True)
    names = ["label is the answer", "label is another"]
    assert titles(figure)[:-1] == [f"{task}, {name}" for task in ("one", "two") for name in names]
    limits = {panel.collections[0].get_clim() for panel in figure.axes[:-1]}
    assert len(limits) == 1
    own = np.ma.getmaskarray(figure.axes[0].collections[0].get_array())
    assert own.all(axis=1).tolist() == [False, True, False, True]  # the others are not in it
    assert plot_contributions(frame, "leave_one_out").axes[0].collections[0].get_clim() == (-1, 1)


def test_what_is_not_there_is_said() -> None:
    with pytest.raises(ValueError, match=r"There is no 'flops' in this summary, only \['accuracy'"):
        unwrap(plot_by_shots)(BY_SHOTS, "flops")
    with pytest.raises(ValueError, match=r"was asked for condition=\['label'\]; .*'labels up'"):
        plot_patching(patching(), conditions=["label"])
    with pytest.raises(ValueError, match=r"baselines \(layer -1\) alone; expected layers"):
        plot_patching(patching().query("layer < 0"))
    for function, column in [
        (plot_by_shots, "shots"),
        (plot_patching, "condition"),
        (plot_contributions, "demo"),
    ]:
        name = function.__name__
        with pytest.raises(
            ValueError, match=f"{name} needs the columns .*'{column}'.*spade_lens.i"
        ):
            function(pd.DataFrame({"layer": [1], "value": [0.5]}))
