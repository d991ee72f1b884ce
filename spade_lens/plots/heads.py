"""The effect of every attention head, as a map of blocks and heads."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from spade_lens.plots.lines import label_of, means
from spade_lens.plots.registry import figure
from spade_lens.plots.style import BY_BLOCK, by_task, legend_above, panel_grid, some_ticks

_LABELS = {
    "logit_diff": "effect on the\nlogit difference",
    "probability": "effect on the right\nanswer's probability",
}


@figure("heads", needs=("block", "head", "prompt", "effect"), source="spade_lens.icl.head_effects")
def plot_heads(
    frame: pd.DataFrame,
    measure: str = "logit_diff",
    *,
    chosen: Sequence[tuple[int, int]] = (),
) -> Figure:
    """Draw the mean effect of every attention head, blocks across and heads upwards.

    Example:
        >>> import pandas as pd
        >>> rows = {"block": [0, 0, 1, 1], "head": [0, 1, 0, 1], "prompt": 0,
        ...         "effect": [0.1, 0.5, 0.3, -1.0]}
        >>> drawing = sl.plot(pd.DataFrame(rows), chosen=[(0, 1)])
        >>> [t.get_text() for t in drawing.legends[0].texts]
        ['chosen heads']

    Args:
        frame: From :func:`spade_lens.icl.head_effects`.
        measure: What was measured there: ``"logit_diff"`` or ``"probability"``.
        chosen: Heads to mark, such as those of :func:`spade_lens.icl.top_heads`.

    Returns:
        With several tasks, each has a panel; the colours are the same.
    """
    label = label_of(measure, _LABELS)
    maps = {
        task: rows.pivot(index="head", columns="block", values="mean")
        for task, rows in by_task(means(frame, "effect", ["block", "head"])).items()
    }
    present = set(zip(frame["block"], frame["head"], strict=True))
    missing = [head for head in chosen if tuple(head) not in present]
    if missing:
        raise ValueError(f"chosen= has the heads {missing}, which the table lacks.")
    most = max(float(np.nanmax(np.abs(cells.to_numpy()))) for cells in maps.values()) or 1.0
    height = min(4.5, max(1.1, 0.16 * max(len(cells) for cells in maps.values())))
    drawing, panels = panel_grid(len(maps), across=1, height=height, sharex=False, sharey=False)
    for panel, (task, cells) in zip(panels, maps.items(), strict=True):
        panel.grid(visible=False)
        image = panel.imshow(
            cells.to_numpy(), origin="lower", aspect="auto", cmap="RdBu_r", vmin=-most, vmax=most
        )
        blocks: list[Any] = cells.columns.tolist()
        heads: list[Any] = cells.index.tolist()
        marked = [(b, h) for b, h in chosen if b in blocks and h in heads]
        if marked:
            panel.scatter(
                [blocks.index(b) for b, _ in marked],
                [heads.index(h) for _, h in marked],
                s=14,
                facecolor="white",
                edgecolor="black",
                linewidth=0.8,
                label="chosen heads",
            )
        for set_ticks, values in ((panel.set_xticks, blocks), (panel.set_yticks, heads)):
            places = some_ticks(values, most=16)
            set_ticks(places, [str(values[place]) for place in places])
        panel.tick_params(length=0)
        panel.spines[:].set_visible(False)
        panel.set_ylabel("head")
        if len(maps) > 1:
            panel.set_title(task, loc="left", parse_math=False)
    panels[-1].set_xlabel(BY_BLOCK)
    bar = drawing.colorbar(image, ax=panels, label=label, pad=0.01, aspect=20)
    bar.outline.set_visible(False)
    legend_above(drawing)
    return drawing
