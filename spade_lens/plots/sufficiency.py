"""The sufficiency map by layer: every set of positions beside random sets of its size."""

from collections.abc import Sequence
from typing import Literal

import pandas as pd
from matplotlib.figure import Figure

from spade_lens.plots.attention import check_one_model
from spade_lens.plots.lines import choose, line_figure
from spade_lens.plots.style import FULL_WIDTH, check_table
from spade_lens.stats.summary import summarise

_LABELS = {"agrees": "agreement\nwith the full model", "correct": "accuracy"}


def plot_sufficiency(
    frame: pd.DataFrame,
    value: Literal["agrees", "correct"] = "agrees",
    *,
    sets: Sequence[str] | None = None,
    width: float = FULL_WIDTH,
) -> Figure:
    """Lines with their intervals, by layer; a panel per set of positions.

    A set without controls, such as the answer token alone, is a line in every panel, there
    without its interval.

    Example:
        >>> frame = icl.sufficiency_map(model, prompts, sets=[Keep(), Keep(last=4)])
        >>> figure = plot_sufficiency(frame)
        >>> [panel.get_title() for panel in figure.axes]
        ['start+last 4']

    Args:
        frame: From :func:`spade_lens.icl.sufficiency_map`, with ``task`` added for several tasks.
        value: What to plot.
        sets: Which sets, in the panels' order; by default all that have controls, if one has.
        width: Of the figure, in inches.

    Returns:
        The figure, not shown. With several tasks, each has a row of panels.

    Raises:
        ValueError: If the table lacks a column or a set, is of several models, or has too much
            for a page.
    """
    needed = ("lens", "layer", "prompt", "of", "control", value)
    check_table("plot_sufficiency", frame, needed, source="spade_lens.icl.sufficiency_map")
    check_one_model("plot_sufficiency", frame)
    by = [*(["task"] if "task" in frame.columns else []), "of", "control", "lens", "layer"]
    means = summarise(frame, value, by=by)
    name = means["lens"].str.partition(", as many as ")[0]
    means = means.assign(line=name.where(means["control"], "the set"), x=means["layer"])
    drawn = list(means.loc[means["control"], "of"].unique()) or list(means["of"].unique())
    panels = choose("plot_sufficiency", means, "of", drawn if sets is None else sets)
    alone = means[~means["of"].isin(drawn)]
    nothing = float("nan")
    points = [panels.assign(panel=panels["of"])]
    for panel in panels["of"].unique():
        others = alone[alone["of"] != panel].assign(panel=panel, low=nothing, high=nothing)
        points.append(others.assign(line=others["of"]))
    # A control is a line of its own here: one set has two.
    table = pd.concat(points).assign(control=False)
    return line_figure(
        "plot_sufficiency",
        table,
        ylabel=_LABELS[value],
        share=True,
        across=4,
        height=1.5,
        width=width,
    )
