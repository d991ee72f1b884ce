"""Accuracy by the number of demonstrations: a line per task."""

from collections.abc import Mapping
from typing import Literal

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from spade_lens.plots.lines import Level, line_figure
from spade_lens.plots.style import FULL_WIDTH, check_table

_LABELS = {"accuracy": "accuracy", "preference": "right answer preferred\nto the wrong ones"}


def plot_by_shots(
    summary: pd.DataFrame,
    measure: Literal["accuracy", "preference"] = "accuracy",
    *,
    chance: Mapping[str, float] | float | None = None,
    panels: str | None = None,
    width: float = FULL_WIDTH,
) -> Figure:
    """Lines with their intervals, by number of demonstrations; every doubling is one step.

    Example:
        >>> import pandas as pd
        >>> rows = {"task": "antonym", "shots": [0, 4, 16], "measure": "accuracy",
        ...         "mean": [0.1, 0.6, 0.8], "low": [0.0, 0.5, 0.7], "high": [0.2, 0.7, 0.9]}
        >>> figure = plot_by_shots(pd.DataFrame(rows), chance=0.5)
        >>> [t.get_text() for t in figure.legends[0].texts]
        ['antonym', 'chance']

    Args:
        summary: From ``stats.summarise(icl.accuracy_by_shots(...), by=("task", "shots"))``.
        measure: What to plot. Chance is known for ``"preference"`` alone: accuracy is among all
            tokens.
        chance: Where to draw it; by panel where there are several.
        panels: A column of the table whose values have a panel each, such as the kind of task.
        width: Of the figure, in inches.

    Returns:
        The figure, not shown.

    Raises:
        ValueError: If the table lacks the measure or a column, has several rows of one task and
            number, or ``chance`` lacks a panel.
    """
    needed = ["task", "shots", "measure", "mean", "low", "high", *([panels] if panels else [])]
    check_table("plot_by_shots", summary, needed, source="spade_lens.stats.summarise")
    rows = of_measure(summary, measure)
    points = pd.DataFrame(
        {
            "line": rows["task"],
            "panel": rows[panels].astype(str) if panels else "",
            "x": rows["shots"],
            **{name: rows[name] for name in ("mean", "low", "high")},
        }
    )
    several = list(points["panel"].unique())
    if isinstance(chance, Mapping):
        missing = [panel for panel in several if panel not in chance]
        if missing:
            raise ValueError(f"chance= has {list(chance)}; the panels {missing} are not there.")
        levels = [Level("chance", chance[panel], panel=panel) for panel in several]
    else:
        levels = [] if chance is None else [Level("chance", chance)]
    figure = line_figure(
        "plot_by_shots",
        points,
        xlabel="demonstrations",
        ylabel=_LABELS[measure],
        share=True,
        levels=levels,
        across=2,
        height=2.2,
        width=width,
    )
    axis = figure.axes[0]
    # Linear up to 1 and logarithmic from there, with as long a step from 0 to 1 as from 1 to 2.
    axis.set_xscale("symlog", base=2, linthresh=1, linscale=0.5)
    axis.xaxis.set_major_locator(FixedLocator(sorted(set(points["x"]))))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    margin = 1.03 if points["x"].max() > 0 else 1
    axis.set_xlim(points["x"].min() - 0.15, max(points["x"].max(), 1) * margin**3)
    return figure


def of_measure(summary: pd.DataFrame, measure: str) -> pd.DataFrame:
    """The rows of one measure.

    Raises:
        ValueError: If there are none.
    """
    rows = summary[summary["measure"] == measure]
    if rows.empty:
        known = list(summary["measure"].unique())
        raise ValueError(f"There is no {measure!r} in this summary, only {known}.")
    return rows
