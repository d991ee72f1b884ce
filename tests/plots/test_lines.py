"""Lines with intervals in panels: what is drawn is the table, whatever panels there are."""

from itertools import product

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from figures import assert_readable, legend, line
from matplotlib.figure import Figure

from spade_lens.plots.lines import Layout, Level, choose, line_figure
from spade_lens.plots.style import style


def table(tasks: int = 1, panels: int = 1, lines: int = 2, points: int = 5) -> pd.DataFrame:
    """A point for every combination, with a control for each; the means are all different."""
    keys = product(range(tasks), range(panels), range(lines), [False, True], range(points))
    columns = ["task", "panel", "line", "control", "x"]
    frame = pd.DataFrame(list(keys), columns=columns)
    for column in columns[:3]:
        frame[column] = f"{column} " + frame[column].astype(str)
    mean = np.linspace(0.1, 0.9, len(frame))
    return frame.assign(mean=mean, low=mean - 0.05, high=mean + 0.05)


def draw(frame: pd.DataFrame, **arguments: object) -> Figure:
    levels = arguments.pop("levels", ())
    options = {"ylabel": "what it is", "control": "its control"} | arguments
    with mpl.rc_context(style()):
        return line_figure(frame, Layout(**options), levels=levels)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("tasks", "panels", "across", "titles"),
    [
        (1, 1, 1, ["panel 0"]),
        (1, 4, 3, ["panel 0", "panel 1", "panel 2", "panel 3"]),
        (4, 1, 3, [f"task {n}, panel 0" for n in range(4)]),
        (2, 4, 4, ["panel 0", "panel 1", "panel 2", "panel 3", *[""] * 4]),
    ],
)
def test_panels_are_named_and_hold_their_rows(
    tasks: int, panels: int, across: int, titles: list[str]
) -> None:
    frame = table(tasks, panels)
    figure = draw(frame, fraction=True)
    assert [panel.get_title() for panel in figure.axes] == titles
    assert len({round(panel.get_position().x0, 3) for panel in figure.axes}) == across
    if tasks > 1 and panels > 1:
        assert [panel.get_ylabel() for panel in figure.axes[::panels]] == ["task 0", "task 1"]
    for panel, (_, rows) in zip(figure.axes, frame.groupby(["task", "panel"]), strict=True):
        for name, own in rows[~rows["control"]].groupby("line"):
            np.testing.assert_array_equal(line(panel, str(name)).get_xdata(), own["x"])
            np.testing.assert_array_equal(line(panel, str(name)).get_ydata(), own["mean"])
        drawn = [x for x in panel.lines if x.get_label() == "_control"]
        expected = [own["mean"] for _, own in rows[rows["control"]].groupby("line")]
        np.testing.assert_array_equal([x.get_ydata() for x in drawn], expected)
        corners = np.concatenate([c.get_paths()[0].vertices for c in panel.collections])
        assert set(rows["low"]) | set(rows["high"]) <= set(corners[:, 1])
    assert legend(figure) == ["line 0", "line 1", "its control"]
    assert_readable(figure)


def test_a_control_has_the_colour_of_its_line_and_other_dashes() -> None:
    (panel,) = draw(table()).axes
    controls = [x for x in panel.lines if x.get_label() == "_control"]
    for name, control in zip(["line 0", "line 1"], controls, strict=True):
        own = line(panel, name)
        assert control.get_color() == own.get_color()
        assert control.get_linewidth() < own.get_linewidth()


def test_every_line_looks_different_and_the_same_in_all_panels() -> None:
    figure = draw(table(panels=2, lines=12))
    looks = []
    for panel in figure.axes:
        drawn = [line(panel, f"line {n}") for n in range(12)]
        looks.append([(x.get_color(), x.get_marker()) for x in drawn])
    assert looks[0] == looks[1]
    assert len(set(looks[0])) == 12
    assert_readable(figure)


def test_few_points_are_marked_and_one_alone_has_a_bar() -> None:
    (panel,) = draw(table(points=30)).axes
    assert line(panel, "line 0").get_marker() == ""
    (panel,) = draw(table(points=3)).axes
    assert line(panel, "line 0").get_marker() == "o"
    one = table(lines=1, points=1)
    (panel,) = draw(one[~one["control"]]).axes
    ends = [c.get_segments()[0][:, 1] for c in panel.collections if hasattr(c, "get_segments")]
    np.testing.assert_array_equal(ends, one[~one["control"]][["low", "high"]])


def test_places_have_points_side_by_side_and_no_lines() -> None:
    figure = draw(table(points=3), places=["all", "0-8", "8-16"])
    (panel,) = figure.axes
    assert [t.get_text() for t in panel.get_xticklabels()] == ["all", "0-8", "8-16"]
    points = [x for x in panel.lines if len(x.get_xdata()) == 3]  # type: ignore[arg-type]
    assert {x.get_linestyle() for x in points} == {"None"}
    at = sorted(float(x.get_xdata()[0]) for x in points)  # type: ignore[index]
    np.testing.assert_allclose(np.diff(at), 0.24)
    assert np.mean(at) == pytest.approx(0)
    assert_readable(figure)


def test_levels_are_drawn_where_they_belong() -> None:
    levels = [
        Level("ceiling", 0.9),
        Level("floor", 0.1, task="task 1"),
        Level("floor", 0.2, panel="panel 0"),
    ]
    figure = draw(table(tasks=2, panels=2), levels=levels)
    found = [
        [(x.get_label(), x.get_ydata()[0]) for x in panel.lines if x.get_label() in names]  # type: ignore[index]
        for panel in figure.axes
        for names in [("ceiling", "floor")]
    ]
    ceiling, here, there = ("ceiling", 0.9), ("floor", 0.1), ("floor", 0.2)
    assert found == [[ceiling, there], [ceiling], [ceiling, here, there], [ceiling, here]]
    floors = {x.get_color() for panel in figure.axes for x in panel.lines if "fl" in x.get_label()}
    assert len(floors) == 1


@pytest.mark.parametrize("fraction", [True, False])
def test_fractions_fill_their_axis_and_other_values_have_a_line_at_0(fraction: bool) -> None:
    (panel,) = draw(table(), fraction=fraction).axes
    low, high = panel.get_ylim()
    assert ((low, high) == (-0.03, 1.03)) == fraction
    at_zero = [x for x in panel.lines if list(x.get_ydata()) == [0, 0] and len(x.get_xdata()) == 2]  # type: ignore[arg-type]
    assert bool(at_zero) == (not fraction)


def test_what_cannot_be_drawn_is_said() -> None:
    frame = table()
    with pytest.raises(ValueError, match="Several rows are of one place.*'line': 'line 0"):
        draw(pd.concat([frame, frame]))
    with pytest.raises(ValueError, match="6 panels for each of 2 tasks .*expected up to 5"):
        draw(table(tasks=2, panels=6))
    assert len(draw(table(panels=6)).axes) == 6


def test_rows_are_chosen_in_the_order_wanted() -> None:
    frame = table(lines=3)
    assert list(choose(frame, "line", ["line 2", "line 0"])["line"].unique()) == [
        "line 2",
        "line 0",
    ]
    assert choose(frame, "line", None) is frame
    with pytest.raises(ValueError, match=r"line=\['line 9'\] was asked for; .*'line 0'"):
        choose(frame, "line", ["line 1", "line 9"])
    with pytest.raises(ValueError, match="of no name"):
        choose(frame, "line", [])
