"""Rule vectors by layer: how alike they are, what probes read in them, what they vary with."""

from collections.abc import Sequence

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from spade_lens.plots.lines import Level, choose, crossed_looks, line_figure
from spade_lens.plots.style import FULL_WIDTH, by_task, check_table
from spade_lens.stats.summary import summarise

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


def plot_convergence_beside(frame: pd.DataFrame, *, width: float = FULL_WIDTH) -> Figure:
    """Likeness within a prompt beside that without the rule, and across tasks, by layer.

    Args:
        frame: The table ``others`` of the experiment ``geometry`` on word pairs.
        width: Of the figure, in inches.

    Returns:
        The figure, with a panel for what is taken off, not shown.

    Raises:
        ValueError: If the table lacks a column.
    """
    needed = ("layer", "comparison", "prompts", "center", *_ENDS)
    check_table("plot_convergence_beside", frame, needed, source="the experiment geometry")
    shown = frame["comparison"].isin(["within a prompt", "across rules"])
    rows = frame[shown & (frame["prompts"] != "own less shuffled")]
    names = {"nothing": "nothing taken off", "mean of shuffled": "mean of shuffled taken off"}
    return line_figure(
        "plot_convergence_beside",
        rows.assign(
            panel=rows["center"].replace(names),
            line=rows["prompts"],
            x=rows["layer"],
            control=False,
        ),
        ylabel="cosine similarity",
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


def plot_projections(
    frame: pd.DataFrame,
    *,
    layer: int | None = None,
    factors: Sequence[str] | None = None,
    width: float = FULL_WIDTH,
) -> Figure:
    """Mean rule vectors along the first component of each factor, by demonstration; a panel each.

    A line for every rule and label: colours are rules, dashes are labels. On the component of a
    rule, lines of one colour run together if vectors tell the rule apart and nothing else there.
    Shown are prompts that the components were not found on.

    Example:
        >>> import torch
        >>> rule = torch.arange(16) % 2
        >>> label = (torch.arange(16)[:, None] // 2 + torch.arange(2)) % 2
        >>> from spade_lens.icl.geometry.dpca_projections import factor_projections
        >>> frame = factor_projections(torch.randn(1, 16, 2, 8), rule=rule, label=label)
        >>> [panel.get_title() for panel in plot_projections(frame).axes]
        ['rule', 'label', 'demo']

    Args:
        frame: From :func:`spade_lens.icl.factor_projections`. Rules and labels may be names.
        layer: Which layer; needed where the table has several.
        factors: Which factors, in the panels' order; all by default.
        width: Of the figure, in inches.

    Returns:
        The figure, not shown. Every panel has a y axis of its own.

    Raises:
        ValueError: If the table lacks a column, a factor or the layer, or has several layers and
            none is named.
    """
    needed = ("layer", "factor", "prompt", "demo", "rule", "label", "value")
    check_table("plot_projections", frame, needed, source="spade_lens.icl.factor_projections")
    known = sorted(frame["layer"].unique().tolist())
    layer = known[0] if layer is None and len(known) == 1 else layer
    if layer not in known:
        raise ValueError(f"plot_projections was given layer={layer}; expected one of {known}.")
    rows = choose("plot_projections", frame[frame["layer"] == layer], "factor", factors)
    by = [*(["task"] if "task" in frame.columns else []), "factor", "rule", "label", "demo"]
    means = summarise(rows, "value", by=by).sort_values(["rule", "label"], kind="stable")
    rules, labels = (list(means[name].unique()) for name in ("rule", "label"))
    names = {
        (rule, label): f"{rule if isinstance(rule, str) else f'rule {rule}'}; label {label}"
        for rule in rules
        for label in labels
    }
    pairs = zip(means["rule"], means["label"], strict=True)
    means = means.assign(line=[names[pair] for pair in pairs], panel=means["factor"])
    panels = list(rows["factor"].unique())
    means = means.sort_values("panel", key=lambda p: p.map(panels.index), kind="stable")
    return line_figure(
        "plot_projections",
        means.assign(x=means["demo"]),
        xlabel="demonstration (0 comes first)",
        ylabel=f"projection at layer {layer}",
        looks=crossed_looks(
            {name: (rules.index(r), labels.index(y)) for (r, y), name in names.items()}
        ),
        sharey=False,
        across=4 if len(panels) == 4 else 3,
        height=2.0,
        width=width,
    )
