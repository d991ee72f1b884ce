"""Patching by layer: every condition beside its controls, between the floors and the ceiling."""

from collections.abc import Sequence
from typing import Literal

import pandas as pd
from matplotlib.figure import Figure

from spade_lens.plots.lines import BY_LAYER, Level, choose, line_figure
from spade_lens.plots.shots import of_measure
from spade_lens.plots.style import FULL_WIDTH, by_task, check_table

_LABELS = {
    "accuracy": "accuracy",
    "preference": "right answer preferred\nto the wrong ones",
    "flips": "a wrong answer preferred\nto the right one",
    "logit_diff": "logit difference,\nright less wrong answer",
}
_PLAIN = "as named"


def plot_patching(
    summary: pd.DataFrame,
    measure: Literal["accuracy", "preference", "flips", "logit_diff"] = "accuracy",
    *,
    conditions: Sequence[str] | None = None,
    width: float = FULL_WIDTH,
) -> Figure:
    """Lines with their intervals, by patched layer; panels by what is patched.

    A condition's name up to its first comma names the panel, and what follows the line: ``"labels
    to the top"`` and its control ``"labels to the top, random"`` are in one panel, the first as
    *as named*. So a condition stands beside its controls, which look the same in all panels.

    Example:
        >>> import pandas as pd
        >>> rows = {"task": "t", "condition": ["dummy", "few-shot", "labels", "labels, random"],
        ...         "layer": [-1, -1, 3, 3], "measure": "accuracy", "mean": [0.1, 0.9, 0.7, 0.2],
        ...         "low": [0.0, 0.8, 0.6, 0.1], "high": [0.2, 1.0, 0.8, 0.3]}
        >>> figure = plot_patching(pd.DataFrame(rows))
        >>> [t.get_text() for t in figure.legends[0].texts]
        ['as named', 'random', 'few-shot', 'dummy']

    Args:
        summary: From ``stats.summarise(icl.patch_sweep(...))``. What has layer -1 there,
            the floors and the ceiling, is a horizontal line in every panel of its task.
        measure: What to plot.
        conditions: Which conditions, and in which order; by default all.
        width: Of the figure, in inches.

    Returns:
        The figure, not shown. With several tasks, each has a row of panels.

    Raises:
        ValueError: If the table lacks the measure, a column, a condition or patched layers, or
            has too much for a page.
    """
    needed = ("condition", "layer", "measure", "mean", "low", "high")
    check_table("plot_patching", summary, needed, source="spade_lens.stats.summarise")
    rows = of_measure(summary, measure)
    patched = rows[rows["layer"] >= 0]
    if patched.empty:
        raise ValueError("plot_patching was given baselines (layer -1) alone; expected layers.")
    patched = choose("plot_patching", patched, "condition", conditions)
    parts = patched["condition"].str.partition(",")
    points = patched.assign(
        panel=parts[0], line=parts[2].str.strip().replace("", _PLAIN), x=patched["layer"]
    )
    if conditions is None:
        points = points.sort_values("line", key=lambda line: line != _PLAIN, kind="stable")
    # The ceiling comes last in a sweep; here its line is the darkest, and first.
    baselines = rows[rows["layer"] < 0].iloc[::-1]
    return line_figure(
        "plot_patching",
        points,
        xlabel=f"patched {BY_LAYER}",
        ylabel=_LABELS[measure],
        share=measure != "logit_diff",
        levels=[
            Level(str(name), mean, task or None)
            for task, some in by_task(baselines).items()
            for name, mean in zip(some["condition"], some["mean"], strict=True)
        ],
        across=2,
        width=width,
    )
