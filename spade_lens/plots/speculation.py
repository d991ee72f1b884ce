"""Self-speculation: acceptance and speed by layer and draft length, confidence, measured speed."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator, NullLocator
from numpy.typing import NDArray

from spade_lens.plots.lines import Layout, Level, choose, line_figure
from spade_lens.plots.registry import figure
from spade_lens.plots.style import PageFigure, legend_above, page, panel_grid, some_ticks
from spade_lens.stats.auroc import auroc

_SOURCE = "a study of spade_lens.studies.SpeculationPlan"
_SETTING = ("drafter", "layer", "draft_tokens", "eta", "adaptive", "kind")
_MEASURES = {"acceptance": "acceptance", "predicted_speedup": "predicted speed"}
_MOST_PANELS, _ACROSS, _BINS = 8, 4, 20
_MOST_WRITTEN = 8
"""So many cells across, or upwards, have room for their numbers."""
_BREAK_EVEN = "break-even by measured costs"
_VERDICTS: dict[str, dict[str, Any]] = {
    "faster": {"marker": "o", "mfc": "white"},
    "undecided": {"marker": "D", "mfc": "0.6"},
    "slower": {"marker": "X", "mfc": "black"},
}


@figure(
    "speculation",
    needs=(*_SETTING, "acceptance", "break_even", "predicted_speedup"),
    source=_SOURCE,
)
def plot_speculation(
    frame: pd.DataFrame,
    *,
    eta: float | None = None,
    drafter: str | None = None,
    prompts: str = "all",
) -> PageFigure:
    """Draw acceptance and predicted speed by the layer that drafts and the length of drafts.

    A cell is a setting. Those with a border are predicted to be faster than plain text, by the
    measured costs; marks are settings that were timed. With one layer or one draft length there
    is no map, and lines by draft length stand in its place.

    Example:
        >>> import pandas as pd
        >>> rows = pd.DataFrame({"drafter": "exit", "layer": [1, 2, 1, 2], "draft_tokens": 1,
        ...     "eta": 0.0, "adaptive": False, "kind": "all", "acceptance": [0.2, 0.6, 0.1, 0.5],
        ...     "break_even": 0.4, "predicted_speedup": [0.7, 1.1, 0.6, 1.05]})
        >>> drawing = sl.plot(rows.assign(draft_tokens=[1, 1, 2, 2]))
        >>> [panel.get_title() for panel in drawing.axes[:2]]
        ['acceptance', 'predicted speed']

    Args:
        frame: The table ``points`` of the study.
        eta: Which ``eta``; the smallest by default.
        drafter: Whose map to draw; by default that of the drafter with most layers.
        prompts: Which kind of prompts.

    Raises:
        ValueError: If the table has no such rows, or several of one setting.
    """
    rows = choose(frame, "kind", [prompts])
    rows = rows[~rows["adaptive"].astype(bool)]
    if drafter is not None:
        rows = choose(rows, "drafter", [drafter])
    at_layers = rows[rows["layer"] > 0]
    if eta is None:
        eta = None if at_layers.empty else float(at_layers["eta"].min())
    else:
        at_layers = choose(at_layers, "eta", [eta])
    rows = rows[(rows["layer"] == 0) | (rows["eta"] == eta)]
    if rows.duplicated(list(_SETTING)).any():
        raise ValueError(
            "Several rows are of one drafter, layer, draft length and eta. Draw the points of one "
            "study and model at a time."
        )
    at_layers = rows[rows["layer"] > 0]
    widest = at_layers.groupby("drafter", sort=False)["layer"].nunique()
    grid = at_layers[at_layers["drafter"] == widest.idxmax()] if len(widest) else at_layers
    complete = len(grid) == grid["layer"].nunique() * grid["draft_tokens"].nunique()
    if complete and min(grid["layer"].nunique(), grid["draft_tokens"].nunique()) > 1:
        return _maps(grid)
    return _by_length(rows)


def _maps(grid: pd.DataFrame) -> PageFigure:
    """Draw both measures, a cell for every layer and draft length that was measured."""
    drawing, panels = panel_grid(2, across=2, height=2.3)
    axes = {"index": "draft_tokens", "columns": "layer"}
    pays = (grid.pivot(**axes, values="predicted_speedup").astype(float) > 1).to_numpy()
    for panel, (measure, title) in zip(panels, _MEASURES.items(), strict=True):
        cells = grid.pivot(**axes, values=measure).astype(float)
        _cells(panel, drawing, cells.to_numpy(), ratio=measure != "acceptance")
        for row, column in np.argwhere(pays):
            look: dict[str, Any] = {"fill": False, "ec": "black", "lw": 1.4, "zorder": 3}
            corner = (column - 0.47, row - 0.47)
            panel.add_patch(Rectangle(corner, 0.94, 0.94, label="pays by measured costs", **look))
        panel.grid(visible=False)
        panel.set_title(title)
        for ticks, names in ((panel.set_xticks, cells.columns), (panel.set_yticks, cells.index)):
            chosen = some_ticks(list(names), most=8)
            ticks(chosen, [str(names[i]) for i in chosen])
        _marks(panel, grid, cells.columns.tolist(), cells.index.tolist())
    drawing.supxlabel("layer that drafts")
    drawing.supylabel("tokens drafted in a round")
    legend_above(drawing)
    return drawing


def _cells(panel: Axes, drawing: Figure, values: NDArray[np.float64], *, ratio: bool) -> None:
    """Draw a map of numbers, written into the cells where they fit. White is a ratio of 1."""
    known = values[np.isfinite(values)]
    low, high = (float(known.min()), float(known.max())) if len(known) else (0.0, 1.0)
    scale: dict[str, Any] = {"cmap": "Blues", "vmin": low, "vmax": high}
    if ratio:
        low, high = min(low, 1.0), max(high, 1.0)
        most = max(1 - low, high - 1, 0.01)
        scale = {"cmap": "RdBu_r", "vmin": 1 - most, "vmax": 1 + most}
    places = [np.arange(n) for n in reversed(values.shape)]
    mesh = panel.pcolormesh(*places, np.ma.masked_invalid(values), **scale)
    bar = drawing.colorbar(mesh, ax=panel, aspect=25, pad=0.02)
    bar.outline.set_visible(False)
    if high > low:
        # What no cell has is cut off. Steps are such that 1 is one of them.
        bar.ax.set_ylim(low, high)
        steps = MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
        bar.set_ticks([step for step in steps if low - 1e-9 <= step <= high + 1e-9])
    if values.shape[0] > _MOST_WRITTEN or values.shape[1] > _MOST_WRITTEN:
        return
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            red, green, blue, _ = mesh.to_rgba(np.asarray(value))
            dark = 0.3 * red + 0.6 * green + 0.1 * blue < 0.5
            look: dict[str, Any] = {"ha": "center", "va": "center", "zorder": 4}
            look |= {"fontsize": page().font_size - 1, "color": "white" if dark else "black"}
            panel.text(column, row, f"{value:.2f}", **look)


def _marks(panel: Axes, grid: pd.DataFrame, layers: list[Any], lengths: list[Any]) -> None:
    """Mark settings that were timed, in the corners of their cells."""
    if "verdict" not in grid.columns:
        return
    for name, look in _VERDICTS.items():
        rows = grid[grid["verdict"] == name]
        if len(rows):
            options: dict[str, Any] = {"ls": "none", "mec": "black", "ms": 4, "zorder": 5}
            x = [layers.index(layer) + 0.33 for layer in rows["layer"]]
            y = [lengths.index(length) + 0.3 for length in rows["draft_tokens"]]
            panel.plot(x, y, label=f"measured: {name}", **options, **look)


def _by_length(rows: pd.DataFrame) -> PageFigure:
    """Draw both measures by draft length, a line for every drafter and layer."""
    rows = rows.assign(line=_lines(rows), x=rows["draft_tokens"])
    parts = []
    for measure, panel in _MEASURES.items():
        low, high = (f"{measure}_{end}" for end in ("low", "high"))
        part = rows[["line", "x"]].assign(panel=panel, mean=rows[measure].astype(float))
        part["low"] = rows.get(low, part["mean"])
        part["high"] = rows.get(high, part["mean"])
        parts.append(part.assign(control=False))
        if measure == "acceptance":
            needed = part.assign(mean=rows["break_even"].astype(float), control=True)
            parts.append(needed.assign(low=needed["mean"], high=needed["mean"]))
    table = pd.concat(parts, ignore_index=True)
    layout = Layout(
        ylabel="",
        xlabel="tokens drafted in a round",
        control=_BREAK_EVEN,
        sharey=False,
        across=2,
        height=2.1,
    )
    equal = Level("as fast as plain text", 1.0, panel=_MEASURES["predicted_speedup"])
    return line_figure(table, layout, levels=[equal])


def _lines(rows: pd.DataFrame) -> "pd.Series[Any]":
    layers = rows["layer"].astype(str)
    return rows["drafter"].where(rows["layer"] == 0, rows["drafter"] + " at " + layers)


@figure(
    "draft_confidence",
    needs=("drafter", "layer", "prompt", "kind", "step", "confidence", "accepted"),
    source=_SOURCE,
)
def plot_draft_confidence(
    frame: pd.DataFrame, *, layers: Sequence[int] | None = None
) -> PageFigure:
    """Draw how sure a drafter is where its draft is right and where it is wrong.

    The number is the area under the ROC curve with its jackknife interval over prompts: how often
    a right draft has more confidence than a wrong one. ``eta`` cuts at a confidence.

    Args:
        frame: The table ``drafts`` of the study.
        layers: Which layers; by default up to eight, evenly chosen from all.
    """
    present = sorted(frame["layer"].unique().tolist())
    if layers is None:
        places = np.linspace(0, len(present) - 1, min(_MOST_PANELS, len(present)))
        layers = [present[place] for place in places.round().astype(int)]
    frame = choose(frame, "layer", layers)
    groups = list(frame.groupby(["drafter", "layer"], sort=False))
    if len(groups) > _MOST_PANELS:
        raise ValueError(
            f"{len(groups)} drafters and layers were given; expected at most {_MOST_PANELS}. "
            "Name fewer with layers=."
        )
    across = min(len(groups), _ACROSS)
    drawing, panels = panel_grid(len(groups), across=across, height=1.6)
    edges = np.linspace(0, 1, _BINS + 1)
    for ((drafter, layer), rows), panel in zip(groups, panels, strict=True):
        accepted = rows["accepted"].to_numpy(dtype=bool)
        sure = rows["confidence"].to_numpy(dtype=float)
        for right, color, label in ((False, "#D55E00", "wrong"), (True, "#0072B2", "right")):
            chosen = sure[(accepted == right) & np.isfinite(sure)]
            weights = np.full(len(chosen), 1 / len(rows))
            filled: dict[str, Any] = {"color": color, "alpha": 0.55, "label": f"{label} drafts"}
            panel.hist(chosen, bins=edges.tolist(), weights=weights, **filled)
        known = np.isfinite(sure)
        prompt = rows["prompt"].to_numpy(dtype=np.int64)
        area, low, high = auroc(sure[known], accepted[known], prompt[known])
        text = f"right {accepted.mean():.2f}"
        if np.isfinite(area):
            text += f"\nAUROC {area:.2f}"
        if np.isfinite(low):
            text += f"\n[{low:.2f}, {high:.2f}]"
        place: dict[str, Any] = {"ha": "left", "va": "top", "transform": panel.transAxes}
        panel.text(0.04, 0.95, text, fontsize=page().font_size - 1, **place)
        panel.set_title(f"{drafter} at {layer}")
    panels[0].set_xlim(0, 1)
    panels[0].set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "", "0.5", "", "1"])
    drawing.supxlabel("probability of the drafted token under the drafter")
    drawing.supylabel("fraction of drafts")
    legend_above(drawing, first=["right drafts"])
    return drawing


@figure(
    "drafted_speed",
    needs=(*_SETTING, "n", "predicted_speedup", "cpu_speedup", "wall_speedup", "verdict"),
    source=_SOURCE,
    fits=False,
)
def plot_drafted_speed(frame: pd.DataFrame, *, clock: str = "cpu") -> Figure:
    """Draw the measured speed of every setting that was timed, by kind of prompt.

    The axis is logarithmic: half as fast is as far from plain text as twice as fast. Marks without
    an interval, which need two prompts, are hollow.

    Args:
        frame: The table ``points`` of the study.
        clock: ``"cpu"`` or ``"wall"``.

    Raises:
        ValueError: If nothing was timed, or there is no such clock.
    """
    if clock not in ("cpu", "wall"):
        raise ValueError(f"clock={clock!r} was given; expected 'cpu' or 'wall'.")
    timed = frame[frame["verdict"].fillna("") != ""]
    if timed.empty:
        raise ValueError("No setting was timed; expected a study with timed=1 or more.")
    kinds = list(timed["kind"].unique())
    upto = timed["adaptive"].map({True: " up to ", False: " "}).fillna(" ")
    eta = timed["eta"].map(lambda value: f", eta {value:g}" if value else "")
    drafts = timed["draft_tokens"].map(lambda n: f"{n} draft{'s' if n > 1 else ''}")
    names = _lines(timed) + "," + upto + drafts + eta
    ratio = f"{clock}_speedup"
    table = pd.DataFrame(
        {
            "line": names,
            "x": [kinds.index(kind) for kind in timed["kind"]],
            "mean": timed[ratio],
            "low": timed[f"{ratio}_low"],
            "high": timed[f"{ratio}_high"],
        }
    )
    label = {"cpu": "CPU time", "wall": "wall-clock time"}[clock]
    layout = Layout(
        ylabel=f"speed after the prompt\n({label} of plain text = 1)",
        xlabel="kind of prompt",
        places=[f"{kind}\nn = {timed.loc[timed['kind'] == kind, 'n'].max()}" for kind in kinds],
        height=2.2,
    )
    drawing = line_figure(table, layout, levels=[Level("plain text", 1.0)])
    [panel] = drawing.axes
    _hollow(panel, table)
    known = table[["mean", "low", "high"]].to_numpy(float)
    ends = np.log2([min(1.0, np.nanmin(known)), max(1.0, np.nanmax(known))])
    ends[0] = np.floor(ends[0])
    panel.set_yscale("log", base=2)
    ticks = 2.0 ** np.arange(ends[0], np.floor(ends[1] + 0.15) + 1)
    panel.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    panel.set_ylim(*2.0 ** (ends + [-0.15, 0.15]))
    panel.yaxis.set_minor_locator(NullLocator())
    return drawing


def _hollow(panel: Axes, table: pd.DataFrame) -> None:
    """Draw the marks hollow that have no interval."""
    lines = {line.get_label(): line for line in panel.lines}
    for name, rows in table.groupby("line", sort=False):
        line, bare = lines[name], rows.sort_values("x")["low"].isna().to_numpy()
        if bare.any():
            x, y = (np.asarray(values)[bare] for values in line.get_data())
            look: dict[str, Any] = {"ls": "none", "ms": 3.6, "mfc": "white", "zorder": 4}
            look |= {"marker": line.get_marker(), "mec": line.get_color(), "clip_on": False}
            panel.plot(x, y, **look)
