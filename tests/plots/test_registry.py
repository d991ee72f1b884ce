"""The one verb finds the figure of a table, draws it for a page, and takes figures of a user's."""

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from figures import legend, line, titles
from matplotlib.figure import Figure
from matplotlib.text import Text

import spade_lens as sl
from spade_lens.exits import FixedLayer, Threshold, exit_tables, sweep
from spade_lens.lazy import verb
from spade_lens.plots import registry
from spade_lens.stats import summarise

TEXTS = ["ab->AB,cd->", "q->", "xy->XY,z->"]


def kind_of(table: Any) -> str:
    """The kind that the verb chooses."""
    drawn: list[str] = []
    kept = dict(registry._KINDS)
    try:
        for name, kind in kept.items():

            def draw(*_: Any, name: str = name, **__: Any) -> Figure:
                drawn.append(name)
                return Figure()

            registry._KINDS[name] = registry._Kind(name, kind.needs, "", kind.fits, draw)
        sl.plot(table)
    finally:
        registry._KINDS.clear()
        registry._KINDS.update(kept)
    return drawn[0]


def test_readouts_find_their_figures(tiny_llama: sl.Model) -> None:
    read = tiny_llama.read
    assert kind_of(read(TEXTS[0], positions="all")) == "grid"
    assert kind_of(read(TEXTS[0])) == "grid"
    assert kind_of(read(TEXTS)) == "by_layer"
    assert kind_of(sl.stats.summarise(read(TEXTS))) == "by_layer"
    assert kind_of([read(TEXTS[:2]), read(TEXTS[2:], "spade")]) == "by_layer"


def test_exits_find_their_figures(tiny_llama: sl.Model) -> None:
    prompts = [tiny_llama.prompt(text) for text in TEXTS]
    [table] = exit_tables(tiny_llama, prompts, sl.LogitLens(tiny_llama), layers=[1, 3])
    assert kind_of(table) == "exit_table"
    assert kind_of(table.simulate(FixedLayer(1))) == "exit_layers"
    rows = sweep(table, [Threshold(0.9), Threshold(0.5)], front="agreement")
    assert kind_of(rows.assign(family="threshold")) == "front"
    for result in (table, table.simulate(FixedLayer(1))):
        assert isinstance(result.plot(), Figure)


def test_residuals_and_patched_runs_draw_themselves(tiny_llama: sl.Model) -> None:
    residuals = sl.capture(tiny_llama, TEXTS, layers=[0, 2])
    assert kind_of(residuals) == "norms"
    drawing = residuals.plot()
    assert legend(drawing) == ["first token", "other tokens"]
    rows = residuals.to_frame().query("position > 0").groupby("layer")["norm"].median()
    assert drawing.axes[0].lines[1].get_ydata().tolist() == rows.tolist()

    write = sl.Patch(2, prompts=[1], values=torch.ones(32), mode="add")
    patched = sl.patch(TEXTS, write, model=tiny_llama)
    assert kind_of(patched) == "patched"
    [panel] = patched.plot().axes
    kl = patched.to_frame().query("condition == 'patched'")["kl"].tolist()
    assert [bar.get_width() for bar in panel.patches] == kl and kl[1] > 10 * max(kl[0], kl[2])
    assert [t.get_text()[:2] for t in panel.get_yticklabels()] == ["0:", "1:", "2:"]
    with pytest.raises(ValueError, match=r"\['patched'\] were given"):
        sl.plot(patched.to_frame().query("condition == 'patched'"))


def test_experiments_find_their_figures(tiny_llama: sl.Model) -> None:
    prompts = [tiny_llama.prompt(text, target="B") for text in TEXTS]
    last = {"to the last": lambda p: [(p.answer, k) for k in range(p.answer)]}
    assert kind_of(sl.icl.knockout(tiny_llama, prompts, edges=last, windows=[(0, 4)])) == "knockout"
    sets = sl.icl.sufficiency_map(tiny_llama, prompts[:1], sets=[sl.Keep(), sl.Keep(last=2)])
    assert kind_of(sets) == "sufficiency"
    assert kind_of(sl.icl.smallest_sets(tiny_llama, prompts, layers=[1])) == "smallest_sets"
    rows = {"prompt": [0, 1], "layer": 3, "demo": 0, "same_label": True, "shapley": [1.0, 2.0]}
    frame = pd.DataFrame(rows | {"effective": 1.0})
    assert kind_of(frame) == "contributions"
    assert kind_of(sl.stats.summarise(frame, "effective")) == "effective_number"


