"""Figures of drafts: maps, lines where there is no map, confidence, measured speed."""

from itertools import product
from typing import Any

import numpy as np
import pandas as pd
import pytest
from figures import assert_readable, legend, line, titles

import spade_lens as sl


def points(layers: Any = (4, 8, 12), lengths: Any = (1, 2, 4), **more: Any) -> pd.DataFrame:
    """Points as the study gives them: later layers accept more, longer drafts need more."""
    rows = [
        {
            **{"drafter": "exit", "layer": layer, "draft_tokens": n, "eta": eta, "kind": kind},
            **{"adaptive": False, "acceptance": layer / 16 - n / 40, "break_even": 0.3 + n / 20},
            "n": 12 if kind == "all" else 6,
            "predicted_speedup": 0.7 + layer / 20 - n / 20,
        }
        for layer, n, eta, kind in product(layers, lengths, (0.0, 0.4), ("all", "chat"))
    ]
    lookups = {"drafter": "lookups", "layer": 0, "eta": 0.0}
    rows += [row | lookups for row in rows if row["layer"] == layers[0] and not row["eta"]]
    rows += [rows[-1] | {"adaptive": True, "draft_tokens": 9}]
    frame = pd.DataFrame(rows).assign(**more)
    return frame.assign(
        acceptance_low=frame["acceptance"] - 0.1, acceptance_high=frame["acceptance"] + 0.1
    )


def timed(frame: pd.DataFrame) -> pd.DataFrame:
    said = np.resize(["faster", "slower", "undecided", "", ""], len(frame))
    ratio = frame["predicted_speedup"] + 0.05
    return frame.assign(
        verdict=said,
        **{f"{c}_speedup": ratio for c in ("cpu", "wall")},
        **{f"{c}_speedup_low": ratio - 0.1 for c in ("cpu", "wall")},
        **{f"{c}_speedup_high": ratio + 0.1 for c in ("cpu", "wall")},
    )


def cells(panel: Any) -> Any:
    """The numbers of a map, drafts by layer."""
    [mesh] = (c for c in panel.collections if hasattr(c, "get_coordinates"))
    return np.asarray(mesh.get_array())


def borders(panel: Any) -> set[tuple[int, int]]:
    """The row and column of every cell with a border."""
    return {(round(p.get_y() + 0.47), round(p.get_x() + 0.47)) for p in panel.patches}


def test_a_map_has_a_cell_for_every_setting() -> None:
    frame = timed(points())
    drawing = sl.plot(frame)
    assert titles(drawing)[:2] == ["acceptance", "predicted speed"]
    assert legend(drawing)[0] == "pays by measured costs"
    assert "measured: faster" in legend(drawing)
    rows = frame[(frame["kind"] == "all") & (frame["eta"] == 0) & (frame["layer"] > 0)]
    for panel, column in zip(drawing.axes, ("acceptance", "predicted_speedup"), strict=False):
        expected = rows.pivot(index="draft_tokens", columns="layer", values=column).to_numpy()
        assert cells(panel) == pytest.approx(expected)
        # All cells are whole, those of one draft as well.
        assert panel.get_xlim() == (-0.5, 2.5) and panel.get_ylim() == (-0.5, 2.5)
        assert [t.get_text() for t in panel.get_xticklabels()] == ["4", "8", "12"]
        assert [t.get_text() for t in panel.texts] == [f"{v:.2f}" for v in expected.flat]
    assert [t.get_text() for t in drawing.axes[0].get_yticklabels()] == ["1", "2", "4"]
    assert_readable(drawing)


def test_cells_that_pay_have_a_border_and_the_bars_have_no_idle_part() -> None:
    frame = points()
    frame = frame.assign(predicted_speedup=frame["predicted_speedup"] + 0.01)
    drawing = sl.plot(frame, prompts="chat", eta=0.4)
    acceptance, speed = drawing.axes[:2]
    paying = set(map(tuple, np.argwhere(cells(speed) > 1).tolist()))
    assert 0 < len(paying) < 9 and borders(acceptance) == borders(speed) == paying
    bars = drawing.axes[2:]
    for panel, bar in zip((acceptance, speed), bars, strict=True):
        assert bar.get_ylim() == pytest.approx((cells(panel).min(), cells(panel).max()))
    assert 1.0 in bars[1].get_yticks().round(9)
    slow = sl.plot(timed(frame.assign(predicted_speedup=frame["predicted_speedup"] / 2)))
    assert not borders(slow.axes[0]) and "pays by measured costs" not in legend(slow)
    assert slow.axes[3].get_ylim()[1] == 1.0 and 1.0 in slow.axes[3].get_yticks().round(9)


def test_a_map_of_many_settings_has_no_numbers_in_its_cells() -> None:
    drawing = sl.plot(points(range(1, 13)))
    assert not drawing.axes[0].texts and cells(drawing.axes[0]).shape == (3, 12)


@pytest.mark.parametrize(("layers", "lengths"), [((8,), (1, 2, 4)), ((4, 8), (3,)), ((8,), (2,))])
def test_without_a_map_there_are_lines(layers: Any, lengths: Any) -> None:
    drawing = sl.plot(points(layers, lengths))
    assert titles(drawing) == ["acceptance", "predicted speed"]
    assert {f"exit at {layer}" for layer in layers} | {"lookups"} <= set(legend(drawing))
    assert "break-even by measured costs" in legend(drawing)
    shown = line(drawing.axes[0], f"exit at {layers[0]}").get_ydata()
    assert list(shown) == pytest.approx([layers[0] / 16 - n / 40 for n in lengths])
    assert_readable(drawing)


