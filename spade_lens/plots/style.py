"""How figures look and how they are saved: the page, colours, legends, panels and formats."""

import io
from collections.abc import Iterable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from math import ceil
from os import PathLike
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.ft2font import FT2Font
from matplotlib.ticker import FixedLocator, MaxNLocator

from spade_lens.checks import check_fields, checked
from spade_lens.storage.files import as_path, output_folder, write_atomically


@dataclass(frozen=True)
class Page:
    """The size of figures. Inside ``with Page(...):`` all figures are made for that page.

    Example:
        >>> with sl.plots.Page(width=3.3):
        ...     figure = sl.plot(sl.read("ab->AB,cd->", model=model))
        >>> float(figure.get_figwidth())
        3.3

    Args:
        width: Width of a figure in inches. The default spans both columns of a paper.
        font_size: Size of letters in points at the figure's own size. Tick labels are one point
            smaller.

    Raises:
        ValueError: If a size is not positive.
    """

    width: float = 6.9
    font_size: float = 8

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("width", "font_size"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} was given; expected more than 0.")

    def __enter__(self) -> "Page":
        _pages.set((*_pages.get(), self))
        return self

    def __exit__(self, *error: object) -> None:
        _pages.set(_pages.get()[:-1])


_pages: ContextVar[tuple[Page, ...]] = ContextVar("pages", default=(Page(),))


def page() -> Page:
    """Return the page in force."""
    return _pages.get()[-1]


BY_LAYER = "layer (residual stream after so many blocks)"
BY_BLOCK = "block (block b lies between layer b and layer b + 1)"
FULL_MODEL: dict[str, Any] = {"color": "black", "lw": 0.9, "ls": (0, (4, 2))}
"""The line of the full model."""

_STYLE: dict[Any, Any] = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "lines.linewidth": 1.4,
    "axes.grid": True,
    "grid.linewidth": 0.4,
    "grid.color": "0.88",
    "axes.axisbelow": True,
}

# Okabe and Ito's palette: distinct to all common kinds of colour vision, and by dashes in grey.
_Look = tuple[str, tuple[float, ...] | None]
_NAMED: dict[str, _Look] = {
    "logit lens": ("#D55E00", (5, 1.2, 1.2, 1.2)),
    "SPADE": ("#0072B2", None),
}
_OTHERS: list[_Look] = [
    ("#009E73", (1.2, 1)),
    ("#CC79A7", (3.5, 1.2)),
    ("#E69F00", None),
    ("#56B4E9", (2.5, 1)),
    ("#7F7F7F", (6, 1.2)),
    ("#332288", (1.2, 1.2, 4, 1.2)),
    ("#882255", None),
]


def style() -> dict[Any, Any]:
    """Return matplotlib's settings for the page in force."""
    size = page().font_size
    large = ("font.size", "axes.titlesize", "axes.labelsize", "legend.fontsize", "figure.labelsize")
    small = ("xtick.labelsize", "ytick.labelsize")
    return _STYLE | dict.fromkeys(large, size) | dict.fromkeys(small, size - 1)


class PageFigure(Figure):
    """A matplotlib figure that a notebook draws though pyplot does not know it."""

    def _repr_png_(self) -> bytes:
        # IPython asks for this. Once pyplot is imported there, its own formatter comes first.
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=120)
        return buffer.getvalue()


def text_width(text: str, size: float, *, bold: bool = False) -> float:
    """Return the width of a line of text in the current font, in points."""
    font = _font(bold)
    font.set_size(10 * size, 72)  # large, so that widths are not rounded to pixels
    font.set_text(text)
    return font.get_width_height()[0] / 64 / 10  # it counts in 64ths of a point


def known_glyphs(text: str) -> str:
    """Return the text with an empty box for every character that the current font lacks."""
    font = _font(False)
    return "".join(c if font.get_char_index(ord(c)) else "□" for c in text)


def _font(bold: bool) -> FT2Font:
    return get_font(findfont(FontProperties(weight="bold" if bold else "normal")))


