"""Accuracy against compute: the fronts of families of policies, and the policies chosen."""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from spade_lens.plots.lines import label_of
from spade_lens.plots.registry import figure
from spade_lens.plots.style import FULL_MODEL, by_task, legend_above, line_styles, panel_grid
from spade_lens.stats.frames import check_columns

_LABELS = {"accuracy": "accuracy", "agreement": "agreement with the full model"}
_SHAPES = ("s", "^", "v", "P", "X")
"""Markers of losses, smallest first; best accuracy is a diamond."""
_STEPS = (1, 2, 5, 10)
"""Between ticks, so that 1 is among those of compute."""


@figure("front", needs=("policy", "compute"), source="spade_lens.exits.sweep")
def plot_front(
    fronts: pd.DataFrame,
    *,
    measure: str = "accuracy",
    by: str = "family",
    full: Mapping[str, float] | float | None = None,
    points: pd.DataFrame | None = None,
) -> Figure:
    """Draw accuracy against compute, a staircase for every series of exit policies.

    Dots are the policies of a front; between two of them there is only the cheaper one. A front
    is the best *on its own prompts*; ``points`` show what was chosen on others.

    Example:
        >>> from spade_lens.exits import FixedLayer, Threshold, exit_tables, sweep
        >>> [table] = exit_tables(model, prompts, "logit", layers=[2, 3])
        >>> policies = {
        ...     "fixed layer": [FixedLayer(2), FixedLayer(3)],
        ...     "threshold": [Threshold(0.9), Threshold(0.5)],
        ... }
        >>> fronts = [
        ...     sweep(table, several, front="agreement").assign(family=family)
        ...     for family, several in policies.items()
        ... ]
        >>> drawing = sl.plot(fronts, measure="agreement")

    Args:
        fronts: Rows of :func:`spade_lens.exits.sweep`, reduced by
            ``front=`` for every series (and task), with the column that
            ``by`` names, and ``task`` for more than one panel.
        measure: ``"accuracy"`` or ``"agreement"``, of which the table has the interval too.
        by: The column that names the series.
        full: The full model's own, for a dashed line; by task where there are tasks.
        points: Rows of :func:`spade_lens.exits.sweep` with the loss ``wanted``, and the columns of
            ``by`` and ``task`` as in ``fronts``: a diamond for best accuracy, another shape for
            every loss.
    """
    label = label_of(measure, _LABELS)
    values = ["compute", measure, f"{measure}_low", f"{measure}_high"]
    source = "spade_lens.exits.sweep"
    check_columns(fronts, [by, *values], what=f"the figure 'front' (by={by!r})", source=source)
    _check_measured(fronts, measure)
    _check_fronts(fronts, measure, by)
    series = list(fronts[by].unique())
    tasks = by_task(fronts)
    if points is not None:
        columns = [by, "wanted", *values, *(["task"] if "task" in fronts.columns else [])]
        check_columns(points, columns, what="the figure 'front' (points=)", source=source)
        _check_measured(points, measure)
        for column, present in ((by, series), ("task", list(tasks))):
            unknown = sorted(set(points.get(column, [])) - set(present))
            if unknown:
                raise ValueError(
                    f"The points have the {column} {unknown}; the fronts have only {present}."
                )
    own = _full_by_task(full, list(tasks))

    looks = line_styles(series)
    several = len(tasks) > 1
    drawing, panels = panel_grid(
        len(tasks), across=2 if len(tasks) == 4 else 3, height=1.9 if several else 2.8, sharey=False
    )
    for (task, rows), panel in zip(tasks.items(), panels, strict=True):
        for name in series:
            _front(panel, rows[rows[by] == name], measure, str(name), looks[name])
        if task in own:
            panel.axhline(own[task], label="full model", **FULL_MODEL)
        panel.set_title(task)
        panel.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=_STEPS))
    if points is not None:
        shapes = _shapes(points, measure)
        for (task, _), panel in zip(tasks.items(), panels, strict=True):
            here = by_task(points).get(task, points.iloc[:0])
            for row in here.to_dict("records"):
                _point(panel, row, measure, looks[row[by]]["color"], shapes)
        for label, shape in shapes.values():
            look: dict[str, Any] = {"mfc": "0.6", "mec": "black", "mew": 0.7, "ms": 5}
            panels[0].plot([], [], ls="none", marker=shape, label=label, **look)
    computes = [fronts["compute"], *([] if points is None else [points["compute"]])]
    low, high = min(c.min() for c in computes), max(1.0, *(c.max() for c in computes))
    margin = 0.03 * (high - low)
    panels[0].set_xlim(low - margin, high + margin)
    panels[0].xaxis.set_major_locator(MaxNLocator(nbins=6, steps=_STEPS))
    drawing.supxlabel("compute (fraction of the full model's FLOPs)")
    drawing.supylabel(label)
    legend_above(drawing)
    return drawing


