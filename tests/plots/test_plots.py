"""Figures hold the numbers they were given, in sizes that can be read."""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.text import Text

from spade_lens import LogitLens, Model, Spade, read
from spade_lens.lenses import Readout
from spade_lens.plots import plot_by_layer, plot_grid, save_figure
from spade_lens.stats import summarise


def texts(figure: Figure) -> list[Text]:
    figure.draw_without_rendering()
    return [t for t in figure.findobj(Text) if t.get_text() and t.get_visible()]


@pytest.fixture(scope="module")
def frame(tiny_llama: Model) -> pd.DataFrame:
    """Readings of two lenses, for four tasks."""
    lenses = [LogitLens(tiny_llama), Spade(tiny_llama)]
    prompts = [tiny_llama.prompt(text, target="B") for text in ("a>A,b>", "c>C,d>", "xyz")]
    one = read(prompts, lenses).to_frame()
    return pd.concat([one.assign(task=f"task {n}") for n in range(4)])


@pytest.fixture(scope="module")
def grid(tiny_llama: Model) -> Readout:
    """Readings at every position of a text that needs care in figures."""
    return read(
        tiny_llama.prompt("a$b$_{^\\c"),
        [LogitLens(tiny_llama), Spade(tiny_llama)],
        positions="all",
        top_k=1,
    )


def test_lines_are_the_summary(frame: pd.DataFrame) -> None:
    summary = summarise(frame)
    figure = plot_by_layer(summary, "agreement")
    assert len(figure.axes) == 4
    line = next(x for x in figure.axes[2].lines if x.get_label() == "SPADE")
    rows = summary.query("task == 'task 2' and lens == 'SPADE' and measure == 'agreement'")
    np.testing.assert_array_equal(line.get_xdata(), rows["layer"])
    np.testing.assert_array_equal(line.get_ydata(), rows["mean"])
    assert [t.get_text() for t in figure.legends[0].texts] == ["logit lens", "SPADE"]


def test_full_model_is_a_dashed_line(frame: pd.DataFrame) -> None:
    summary = summarise(frame)
    panel = plot_by_layer(summary).axes[0]
    (dashed,) = (x for x in panel.lines if x.get_label() == "full model")
    last = summary.query("layer == 4 and measure == 'accuracy' and task == 'task 0'")
    assert dashed.get_ydata()[0] == last["mean"].iloc[0]


@pytest.mark.parametrize("n_tasks", [1, 2, 4])
def test_page_width_readable_letters_and_a_legend_that_covers_nothing(
    frame: pd.DataFrame, n_tasks: int
) -> None:
    some = frame[frame["task"].isin([f"task {n}" for n in range(n_tasks)])]
    figure = plot_by_layer(summarise(some))
    assert figure.get_figwidth() == 6.9
    assert min(t.get_fontsize() for t in texts(figure)) >= 7
    (legend,) = figure.legends
    box = legend.get_window_extent()
    assert not any(panel.get_window_extent().overlaps(box) for panel in figure.axes)


@pytest.mark.parametrize("n_lenses", [3, 8])
def test_many_long_names_stay_inside(frame: pd.DataFrame, n_lenses: int) -> None:
    spade = frame[(frame["lens"] == "SPADE") & (frame["task"] == "task 0")]
    many = [spade.assign(lens=f"SPADE (start+answer+query+{n})") for n in range(n_lenses)]
    figure = plot_by_layer(summarise(pd.concat(many)), "agreement")
    inside = figure.bbox
    figure.draw_without_rendering()
    for text in [*figure.legends[0].texts, *figure.axes[0].get_yticklabels(), figure._supylabel]:
        box = text.get_window_extent()
        assert inside.x0 <= box.x0 and box.x1 <= inside.x1, text
        assert inside.y0 <= box.y0 and box.y1 <= inside.y1, text


def test_pyplot_knows_nothing_of_it(frame: pd.DataFrame, grid: Readout) -> None:
    plot_by_layer(summarise(frame))
    plot_grid(grid, lens="SPADE")
    assert plt.get_fignums() == []


