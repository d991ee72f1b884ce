"""Means as maps of colours: heads by block, demonstrations by layer."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from spade_lens.plots.lines import label_of, means
from spade_lens.plots.registry import figure
from spade_lens.plots.style import (
    BY_BLOCK,
    BY_LAYER,
    PageFigure,
    by_task,
    legend_above,
    panel_grid,
    some_ticks,
)

Marks = tuple[Sequence[Any], Sequence[Any]]
"""Columns and rows of the cells that are marked."""

_LABELS = {
    "shapley": "Shapley value",
    "leave_one_out": "loss when left out",
    "add_one_in": "gain when alone",
}
_EFFECTS = {
    "logit_diff": "effect on the\nlogit difference",
    "probability": "effect on the right\nanswer's probability",
}
_SURE = "95% interval excludes 0"
SAME, OTHER = "label is the answer", "label is another"


def contribution_label(value: str, frame: pd.DataFrame) -> str:
    """Return the label of a contribution that the frame has."""
    return f"{label_of(value, _LABELS, frame)}\n(logit difference)"


@figure(
    "contributions",
    needs=("prompt", "layer", "demo", "shapley"),
    source="spade_lens.icl.measure_contributions",
)
def plot_contributions(
    frame: pd.DataFrame, value: str = "shapley", *, by_answer: bool = False
) -> PageFigure:
    """Draw mean contributions to the logit difference, demonstration by layer.

    Dots mark cells whose 95% interval over prompts (Student's) excludes 0. Where nothing
    contributes, one cell in twenty has a dot by chance.

    Args:
        frame: From :func:`spade_lens.icl.measure_contributions`.
        value: The column whose mean over prompts is drawn: ``"shapley"``, ``"leave_one_out"`` or
            ``"add_one_in"``.
        by_answer: Whether demonstrations whose label is the right answer (``same_label``) have
            a panel of their own.
    """
    label = contribution_label(value, frame)
    maps = {}
    for task, rows in by_task(frame).items():
        groups = {task: rows}
        if by_answer:
            label_of("same_label", {"same_label": ""}, frame)
            own = rows["same_label"].astype(bool)
            before = f"{task}, " if task else ""
            groups = {f"{before}{SAME}": rows[own], f"{before}{OTHER}": rows[~own]}
        for name, group in groups.items():
            if len(group):
                maps[name] = means(group, value, ["demo", "layer"])
    marks = {}
    for name, table in maps.items():
        sure = table[(table["low"] > 0) | (table["high"] < 0)]
        marks[name] = list(sure["layer"]), list(sure["demo"])
    drawing = _map_figure(maps, "layer", "demo", marks, {"ms": 1.4, "color": "black"}, _SURE, label)
    drawing.axes[0].invert_yaxis()  # the first at the top, as in the prompt
    drawing.supxlabel(BY_LAYER)
    drawing.supylabel("demonstration (0 comes first)")
    return drawing


@figure("heads", needs=("block", "head", "prompt", "effect"), source="spade_lens.icl.head_effects")
def plot_heads(
    frame: pd.DataFrame, measure: str = "logit_diff", *, chosen: Sequence[tuple[int, int]] = ()
) -> PageFigure:
    """Draw the mean effect of every attention head, blocks across and heads upwards.

    Args:
        frame: From :func:`spade_lens.icl.head_effects`.
        measure: What was measured there: ``"logit_diff"`` or ``"probability"``.
        chosen: Heads to mark, such as those of :func:`spade_lens.icl.top_heads`.
    """
    label = label_of(measure, _EFFECTS)
    present = set(zip(frame["block"], frame["head"], strict=True))
    missing = [head for head in chosen if tuple(head) not in present]
    if missing:
        raise ValueError(f"chosen= has the heads {missing}, which the table lacks.")
    maps = by_task(means(frame, "effect", ["block", "head"]))
    marks = {task: ([b for b, _ in chosen], [h for _, h in chosen]) for task in maps}
    look = {"ms": 3.7, "mfc": "white", "mec": "black", "mew": 0.8}
    drawing = _map_figure(maps, "block", "head", marks, look, "chosen heads", label)
    drawing.supxlabel(BY_BLOCK)
    drawing.supylabel("head")
    return drawing


def _map_figure(
    maps: Mapping[str, pd.DataFrame],
    column: str,
    row: str,
    marks: Mapping[str, Marks],
    look: Mapping[str, Any],
    marked: str,
    label: str,
) -> PageFigure:
    """Draw the ``mean`` of every table, a panel each, with marks on some cells."""
    every = pd.concat(maps.values())
    columns, rows = (sorted(every[name].unique().tolist()) for name in (column, row))
    most = float(np.nanmax(every["mean"].abs())) or 1.0
    height = min(3.4, 0.5 + 0.16 * max(len(rows), 6))
    drawing, panels = panel_grid(len(maps), across=min(2, len(maps)), height=height)
    for (name, table), panel in zip(maps.items(), panels, strict=True):
        cells = table.pivot(index=row, columns=column, values="mean").reindex(rows, columns=columns)
        # White is 0: the map is symmetric, with one scale for all panels.
        scale: dict[str, Any] = {"cmap": "RdBu_r", "vmin": -most, "vmax": most}
        places = range(len(columns)), range(len(rows))
        mesh = panel.pcolormesh(*places, cells.to_numpy(dtype=float), shading="nearest", **scale)
        x = [columns.index(value) for value in marks[name][0]]
        y = [rows.index(value) for value in marks[name][1]]
        panel.plot(x, y, ls="none", marker="o", label=marked if x else None, **look)
        panel.grid(visible=False)
        panel.set_title(name)
    for set_ticks, values in ((panels[0].set_xticks, columns), (panels[0].set_yticks, rows)):
        shown = some_ticks(values, most=8)
        set_ticks(shown, [f"{values[place]}" for place in shown])
    bar = drawing.colorbar(mesh, ax=panels, label=label, aspect=30, fraction=0.05, pad=0.02)
    bar.outline.set_visible(False)
    legend_above(drawing)
    return drawing