def test_results_draw_themselves_by_the_same_verb(tiny_llama: sl.Model) -> None:
    assert verb("plot") is sl.plot
    assert isinstance(verb("plot")(tiny_llama.read(TEXTS[0])), Figure)


def test_a_page_has_its_width_and_its_letters(tiny_llama: sl.Model) -> None:
    readout = tiny_llama.read(TEXTS)
    with sl.plots.Page(width=3.3, font_size=10):
        narrow = sl.plot(readout)
    assert narrow.get_figwidth() == 3.3
    assert narrow._supxlabel.get_fontsize() == 10  # type: ignore[attr-defined]
    assert narrow.axes[0].get_xticklabels()[0].get_fontsize() == 9
    narrow.draw_without_rendering()
    inside = narrow.bbox
    for text in [*narrow.legends[0].texts, narrow._supxlabel, narrow._supylabel]:  # type: ignore[attr-defined]
        box = text.get_window_extent()
        assert inside.x0 <= box.x0 and box.x1 <= inside.x1, text
    assert sl.plot(readout).get_figwidth() == 6.9
    with pytest.raises(ValueError, match="width=0 was given"):
        sl.plots.Page(width=0)


def test_one_layer_is_seen(tiny_llama: sl.Model) -> None:
    (panel,) = sl.plot(tiny_llama.read(TEXTS, layers=3)).axes
    for name in ("logit lens", "SPADE"):
        assert line(panel, name).get_marker() == "o"
    bars = [c for c in panel.collections if hasattr(c, "get_segments")]
    ends = [segment[:, 1] for bar in bars for segment in bar.get_segments()]
    assert len(ends) == 2 and all(low < high for low, high in ends)
    first, second = (float(line(panel, n).get_xdata()[0]) for n in ("logit lens", "SPADE"))
    assert first != second and abs(first - 3) < 0.5 and abs(second - 3) < 0.5
    assert [t for t in panel.get_xticks() if panel.get_xlim()[0] <= t <= panel.get_xlim()[1]] == [3]


def test_a_grid_has_a_panel_for_every_lens_and_lenses_side_by_side_at_one_position(
    tiny_llama: sl.Model,
) -> None:
    frame = tiny_llama.read(TEXTS[0], positions="all").to_frame()
    drawing = sl.plot(frame, shade="entropy")
    assert [t.partition(":")[0] for t in titles(drawing)[:2]] == ["", ""]
    names = [panel.get_title(loc="left").partition(":")[0] for panel in drawing.axes[:2]]
    assert names == ["logit lens", "SPADE"]
    scales = {panel.images[0].get_clim() for panel in drawing.axes[:2]}
    assert scales == {(0, frame["entropy"].max())}
    last = tiny_llama.read(TEXTS[0])
    (panel, _) = sl.plot(last).axes
    assert [t.get_text() for t in panel.get_xticklabels()] == ["logit lens", "SPADE"]
    rows = last.to_frame().set_index(["layer", "lens"])["top_1"]
    shown = {(int(t.get_position()[1]), int(t.get_position()[0])): t for t in panel.texts}
    for (layer, column), text in shown.items():
        assert text.get_text() == rows[layer, ["logit lens", "SPADE"][column]].replace(" ", "·")


def test_an_exit_table_shows_confidence_beside_what_comes_true(tiny_llama: sl.Model) -> None:
    prompts = [tiny_llama.prompt(text, target="B") for text in TEXTS]
    checks = [sl.LogitLens(tiny_llama), sl.Spade(tiny_llama)]
    tables = exit_tables(tiny_llama, prompts, checks, layers=[1, 2, 3])
    drawing = sl.plot(tables)
    assert titles(drawing) == [table.check for table in tables]
    assert legend(drawing)[-1] == "accuracy"
    for panel, table in zip(drawing.axes, tables, strict=True):
        drawn = line(panel, "mean confidence of the check").get_ydata()
        np.testing.assert_allclose(drawn, table.confidence.mean(dim=1))
        drawn = line(panel, "agreement with the full model").get_ydata()
        np.testing.assert_allclose(drawn, table.agrees.double().mean(dim=1))


