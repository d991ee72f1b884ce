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
    said = np.resize(["faster", "slower", "not told apart", "", ""], len(frame))
    ratio = frame["predicted_speedup"] + 0.05
    return frame.assign(
        verdict=said,
        **{f"{c}_speedup": ratio for c in ("cpu", "wall")},
        **{f"{c}_speedup_low": ratio - 0.1 for c in ("cpu", "wall")},
        **{f"{c}_speedup_high": ratio + 0.1 for c in ("cpu", "wall")},
    )


def break_even(panel: Any) -> list[Any]:
    """The black lines of a map."""
    colors = [(c, np.asarray(c.get_edgecolor())) for c in panel.collections]
    return [c for c, color in colors if len(color) and np.allclose(color[:, :3], 0)]


def test_maps_have_a_break_even_line() -> None:
    drawing = sl.plot(timed(points()))
    assert titles(drawing)[:2] == ["acceptance", "predicted speed"]
    assert legend(drawing)[0] == "break-even by measured costs"
    assert set(legend(drawing)[1:]) <= {f"measured: {v}" for v in ("faster", "slower")} | {
        "measured: not told apart"
    }
    for panel in (panel for panel in drawing.axes if panel.get_title()):
        assert panel.get_xlim() == (4, 12) and panel.get_ylim() == (1, 4)
        assert len(break_even(panel)) == 1
    assert_readable(drawing)


def test_the_line_is_where_acceptance_is_enough() -> None:
    drawing = sl.plot(points(lengths=(1, 2)), prompts="chat", eta=0.4)
    [drawn] = break_even(drawing.axes[0])
    places = np.concatenate([path.vertices for path in drawn.get_paths()])
    # layer / 16 - n / 40 = 0.3 + n / 20
    expected = 16 * (0.3 + places[:, 1] / 20 + places[:, 1] / 40)
    assert places[:, 0] == pytest.approx(expected, abs=0.01)


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
    holes = frame.assign(
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
    assert [t.get_text() for t in drawing.axes[0].get_xticklabels()] == ["all", "chat"]
    assert "CPU time" in drawing.get_supylabel()
    assert "wall-clock" in sl.plot(frame, "drafted_speed", clock="wall").get_supylabel()
    assert_readable(drawing)
    with pytest.raises(ValueError, match="expected 'cpu' or 'wall'"):
        sl.plot(frame, "drafted_speed", clock="sun")
    with pytest.raises(ValueError, match="No setting was timed"):
        sl.plot(frame.assign(verdict=""), "drafted_speed")
