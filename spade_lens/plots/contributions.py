"""How much each demonstration contributes by its place, and how many contribute in effect."""

from collections.abc import Sequence
from math import pi

import pandas as pd
from matplotlib.figure import Figure

from spade_lens.plots.lines import Layout, Level, choose, line_figure, means, of_measure
from spade_lens.plots.maps import OTHER, SAME, contribution_label
from spade_lens.plots.registry import figure

_FEWEST = 5
"""Prompts of an interval that is drawn: those of two or three are as wide as the page is high."""


@figure(
    "by_demonstration",
    needs=("prompt", "layer", "demo", "same_label"),
    source="spade_lens.icl.measure_contributions",
    fits=False,
)
def plot_by_demonstration(
    frame: pd.DataFrame, value: str = "shapley", *, layers: Sequence[int] | None = None
) -> Figure:
    """Draw mean contributions by a demonstration's place in the prompt, a panel per layer.

    One line is of demonstrations whose label is the right answer, one of all others. So recency
    and the effect of a label itself can be distinguished.

    Example:
        >>> import pandas as pd
        >>> rows = {"prompt": [0, 1] * 4, "layer": 3, "demo": [0, 0, 1, 1] * 2,
        ...         "same_label": [True] * 4 + [False] * 4, "shapley": range(8)}
        >>> drawing = sl.plot(pd.DataFrame(rows), "by_demonstration")
        >>> [t.get_text() for t in drawing.legends[0].texts]
        ['label is the answer', 'label is another']

    Args:
        frame: From :func:`spade_lens.icl.measure_contributions`.
        value: As in ``"contributions"``. Student's interval is drawn where at least five prompts
            have such a demonstration at the place.
        layers: Which layers, in the panels' order; all by default.
    """
    rows = choose(frame, "layer", layers)
    points = means(rows, value, ["layer", "same_label", "demo"])
    points = points.sort_values("same_label", ascending=False, kind="stable")  # the answer's first
    order = list(rows["layer"].unique())
    points = points.sort_values("layer", key=lambda x: x.map(order.index), kind="stable")
    ends = ["low", "high"]
    points[ends] = points[ends].where(points["n"] >= _FEWEST)
    line = points["same_label"].astype(bool).map({True: SAME, False: OTHER})
    panel = "layer " + points["layer"].astype(str)
    return line_figure(
        points.assign(line=line, panel=panel, x=points["demo"]),
        Layout(xlabel="demonstration (0 comes first)", ylabel=contribution_label(value, frame)),
    )


@figure(
    "effective_number",
    needs=("layer", "measure", "mean", "low", "high"),
    source="spade_lens.stats.summarise(contributions, 'effective')",
    fits=lambda frame: bool((frame["measure"] == "effective").all()),
)
def plot_effective_number(frame: pd.DataFrame, *, shots: int | None = None) -> Figure:
    """Draw how many demonstrations contribute in effect, by layer, a panel per task.

    Example:
        >>> import pandas as pd
        >>> rows = {"layer": [3, 6], "measure": "effective", "mean": [2.0, 3.0],
        ...         "low": [1.5, 2.5], "high": [2.5, 3.5]}
        >>> drawing = sl.plot(pd.DataFrame(rows), shots=4)
        >>> [t.get_text() for t in drawing.legends[0].texts]
        ['effective number', 'all alike', 'noise alone']

    Args:
        frame: From ``stats.summarise(contributions, "effective")``.
        shots: How many demonstrations there are. Lines show where the number would be if all of
            them did the same, and its expectation if Shapley values were nothing but noise,
            normal and alike for all: 1 + (shots - 1) 2 / π. Contributions that are few lie below
            the noise, those that are many and alike above it.
    """
    if shots is not None and shots < 1:
        raise ValueError(f"shots={shots} was given; expected at least one demonstration.")
    rows = of_measure(frame, "effective", ())
    # Of a normal direction the mean of (sum of |s|)^2 / (sum of s^2).
    levels = {} if shots is None else {"all alike": shots, "noise alone": 1 + (shots - 1) * 2 / pi}
    drawing = line_figure(
        rows.assign(line="effective number", x=rows["layer"]),
        Layout(ylabel="demonstrations that\ncontribute in effect", across=2, height=2.0),
        levels=[Level(label, value) for label, value in levels.items()],
    )
    drawing.axes[0].set_ylim(bottom=0)
    return drawing
