"""The smallest sufficient sets by layer: what they hold, their size, and whether luck does it."""

import pandas as pd
from matplotlib.figure import Figure

from spade_lens.plots.attention import check_one_model
from spade_lens.plots.lines import line_figure
from spade_lens.plots.style import FULL_WIDTH, check_table
from spade_lens.stats.summary import summarise

_KINDS = {
    "query": "query",
    "arrow": "final arrow",
    "input": "inputs",
    "demo/arrow": "arrows",
    "output": "outputs",
    "separator": "separators",
}
_SIZES = {"units": "pieces", "tokens": "tokens"}
_PANELS = ("pieces of each kind", "size", "found, and found by luck")


def plot_smallest(frame: pd.DataFrame, *, width: float = FULL_WIDTH) -> Figure:
    """What the smallest sufficient sets hold, by layer; one panel each for kinds, size and luck.

    Kinds and sizes are means over the prompts for which a set was found. Intervals end at 0, and
    those of shares at 1.

    Example:
        >>> frame = icl.smallest_sets(model, prompts, layers=[1, 3])
        >>> [panel.get_title() for panel in plot_smallest(frame).axes]  # no pieces are named here
        ['size', 'found, and found by luck']

    Args:
        frame: From :func:`spade_lens.icl.smallest_sets`, with ``task`` added for several tasks.
            Its ``spans`` may be a text with spaces between them, as in files.
        width: Of the figure, in inches.

    Returns:
        The figure, not shown. With several tasks, each has a row of panels. Where no set was
        found the last panel stands alone; where sets hold no pieces with names, the first one is
        left out.

    Raises:
        ValueError: If the table lacks a column or is of several models.
    """
    needed = ("layer", "prompt", "sufficient", "units", "tokens", "spans", "random")
    check_table("plot_smallest", frame, needed, source="spade_lens.icl.smallest_sets")
    check_one_model("plot_smallest", frame)
    by = [*(["task"] if "task" in frame.columns else []), "layer"]
    kinds, size, luck = _PANELS
    found = frame[frame["sufficient"].astype(bool)]
    lines: list[tuple[str, str, pd.DataFrame, str]] = []
    if len(found):
        pieces = _pieces(found)
        lines += [(kinds, kind, found.assign(n=pieces[kind]), "n") for kind in pieces.columns]
        lines += [(size, name, found, column) for column, name in _SIZES.items()]
    lines.append((luck, "a set was found", frame, "sufficient"))
    if frame["random"].notna().any():
        lines.append((luck, "random sets of its size that suffice", frame, "random"))
    points = [
        summarise(rows, column, by=by).assign(panel=panel, line=name)
        for panel, name, rows, column in lines
    ]
    table = pd.concat(points)
    # Student's intervals know neither that numbers are not negative nor that shares end at 1.
    table["low"] = table["low"].clip(lower=0)
    table["high"] = table["high"].mask(table["panel"] == luck, table["high"].clip(upper=1))
    figure = line_figure(
        "plot_smallest",
        table.assign(x=table["layer"]),
        ylabel="mean over prompts",
        sharey=False,
        height=2.0,
        width=width,
    )
    n = table["panel"].nunique()
    for panel in figure.axes[n - 1 :: n]:  # shares
        panel.set_ylim(-0.03, 1.03)
    return figure


def _pieces(found: pd.DataFrame) -> pd.DataFrame:
    """How many pieces of each kind every set holds; kinds that none holds are left out."""
    spans = [s.split() if isinstance(s, str) else list(s) for s in found["spans"].fillna("")]
    named = [[_kind(name) for name in some] for some in spans]
    present = dict.fromkeys(kind for some in named for kind in some)
    order = [kind for kind in _KINDS.values() if kind in present]
    order += [kind for kind in present if kind not in order]
    counts = {kind: [some.count(kind) for some in named] for kind in order}
    return pd.DataFrame(counts, index=found.index)


def _kind(span: str) -> str:
    """From ``demo3/input`` to ``inputs``; other names are their own."""
    demo, _, piece = span.rpartition("/")
    name = "demo/arrow" if demo and piece == "arrow" else piece
    return _KINDS.get(name, span)
