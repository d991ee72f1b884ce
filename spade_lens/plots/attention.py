"""What attention carries: cutting it by window of blocks, and its saliency block by block."""

from collections.abc import Sequence

import pandas as pd
from matplotlib.figure import Figure

from spade_lens.plots.lines import Layout, Level, choose, label_of, line_figure, means
from spade_lens.plots.registry import figure
from spade_lens.plots.style import BY_BLOCK, by_task

_LABELS = {
    "change": "change of the logit difference",
    "logit_diff": "logit difference,\nright minus best other answer",
    "correct": "accuracy",
    "agrees": "agreement\nwith the full model",
}
_UNCUT = "nothing"


@figure(
    "knockout",
    needs=("edges", "control", "start", "stop", "prompt"),
    source="spade_lens.icl.knockout",
)
def plot_knockout(
    frame: pd.DataFrame, value: str = "change", *, edges: Sequence[str] | None = None
) -> Figure:
    """Draw what is left of the answer once attention edges are cut, by window of blocks.

    Example:
        >>> answered = [model.prompt("ab->AB,cd->", target="C")]
        >>> last = {"to the last": lambda p: [(p.answer, k) for k in range(p.answer)]}
        >>> drawing = sl.plot(icl.knockout(model, answered, edges=last, windows=[(0, 4), (0, 2)]))
        >>> [t.get_text() for t in drawing.legends[0].texts]
        ['cut', 'as many random edges', 'full model']

    Args:
        frame: From :func:`spade_lens.icl.knockout`, with ``task`` added for several tasks.
        value: The column whose mean over prompts is drawn: ``"change"``, ``"logit_diff"``,
            ``"correct"`` or ``"agrees"``.
        edges: Which families of edges, in the panels' order; by default all.
    """
    ylabel = label_of(value, _LABELS, frame)
    cut = choose(frame[frame["edges"] != _UNCUT], "edges", edges)
    if cut.empty:
        raise ValueError(
            "The figure 'knockout' was given the uncut model alone; expected cut edges."
        )
    windows = _windows(cut)
    points = means(cut, value, ["edges", "control", "start", "stop"])
    keys = zip(points["start"], points["stop"], strict=True)
    points = points.assign(
        panel=points["edges"], line="cut", x=[windows.index(key) for key in keys]
    )
    levels = [
        Level("full model", float(rows[value].astype(float).mean()), task or None)
        for task, rows in by_task(frame[frame["edges"] == _UNCUT]).items()
        if len(rows)
    ]
    layout = Layout(
        xlabel="cut in the blocks between two layers",
        ylabel=ylabel,
        fraction=value in ("correct", "agrees"),
        control="as many random edges",
        places=[f"{start}\N{EN DASH}{stop}" for start, stop in windows],
    )
    return line_figure(points, layout, levels=levels)


@figure(
    "saliency",
    needs=("block", "prompt", "flow", "control", "saliency"),
    source="spade_lens.icl.saliency_flows",
)
def plot_saliency(frame: pd.DataFrame, *, flows: Sequence[str] | None = None) -> Figure:
    """Draw mean saliency by block, a line per flow, with random positions as the labels' control.

    Example:
        >>> from spade_lens.prompts import Template, few_shot_prompt
        >>> pairs, tight = [("a", "A"), ("b", "B")], Template("{input}>{output}", ";", "{input}>")
        >>> prompt = few_shot_prompt(model.tokenizer, pairs, "c", answer="C", template=tight)
        >>> drawing = sl.plot(icl.saliency_flows(model, [prompt]))
        >>> [panel.get_title() for panel in drawing.axes]
        ['the three flows', 'from inputs to labels']

    Args:
        frame: From :func:`spade_lens.icl.saliency_flows`, with ``task`` added for several tasks.
        flows: Which flows, in the legend's order; by default all.

    Returns:
        The parts of ``words -> label`` have panels of their own.
    """
    points = means(choose(frame, "flow", flows), "saliency", ["flow", "control", "block"])
    parts = points["flow"].str.contains("input")
    panel = parts.map({False: "the three flows", True: "from inputs to labels"})
    layout = Layout(
        xlabel=BY_BLOCK,
        ylabel="saliency,\nmean per pair of tokens",
        control="random positions as labels",
        across=2,
        height=2.2,
    )
    return line_figure(points.assign(panel=panel, line=points["flow"], x=points["block"]), layout)


def _windows(cut: pd.DataFrame) -> list[tuple[int, int]]:
    """The windows in order, those around another one (such as that of all blocks) first."""
    pairs = zip(cut["start"].tolist(), cut["stop"].tolist(), strict=True)
    windows = sorted(set(pairs))
    around = [w for w in windows if any(w != x and w[0] <= x[0] and x[1] <= w[1] for x in windows)]
    return [*around, *(w for w in windows if w not in around)]