def test_notebooks_can_draw_it(frame: pd.DataFrame) -> None:
    figure = plot_by_layer(summarise(frame))
    assert figure._repr_png_().startswith(b"\x89PNG")  # type: ignore[attr-defined]


def test_saved_as_png_and_pdf(frame: pd.DataFrame, tmp_path: Path) -> None:
    figure = plot_by_layer(summarise(frame))
    png, pdf = save_figure(figure, tmp_path / "deep" / "v1.2")
    assert (png.name, pdf.name) == ("v1.2.png", "v1.2.pdf")
    assert imread(png).shape[1] == round(6.9 * 300)
    assert pdf.read_bytes().startswith(b"%PDF")
    assert save_figure(figure, tmp_path / "f.png") == (tmp_path / "f.png", tmp_path / "f.pdf")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["deep", "f.pdf", "f.png"]


def test_what_cannot_be_plotted_is_said(frame: pd.DataFrame) -> None:
    with pytest.raises(ValueError, match="lacks .*'lens'.* Make it with spade_lens.read or stats"):
        plot_by_layer(frame.drop(columns="lens"))
    summary = summarise(frame.drop(columns="correct"))
    with pytest.raises(ValueError, match="no 'accuracy' in this summary, only .'agreement'"):
        plot_by_layer(summary, "accuracy")
    with pytest.raises(ValueError, match=r"lens=\['tuned lens'\] was asked for; .*'SPADE'"):
        plot_by_layer(summary, "agreement", lenses=["tuned lens"])


@pytest.mark.parametrize("shade", ["probability", "entropy"])
def test_grid_shows_the_top_tokens(grid: Readout, shade: str) -> None:
    figure = plot_grid(grid, shade, lens="SPADE")  # type: ignore[arg-type]
    axes = figure.axes[0]
    assert len(axes.texts) == grid.entropy[1].numel()
    frame = grid.to_frame().query("lens == 'SPADE'")
    shown = {(t.get_position()[1], t.get_position()[0]): t for t in axes.texts}
    for row in frame.itertuples():
        cell = shown[row.layer, row.position]
        assert cell.get_text() == (row.top_1 or "").replace(" ", "·")
        assert (cell.get_fontweight() == "bold") == row.agrees
    values = axes.images[0].get_array()
    expected = grid.entropy[1] if shade == "entropy" else grid.top_logprobs[1, ..., 0].exp()
    np.testing.assert_allclose(values, expected, rtol=1e-6)
    ticks = [t.get_text() for t in axes.get_xticklabels()]
    assert ticks == ["(start)", *"a$b$_{^\\c"]
    assert min(t.get_fontsize() for t in texts(figure)) >= 7


def test_grid_cells_keep_to_their_width(grid: Readout) -> None:
    frame = grid.to_frame().query("lens == 'SPADE'").assign(top_1="·wonderfully五\n")
    figure = plot_grid(frame)
    figure.draw_without_rendering()
    axes = figure.axes[0]
    width = axes.get_window_extent().width / frame["position"].nunique()
    for cell in axes.texts:
        assert cell.get_window_extent().width <= width * 1.02
        assert cell.get_text().startswith("·wonder")
    unknown = plot_grid(frame.assign(top_1="五\n")).axes[0].texts[0].get_text()
    assert unknown == "□↵"  # the font has no such glyph, and matplotlib would warn of it


def test_what_is_no_grid_is_said(grid: Readout, frame: pd.DataFrame) -> None:
    with pytest.raises(ValueError, match=r"lens=\['tuned'\] was asked for; .*'SPADE'"):
        plot_grid(grid, lens="tuned")
    with pytest.raises(ValueError, match="several readings of one layer and position"):
        plot_grid(frame, lens="SPADE")
    with pytest.raises(ValueError, match="2 tokens were given for 10 positions"):
        plot_grid(grid, lens="SPADE", tokens=["a", "b"])
