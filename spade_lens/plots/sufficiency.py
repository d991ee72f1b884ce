"""Sufficient positions: sets of positions by layer, and the smallest sets that suffice."""

from collections.abc import Sequence

import pandas as pd
from matplotlib.figure import Figure

from spade_lens.plots.lines import Layout, choose, label_of, line_figure, means
from spade_lens.plots.registry import figure
from spade_lens.plots.style import fraction_axis

_LABELS = {"agrees": "agreement\nwith the full model", "correct": "accuracy"}
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


@figure(
    "sufficiency",
    needs=("lens", "layer", "prompt", "of", "control"),
    source="spade_lens.icl.sufficiency_map",
)
def plot_sufficiency(
    frame: pd.DataFrame, value: str = "agrees", *, sets: Sequence[str] | None = None
) -> Figure:
    """Draw whether sets of positions suffice, by layer, beside random sets of their size.

    Every set has a panel. A set without controls, such as the answer token alone, is a line in
    every panel, there without its interval.

    Example:
        >>> drawing = sl.plot(icl.sufficiency_map(model, prompts, sets=[Keep(), Keep(last=4)]))
        >>> [panel.get_title() for panel in drawing.axes]
        ['start+last 4']

    Args:
        frame: From :func:`spade_lens.icl.sufficiency_map`, with ``task`` added for several tasks.
        value: The column whose mean over prompts is drawn: ``"agrees"`` or ``"correct"``.
        sets: Which sets, in the panels' order; by default all that have controls, if one has.
    """
    ylabel = label_of(value, _LABELS, frame)
    points = means(frame, value, ["of", "control", "lens", "layer"])
    name = points["lens"].str.partition(", as many as ")[0]
    points = points.assign(line=name.where(points["control"], "the set"), x=points["layer"])
    controlled = points.loc[points["control"], "of"].unique()
    drawn = list(controlled if len(controlled) else points["of"].unique())
    panels = choose(points, "of", drawn if sets is None else sets)
    alone = points[~points["of"].isin(drawn)].assign(low=float("nan"), high=float("nan"))
    parts = [panels.assign(panel=panels["of"])]
    for panel in panels["of"].unique():
        others = alone[alone["of"] != panel]
        parts.append(others.assign(panel=panel, line=others["of"]))
    # A control is a line of its own here: one set has two.
    table = pd.concat(parts).assign(control=False)
    return line_figure(table, Layout(ylabel=ylabel, fraction=True, across=4, height=1.5))


@figure(
    "smallest_sets",
    needs=("layer", "prompt", "sufficient", "units", "tokens", "spans", "random"),
    source="spade_lens.icl.smallest_sets",
)
def plot_smallest(frame: pd.DataFrame) -> Figure:
    """Draw what the smallest sufficient sets hold, their size, and whether luck finds them.

    Kinds and sizes are means over the prompts for which a set was found. Intervals end at 0, and
    those of fractions at 1.

    Example:
        >>> drawing = sl.plot(icl.smallest_sets(model, prompts, layers=[1, 3]))
        >>> [panel.get_title() for panel in drawing.axes]  # no pieces are named here
        ['size', 'found, and found by luck']

    Args:
        frame: From :func:`spade_lens.icl.smallest_sets`, with ``task`` added for several tasks.
            Its ``spans`` may be a text with spaces between them, as in files.

    Returns:
        Where no set was found the last panel stands alone; where sets hold no pieces with names,
        the first one is left out.
    """
    kinds, size, luck = _PANELS
    sufficient = frame[frame["sufficient"].astype(bool)]
    lines: list[tuple[str, str, pd.DataFrame, str]] = []
    if len(sufficient):
        pieces = _pieces(sufficient)
        lines += [(kinds, kind, sufficient.assign(n=pieces[kind]), "n") for kind in pieces.columns]
        lines += [(size, name, sufficient, column) for column, name in _SIZES.items()]
    lines.append((luck, "a set was found", frame, "sufficient"))
    if frame["random"].notna().any():
        lines.append((luck, "random sets of its size that suffice", frame, "random"))
    table = pd.concat(
        means(rows, column, ["layer"]).assign(panel=panel, line=name)
        for panel, name, rows, column in lines
    )
    # Student's interval does not know that numbers are not negative, nor that fractions end at 1.
    table["low"] = table["low"].clip(lower=0)
    table["high"] = table["high"].mask(table["panel"] == luck, table["high"].clip(upper=1))
    drawing = line_figure(
        table.assign(x=table["layer"]), Layout(ylabel="mean over prompts", sharey=False, height=2.0)
    )
    n = table["panel"].nunique()
    for panel in drawing.axes[n - 1 :: n]:
        fraction_axis(panel)
    return drawing


def _pieces(sets: pd.DataFrame) -> pd.DataFrame:
    """How many pieces of each kind every set holds; kinds that none holds are left out."""
    spans = [s.split() if isinstance(s, str) else list(s) for s in sets["spans"].fillna("")]
    kinds_of_set = [[_kind(name) for name in names] for names in spans]
    present = dict.fromkeys(kind for kinds in kinds_of_set for kind in kinds)
    order = [kind for kind in _KINDS.values() if kind in present]
    order += [kind for kind in present if kind not in order]
    counts = {kind: [kinds.count(kind) for kinds in kinds_of_set] for kind in order}
    return pd.DataFrame(counts, index=sets.index)


def _kind(span: str) -> str:
    """From ``demo3/input`` to ``inputs``; other names are their own."""
    demo, _, piece = span.rpartition("/")
    name = "demo/arrow" if demo and piece == "arrow" else piece
    return _KINDS.get(name, span)
