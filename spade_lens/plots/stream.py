"""The residual stream: how long its vectors are, and what a patch changes in the answers."""

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from spade_lens.plots.registry import figure
from spade_lens.plots.style import (
    BY_LAYER,
    known_glyphs,
    legend_above,
    panel_grid,
    some_ticks,
    whole_numbers,
)
from spade_lens.report.words import VISIBLE

_MOST_PROMPTS = 40
"""How many prompts have a label of their own."""


@figure(
    "norms", needs=("layer", "prompt", "position", "token", "norm"), source="spade_lens.capture"
)
def plot_norms(frame: pd.DataFrame) -> Figure:
    """Draw the norms of residuals by layer: the median, and the range from smallest to largest.

    First tokens have a line of their own. Their norms are often far larger than those of others.

    Example:
        >>> drawing = sl.plot(sl.capture(model, ["ab", "abc"]))
        >>> [t.get_text() for t in drawing.legends[0].texts]
        ['first token', 'other tokens']

    Args:
        frame: From :meth:`spade_lens.Residuals.to_frame`.
    """
    drawing, [panel] = panel_grid(1, height=2.0)
    first = frame["position"] == 0
    lines = (("first token", frame[first], "#0072B2"), ("other tokens", frame[~first], "#D55E00"))
    for name, rows, color in lines:
        if len(rows):
            norms = rows.groupby("layer")["norm"]
            panel.plot(norms.median(), color=color, marker="o", ms=3, label=name)
            low, high = norms.min(), norms.max()
            panel.fill_between(low.index, low, high, color=color, alpha=0.16, lw=0)
    if (frame["norm"] > 0).all():
        panel.set_yscale("log")
    panel.set_ylabel("norm of the residual")
    whole_numbers(panel, frame["layer"])
    drawing.supxlabel(BY_LAYER)
    legend_above(drawing)
    return drawing


@figure(
    "patched",
    needs=("condition", "prompt", "kl", "top_1"),
    source="spade_lens.patch",
    fits=lambda frame: "layer" not in frame.columns,
)
def plot_patched(frame: pd.DataFrame) -> Figure:
    """Draw how far a patch moves each prompt's answer, with the top tokens before and after.

    Example:
        >>> import torch
        >>> write = sl.Patch(2, values=torch.zeros(32))
        >>> drawing = sl.plot(sl.patch(["ab->", "cd->"], write, model=model))
        >>> len(drawing.axes[0].patches)
        2

    Args:
        frame: From the ``to_frame`` of what :func:`spade_lens.patch` returns.

    Returns:
        The figure, with a bar per prompt.

    Raises:
        ValueError: If the table does not have one unpatched and one patched row per prompt.
    """
    runs = {str(name): rows for name, rows in frame.groupby("condition")}
    if set(runs) != {"unpatched", "patched"} or frame.duplicated(["condition", "prompt"]).any():
        raise ValueError(
            f"The conditions {sorted(runs)} were given; expected one row 'unpatched' and one row "
            "'patched' for every prompt, as in spade_lens.patch(...).to_frame()."
        )
    before, after = (runs[name].set_index("prompt") for name in ("unpatched", "patched"))
    prompts = list(after.index)
    drawing, [panel] = panel_grid(1, height=0.2 + 0.17 * min(len(prompts), _MOST_PROMPTS))
    panel.barh(np.arange(len(prompts)), after["kl"], color="#0072B2")
    shown = some_ticks(prompts, _MOST_PROMPTS)
    panel.set_yticks(shown, [_label(prompts[i], before, after) for i in shown])
    panel.invert_yaxis()
    panel.set_ylabel("prompt: top token, unpatched > patched")
    panel.set_xlabel("KL(unpatched || patched), nats")
    return drawing


def _label(prompt: int, before: pd.DataFrame, after: pd.DataFrame) -> str:
    tokens = [str(rows.loc[prompt, "top_1"]).translate(VISIBLE) for rows in (before, after)]
    return known_glyphs(f"{prompt}: {tokens[0]} > {tokens[1]}")