def test_lookups_alone_and_values_that_are_missing() -> None:
    frame = points()
    alone = sl.plot(frame[frame["layer"] == 0])
    assert "lookups" in legend(alone)
    holes = timed(frame).assign(
        acceptance=frame["acceptance"].mask(frame["layer"] == 8),
        predicted_speedup=np.nan,
    )
    assert_readable(sl.plot(holes))
    assert_readable(sl.plot(frame[~((frame["layer"] == 8) & (frame["draft_tokens"] == 2))]))


def test_points_that_cannot_be_drawn_are_refused() -> None:
    with pytest.raises(ValueError, match=r"kind=\['code'\].*expected some of"):
        sl.plot(points(), prompts="code")
    with pytest.raises(ValueError, match=r"eta=\[0.7\].*expected some of"):
        sl.plot(points(), eta=0.7)
    with pytest.raises(ValueError, match=r"drafter=\['mine'\].*expected some of"):
        sl.plot(points(), drafter="mine")
    with pytest.raises(ValueError, match="one study and model at a time"):
        sl.plot([points(), points()])


def drafts(layers: Any = (4, 8, 12)) -> pd.DataFrame:
    draws = np.random.default_rng(0)
    rows = []
    for layer, prompt, step in product(layers, range(6), range(40)):
        right = bool(draws.random() < layer / 20)
        sure = float(np.clip(draws.normal(0.6 if right else 0.3, 0.15), 0, 1))
        row = {"drafter": "exit", "layer": layer, "prompt": prompt, "kind": "chat", "step": step}
        rows.append(row | {"confidence": sure, "accepted": right})
    return pd.DataFrame(rows)


def test_confidence_of_right_and_wrong_drafts() -> None:
    frame = drafts()
    drawing = sl.plot(frame)
    assert titles(drawing) == ["exit at 4", "exit at 8", "exit at 12"]
    assert legend(drawing) == ["right drafts", "wrong drafts"]
    for panel, layer in zip(drawing.axes, (4, 8, 12), strict=True):
        heights = sum(patch.get_height() for patch in panel.patches)
        assert heights == pytest.approx(1.0)  # fractions of all drafts
        [text] = panel.texts
        right = frame[frame["layer"] == layer]["accepted"].mean()
        assert f"right {right:.2f}" in text.get_text() and "AUROC 0.9" in text.get_text()
    assert_readable(drawing)
    assert titles(sl.plot(frame, layers=[8])) == ["exit at 8"]
    nothing = sl.plot(frame.assign(accepted=False), layers=[4])
    assert "AUROC" not in nothing.axes[0].texts[0].get_text()
    one = frame[frame["prompt"] == 0].assign(
        confidence=lambda f: f["confidence"].mask(f["step"] > 30)
    )
    assert "[" not in sl.plot(one, layers=[4]).axes[0].texts[0].get_text()
    with pytest.raises(ValueError, match="expected some of"):
        sl.plot(frame, layers=[5])
    many = drafts(range(1, 10))
    assert len(titles(sl.plot(many))) == 8
    with pytest.raises(ValueError, match="at most 8"):
        sl.plot(many, layers=list(range(1, 10)))


def test_measured_speed_by_kind() -> None:
    frame = timed(points(layers=(8,), lengths=(2,)))
    drawing = sl.plot(frame, "drafted_speed")
    assert "plain text" in legend(drawing)
    assert [t.get_text() for t in drawing.axes[0].get_xticklabels()] == [
        "all\nn = 12",
        "chat\nn = 6",
    ]
    assert "exit at 8, 2 drafts" in legend(drawing)
    assert drawing.axes[0].get_yscale() == "log"
    one = timed(points(layers=(8,), lengths=(1,)))
    assert "exit at 8, 1 draft" in legend(sl.plot(one, "drafted_speed"))
    assert "CPU time" in drawing.get_supylabel()
    assert "wall-clock" in sl.plot(frame, "drafted_speed", clock="wall").get_supylabel()
    assert_readable(drawing)
    with pytest.raises(ValueError, match="expected 'cpu' or 'wall'"):
        sl.plot(frame, "drafted_speed", clock="sun")
    with pytest.raises(ValueError, match="No setting was timed"):
        sl.plot(frame.assign(verdict=""), "drafted_speed")


def test_speeds_are_ratios_and_marks_without_an_interval_are_hollow() -> None:
    frame = timed(points(layers=(8,), lengths=(2,)))
    frame = frame[(frame["verdict"] != "") & (frame["layer"] == 8)]
    ends = {
        f"cpu_speedup_{end}": frame["cpu_speedup"] * by for end, by in (("low", 0.6), ("high", 5))
    }
    frame = frame.assign(**ends)
    [panel] = sl.plot(frame, "drafted_speed").axes
    assert [t.get_text() for t in panel.get_yticklabels()] == ["0.5", "1", "2", "4"]
    assert not [x for x in panel.lines if x.get_markerfacecolor() == "white"]
    single = frame["kind"] == "chat"
    assert single.any() and not single.all()
    bare = frame.assign(**{name: values.mask(single) for name, values in ends.items()})
    [panel] = sl.plot(bare, "drafted_speed").axes
    hollow = [x for x in panel.lines if x.get_markerfacecolor() == "white"]
    drawn = np.concatenate([x.get_ydata() for x in hollow])
    assert sorted(drawn) == pytest.approx(sorted(frame.loc[single, "cpu_speedup"]))
