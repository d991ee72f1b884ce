"""The effect of every attention head, as a map of blocks and heads."""

from collections.abc import Sequence
from math import ceil
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from spade_lens.plots.attention import check_one_model
from spade_lens.plots.style import FULL_WIDTH, STYLE, by_task, check_table, legend_above, panel_grid
from spade_lens.stats.summary import summarise

_LABELS = {
    "logit_diff": "effect on the\nlogit difference",
    "probability": "effect on the right\nanswer's probability",
}
_MOST_TICKS = 16


def plot_heads(
    frame: pd.DataFrame,
    measure: Literal["logit_diff", "probability"] = "logit_diff",
    *,
    chosen: Sequence[tuple[int, int]] = (),
    width: float = FULL_WIDTH,
) -> Figure:
    """The mean effect of every head, blocks across and heads upwards.

    Example:
        >>> import pandas as pd
        >>> rows = {"block": [0, 0, 1, 1], "head": [0, 1, 0, 1], "prompt": 0,
        ...         "effect": [0.1, 0.5, 0.3, -1.0]}
        >>> figure = plot_heads(pd.DataFrame(rows), chosen=[(0, 1)])
        >>> [t.get_text() for t in figure.legends[0].texts]
        ['chosen heads']

    Args:
        frame: From :func:`spade_lens.icl.head_effects`.
        measure: What was measured there.
        chosen: Heads to mark, such as those of :func:`spade_lens.icl.top_heads`.
        width: Of the figure, in inches.

    Returns:
        The figure, not shown. With several tasks, each has a panel; the colours are the same.

    Raises:
        ValueError: If the table lacks a column or a chosen head, or is of several models.
    """
    needed = ("block", "head", "prompt", "effect")
    check_table("plot_heads", frame, needed, source="spade_lens.icl.head_effects")
    check_one_model("plot_heads", frame)
    by = [*(["task"] if "task" in frame.columns else []), "block", "head"]
    maps = {
        task: rows.pivot(index="head", columns="block", values="mean")
        for task, rows in by_task(summarise(frame, "effect", by=by)).items()
    }
    known = set(zip(frame["block"], frame["head"], strict=True))
    missing = [head for head in chosen if tuple(head) not in known]
    if missing:
        raise ValueError(f"plot_heads was to mark the heads {missing}, which the table lacks.")
    most = max(float(np.nanmax(np.abs(some.to_numpy()))) for some in maps.values()) or 1.0
    n_heads = max(len(some) for some in maps.values())
    with mpl.rc_context(STYLE | {"axes.grid": False}):
        height = min(4.5, max(1.1, 0.16 * n_heads))
        figure, panels = panel_grid(
            len(maps), across=1, width=width, height=height, sharex=False, sharey=False
        )
        for panel, (task, some) in zip(panels, maps.items(), strict=True):
            image = panel.imshow(
                some.to_numpy(), origin="lower", aspect="auto", cmap="RdBu_r", vmin=-most, vmax=most
            )
            blocks: list[Any] = some.columns.tolist()
            heads: list[Any] = some.index.tolist()
            here = [(b, h) for b, h in chosen if b in blocks and h in heads]
            if here:
                panel.scatter(
                    [blocks.index(b) for b, _ in here],
                    [heads.index(h) for _, h in here],
                    s=14,
                    facecolor="white",
                    edgecolor="black",
                    linewidth=0.8,
                    label="chosen heads",
                )
            for set_ticks, values in ((panel.set_xticks, blocks), (panel.set_yticks, heads)):
                step = ceil(len(values) / _MOST_TICKS)
                set_ticks(range(0, len(values), step), [str(v) for v in values[::step]])
            panel.tick_params(length=0)
            panel.spines[:].set_visible(False)
            panel.set_ylabel("head")
            if len(maps) > 1:
                panel.set_title(task, loc="left", parse_math=False)
        panels[-1].set_xlabel("block (block b lies between layer b and layer b + 1)")
        bar = figure.colorbar(image, ax=panels, label=_LABELS[measure], pad=0.01, aspect=20)
        bar.outline.set_visible(False)
        legend_above(figure)
    return figure
