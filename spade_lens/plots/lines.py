"""Lines with intervals, in panels by task and by something else: what most figures here are.

Knows one kind of table, which each figure makes of its own: a row per point with the columns
``line, x, mean, low, high``, and where they are of use ``task`` and ``panel`` (which panel the
point is in) and ``control`` (whether it is of the control of its line, not of the line itself).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from spade_lens.plots.style import FULL_WIDTH, STYLE, PageFigure, legend_above, panel_grid

BY_LAYER = "layer (residual stream after so many blocks)"
_ABREAST = 5
"""How many panels fit beside each other where every task has a row of its own."""
_FEW = 12
"""So few points of a line are marked: what is between them was not measured."""
# Okabe and Ito's palette again, and wine. No lens is drawn here, so the colours of lenses are
# free; and no line is dotted but a control's.
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
"""Between points that stand side by side, of the way from one place to the next."""
_MARKERS = ("", "s", "^", "D", "v")
_CONTROL: dict[str, Any] = {"dashes": (1, 1.3), "lw": 1.0, "mfc": "white"}
_LEVELS: tuple[dict[str, Any], ...] = (
    {"color": "black", "ls": (0, (4, 2))},
    {"color": "0.35", "ls": (0, (1, 1.3))},
    {"color": "0.35", "ls": (0, (6, 1.3, 1, 1.3))},
)


@dataclass(frozen=True)
class Level:
    """A horizontal line, such as a floor, a ceiling or chance.

    Args:
        label: What the legend calls it. Levels of one label look the same.
        mean: Where it is.
        task: In which task's panels; in all by default.
        panel: In which panels; in all by default.
    """

    label: str
    mean: float
    task: str | None = None
    panel: str | None = None


def line_figure(
    function: str,
    table: pd.DataFrame,
    *,
    ylabel: str,
    xlabel: str = BY_LAYER,
    share: bool = False,
    levels: Sequence[Level] = (),
    control: str = "",
    places: Sequence[str] = (),
    looks: Mapping[str, dict[str, Any]] | None = None,
    sharey: bool = True,
    across: int = 3,
    height: float = 1.75,
    width: float = FULL_WIDTH,
) -> PageFigure:
    """Draw a table of points.

    With several tasks and several panels, every task has a row of panels.

    Args:
        function: The name of the function that draws, for errors.
        table: The points, as the module says.
        ylabel: Of the y axis.
        xlabel: Of the x axis.
        share: Whether the y axis is that of shares, 0 to 1; else it has a line at 0.
        levels: Horizontal lines.
        control: What the legend calls the lines' controls, which have their lines' colours.
        places: Names for x = 0, 1, 2, ...: points stand side by side there, and no line joins
            them.
        looks: How lines look, such as :func:`crossed_looks` gives; one after the other in their
            own colours by default.
        sharey: Whether all panels have one y axis.
        across: How many panels fit beside each other.
        height: Of each row of panels.
        width: Of the figure, in inches.

    Raises:
        ValueError: If two points are of one line and x, or there are too many panels for a page.
    """
    table = _complete(table)
    key = ["task", "panel", "line", "control", "x"]
    twice = table[table.duplicated(key)]
    if len(twice):
        raise ValueError(
            f"{function}: several rows are of one place in the figure, for example "
            f"{twice[key].iloc[0].to_dict()}. Draw other models and settings in figures of their "
            "own, or tell them apart in the column 'task'."
        )
    tasks, panels = list(table["task"].unique()), list(table["panel"].unique())
    rowwise = len(tasks) > 1 and len(panels) > 1
    if rowwise and len(panels) > _ABREAST:
        raise ValueError(
            f"{function}: {len(panels)} panels for each of {len(tasks)} tasks do not fit a page; "
            f"expected up to {_ABREAST}. Draw tasks in figures of their own, or fewer of {panels}."
        )
    cells = [(task, panel) for task in tasks for panel in panels]
    looks = dict(looks or _looks(list(table["line"].unique())))
    control = control if table["control"].any() else ""
    with mpl.rc_context(STYLE):
        figure, axes = panel_grid(
            len(cells),
            across=len(panels) if rowwise else across,
            width=width,
            height=height,
            sharey=sharey,
        )
        for (task, panel), ax in zip(cells, axes, strict=True):
            if not share:
                ax.axhline(0, color="0.6", lw=0.6, zorder=1)
            here = table[(table["task"] == task) & (table["panel"] == panel)]
            _panel(ax, here, looks, bool(places))
            _levels(ax, levels, task, panel)
            if not rowwise:
                names = [task if len(tasks) > 1 or not panel else "", panel]
                ax.set_title(", ".join(name for name in names if name))
            elif task == tasks[0]:
                ax.set_title(panel)
            if rowwise and panel == panels[0]:
                ax.set_ylabel(task)
        _axes(axes[0], table, share, places)
        if control:
            axes[0].add_line(Line2D([], [], color="0.4", label=control, **_control(bool(places))))
        figure.supxlabel(xlabel, fontsize=8)
        figure.supylabel(ylabel, fontsize=8, multialignment="center")
        legend_above(figure, first=[*looks, control])
    return figure


def choose(
    function: str, frame: pd.DataFrame, column: str, wanted: Sequence[str] | None
) -> pd.DataFrame:
    """The rows whose column has one of the values wanted, in their order; all of them for None.

    Raises:
        ValueError: If there is no such value, or none is wanted.
    """
    if wanted is None:
        return frame
    known = list(frame[column].unique())
    unknown = [value for value in wanted if value not in known]
    if unknown or not len(wanted):
        raise ValueError(
            f"{function} was asked for {column}={unknown or 'of no name'}; expected some of "
            f"{known}."
        )
    return pd.concat([frame[frame[column] == value] for value in wanted])


def _complete(table: pd.DataFrame) -> pd.DataFrame:
    """With all columns; names are text."""
    table = table.assign(
        task=table["task"].astype(str) if "task" in table.columns else "",
        panel=table["panel"].astype(str) if "panel" in table.columns else "",
        line=table["line"].astype(str),
        control=table["control"].astype(bool) if "control" in table.columns else False,
    )
    return table.reset_index(drop=True)


def _looks(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Styles of lines; where colours come again, markers tell them apart."""
    looks = {}
    for number, name in enumerate(names):
        color, dashes = _COLORS[number % len(_COLORS)]
        marker = _MARKERS[number // len(_COLORS) % len(_MARKERS)]
        looks[name] = {"color": color, "dashes": dashes, "marker": marker}
    return looks


def crossed_looks(lines: Mapping[str, tuple[int, int]]) -> dict[str, dict[str, Any]]:
    """Styles of lines that stand for two things: one by colour, one by dashes and marker.

    Args:
        lines: The numbers of both, by line.
    """
    return {
        name: {
            "color": _COLORS[one % len(_COLORS)][0],
            "dashes": _COLORS[other % len(_COLORS)][1],
            "marker": _MARKERS[other % len(_MARKERS)],
        }
        for name, (one, other) in lines.items()
    }


def _panel(ax: Axes, rows: pd.DataFrame, looks: dict[str, dict[str, Any]], apart: bool) -> None:
    some = {(str(name), bool(c)): line for (name, c), line in rows.groupby(["line", "control"])}
    beside = [key for name in looks for key in ((name, False), (name, True)) if key in some]
    for name, control in sorted(beside, key=lambda key: not key[1]):  # controls lie under lines
        line = some[name, control].sort_values("x")
        look = dict(looks[name])
        color = look["color"]
        place = beside.index((name, control)) - (len(beside) - 1) / 2
        x = line["x"] + (_APART * place if apart else 0)
        if apart or len(line) == 1:  # a band of no width would not be seen
            ax.vlines(x, line["low"], line["high"], color=color, lw=0.9, alpha=0.8)
        if apart:
            look = {"color": color, "ls": "none", "marker": look["marker"] or "o", "ms": 3.6}
        else:
            shade = 0.07 if control else 0.16 if len(beside) <= 3 else 0.1
            ax.fill_between(x, line["low"], line["high"], color=color, alpha=shade, lw=0)
            few = len(line) <= _FEW
            look |= {"marker": look["marker"] or ("o" if few else ""), "ms": 2.6}
            look |= {} if few else {"markevery": 3}
        if control:
            look |= _control(apart)
        label = "_control" if control else name
        ax.plot(x, line["mean"], label=label, clip_on=False, zorder=3, **look)


def _control(apart: bool) -> dict[str, Any]:
    return {"ls": "none", "marker": "o", "ms": 3.6, "mfc": "white"} if apart else _CONTROL


def _levels(ax: Axes, levels: Sequence[Level], task: str, panel: str) -> None:
    labels = list(dict.fromkeys(level.label for level in levels))
    for level in levels:
        if level.task in (None, task) and level.panel in (None, panel):
            look = _LEVELS[labels.index(level.label) % len(_LEVELS)]
            ax.axhline(level.mean, lw=0.9, label=level.label, zorder=2, **look)


def _axes(ax: Axes, table: pd.DataFrame, share: bool, places: Sequence[str]) -> None:
    """Limits and ticks, of all panels: they share theirs."""
    if share:
        ax.set_ylim(-0.03, 1.03)
        ax.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0", "", "0.5", "", "1"])
    if places:
        ax.set_xlim(-0.6, len(places) - 0.4)
        ax.set_xticks(range(len(places)), list(places))
        return
    first, last = table["x"].min(), table["x"].max()
    margin = 0.03 * max(1, last - first)
    ax.set_xlim(first - margin, last + margin)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))
