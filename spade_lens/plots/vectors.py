"""Rule vectors by layer: how alike they are, what probes read in them, what they vary with."""

from collections.abc import Sequence

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from spade_lens.plots.lines import Level, choose, line_figure
from spade_lens.plots.style import FULL_WIDTH, by_task, check_table

_ENDS = ("mean", "low", "high")


def plot_convergence(
    frame: pd.DataFrame, *, labels: Sequence[str] | None = None, width: float = FULL_WIDTH
) -> Figure:
    """Mean cosine similarity by layer, a line per comparison, panels by the pair's labels.

    Example:
        >>> import torch
        >>> vectors = torch.randn(3, 8, 4, 16)  # [layer batch demo d_model]
        >>> frame = icl.convergence(vectors, rule=torch.arange(8) % 2)
        >>> len(plot_convergence(frame).axes)
        1

    Args:
        frame: From :func:`spade_lens.icl.convergence`.
        labels: Which of ``"any"``, ``"same"`` and ``"different"``, a panel each; by default all
            that the table has.
        width: Of the figure, in inches.

    Returns:
        The figure, not shown.

    Raises:
        ValueError: If the table lacks a column or a kind of labels.
    """
    needed = ("layer", "comparison", "labels", "control", *_ENDS)
    check_table("plot_convergence", frame, needed, source="spade_lens.icl.convergence")
    rows = choose("plot_convergence", frame, "labels", labels)
    names = {"any": "any two vectors", "same": "of the same label", "different": "of two labels"}
    return line_figure(
        "plot_convergence",
        rows.assign(panel=rows["labels"].replace(names), line=rows["comparison"], x=rows["layer"]),
        ylabel="cosine similarity",
        control="rules shuffled",
        height=2.0,
        width=width,
    )


def plot_probes(frame: pd.DataFrame, *, by: str = "probed", width: float = FULL_WIDTH) -> Figure:
    """Accuracy of linear probes by layer, beside the same probes on shuffled classes.

    Example:
        >>> import torch
        >>> vectors = torch.randn(2, 10, 4, 8)  # [layer batch demo d_model]
        >>> frame = icl.probe(vectors, (vectors[1, ..., 0] > 0).long())
        >>> [t.get_text() for t in plot_probes(frame).legends[0].texts]
        ['probe', 'classes shuffled', 'most frequent class']

    Args:
        frame: From :func:`spade_lens.icl.probe`; for several probes put together, with the column
            that ``by`` names.
        by: The column that says what was probed, such as the rule or the label: a panel each.
        width: Of the figure, in inches.

    Returns:
        The figure, not shown.

    Raises:
        ValueError: If the table lacks a column, or several probes are not told apart.
    """
    needed = ("layer", "control", "chance", *_ENDS)
    check_table("plot_probes", frame, needed, source="spade_lens.icl.probe")
    points = frame.assign(
        panel=frame[by].astype(str) if by in frame.columns else "", line="probe", x=frame["layer"]
    )
    return line_figure(
        "plot_probes",
        points,
        ylabel="accuracy",
        share=True,
        levels=[
            Level("most frequent class", rows["chance"].iloc[0], task or None, str(panel))
            for panel, of_panel in points.groupby("panel", sort=False)
            for task, rows in by_task(of_panel).items()
        ],
        control="classes shuffled",
        height=2.0,
        width=width,
    )


def plot_factors(
    frame: pd.DataFrame, *, factors: Sequence[str] | None = None, width: float = FULL_WIDTH
) -> Figure:
    """The share of the variance of rule vectors that each factor has, by layer; a panel each.

    Most factors have little, so the y axis is linear up to 0.01 and logarithmic from there.

    Example:
        >>> import torch
        >>> rule = torch.arange(16) % 2
        >>> label = (torch.arange(16)[:, None] // 2 + torch.arange(2)) % 2
        >>> frame = icl.factor_variance(torch.randn(2, 16, 2, 8), rule=rule, label=label)
        >>> [panel.get_title() for panel in plot_factors(frame, factors=["rule"]).axes]
        ['rule']

    Args:
        frame: From :func:`spade_lens.icl.factor_variance`.
        factors: Which factors and interactions, in the panels' order; by default all but the
            rest, which is what the others leave.
        width: Of the figure, in inches.

    Returns:
        The figure, not shown. The controls and the share that halves of the prompts agree on are
        there if the table has them.

    Raises:
        ValueError: If the table lacks a column or a factor, or has the rest alone.
    """
    check_table(
        "plot_factors", frame, ("layer", "factor", "share"), source="spade_lens.icl.factor_variance"
    )
    some = frame[frame["factor"] != "rest"] if factors is None else frame
    some = choose("plot_factors", some, "factor", factors)
    if some.empty:
        raise ValueError("plot_factors was given the rest alone; give factors=['rest'] to see it.")
    some = some.assign(panel=some["factor"], x=some["layer"], control=False)
    nothing = float("nan")
    points = [some.assign(line="share", mean=some["share"], low=nothing, high=nothing)]
    if "control" in frame.columns:
        shuffled = frame.loc[some.index, "control"]
        ends = {"low": some["control_low"], "high": some["control_high"]}
        points.append(some.assign(line="share", control=True, mean=shuffled, **ends))
    if "held_out" in frame.columns:
        held_out = some.assign(mean=some["held_out"], low=nothing, high=nothing)
        points.append(held_out.assign(line="share that two halves of the prompts agree on"))
    table = pd.concat(points)
    figure = line_figure(
        "plot_factors",
        table,
        ylabel="share of variance",
        control="share in shuffled vectors",
        across=4,
        width=width,
    )
    axis = figure.axes[0]
    axis.set_yscale("symlog", linthresh=0.01, linscale=0.5)
    axis.set_yticks([0, 0.01, 0.1, 1], ["0", "0.01", "0.1", "1"])
    axis.yaxis.set_minor_locator(NullLocator())
    # What halves agree on may fall below 0.
    axis.set_ylim(1.2 * min(table["mean"].min(), -0.002), 1.2)
    return figure
