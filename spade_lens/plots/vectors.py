"""Rule vectors by layer: how alike they are, what probes decode, what they vary with."""

from collections.abc import Sequence

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from spade_lens.plots.lines import Layout, Level, choose, crossed_looks, line_figure, means
from spade_lens.plots.registry import figure
from spade_lens.plots.style import by_task

_ENDS = ("mean", "low", "high")


@figure(
    "convergence",
    needs=("layer", "comparison", "labels", "control", *_ENDS),
    source="spade_lens.icl.convergence",
)
def plot_convergence(frame: pd.DataFrame, *, labels: Sequence[str] | None = None) -> Figure:
    """Draw the mean cosine similarity of rule vectors by layer, a line per comparison.

    Example:
        >>> import torch
        >>> vectors = torch.randn(3, 8, 4, 16)  # [layer batch demo d_model]
        >>> drawing = sl.plot(icl.convergence(vectors, rule=torch.arange(8) % 2))
        >>> len(drawing.axes)
        1

    Args:
        frame: From :func:`spade_lens.icl.convergence`.
        labels: Which of ``"any"``, ``"same"`` and ``"different"``, the labels of a pair; a panel
            each. By default all that the table has.
    """
    rows = choose(frame, "labels", labels)
    names = {"any": "any two vectors", "same": "of the same label", "different": "of two labels"}
    return line_figure(
        rows.assign(panel=rows["labels"].replace(names), line=rows["comparison"], x=rows["layer"]),
        Layout(ylabel="cosine similarity", control="rules shuffled", height=2.0),
    )


@figure("probes", needs=("layer", "control", "chance", *_ENDS), source="spade_lens.icl.probe")
def plot_probes(frame: pd.DataFrame, *, by: str = "probed") -> Figure:
    """Draw the accuracy of linear probes by layer, beside the same probes on shuffled classes.

    Example:
        >>> import torch
        >>> vectors = torch.randn(2, 10, 4, 8)  # [layer batch demo d_model]
        >>> drawing = sl.plot(icl.probe(vectors, (vectors[1, ..., 0] > 0).long()))
        >>> [t.get_text() for t in drawing.legends[0].texts]
        ['probe', 'classes shuffled', 'most frequent class']

    Args:
        frame: From :func:`spade_lens.icl.probe`; for several probes put together, with the column
            that ``by`` names.
        by: The column that says what was probed, such as the rule or the label: a panel each.
    """
    panel = frame[by].astype(str) if by in frame.columns else ""
    points = frame.assign(panel=panel, line="probe", x=frame["layer"])
    levels = [
        Level("most frequent class", rows["chance"].iloc[0], task or None, str(name))
        for name, of_panel in points.groupby("panel", sort=False)
        for task, rows in by_task(of_panel).items()
    ]
    layout = Layout(ylabel="accuracy", fraction=True, control="classes shuffled", height=2.0)
    return line_figure(points, layout, levels=levels)


