"""Reliability curves: how often what a confidence claims comes true, layer by layer."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from spade_lens.plots.lines import choose
from spade_lens.plots.registry import figure
from spade_lens.plots.style import fraction_axis, legend_above, line_styles, page, panel_grid
from spade_lens.stats.intervals import proportion_interval

_MOST_PANELS, _ACROSS = 8, 4
_EVENTS = {
    "agrees": "SPADE's answer is the full model's",
    "correct": "SPADE's answer is right",
    "check agrees": "the check's answer is the full model's",
    "check correct": "the check's answer is right",
}


@figure(
    "reliability",
    needs=("check", "event", "bin", "n", "confidence", "frequency", "ece"),
    source="spade_lens.exits.reliability",
)
def plot_reliability(curve: pd.DataFrame, *, layers: Sequence[int] | None = None) -> Figure:
    """Draw how often what a confidence claims comes true, one panel per layer.

    On the grey diagonal a confidence is worth its number; below it promises too much. A dot is a
    bin of prompts, shaded is Wilson's 95% interval of its frequency.

    Example:
        >>> from spade_lens.exits import Confidence, exit_tables, reliability
        >>> sure = Confidence(LogitLens(model), "top-1")
        >>> [table] = exit_tables(model, prompts, sure, layers=[1, 2, 3])
        >>> drawing = sl.plot(reliability(table), layers=[1, 3])
        >>> len(drawing.axes)
        2

    Args:
        curve: From :func:`spade_lens.exits.reliability`, of one or several checks put together;
            of one event and, for each check, one keep set. The calibration errors (``ece``) are
            written into the panels, in the legend's order. Or from
            :func:`spade_lens.exits.gated_reliability`: one panel, a line for every policy.
        layers: Which layers; by default up to eight, evenly chosen from all.
    """
    mixture = "layer" not in curve.columns
    if mixture:
        curve = curve.assign(layer=0, check=curve.get("policy", curve["check"]))
    _check_single(curve, ["check", "layer", "bin"])
    if curve["event"].nunique() > 1:
        events = list(curve["event"].unique())
        raise ValueError(f"The curves are of the events {events}; give those of one.")
    event = str(curve["event"].iloc[0])
    present = sorted(curve["layer"].unique().tolist())
    if layers is None:
        places = np.linspace(0, len(present) - 1, min(_MOST_PANELS, len(present)))
        layers = [present[place] for place in places.round().astype(int)]
    checks = list(curve["check"].unique())
    curve = choose(curve, "layer", layers)
    looks = _looks(checks)
    # Panels are square, as large as fit beside each other.
    height = min(2.6, page().width / min(len(layers), _ACROSS))
    drawing, panels = panel_grid(len(layers), across=_ACROSS, height=height)
    for layer, panel in zip(layers, panels, strict=True):
        panel.plot([0, 1], [0, 1], color="0.6", lw=0.8, zorder=1)
        rows = curve[curve["layer"] == layer]
        for check in checks:
            _line(panel, rows[rows["check"] == check], check, looks[check])
        errors = rows.drop_duplicates("check").set_index("check")["ece"]
        written = [errors[check] for check in checks if check in errors.index]
        _write(panel, written, rows)
        panel.set_title("all exits together" if mixture else f"layer {layer}")
        panel.set_box_aspect(1)
    fraction_axis(panels[0])
    panels[0].set_xlim(-0.03, 1.03)
    panels[0].set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "", "0.5", "", "1"])
    drawing.supxlabel("mean confidence of a bin of prompts")
    said = _EVENTS.get(event, event)
    if mixture:
        said = said.replace("SPADE's", "early exit's")
    drawing.supylabel(f"how often\n{said}", multialignment="center")
    legend_above(drawing)
    return drawing


def _looks(lenses: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Styles by the lens' own name ("logit lens, top-1"), to be the same in all figures."""
    short = [lens.partition(",")[0] for lens in lenses]
    names = short if len(set(short)) == len(lenses) else list(lenses)
    styles = line_styles(names)
    return {lens: styles[name] for lens, name in zip(lenses, names, strict=True)}


def _line(panel: Axes, rows: pd.DataFrame, lens: str, look: dict[str, Any]) -> None:
    rows = rows.sort_values("confidence")
    happened = (rows["frequency"] * rows["n"]).round().astype(int)
    ends = map(proportion_interval, happened.tolist(), rows["n"].tolist())
    low, high = zip(*ends, strict=True)
    x = rows["confidence"]
    if len(rows) == 1:  # a band of no width would not be seen
        panel.vlines(x, low, high, color=look["color"], lw=0.9, alpha=0.6)
    panel.fill_between(x, low, high, color=look["color"], alpha=0.13, lw=0)
    panel.plot(x, rows["frequency"], marker="o", ms=2.4, label=lens, zorder=3, **look)


def _write(panel: Axes, errors: Sequence[float], rows: pd.DataFrame) -> None:
    """In the corner that the curves leave free."""
    overconfident = ((rows["confidence"] - rows["frequency"]) * rows["n"]).sum() > 0
    x, y, ha, va = (0.04, 0.97, "left", "top") if overconfident else (0.98, 0.03, "right", "bottom")
    text = ("ECE\n" if len(errors) > 1 else "ECE ") + "\n".join(f"{e:.2f}" for e in errors)
    panel.text(x, y, text, ha=ha, va=va, fontsize=7, transform=panel.transAxes, zorder=4)


def _check_single(frame: pd.DataFrame, key: list[str]) -> None:
    if frame.duplicated(key).any():
        raise ValueError(
            f"There are several rows of one {', '.join(key)}. Filter the table so that every check "
            "has one keep set, event and task, or put those into the check's name."
        )
