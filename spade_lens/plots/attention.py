"""What attention carries: cutting it by window of blocks, and its saliency block by block."""

from collections.abc import Sequence
from typing import Literal

import pandas as pd
from matplotlib.figure import Figure

from spade_lens.plots.lines import Level, choose, line_figure
from spade_lens.plots.style import FULL_WIDTH, by_task, check_table
from spade_lens.stats.summary import summarise

_LABELS = {
    "change": "change of the logit difference",
    "logit_diff": "logit difference,\nright less best other answer",
    "correct": "accuracy",
    "agrees": "agreement\nwith the full model",
}
_UNCUT = "nothing"


def plot_knockout(
    frame: pd.DataFrame,
    value: Literal["change", "logit_diff", "correct", "agrees"] = "change",
    *,
    edges: Sequence[str] | None = None,
    width: float = FULL_WIDTH,
) -> Figure:
    """What is left of the answer once edges are cut, by window; a panel per family of edges.

    Example:
        >>> answered = [model.prompt("ab->AB,cd->", target="C")]
        >>> last = {"to the last": lambda p: [(p.answer, k) for k in range(p.answer)]}
        >>> frame = icl.knockout(model, answered, edges=last, windows=[(0, 4), (0, 2)])
        >>> figure = plot_knockout(frame)
        >>> [t.get_text() for t in figure.legends[0].texts]
        ['cut', 'as many random edges', 'full model']

    Args:
        frame: From :func:`spade_lens.icl.knockout`, with ``task`` added for several tasks.
        value: What to plot: the mean over prompts of this column.
        edges: Which families, in the panels' order; by default all.
        width: Of the figure, in inches.

    Returns:
        The figure, not shown. With several tasks, each has a row of panels.

    Raises:
        ValueError: If the table lacks a column or a family, is of several models, or has too
            much for a page.
    """
    needed = ("edges", "control", "start", "stop", "prompt", value)
    check_table("plot_knockout", frame, needed, source="spade_lens.icl.knockout")
    check_one_model("plot_knockout", frame)
    cut = choose("plot_knockout", frame[frame["edges"] != _UNCUT], "edges", edges)
    if cut.empty:
        raise ValueError("plot_knockout was given the uncut model alone; expected cut edges.")
    windows = _windows(cut)
    means = _means(cut, value, ["edges", "control", "start", "stop"])
    keys = zip(means["start"], means["stop"], strict=True)
    points = means.assign(panel=means["edges"], line="cut", x=[windows.index(key) for key in keys])
    uncut = frame[frame["edges"] == _UNCUT]
    return line_figure(
        "plot_knockout",
        points,
        xlabel="cut in the blocks between two layers",
        ylabel=_LABELS[value],
        share=value in ("correct", "agrees"),
        levels=[
            Level("full model", float(rows[value].astype(float).mean()), task or None)
            for task, rows in by_task(uncut).items()
            if len(rows)
        ],
        control="as many random edges",
        places=[f"{start}\N{EN DASH}{stop}" for start, stop in windows],
        width=width,
    )


def plot_saliency(
    frame: pd.DataFrame, *, flows: Sequence[str] | None = None, width: float = FULL_WIDTH
) -> Figure:
    """Mean saliency by block, a line per flow, with random positions in the labels' places.

    Example:
        >>> from spade_lens.prompts.few_shot import few_shot_prompt
        >>> pairs = [("a", "A"), ("b", "B")]
        >>> some = [few_shot_prompt(model.tokenizer, pairs, "c", answer="C")]
        >>> figure = plot_saliency(icl.saliency_flows(model, some))
        >>> [panel.get_title() for panel in figure.axes]
        ['the three flows', 'from inputs to labels']

    Args:
        frame: From :func:`spade_lens.icl.saliency_flows`, with ``task`` added for several tasks.
        flows: Which flows, in the legend's order; by default all.
        width: Of the figure, in inches.

    Returns:
        The figure, not shown. The parts of ``words -> label`` have panels of their own.

    Raises:
        ValueError: If the table lacks a column or a flow, or is of several models.
    """
    needed = ("block", "prompt", "flow", "control", "saliency")
    check_table("plot_saliency", frame, needed, source="spade_lens.icl.saliency_flows")
    check_one_model("plot_saliency", frame)
    some = choose("plot_saliency", frame, "flow", flows)
    means = _means(some, "saliency", ["flow", "control", "block"])
    parts = means["flow"].str.contains("input")
    return line_figure(
        "plot_saliency",
        means.assign(
            panel=parts.map({False: "the three flows", True: "from inputs to labels"}),
            line=means["flow"],
            x=means["block"],
        ),
        xlabel="block (block b lies between layer b and layer b + 1)",
        ylabel="saliency,\nmean per pair of tokens",
        control="random positions as labels",
        across=2,
        height=2.2,
        width=width,
    )


def check_one_model(function: str, frame: pd.DataFrame) -> None:
    """Raise if rows are of several models, whose prompts would be averaged.

    Raises:
        ValueError: If they are.
    """
    if "model" in frame.columns and frame["model"].nunique() > 1:
        models = list(frame["model"].unique())
        raise ValueError(f"{function} was given rows of the models {models}; draw one at a time.")


def _windows(cut: pd.DataFrame) -> list[tuple[int, int]]:
    """In order, those that hold another one (such as that of all blocks) first."""
    pairs = zip(cut["start"].tolist(), cut["stop"].tolist(), strict=True)
    windows = sorted(set(pairs))
    around = [w for w in windows if any(w != x and w[0] <= x[0] and x[1] <= w[1] for x in windows)]
    return [*around, *(w for w in windows if w not in around)]


def _means(frame: pd.DataFrame, value: str, by: Sequence[str]) -> pd.DataFrame:
    by = [*(["task"] if "task" in frame.columns else []), *by]
    return summarise(frame, value, by=by)
