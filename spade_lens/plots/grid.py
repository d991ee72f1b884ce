"""The grid of a text: what a lens reads at every position and layer, shaded by how surely."""

from collections.abc import Sequence
from functools import cache
from typing import Literal

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from spade_lens.lenses.readout import Readout
from spade_lens.plots.style import FULL_WIDTH, STYLE, PageFigure, known_glyphs, text_width

_CELL = 0.42
"""The least width of a cell in inches: six or seven letters."""
_FONT_SIZE = 7
_VISIBLE = str.maketrans({" ": "·", "\n": "↵", "\r": "↵", "\t": "→"})
_LABELS = {"probability": "probability of the top token", "entropy": "entropy (nats)"}


def plot_grid(
    readout: Readout | pd.DataFrame,
    shade: Literal["probability", "entropy"] = "probability",
    *,
    lens: str | None = None,
    tokens: Sequence[str] | None = None,
    width: float | None = None,
) -> Figure:
    """The top token at every position (across) and layer (upwards, the output on top).

    Darker is surer. Bold marks what the model itself says at that position. A dot in a token
    stands for a space, a bent arrow for a line break.

    Example:
        >>> grid = read(prompts[0], Spade(model), positions="all")
        >>> figure = plot_grid(grid, "entropy")

    Args:
        readout: From ``read(text, positions="all")``, or its frame; fewer layers or positions than
            all are chosen by filtering the frame.
        shade: What the shading shows.
        lens: Which lens, where there are several.
        tokens: The text's tokens, for the axis; by default those that the readout knows, which
            are all but the first.
        width: Of the figure, in inches; by default the width of a page up to 15 positions, and
            wider beyond.

    Returns:
        The figure, not shown.

    Raises:
        ValueError: If there are several lenses and none is named, the lens is unknown, or the
            readings are not of one text.
    """
    frame = readout.to_frame() if isinstance(readout, Readout) else readout
    frame = _of_one_lens(frame, lens)
    if frame.duplicated(["layer", "position"]).any():
        raise ValueError(
            "plot_grid shows one text, and this readout has several readings of one layer and "
            'position. Read with positions="all", or filter the frame by prompt.'
        )
    positions = sorted(int(p) for p in frame["position"].unique())
    if tokens is None:
        tokens = _tokens(frame, positions)
    elif len(tokens) != len(positions):
        raise ValueError(f"{len(tokens)} tokens were given for {len(positions)} positions.")
    sure, words, own = (
        frame.pivot(index="layer", columns="position", values=column)
        for column in ("entropy" if shade == "entropy" else "top_1_logprob", "top_1", "agrees")
    )
    colours = sure.to_numpy(dtype=float)
    if shade == "probability":
        colours = np.exp(colours)
    n_layers, n_positions = colours.shape
    across = max(FULL_WIDTH, 0.5 + _CELL * n_positions) if width is None else width
    with mpl.rc_context(STYLE | {"axes.grid": False}):
        figure = PageFigure(figsize=(across, 0.95 + 0.17 * n_layers), layout="constrained")
        axes = figure.subplots()
        image = axes.imshow(
            colours,
            origin="lower",
            aspect="auto",
            cmap="Blues" if shade == "probability" else "Blues_r",
            vmin=0,
            vmax=1 if shade == "probability" else None,
        )
        room = (across - 1.0) / n_positions * 72
        red, green, blue, _ = np.moveaxis(image.to_rgba(colours), -1, 0)
        dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
        for (row, column), word in np.ndenumerate(words.to_numpy()):
            bold = bool(own.iat[row, column])
            axes.text(
                column,
                row,
                _shown(word, room, bold),
                ha="center",
                va="center",
                fontsize=_FONT_SIZE,
                color="white" if dark[row, column] else "black",
                fontweight="bold" if bold else "normal",
                parse_math=False,
            )
        _label(axes, sure.index.tolist(), [_shown(t, room) for t in tokens])
        title = f"{frame['lens'].iloc[0]}: top token by position and layer (bold: the model's own)"
        axes.set_title(title, loc="left", parse_math=False)
        bar = figure.colorbar(image, ax=axes, label=_LABELS[shade], pad=0.01, aspect=40)
        bar.outline.set_visible(False)
    return figure


def _of_one_lens(frame: pd.DataFrame, lens: str | None) -> pd.DataFrame:
    present = list(frame["lens"].unique())
    if lens is None and len(present) > 1:
        raise ValueError(f"This readout has the lenses {present}; name one with lens=.")
    if lens is not None and lens not in present:
        raise ValueError(f"No lens {lens!r} in this readout, only {present}.")
    return frame if lens is None else frame[frame["lens"] == lens]


def _tokens(frame: pd.DataFrame, positions: Sequence[int]) -> list[str]:
    """The text's tokens: each is the target of the position before."""
    following = {}
    if "target" in frame.columns:
        following = dict(zip(frame["position"] + 1, frame["target"], strict=True))
    return [following.get(p) or ("(start)" if p == 0 else str(p)) for p in positions]


def _label(axes: Axes, layers: Sequence[int], tokens: Sequence[str]) -> None:
    axes.set_xticks(range(len(tokens)), tokens, parse_math=False)
    axes.set_yticks(range(len(layers)), [str(layer) for layer in layers])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("token of the text, whose next token is read")
    axes.set_ylabel("layer")


@cache
def _shown(word: str | None, room: float, bold: bool = False) -> str:
    """A token as a cell shows it: white space visible, cut to ``room`` points, in known glyphs."""
    text = known_glyphs((word or "").translate(_VISIBLE))
    if text_width(text, _FONT_SIZE, bold=bold) <= room:
        return text
    shorter = (text[:n] + "…" for n in range(len(text) - 1, 0, -1))
    return next((s for s in shorter if text_width(s, _FONT_SIZE, bold=bold) <= room), "…")
