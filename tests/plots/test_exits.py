"""Figures of early exit hold the tables they were given, and refuse what is no such table."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import pytest
from figures import assert_readable, legend, line
from matplotlib.axes import Axes

from spade_lens import Keep, LogitLens, Model, Spade
from spade_lens.exits import (
    Confidence,
    ExitTable,
    FixedLayer,
    Threshold,
    exit_tables,
    gated_reliability,
    reliability,
    sweep,
)
from spade_lens.exits.choice import best_of, tried_policies
from spade_lens.exits.families import calibrated_thresholds, fixed_layers, patiences
from spade_lens.exits.policies import Policy
from spade_lens.exits.sweeps import pareto
from spade_lens.plots import plot
from spade_lens.plots.exit_layers import plot_exit_layers
from spade_lens.plots.front import plot_front
from spade_lens.plots.reliability import plot_reliability
from spade_lens.stats import proportion_interval

LEVELS = (0.9, 0.5, 0.3)


@pytest.fixture(scope="module")
def tables(tiny_llama: Model) -> list[ExitTable]:
    """Two lenses on thirty prompts; half of the targets are what the model says."""
    texts = [f"{a}>{b},{c}>" for a in "abcdef" for b in "XYZ+-" for c in "q"]
    prompts = [tiny_llama.prompt(text, target="B") for text in texts]
    checks = [
        Confidence(LogitLens(tiny_llama), "top-1"),
        Confidence(Spade(tiny_llama, keep=Keep(start=False)), "top-1"),
    ]
    return exit_tables(tiny_llama, prompts, checks, layers=[1, 2, 3])


def families(table: ExitTable) -> dict[str, Sequence[Policy]]:
    return {
        "fixed layer": fixed_layers(table),
        "threshold": [Threshold(level) for level in LEVELS],
        "thresholds by layer": calibrated_thresholds(table, LEVELS),
        "patience": patiences(table),
    }


def fronts_of(table: ExitTable, measure: str = "agreement") -> pd.DataFrame:
    named = families(table)
    return pd.concat(
        pareto(sweep(table, policies), measure=measure).assign(family=family)
        for family, policies in named.items()
    )


@pytest.fixture(scope="module")
def fronts(tables: list[ExitTable]) -> pd.DataFrame:
    """Fronts of four families by agreement."""
    return fronts_of(tables[0])


@pytest.fixture(scope="module")
def points(tables: list[ExitTable]) -> pd.DataFrame:
    """For two families the best, and two losses."""
    named = families(tables[0])
    some = {name: named[name] for name in ("fixed layer", "threshold")}
    half, other = tables[0].of(range(15)), tables[0].of(range(15, 30))
    losses = (None, 0.1, 0.5)
    rows = []
    for family, policies in some.items():
        tried = tried_policies(policies, half, measure="agreement")
        for loss in losses:
            chosen = best_of(tried, loss=loss).policy
            row = sweep(other, [chosen]).iloc[0].to_dict()
            rows.append({"family": family, "wanted": np.nan if loss is None else loss, **row})
    return pd.DataFrame(rows)


def for_tasks(frame: pd.DataFrame, n: int) -> pd.DataFrame:
    return pd.concat([frame.assign(task=f"task {i}") for i in range(n)])


# -- the front


def test_a_front_is_drawn_as_a_staircase_of_its_rows(fronts: pd.DataFrame) -> None:
    figure = plot_front(fronts, measure="agreement", full=1.0)
    (panel,) = figure.axes
    assert legend(figure) == [*fronts["family"].unique(), "full model"]
    for family, rows in fronts.groupby("family"):
        drawn = line(panel, str(family))
        np.testing.assert_array_equal(drawn.get_xdata(), rows["compute"])
        np.testing.assert_array_equal(drawn.get_ydata(), rows["agreement"])
        assert drawn.get_drawstyle() == "steps-post"
    assert line(panel, "full model").get_ydata()[0] == 1
    assert panel.get_xlim()[1] > 1
    assert_readable(figure)


def test_intervals_are_shaded(fronts: pd.DataFrame) -> None:
    (panel,) = plot_front(fronts, measure="agreement").axes
    corners = np.concatenate([c.get_paths()[0].vertices for c in panel.collections])
    for end in ("agreement_low", "agreement_high"):
        assert set(fronts[end]) <= set(corners[:, 1])


@pytest.mark.parametrize(("n", "across"), [(1, 1), (2, 2), (3, 3), (4, 2), (5, 3)])
def test_one_panel_for_each_task(
    fronts: pd.DataFrame, points: pd.DataFrame, n: int, across: int
) -> None:
    full = {f"task {i}": 0.1 * i for i in range(n)}
    several = for_tasks(fronts, n)
    figure = plot_front(several, measure="agreement", full=full, points=for_tasks(points, n))
    assert [panel.get_title() for panel in figure.axes] == list(full)
    assert [line(p, "full model").get_ydata()[0] for p in figure.axes] == list(full.values())
    assert len({round(panel.get_position().x0, 3) for panel in figure.axes}) == across
    assert_readable(figure)


def test_points_have_the_colour_of_their_series_and_a_shape_for_the_loss(
    fronts: pd.DataFrame, points: pd.DataFrame
) -> None:
    figure = plot_front(fronts, measure="agreement", points=points)
    (panel,) = figure.axes
    losses = ["loss of at most 0.1", "loss of at most 0.5"]
    assert legend(figure) == [*fronts["family"].unique(), "best agreement", *losses]
    shapes = {np.nan: "D", 0.1: "s", 0.5: "^"}
    drawn = [x for x in panel.lines if x.get_marker() in "Ds^" and len(x.get_xdata())]
    assert len(drawn) == len(points) == 6
    for x, row in zip(drawn, points.to_dict("records"), strict=True):
        assert (x.get_xdata()[0], x.get_ydata()[0]) == (row["compute"], row["agreement"])
        assert x.get_markerfacecolor() == line(panel, row["family"]).get_color()
        expected = "D" if np.isnan(row["wanted"]) else shapes[row["wanted"]]
        assert x.get_marker() == expected


def test_any_column_may_name_the_series(tables: list[ExitTable]) -> None:
    both = pd.concat(
        pareto(sweep(t, families(t)["threshold"]), measure="agreement") for t in tables
    )
    figure = plot_front(both, measure="agreement", by="check")
    assert legend(figure) == [t.check for t in tables]


def test_one_row_is_seen(fronts: pd.DataFrame) -> None:
    (panel,) = plot_front(fronts.iloc[:1], measure="agreement").axes
    (bar, _) = panel.collections
    low, high = fronts[["agreement_low", "agreement_high"]].iloc[0]
    np.testing.assert_array_equal(bar.get_segments()[0][:, 1], [low, high])


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        ({"drop": "family"}, {}, "'front'.* needs the columns .*'family'"),
        ({"drop": "agreement_low"}, {}, "needs the columns .*'agreement_low'"),
        ({"none": True}, {}, "has no rows"),
        ({}, {"measure": "loss_"}, "'loss_' was asked for; .*'accuracy'"),
        ({"nan": True}, {}, "no agreement or compute .NaN.*plot measure='agreement'"),
        ({"twice": True}, {}, r"family 'fixed layer' are not a front.*exits.sweep.*front="),
        ({"tasks": 2, "flip": True}, {}, "'patience' at task 'task 0' are not a front"),
        ({"tasks": 2}, {"full": {"task 0": 1.0}}, r"the fronts also have \['task 1'\]"),
    ],
)
def test_what_is_no_front_is_said(
    fronts: pd.DataFrame, change: Mapping[str, Any], arguments: Mapping[str, Any], message: str
) -> None:
    frame = fronts.drop(columns=change.get("drop", []))
    if change.get("none"):
        frame = frame.iloc[:0]
    if change.get("nan"):
        frame = frame.assign(agreement=np.nan)
    if change.get("twice"):
        frame = pd.concat([frame, frame])
    if change.get("tasks"):
        frame = for_tasks(frame, change["tasks"])
    if change.get("flip"):
        frame = frame.iloc[::-1].sort_values("task", kind="stable")
    with pytest.raises(ValueError, match=message):
        plot_front(frame, **{"measure": "agreement"} | dict(arguments))


def test_points_that_do_not_fit_are_refused(fronts: pd.DataFrame, points: pd.DataFrame) -> None:
    with pytest.raises(ValueError, match=r"family \['guess'\]; the fronts have only \['fixed"):
        plot_front(fronts, measure="agreement", points=points.assign(family="guess"))
    with pytest.raises(ValueError, match=r"points=\) needs the columns .*'task'"):
        plot_front(for_tasks(fronts, 2), measure="agreement", points=points)
    with pytest.raises(ValueError, match=r"task \['task 1'\]; the fronts have only \['task 0'\]"):
        two = for_tasks(points, 2)
        plot_front(for_tasks(fronts, 1), measure="agreement", points=two)
    with pytest.raises(ValueError, match="needs the columns .*'wanted'"):
        plot_front(fronts, measure="agreement", points=points.drop(columns="wanted"))


# -- exit layers


@pytest.fixture(scope="module")
def traces(tables: list[ExitTable]) -> pd.DataFrame:
    """A policy that spreads the prompts, one that keeps them together, one that never exits."""
    middle = float(tables[0].confidence[0].median())
    policies = [Threshold({1: middle, 3: middle}), FixedLayer(2), Threshold(2.0)]
    return pd.concat([tables[0].simulate(policy).to_frame() for policy in policies])


def bars(panel: Axes) -> list[tuple[float, float, bool]]:
    """Middle, height, and whether it is hatched."""
    found = [(p, p.get_x() + p.get_width() / 2) for p in panel.patches]  # type: ignore[attr-defined]
    return [(x, p.get_height(), p.get_hatch() is not None) for p, x in found]  # type: ignore[attr-defined]


def test_bars_are_shares_of_each_policys_prompts(traces: pd.DataFrame) -> None:
    figure = plot_exit_layers(traces)
    (panel,) = figure.axes
    assert legend(figure) == list(traces["policy"].unique())
    found = iter(bars(panel))
    for _, rows in traces.groupby("policy", sort=False):
        shares = rows["exit_layer"].value_counts(normalize=True)
        for layer in (1, 2, 3):
            middle, height, hatched = next(found)
            assert round(middle) == layer and not hatched
            assert height == pytest.approx(shares.get(layer, 0))
        middle, height, hatched = next(found)
        assert round(middle) in (5, 6, 7) and hatched
        assert height == pytest.approx(shares.get(4, 0))
    assert next(found, None) is None
    assert "to the\nend" in [t.get_text() for t in panel.get_xticklabels()]
    assert_readable(figure)


def test_bars_never_overlap(traces: pd.DataFrame) -> None:
    (panel,) = plot_exit_layers(traces).axes
    sides = sorted((p.get_x(), p.get_x() + p.get_width()) for p in panel.patches)  # type: ignore[attr-defined]
    left, right = np.array(sides).T
    assert (right[:-1] <= left[1:] + 1e-9).all()
    assert panel.get_xlim()[0] < left[0] and right[-1] < panel.get_xlim()[1]


@pytest.mark.parametrize("n", [2, 3])
def test_exit_layers_by_task(traces: pd.DataFrame, n: int) -> None:
    figure = plot_exit_layers(for_tasks(traces, n))
    assert [panel.get_title() for panel in figure.axes] == [f"task {i}" for i in range(n)]
    assert_readable(figure)


def test_nobody_or_everybody_leaves(traces: pd.DataFrame) -> None:
    stayed = traces[~traces["early"]]
    (panel,) = plot_exit_layers(stayed[stayed["policy"] == "threshold 2"]).axes
    assert [height for _, height, _ in bars(panel)] == [0, 1]
    gone = traces[traces["policy"] == "layer 2"]
    (panel,) = plot_exit_layers(gone, n_layers=4).axes
    assert [height for _, height, _ in bars(panel)] == [1, 0, 0]


def test_what_is_no_trace_is_said(traces: pd.DataFrame) -> None:
    with pytest.raises(ValueError, match="'exit_layers' needs the columns .*'exit_layer'"):
        plot_exit_layers(traces.drop(columns="exit_layer"))
    with pytest.raises(ValueError, match="has no rows"):
        plot_exit_layers(traces.iloc[:0])
    with pytest.raises(ValueError, match=r"With n_layers=30.*\[4\].*expected traces of one depth"):
        plot_exit_layers(traces, n_layers=30)
    with pytest.raises(ValueError, match="deepest exit is at 9"):
        plot_exit_layers(pd.concat([traces, traces.iloc[:1].assign(exit_layer=9, early=True)]))


# -- reliability


@pytest.fixture(scope="module")
def curve(tables: list[ExitTable]) -> pd.DataFrame:
    """Curves of two lenses at three layers."""
    return pd.concat([reliability(table, n_bins=4) for table in tables])


@pytest.fixture(scope="module")
def error(tables: list[ExitTable]) -> pd.DataFrame:
    """Their errors, computed from the bins."""
    curves = pd.concat([reliability(table, n_bins=4) for table in tables])
    gap = (curves["confidence"] - curves["frequency"]).abs() * curves["n"]
    rows = curves.assign(gap=gap).groupby(["check", "layer"], sort=False)[["gap", "n"]].sum()
    return rows.assign(ece=rows["gap"] / rows["n"]).reset_index()


def test_a_reliability_curve_is_its_bins(curve: pd.DataFrame, error: pd.DataFrame) -> None:
    figure = plot_reliability(curve)
    lenses = list(curve["check"].unique())
    assert legend(figure) == lenses
    assert [panel.get_title() for panel in figure.axes] == ["layer 1", "layer 2", "layer 3"]
    for layer, panel in enumerate(figure.axes, start=1):
        for lens in lenses:
            rows = curve[(curve["check"] == lens) & (curve["layer"] == layer)]
            drawn = line(panel, lens)
            np.testing.assert_array_equal(drawn.get_xdata(), rows["confidence"])
            np.testing.assert_array_equal(drawn.get_ydata(), rows["frequency"])
        own = error[error["layer"] == layer]["ece"]
        assert panel.texts[0].get_text() == "ECE\n" + "\n".join(f"{e:.2f}" for e in own)
    assert_readable(figure)


def test_its_intervals_are_wilsons(curve: pd.DataFrame) -> None:
    one = curve[curve["check"] == curve["check"].iloc[0]]
    panel = plot_reliability(one, layers=[2]).axes[0]
    corners = panel.collections[0].get_paths()[0].vertices[:, 1]
    for row in one[one["layer"] == 2].to_dict("records"):
        ends = proportion_interval(round(row["frequency"] * row["n"]), row["n"])
        assert all(np.isclose(corners, end).any() for end in ends)


def test_error_of_one_lens_is_written_behind_its_name(
    curve: pd.DataFrame, error: pd.DataFrame
) -> None:
    lens = curve["check"].iloc[0]
    figure = plot_reliability(curve[curve["check"] == lens], layers=[3])
    expected = error[(error["check"] == lens) & (error["layer"] == 3)]["ece"].item()
    assert figure.axes[0].texts[0].get_text() == f"ECE {expected:.2f}"
    assert_readable(figure)


@pytest.mark.parametrize("side", [0.0, 1.0])
def test_the_error_stands_where_no_curve_is(
    curve: pd.DataFrame, error: pd.DataFrame, side: float
) -> None:
    (panel,) = plot_reliability(curve.assign(frequency=side), layers=[2]).axes
    x, y = panel.texts[0].get_position()
    assert (x < y) == (side == 0)  # above the diagonal if the curves are below it


def test_layers_are_chosen_evenly(curve: pd.DataFrame) -> None:
    many = pd.concat([curve[curve["layer"] == 1].assign(layer=layer) for layer in range(8, 30)])
    figure = plot_reliability(many)
    expected = [8, 11, 14, 17, 20, 23, 26, 29]
    assert [p.get_title() for p in figure.axes] == [f"layer {layer}" for layer in expected]
    assert_readable(figure)


def test_the_logit_lens_keeps_its_colour_whatever_is_measured(curve: pd.DataFrame) -> None:
    panel = plot_reliability(curve, layers=[2]).axes[0]
    assert line(panel, "logit lens, top-1").get_color() == "#D55E00"


def test_the_mixture_of_all_exits_has_one_panel(tiny_llama: Model) -> None:
    texts = [f"{a}>{b},c>" for a in "abcdef" for b in "XYZ+"]
    prompts = [tiny_llama.prompt(t, target="B", candidates=("A", "B")) for t in texts]
    [table] = exit_tables(tiny_llama, prompts, "logit", layers=[1, 2, 3])
    policies = [FixedLayer(2), FixedLayer(3)]
    frames = [gated_reliability(table, one, event="agrees") for one in policies]
    drawing = plot(frames)
    assert [panel.get_title() for panel in drawing.axes] == ["all exits together"]
    assert legend(drawing) == ["layer 2", "layer 3"]
    drawn = line(drawing.axes[0], "layer 3")
    np.testing.assert_array_equal(drawn.get_ydata(), frames[1]["frequency"])
    assert "early exit's answer" in drawing.get_supylabel()
    assert_readable(drawing)


def test_what_is_no_curve_is_said(curve: pd.DataFrame, error: pd.DataFrame) -> None:
    with pytest.raises(ValueError, match="'reliability' needs the columns .*'frequency'"):
        plot_reliability(error)
    with pytest.raises(ValueError, match=r"layer=\[9\] was asked for; .*\[1, 2, 3\]"):
        plot_reliability(curve, layers=[2, 9])
    with pytest.raises(ValueError, match="layer=of no name"):
        plot_reliability(curve, layers=[])
    with pytest.raises(ValueError, match="several rows of one check, layer, bin"):
        plot_reliability(pd.concat([curve, curve.assign(keep="another")]))
    one = curve[curve["check"] == curve["check"].iloc[0]]
    other = one.assign(event="correct", check="another")
    with pytest.raises(ValueError, match=r"of the events \['agrees', 'correct'\]"):
        plot_reliability(pd.concat([one, other]))
    with pytest.raises(ValueError, match="'reliability' needs the columns .*'ece'"):
        plot_reliability(curve.drop(columns="ece"))