@figure("factors", needs=("layer", "factor", "fraction"), source="spade_lens.icl.factor_variance")
def plot_factors(frame: pd.DataFrame, *, factors: Sequence[str] | None = None) -> Figure:
    """Draw the fraction of rule vectors' variance that each factor has, by layer; a panel each.

    Most factors have little, so the y axis is linear up to 0.01 and logarithmic from there.

    Example:
        >>> import torch
        >>> rule = torch.arange(16) % 2
        >>> label = (torch.arange(16)[:, None] // 2 + torch.arange(2)) % 2
        >>> frame = icl.factor_variance(torch.randn(2, 16, 2, 8), rule=rule, label=label)
        >>> [panel.get_title() for panel in sl.plot(frame, factors=["rule"]).axes]
        ['rule']

    Args:
        frame: From :func:`spade_lens.icl.factor_variance`.
        factors: Which factors and interactions, in the panels' order; by default all but the
            rest, which is what the others leave.

    Returns:
        Controls and the fraction that halves of the prompts agree on are drawn if the table has
        them.
    """
    rows = frame[frame["factor"] != "rest"] if factors is None else frame
    rows = choose(rows, "factor", factors)
    if rows.empty:
        raise ValueError(
            "The figure 'factors' was given the rest alone; give factors=['rest'] to see it."
        )
    rows = rows.assign(
        panel=rows["factor"], x=rows["layer"], control=False, low=float("nan"), high=float("nan")
    )
    points = [rows.assign(line="fraction", mean=rows["fraction"])]
    if "control" in frame.columns:
        ends = {"low": rows["control_low"], "high": rows["control_high"]}
        shuffled = frame.loc[rows.index, "control"]
        points.append(rows.assign(line="fraction", control=True, mean=shuffled, **ends))
    if "held_out" in frame.columns:
        held_out = rows.assign(mean=rows["held_out"])
        points.append(held_out.assign(line="fraction that two halves of the prompts agree on"))
    table = pd.concat(points)
    drawing = line_figure(
        table,
        Layout(ylabel="fraction of variance", control="fraction in shuffled vectors", across=4),
    )
    axis = drawing.axes[0]
    axis.set_yscale("symlog", linthresh=0.01, linscale=0.5)
    axis.set_yticks([0, 0.01, 0.1, 1], ["0", "0.01", "0.1", "1"])
    axis.yaxis.set_minor_locator(NullLocator())
    # What halves agree on may fall below 0.
    axis.set_ylim(1.2 * min(table["mean"].min(), -0.002), 1.2)
    return drawing


@figure(
    "projections",
    needs=("layer", "factor", "prompt", "demo", "rule", "label", "value"),
    source="spade_lens.icl.geometry.dpca_projections.factor_projections",
)
def plot_projections(
    frame: pd.DataFrame, *, layer: int | None = None, factors: Sequence[str] | None = None
) -> Figure:
    """Draw mean rule vectors along the first component of each factor, by demonstration.

    A line for every rule and label: colours are rules, dashes are labels. On the component of a
    rule, lines of one colour run together if vectors hold the rule there and nothing else.
    Shown are prompts that the components were not fitted on.

    Example:
        >>> import torch
        >>> rule = torch.arange(16) % 2
        >>> label = (torch.arange(16)[:, None] // 2 + torch.arange(2)) % 2
        >>> from spade_lens.icl.geometry.dpca_projections import factor_projections
        >>> frame = factor_projections(torch.randn(1, 16, 2, 8), rule=rule, label=label)
        >>> [panel.get_title() for panel in sl.plot(frame).axes]
        ['rule', 'label', 'demo']

    Args:
        frame: From :func:`~spade_lens.icl.geometry.dpca_projections.factor_projections`. Rules and
            labels may be names.
        layer: Which layer; needed where the table has several.
        factors: Which factors, in the panels' order; all by default.

    Returns:
        The figure, not shown, a panel per factor. Every panel has a y axis of its own.
    """
    present = sorted(frame["layer"].unique().tolist())
    layer = present[0] if layer is None and len(present) == 1 else layer
    if layer not in present:
        raise ValueError(f"layer={layer} was given; expected one of {present}.")
    rows = choose(frame[frame["layer"] == layer], "factor", factors)
    points = means(rows, "value", ["factor", "rule", "label", "demo"])
    points = points.sort_values(["rule", "label"], kind="stable")
    rules, labels = (list(points[name].unique()) for name in ("rule", "label"))
    names = {
        (rule, label): f"{rule if isinstance(rule, str) else f'rule {rule}'}; label {label}"
        for rule in rules
        for label in labels
    }
    pairs = zip(points["rule"], points["label"], strict=True)
    points = points.assign(line=[names[pair] for pair in pairs], panel=points["factor"])
    panels = list(rows["factor"].unique())
    points = points.sort_values("panel", key=lambda p: p.map(panels.index), kind="stable")
    looks = {name: (rules.index(r), labels.index(y)) for (r, y), name in names.items()}
    layout = Layout(
        xlabel="demonstration (0 comes first)",
        ylabel=f"projection at layer {layer}",
        sharey=False,
        across=4 if len(panels) == 4 else 3,
        height=2.0,
    )
    return line_figure(points.assign(x=points["demo"]), layout, looks=crossed_looks(looks))
