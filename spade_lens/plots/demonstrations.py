"""What demonstrations do: patching by layer, accuracy by their number, contributions of each."""

from collections.abc import Mapping, Sequence
from math import pi

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from spade_lens.plots.lines import Layout, Level, choose, label_of, line_figure, means, of_measure
from spade_lens.plots.maps import OTHER, SAME, contribution_label
from spade_lens.plots.registry import figure
from spade_lens.plots.style import BY_LAYER, by_task

_LABELS = {
    "accuracy": "accuracy",
    "preference": "right answer preferred\nto the wrong ones",
    "flips": "a wrong answer preferred\nto the right one",
    "logit_diff": "logit difference,\nright minus wrong answer",
}
_OWN = "own vectors"


@figure(
    "patching", needs=("condition", "layer"), source="spade_lens.icl.patch_sweep or stats.summarise"
)
def plot_patching(
    table: pd.DataFrame, measure: str = "accuracy", *, conditions: Sequence[str] | None = None
) -> Figure:
    """Draw patching by layer, every condition beside its controls.

    A condition's name up to its first comma names the panel, and what follows names the line:
    ``"labels"`` and its control ``"labels, random"`` are both in the panel *labels*, the first as
    *own vectors*. So a condition stands beside its controls, which look the same in all panels.

    Args:
        table: From :func:`spade_lens.icl.patch_sweep`, or a summary of it. Rows of layer -1, the
            floors and the ceiling, are a horizontal line in every panel of their task.
        measure: ``"accuracy"``, ``"preference"``, ``"flips"`` or ``"logit_diff"``.
        conditions: Which conditions, in the panels' order; by default all.
    """
    ylabel = label_of(measure, _LABELS)
    rows = of_measure(table, measure, ("condition", "layer"))
    patched = rows[rows["layer"] >= 0]
    if patched.empty:
        raise ValueError(
            "The figure 'patching' was given baselines (layer -1) alone; expected layers."
        )
    patched = choose(patched, "condition", conditions)
    parts = patched["condition"].str.partition(",")
    points = patched.assign(
        panel=parts[0], line=parts[2].str.strip().replace("", _OWN), x=patched["layer"]
    )
    if conditions is None:
        points = points.sort_values("line", key=lambda line: line != _OWN, kind="stable")
    # The ceiling comes last in a sweep; here its line is the darkest, and first.
    baselines = rows[rows["layer"] < 0].iloc[::-1]
    levels = [
        Level(str(name), mean, task or None)
        for task, of_task in by_task(baselines).items()
        for name, mean in zip(of_task["condition"], of_task["mean"], strict=True)
    ]
    layout = Layout(
        xlabel=f"patched {BY_LAYER}", ylabel=ylabel, fraction=measure != "logit_diff", across=2
    )
    return line_figure(points, layout, levels=levels)


@figure(
    "by_shots",
    needs=("task", "shots"),
    source="spade_lens.icl.accuracy_by_shots or stats.summarise",
)
def plot_by_shots(
    table: pd.DataFrame,
    measure: str = "accuracy",
    *,
    chance: Mapping[str, float] | float | None = None,
    panels: str | None = None,
) -> Figure:
    """Draw accuracy by the number of demonstrations, a line per task; every doubling is one step.

    Args:
        table: From :func:`spade_lens.icl.accuracy_by_shots`, or a summary of it by task and shots.
        measure: ``"accuracy"`` or ``"preference"``. Chance is known for preference alone:
            accuracy is among all tokens.
        chance: Where to draw it; by panel where there are several.
        panels: A column of the table whose values have a panel each, such as the kind of task.
    """
    ylabel = label_of(measure, {name: _LABELS[name] for name in ("accuracy", "preference")})
    rows = of_measure(table, measure, ("shots", *([panels] if panels else [])))
    points = rows[["mean", "low", "high"]].assign(
        line=rows["task"], x=rows["shots"], panel=rows[panels].astype(str) if panels else ""
    )
    names = list(points["panel"].unique())
    if isinstance(chance, Mapping):
        missing = [name for name in names if name not in chance]
        if missing:
            raise ValueError(f"chance= has {list(chance)}; the panels {missing} are not there.")
        levels = [Level("chance", chance[name], panel=name) for name in names]
    else:
        levels = [] if chance is None else [Level("chance", chance)]
    layout = Layout(xlabel="demonstrations", ylabel=ylabel, fraction=True, across=2, height=2.2)
    drawing = line_figure(points, layout, levels=levels)
    axis = drawing.axes[0]
    # Linear up to 1 and logarithmic from there, with as long a step from 0 to 1 as from 1 to 2.
    axis.set_xscale("symlog", base=2, linthresh=1, linscale=0.5)
    axis.xaxis.set_major_locator(FixedLocator(sorted(set(points["x"]))))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    margin = 1.03 if points["x"].max() > 0 else 1
    axis.set_xlim(points["x"].min() - 0.15, max(points["x"].max(), 1) * margin**3)
    return drawing


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