def _front(
    panel: Axes, rows: pd.DataFrame, measure: str, label: str, look: Mapping[str, Any]
) -> None:
    x, y = rows["compute"], rows[measure]
    low, high = rows[f"{measure}_low"], rows[f"{measure}_high"]
    if len(rows) == 1:  # a band of no width would not be seen
        panel.vlines(x, low, high, color=look["color"], lw=0.9, alpha=0.6)
    panel.fill_between(x, low, high, step="post", color=look["color"], alpha=0.1, lw=0)
    dots: dict[str, Any] = {"marker": "o", "ms": 2.4, "drawstyle": "steps-post"}
    panel.plot(x, y, label=label, zorder=3, **dots, **look)


def _point(
    panel: Axes,
    row: Mapping[Any, Any],
    measure: str,
    color: str,
    shapes: Mapping[float | None, tuple[str, str]],
) -> None:
    x, y = row["compute"], row[measure]
    panel.vlines(x, row[f"{measure}_low"], row[f"{measure}_high"], color="black", lw=0.7, zorder=4)
    _, shape = shapes[None if pd.isna(row["wanted"]) else row["wanted"]]
    size = 4.2 if shape == "D" else 5  # a diamond stands on its corner and looks larger
    panel.plot(x, y, marker=shape, ms=size, mfc=color, mec="black", mew=0.7, ls="none", zorder=5)


def _shapes(points: pd.DataFrame, measure: str) -> dict[float | None, tuple[str, str]]:
    """Label and marker of every loss wanted; None is best accuracy."""
    shapes: dict[float | None, tuple[str, str]] = {}
    if points["wanted"].isna().any():
        shapes[None] = (f"best {measure}", "D")
    for number, loss in enumerate(sorted(points["wanted"].dropna().unique().tolist())):
        shapes[loss] = (f"loss of at most {loss:g}", _SHAPES[number % len(_SHAPES)])
    return shapes


def _check_measured(frame: pd.DataFrame, measure: str) -> None:
    if frame[["compute", measure]].isna().any(axis=None):
        raise ValueError(
            f"Some rows have no {measure} or compute (NaN). Accuracy needs prompts with targets; "
            "without them plot measure='agreement'."
        )


def _check_fronts(fronts: pd.DataFrame, measure: str, by: str) -> None:
    """Raise where a row costs no less than another of its series and is no better."""
    for task, rows in by_task(fronts).items():
        for name, line in rows.groupby(by, sort=False):
            rising = line[["compute", measure]].diff().iloc[1:] > 0
            if not rising.all(axis=None):
                where = f"{name!r}" + (f" at task {task!r}" if task else "")
                raise ValueError(
                    f"The {len(line)} rows of the {by} {where} are not a front: {measure} does "
                    "not rise with compute from row to row. Reduce the rows of every series (and "
                    f"task) by spade_lens.exits.sweep(..., front={measure!r})."
                )


def _full_by_task(
    full: Mapping[str, float] | float | None, tasks: Sequence[str]
) -> Mapping[str, float]:
    if full is None:
        return {}
    if not isinstance(full, Mapping):
        return dict.fromkeys(tasks, full)
    missing = [task for task in tasks if task not in full]
    if missing:
        raise ValueError(
            f"full= has the tasks {list(full)}; the fronts also have {missing}. Give one number "
            "for each task."
        )
    return full
