"""How figures look and how they are saved: one place for sizes, colours and file formats."""

import io
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.ft2font import FT2Font

from spade_lens.report import output_folder, write_atomically

FULL_WIDTH = 6.9
"""Width of a figure across both columns of a page, in inches."""

STYLE: dict[Any, Any] = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 8,
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
"""Sizes in points at the figure's own size; nothing is smaller than 7."""

# Okabe and Ito's palette, told apart by all common kinds of colour vision, and by dashes in grey.
_Look = tuple[str, tuple[float, ...] | None]
_OURS: dict[str, _Look] = {
    "logit lens": ("#D55E00", (5, 1.2, 1.2, 1.2)),
    "SPADE": ("#0072B2", None),
}
_OTHERS: list[_Look] = [
    ("#009E73", (1.2, 1)),
    ("#CC79A7", (3.5, 1.2)),
    ("#E69F00", None),
    ("#56B4E9", (2.5, 1)),
    ("#7F7F7F", (6, 1.2)),
]


class PageFigure(Figure):
    """A matplotlib figure that a notebook draws though pyplot knows nothing of it."""

    def _repr_png_(self) -> bytes:
        # IPython asks for this. Once pyplot is imported there, its own way takes precedence.
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=120)
        return buffer.getvalue()


def text_width(text: str, size: float, *, bold: bool = False) -> float:
    """The width of a line of text in the current font, in points."""
    font = _font(bold)
    font.set_size(10 * size, 72)  # large, so that widths are not rounded to pixels
    font.set_text(text)
    return font.get_width_height()[0] / 64 / 10  # it counts in 64ths of a point


def known_glyphs(text: str) -> str:
    """The text with an empty box for every character that the current font lacks."""
    font = _font(False)
    return "".join(c if font.get_char_index(ord(c)) else "□" for c in text)


def _font(bold: bool) -> FT2Font:
    return get_font(findfont(FontProperties(weight="bold" if bold else "normal")))


def line_styles(lenses: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Colour and dashes of every lens' line; the logit lens and SPADE always have their own."""
    others = [lens for lens in lenses if lens not in _OURS]
    styles = {lens: _OTHERS[i % len(_OTHERS)] for i, lens in enumerate(others)} | _OURS
    return {
        lens: {"color": styles[lens][0], "dashes": styles[lens][1] or (None, None)}
        for lens in lenses
    }


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
    path = Path(path).expanduser()
    stem = path.with_suffix("") if path.suffix.lower() in (".png", ".pdf") else path
    output_folder(stem.parent)
    png, pdf = (stem.with_name(stem.name + suffix) for suffix in (".png", ".pdf"))
    # Type 42 fonts stay text that can be searched and edited; no date, so equal runs are equal.
    with mpl.rc_context({"pdf.fonttype": 42}):
        write_atomically(png, lambda p: figure.savefig(p, dpi=300))
        write_atomically(pdf, lambda p: figure.savefig(p, metadata={"CreationDate": None}))
    return png, pdf
