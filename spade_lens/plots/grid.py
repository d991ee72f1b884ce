"""The grid of a text: what a lens reads at every position and layer, shaded by how surely."""

from collections.abc import Sequence
from functools import cache

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from spade_lens.plots.lines import choose, label_of
from spade_lens.plots.registry import figure
from spade_lens.plots.style import PageFigure, known_glyphs, page, text_width
from spade_lens.report.words import VISIBLE, text_tokens

_CELL = 0.42
"""The least width of a cell in inches: six or seven letters."""
_FONT_SIZE = 7
_LABELS = {"probability": "probability of the top token", "entropy": "entropy (nats)"}


@figure(
    "grid",
    needs=("lens", "layer", "prompt", "position", "entropy", "agrees", "top_1", "top_1_logprob"),
    source="spade_lens.read(text, positions='all')",
    fits=lambda frame: frame["prompt"].nunique() == 1 and "of" not in frame.columns,
)
def plot_grid(
    frame: pd.DataFrame,
    shade: str = "probability",
    *,
    lens: str | None = None,
    tokens: Sequence[str] | None = None,
) -> Figure:
    """Draw the top token at every position (across) and layer (upwards, the output on top).

    Darker is surer. Bold marks what the model itself says at that position. A dot in a token
    stands for a space, a bent arrow for a line break. Several lenses have a panel each. At a
    single position, lenses stand side by side instead.

    Example:
        >>> grid = sl.read("ab->AB,cd->", "spade", model=model, positions="all")
        >>> drawing = sl.plots.plot_grid(grid, "entropy")

    Args:
        frame: A readout of one text, or its frame. For fewer layers or positions, filter the
            frame. The figure is as wide as the page up to 15 positions, and wider beyond.
        shade: What the shading shows: ``"probability"`` or ``"entropy"``.
        lens: Which lens alone, by name.
        tokens: The text's tokens, for the axis; by default those that the readout knows, which
            are all but the first.

    Returns:
        The figure, not shown.

    Raises:
        ValueError: If the lens is unknown, or the table is not of one text.
    """
    label = label_of(shade, _LABELS)
    frame = choose(frame, "lens", None if lens is None else [lens])
    if frame.duplicated(["lens", "layer", "position"]).any():
        raise ValueError(
            "The figure 'grid' shows one text, and this readout has several readings of one layer "
            'and position. Read with positions="all", or filter the frame by prompt.'
        )
    positions = sorted(int(p) for p in frame["position"].unique())
    if tokens is None:
        tokens = text_tokens(frame, positions)
    elif len(tokens) != len(positions):
        raise ValueError(f"{len(tokens)} tokens were given for {len(positions)} positions.")
    lenses = list(frame["lens"].unique())
    beside = len(positions) == 1
    columns = lenses if beside else positions
    panels = {"": frame} if beside else {n: frame[frame["lens"] == n] for n in lenses}
    width = max(page().width, 0.5 + _CELL * len(columns))
    room = (width - 1.0) / len(columns) * 72
    n_layers = frame["layer"].nunique()
    sure = frame["entropy"] if shade == "entropy" else np.exp(frame["top_1_logprob"])
    drawing = PageFigure(
        figsize=(width, 0.6 + (0.35 + 0.17 * n_layers) * len(panels)), layout="constrained"
    )
    axes = drawing.subplots(len(panels), sharex=True, squeeze=False)[:, 0]
    for (name, rows), panel in zip(panels.items(), axes, strict=True):
        rows = rows.assign(sure=sure, column=rows["lens"] if beside else rows["position"])
        most = float(sure.max()) if shade == "entropy" else 1.0
        image = _cells(panel, rows, columns, room, most, reverse=shade == "entropy")
        where = "lens" if beside else "position"
        title = f"{name}: top token by {where} and layer (bold: the model's own)"
        panel.set_title(title.removeprefix(": ").capitalize() if beside else title, loc="left")
        panel.title.set_parse_math(False)
        panel.set_ylabel("layer")
    names = lenses if beside else [shown_word(token, room) for token in tokens]
    axes[-1].set_xticks(range(len(columns)), names, parse_math=False)
    if not beside:
        axes[-1].set_xlabel("token of the text, whose next token is read")
    bar = drawing.colorbar(image, ax=list(axes), label=label, pad=0.01, aspect=40)
    bar.outline.set_visible(False)
    return drawing


def _cells(
    panel: Axes,
    rows: pd.DataFrame,
    columns: Sequence[int | str],
    room: float,
    most: float,
    *,
    reverse: bool,
) -> AxesImage:
    """Draw the rows' ``sure`` as colours, and their top tokens in ``room`` points each."""
    colours, words, agrees = (
        rows.pivot(index="layer", columns="column", values=value).reindex(columns=list(columns))
        for value in ("sure", "top_1", "agrees")
    )
    image = panel.imshow(
        colours.to_numpy(dtype=float),
        origin="lower",
        aspect="auto",
        cmap="Blues_r" if reverse else "Blues",
        vmin=0,
        vmax=most,
    )
    red, green, blue, _ = np.moveaxis(image.to_rgba(colours.to_numpy(dtype=float)), -1, 0)
    dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
    for (row, column), word in np.ndenumerate(words.to_numpy()):
        if not isinstance(word, str):  # a lens that cannot read this layer
            continue
        bold = bool(agrees.iat[row, column])
        panel.text(
            column,
            row,
            shown_word(word, room, bold),
            ha="center",
            va="center",
            fontsize=_FONT_SIZE,
            color="white" if dark[row, column] else "black",
            fontweight="bold" if bold else "normal",
            parse_math=False,
        )
    panel.set_yticks(range(len(colours)), [str(layer) for layer in colours.index])
    panel.tick_params(length=0)
    panel.spines[:].set_visible(False)
    panel.grid(visible=False)
    return image


@cache
def shown_word(word: str | None, room: float, bold: bool = False) -> str:
    """A token as a cell shows it: white space visible, cut to ``room`` points, in known glyphs."""
    text = known_glyphs((word or "").translate(VISIBLE))
    if text_width(text, _FONT_SIZE, bold=bold) <= room:
        return text
    shorter = (text[:n] + "…" for n in range(len(text) - 1, 0, -1))
    return next((s for s in shorter if text_width(s, _FONT_SIZE, bold=bold) <= room), "…")