def test_a_figure_of_a_users_own() -> None:
    with pytest.raises(ValueError, match="No figure fits a table with the columns .*'length'"):
        sl.plot(pd.DataFrame({"prompt": [0, 1], "length": [12, 7]}))
    try:

        @sl.plots.figure("lengths", needs=("prompt", "length"), source="my_lengths()")
        def plot_lengths(frame: pd.DataFrame, color: str = "black") -> Figure:
            drawing = Figure()
            drawing.subplots().bar(frame["prompt"], frame["length"], color=color)
            return drawing

        drawing = sl.plot(pd.DataFrame({"prompt": [0, 1], "length": [12, 7]}), color="red")
        assert [bar.get_height() for bar in drawing.axes[0].patches] == [12, 7]  # type: ignore[attr-defined]
        assert "lengths" in set(sl.plots.kinds()["kind"])
        with pytest.raises(ValueError, match=r"'lengths' needs .*lacks \['length'\].*my_lengths"):
            sl.plot(pd.DataFrame({"prompt": [0]}), "lengths")
        with pytest.raises(TypeError, match=r"no option \['colour'\]; its options are \['color'\]"):
            sl.plot(pd.DataFrame({"prompt": [0], "length": 3}), "lengths", colour="red")
    finally:
        registry._KINDS.pop("lengths", None)


def test_what_cannot_be_drawn_is_said() -> None:
    frame = pd.DataFrame({"block": [0], "head": [1], "effect": [0.5], "lenses": ["x"]})
    with pytest.raises(ValueError, match=r"No figure fits .*'heads' lacks \['prompt'\] .*head_eff"):
        sl.plot(frame)
    with pytest.raises(ValueError, match="kind='head' was given; expected one of .*'heads'"):
        sl.plot(frame, "head")
    with pytest.raises(ValueError, match=r"'heads' needs .*lacks \['prompt'\]"):
        sl.plot(frame, "heads")


def test_every_kind_says_what_it_shows_and_where_its_table_comes_from() -> None:
    kinds = sl.plots.kinds()
    assert kinds["kind"].is_unique and len(kinds) >= 21
    for row in kinds.itertuples():
        assert str(row.shows).startswith("Draw ") and str(row.shows).endswith(".")
        assert row.needs and row.source
        assert all(len(text.split()) <= 25 for text in (str(row.shows),))


def test_letters_are_readable_at_page_size(tiny_llama: sl.Model) -> None:
    for table in (tiny_llama.read(TEXTS), tiny_llama.read(TEXTS[0], positions="all")):
        drawing = sl.plot(table)
        drawing.draw_without_rendering()
        shown = [t for t in drawing.findobj(Text) if t.get_text() and t.get_visible()]
        assert min(t.get_fontsize() for t in shown) >= 7


def test_means_that_no_other_figure_fits_are_points(tiny_llama: sl.Model) -> None:
    answers = {"task": ["a"] * 4 + ["b"] * 4, "prompt": list(range(4)) * 2}
    scored = {"correct_scored": [True, True, False, True] * 2, "loss": [0.5, 2.0, 1.0, 3.0] * 2}
    frame = pd.DataFrame(answers | scored)
    values = {"correct_scored": "accuracy_scored", "loss": "loss"}
    drawing = sl.plot(summarise(frame, values))
    assert [ax.get_title() for ax in drawing.axes] == ["accuracy scored", "loss"]
    assert [t.get_text() for t in drawing.axes[0].get_yticklabels()] == ["a", "b"]
    [of_a] = [line for line in drawing.axes[0].get_lines() if len(line.get_xdata()) == 2]
    assert list(of_a.get_xdata()) == [0.75, 0.75] and list(of_a.get_ydata()) == [0, 1]
    assert drawing.axes[0].get_xlim() == (-0.02, 1.02) != drawing.axes[1].get_xlim()
    one = sl.plot(summarise(frame.query("task == 'a'"), values))
    assert [t.get_text() for t in one.axes[0].get_yticklabels()] == ["accuracy scored", "loss"]
    by_layer = sl.plot(summarise(tiny_llama.read(TEXTS, layers=[2, 4])))
    assert len(by_layer.axes) == 1 and not by_layer.axes[0].get_title()  # as before
    again = summarise(frame, values)
    with pytest.raises(ValueError, match="2 groups were given, 4 rows of them of a group and meas"):
        sl.plot(pd.concat([again, again], ignore_index=True))
