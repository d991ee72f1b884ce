"""Lines with intervals, in panels by task and by something else: what most figures here are.

This module knows one kind of table, which each figure makes of its own: a row per point with the
columns ``line, x, mean, low, high``. Where they are of use there are ``task``, ``panel`` (which
panel the point is in) and ``control`` (whether it belongs to the control of its line).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from spade_lens.checks import as_several
from spade_lens.plots.style import (
    BY_LAYER,
    FULL_MODEL,
    PageFigure,
    fraction_axis,
    legend_above,
    panel_grid,
    whole_numbers,
)
from spade_lens.stats.summary import summarise

_ABREAST = 5
"""How many panels fit beside each other where every task has a row of its own."""
_FEW = 12
"""So few points of a line are marked: what is between them was not measured."""
# Okabe and Ito's palette again, and wine. No lens is drawn here, so the colours of lenses are
# free; and only a control's line is dotted.
_COLORS: tuple[tuple[str, tuple[float | None, ...]], ...] = (
    ("#0072B2", (None, None)),
    ("#D55E00", (4, 1.2)),
    ("#009E73", (7, 1.2, 1.5, 1.2)),
    ("#E69F00", (None, None)),
    ("#CC79A7", (2.5, 1)),
    ("#56B4E9", (5, 1.5)),
    ("#7F7F7F", (3.5, 1, 1.5, 1)),
    ("#882255", (9, 1.2)),
)
_APART = 0.24
"""Between points that stand side by side, as a fraction of the step from one place to the next."""
_MARKERS = ("", "s", "^", "D", "v")
_CONTROL: dict[str, Any] = {"dashes": (1, 1.3), "lw": 1.0, "mfc": "white"}
_LEVELS: tuple[dict[str, Any], ...] = (
    FULL_MODEL,
    {"color": "0.35", "lw": 0.9, "ls": (0, (1, 1.3))},
    {"color": "0.35", "lw": 0.9, "ls": (0, (6, 1.3, 1, 1.3))},
)


@dataclass(frozen=True)
class Level:
    """A horizontal line, such as a floor, a ceiling or chance.

    Args:
        label: What the legend calls it. Levels of one label look the same.
        mean: Where it is.
        task: The task whose panels have it; all by default.
        panel: The panels that have it; all by default.
    """

    label: str
    mean: float
    task: str | None = None
    panel: str | None = None


@dataclass(frozen=True)
class Layout:
    """Axes and panels of a figure of lines.

    Args:
        ylabel: Label of the y axis.
        xlabel: Label of the x axis.
        fraction: Whether the y axis shows fractions, 0 to 1; otherwise it has a line at 0.
        control: What the legend calls the lines' controls, which have their lines' colours.
        places: Names for x = 0, 1, 2, ...: points stand side by side there, without lines.
        sharey: Whether all panels have one y axis.
        across: How many panels fit beside each other.
        height: Height of each row of panels, in inches.
    """

    ylabel: str
    xlabel: str = BY_LAYER
    fraction: bool = False
    control: str = ""
    places: Sequence[str] = ()
    sharey: bool = True
    across: int = 3
    height: float = 1.75


def line_figure(
    table: pd.DataFrame,
    layout: Layout,
    *,
    levels: Sequence[Level] = (),
    looks: Mapping[str, dict[str, Any]] | None = None,
) -> PageFigure:
    """Draw a table of points. With several tasks and several panels, every task has a row."""
    table = _complete(table)
    key = ["task", "panel", "line", "control", "x"]
    twice = table[table.duplicated(key)]
    if len(twice):
        raise ValueError(
            "Several rows are of one place in the figure, for example "
            f"{twice[key].iloc[0].to_dict()}. Draw other models and settings in figures of their "
            "own, or name them in the column 'task'."
        )
    tasks, panels = list(table["task"].unique()), list(table["panel"].unique())
    rowwise = len(tasks) > 1 and len(panels) > 1
    if rowwise and len(panels) > _ABREAST:
        raise ValueError(
            f"{len(panels)} panels for each of {len(tasks)} tasks do not fit a page; expected up "
            f"to {_ABREAST}. Draw tasks in figures of their own, or fewer of {panels}."
        )
    cells = [(task, panel) for task in tasks for panel in panels]
    looks = dict(looks or _looks(list(table["line"].unique())))
    control = layout.control if table["control"].any() else ""
    across = len(panels) if rowwise else layout.across
    figure, axes = panel_grid(len(cells), across=across, height=layout.height, sharey=layout.sharey)
    for (task, panel), ax in zip(cells, axes, strict=True):
        if not layout.fraction:
            ax.axhline(0, color="0.6", lw=0.6, zorder=1)
        rows = table[(table["task"] == task) & (table["panel"] == panel)]
        _panel(ax, rows, looks, bool(layout.places))
        _levels(ax, levels, task, panel)
        if not rowwise:
            names = [task if len(tasks) > 1 or not panel else "", panel]
            ax.set_title(", ".join(name for name in names if name))
        elif task == tasks[0]:
            ax.set_title(panel)
        if rowwise and panel == panels[0]:
            ax.set_ylabel(task)
    if layout.fraction:
        fraction_axis(axes[0])
    if layout.places:
        axes[0].set_xlim(-0.6, len(layout.places) - 0.4)
        axes[0].set_xticks(range(len(layout.places)), list(layout.places))
    else:
        whole_numbers(axes[0], table["x"])
    if control:
        look = _control(bool(layout.places))
        axes[0].add_line(Line2D([], [], color="0.4", label=control, **look))
    figure.supxlabel(layout.xlabel)
    figure.supylabel(layout.ylabel, multialignment="center")
    legend_above(figure, first=[*looks, control])
    return figure


def means(frame: pd.DataFrame, value: str, by: Sequence[str]) -> pd.DataFrame:
    """Return means over prompts with intervals, by task as well where there are tasks."""
    return summarise(frame, value, by=[*(["task"] if "task" in frame.columns else []), *by])


def choose(frame: pd.DataFrame, column: str, wanted: Iterable[Any] | None) -> pd.DataFrame:
    """Return the rows whose column has one of the wanted values, in their order; None for all."""
    if wanted is None:
        return frame
    wanted = as_several(wanted)
    present = frame[column].unique().tolist()
    unknown = [value for value in wanted or () if value not in present]
    if unknown or not wanted:
        raise ValueError(
            f"{column}={unknown or 'of no name'} was asked for; expected some of {present}."
        )
    return pd.concat([frame[frame[column] == value] for value in wanted])


def label_of(value: str, labels: Mapping[str, str], frame: pd.DataFrame | None = None) -> str:
    """Return the label of a value that a figure can show, if the frame has such a column."""
    if value not in labels:
        raise ValueError(f"{value!r} was asked for; expected one of {list(labels)}.")
    if frame is not None and value not in frame.columns:
        raise ValueError(f"{value!r} was asked for; the table's columns are {list(frame.columns)}.")
    return labels[value]


def of_measure(table: pd.DataFrame, measure: str, by: Sequence[str]) -> pd.DataFrame:
    """Return the rows of one measure of a summary; rows by prompt are summarised first."""
    if "measure" not in table.columns:
        table = summarise(table, by=[key for key in ("task", *by) if key in table.columns])
    rows = table[table["measure"] == measure]
    if rows.empty:
        raise ValueError(
            f"There is no {measure!r} in this summary, only {list(table['measure'].unique())}. "
            "Accuracy needs prompts with a target."
        )
    return rows


def crossed_looks(lines: Mapping[str, tuple[int, int]]) -> dict[str, dict[str, Any]]:
    """Return styles of lines by two numbers each: one for colour, one for dashes and marker."""
    return {
        name: {
            "color": _COLORS[one % len(_COLORS)][0],
            "dashes": _COLORS[other % len(_COLORS)][1],
            "marker": _MARKERS[other % len(_MARKERS)],
        }
        for name, (one, other) in lines.items()
    }


def _complete(table: pd.DataFrame) -> pd.DataFrame:
    """The table with all columns; names are text."""
    table = table.assign(
        task=table["task"].astype(str) if "task" in table.columns else "",
        panel=table["panel"].astype(str) if "panel" in table.columns else "",
        line=table["line"].astype(str),
        control=table["control"].astype(bool) if "control" in table.columns else False,
    )
    return table.reset_index(drop=True)


def _looks(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Styles of lines; where colours come again, markers differ."""
    looks = {}
    for number, name in enumerate(names):
        color, dashes = _COLORS[number % len(_COLORS)]
        marker = _MARKERS[number // len(_COLORS) % len(_MARKERS)]
        looks[name] = {"color": color, "dashes": dashes, "marker": marker}
    return looks


def _panel(ax: Axes, rows: pd.DataFrame, looks: dict[str, dict[str, Any]], apart: bool) -> None:
    lines = {(str(name), bool(c)): line for (name, c), line in rows.groupby(["line", "control"])}
    beside = [key for name in looks for key in ((name, False), (name, True)) if key in lines]
    for name, control in sorted(beside, key=lambda key: not key[1]):  # controls lie under lines
        line = lines[name, control].sort_values("x")
        look = {"marker": ""} | looks[name]
        color = look["color"]
        place = beside.index((name, control)) - (len(beside) - 1) / 2
        # One layer alone is a place, too: its points stand side by side, with bars.
        alone = not apart and rows["x"].nunique() == 1
        x = line["x"] + (_APART * place if apart else 0.5 * _APART * place if alone else 0)
        if apart or len(line) == 1:  # a band of no width would not be seen
            ax.vlines(x, line["low"], line["high"], color=color, lw=0.9, alpha=0.8)
        if apart or alone:
            look = {"color": color, "ls": "none", "marker": look["marker"] or "o", "ms": 3.6}
        else:
            shade = 0.07 if control else 0.16 if len(beside) <= 3 else 0.1
            ax.fill_between(x, line["low"], line["high"], color=color, alpha=shade, lw=0)
            few = len(line) <= _FEW
            look |= {"marker": look["marker"] or ("o" if few else ""), "ms": 2.6}
            look |= {} if few else {"markevery": 3}
        if control:
            look |= _control(apart or alone)
        label = "_control" if control else name
        ax.plot(x, line["mean"], label=label, clip_on=False, zorder=3, **look)


def _control(apart: bool) -> dict[str, Any]:
    return {"ls": "none", "marker": "o", "ms": 3.6, "mfc": "white"} if apart else _CONTROL


def _levels(ax: Axes, levels: Sequence[Level], task: str, panel: str) -> None:
    labels = list(dict.fromkeys(level.label for level in levels))
    for level in levels:
        if level.task in (None, task) and level.panel in (None, panel):
            look = _LEVELS[labels.index(level.label) % len(_LEVELS)]
            ax.axhline(level.mean, label=level.label, zorder=2, **look)