def line_styles(lenses: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return every lens' colour and dashes; the logit lens and SPADE always have the same."""
    others = [lens for lens in lenses if lens not in _NAMED]
    styles = {lens: _OTHERS[i % len(_OTHERS)] for i, lens in enumerate(others)} | _NAMED
    return {
        lens: {"color": styles[lens][0], "dashes": styles[lens][1] or (None, None)}
        for lens in lenses
    }


def by_task(frame: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Return every task's rows, in the table's order; all of them under "" without tasks."""
    if "task" not in frame.columns:
        return {"": frame}
    return {str(task): rows for task, rows in frame.groupby("task", sort=False)}


def panel_grid(
    n: int, *, across: int = 3, height: float = 1.75, sharex: bool = True, sharey: bool = True
) -> tuple[PageFigure, list[Axes]]:
    """Return a figure of ``n`` panels as wide as the page, and its panels in reading order."""
    across = min(n, across)
    down = ceil(n / across)
    figure = PageFigure(figsize=(page().width, 0.6 + height * down), layout="constrained")
    grid = figure.subplots(down, across, sharex=sharex, sharey=sharey, squeeze=False)
    panels = list(grid.flat)
    for number, panel in enumerate(panels):
        if number >= n:
            panel.remove()
        elif number + across >= n:
            # With the last row not full, the panels above its gap need their own numbers.
            panel.tick_params(labelbottom=True)
    return figure, panels[:n]


def fraction_axis(panel: Axes) -> None:
    """Let the y axis show fractions, from 0 to 1."""
    panel.set_ylim(-0.03, 1.03)
    panel.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0", "", "0.5", "", "1"])


def whole_numbers(panel: Axes, numbers: Iterable[float]) -> None:
    """Let the x axis show whole numbers, such as layers, with a margin on both sides."""
    values = sorted(set(numbers))
    first, last = values[0], values[-1]
    # One layer alone stands in the middle.
    margin = 0.03 * (last - first) or 0.6
    panel.set_xlim(first - margin, last + margin)
    few = len(values) <= 7
    panel.xaxis.set_major_locator(
        FixedLocator(values) if few else MaxNLocator(nbins=7, integer=True)
    )


def some_ticks(values: Sequence[Any], most: int) -> list[int]:
    """Return the places of at most so many values, at equal steps from the first."""
    return list(range(0, len(values), ceil(len(values) / most)))


def legend_above(figure: Figure, *, first: Sequence[str] = ()) -> None:
    """Draw one legend above all panels, where it covers nothing; a label of several stands once.

    Labels in ``first`` stand before all others.
    """
    entries: dict[str, Artist] = {}
    for panel in figure.axes:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    if not entries:
        return
    entries = {label: entries[label] for label in (*first, *entries) if label in entries}
    columns = _legend_columns(list(entries), figure.get_figwidth() * 72)
    rows = ceil(len(entries) / columns)
    figure.set_figheight(figure.get_figheight() + 0.16 * (rows - 1))
    figure.legend(
        list(entries.values()),
        list(entries),
        loc="outside upper center",
        ncols=columns,
        frameon=False,
        handlelength=2.6,
    )


def _legend_columns(labels: Sequence[str], points: float) -> int:
    """The most columns that fit a width, as matplotlib fills them: one after the other."""
    size = page().font_size
    # A line, the pad behind it, and the space to the next column, in letters' sizes.
    beside = (2.6 + 0.8 + 2.0) * size
    widths = [text_width(label, size) + beside for label in labels]
    for columns in range(len(labels), 1, -1):
        if sum(column.max() for column in np.array_split(widths, columns)) <= points:
            return columns
    return 1


@checked
def save_figure(figure: Figure, path: str | PathLike[str]) -> tuple[Path, Path]:
    """Save a figure as PNG (300 dpi) and as PDF (fonts embedded).

    Args:
        figure: The figure.
        path: Where to, with or without ``.png`` or ``.pdf``; its folder is made.

    Returns:
        The two paths, PNG first.

    Raises:
        ValueError: If the folder cannot be written.
    """
    path = as_path(path)
    stem = path.with_suffix("") if path.suffix.lower() in (".png", ".pdf") else path
    output_folder(stem.parent)
    png, pdf = (stem.with_name(stem.name + suffix) for suffix in (".png", ".pdf"))
    # Type 42 fonts stay text that can be searched and edited; no date, so equal runs are equal.
    with mpl.rc_context({"pdf.fonttype": 42}):
        write_atomically(png, lambda p: figure.savefig(p, dpi=300))
        write_atomically(pdf, lambda p: figure.savefig(p, metadata={"CreationDate": None}))
    return png, pdf
