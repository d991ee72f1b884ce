"""Learning in context: risk by number of examples, probes by layer, losses of a training."""

from collections.abc import Sequence

import pandas as pd

from spade_lens.plots.lines import Layout, Level, choose, crossed_looks, line_figure
from spade_lens.plots.registry import figure
from spade_lens.plots.style import PageFigure

_SOURCE = "a study of spade_lens.studies.InContextPlan"


@figure("risk", needs=("predictor", "shots", "mean", "low", "high"), source=_SOURCE)
def plot_risk(
    frame: pd.DataFrame, *, predictors: Sequence[str] | None = None, highest: float = 1.5
) -> PageFigure:
    """Draw the mean squared error by number of examples, of the network and what is exact.

    Example:
        >>> import pandas as pd
        >>> rows = pd.DataFrame({"predictor": "network", "shots": [0, 1, 2], "mean": [1, 0.6, 0.4],
        ...     "low": [0.9, 0.5, 0.3], "high": [1.1, 0.7, 0.5]})
        >>> len(sl.plot(rows).axes)
        1

    Args:
        frame: The table ``risk`` of the study.
        predictors: Which to draw; by default all.
        highest: What is higher is clipped, as least squares near as many examples as features.
    """
    rows = choose(frame, "predictor", predictors)
    # Few prompts with huge errors make an interval of Student's reach below 0.
    ends = {name: rows[name].clip(0.0, highest) for name in ("mean", "low", "high")}
    table = rows.assign(line=rows["predictor"], x=rows["shots"], **ends)
    if "seed" in rows.columns:
        table["panel"] = "seed " + rows["seed"].astype(str)
    layout = Layout(ylabel="mean squared error", xlabel="examples before", height=2.6)
    return line_figure(table, layout)


@figure("probes_by_layer", needs=("network", "place", "quantity", "probe_error"), source=_SOURCE)
def plot_probe_errors(
    frame: pd.DataFrame, *, quantities: Sequence[str] | None = None, seed: int | None = None
) -> PageFigure:
    """Draw what linear probes read at x-tokens and y-tokens, by layer, trained and untrained.

    Example:
        >>> import pandas as pd
        >>> rows = pd.DataFrame({"network": "trained", "place": "x", "quantity": "Phi(x)",
        ...     "layer": [0, 1], "probe_error": [0.3, 0.1], "probe_error_low": [0.2, 0.0],
        ...     "probe_error_high": [0.4, 0.2]})
        >>> [panel.get_title() for panel in sl.plot(rows).axes]
        ['at x-tokens']

    Args:
        frame: The table ``probes`` of the study.
        quantities: What is read; by default everything.
        seed: Which seed; by default the first.
    """
    if "seed" in frame.columns:
        frame = choose(frame, "seed", [frame["seed"].iloc[0] if seed is None else seed])
    rows = choose(frame, "quantity", quantities)
    table = pd.DataFrame(
        {
            "line": rows["quantity"],
            "x": rows["layer"],
            "panel": "at " + rows["place"] + "-tokens",
            "control": rows["network"] == "untrained",
            "mean": rows["probe_error"],
            "low": rows["probe_error_low"],
            "high": rows["probe_error_high"],
        }
    )
    names = list(dict.fromkeys(table["line"]))
    layout = Layout(ylabel="error over variance", control="untrained network", height=2.4)
    looks = crossed_looks({name: (i, i) for i, name in enumerate(names)})
    return line_figure(table, layout, looks=looks, levels=[Level("the mean alone", 1.0)])


@figure("training", needs=("update", "train_loss", "validation_loss"), source="sl.training.train")
def plot_training(frame: pd.DataFrame) -> PageFigure:
    """Draw the losses of a training by number of updates.

    Example:
        >>> import pandas as pd
        >>> rows = {"update": [50, 100], "train_loss": [1.0, 0.5], "validation_loss": [1.1, 0.7]}
        >>> len(sl.plot(pd.DataFrame(rows)).axes)
        1

    Args:
        frame: The history that :func:`spade_lens.training.train` returns.
    """
    seeds = "seed " + frame["seed"].astype(str) if "seed" in frame.columns else ""
    columns = {"training": "train_loss", "held-out data": "validation_loss"}
    parts = [
        pd.DataFrame({"line": line, "x": frame["update"], "panel": seeds, "mean": frame[column]})
        for line, column in columns.items()
        if frame[column].notna().any()
    ]
    table = pd.concat(parts)
    table = table.assign(low=table["mean"], high=table["mean"])
    return line_figure(table, Layout(ylabel="loss", xlabel="updates of the weights", height=2.4))


@figure("validation", needs=("method", "truth", "measure", "score", "layer"), source=_SOURCE)
def plot_validation(
    frame: pd.DataFrame, *, measure: str = "slope", seed: int | None = None
) -> PageFigure:
    """Draw how far a network follows what is exact, by the layer at which it was acted on.

    Scores above 2 are drawn at 2.

    Example:
        >>> import pandas as pd
        >>> rows = pd.DataFrame({"method": "patch y-tokens", "truth": "ridge", "measure": "slope",
        ...     "layer": [0, 1], "score": [1.0, 0.2], "score_low": 0.1, "score_high": 1.1})
        >>> len(sl.plot(rows).axes)
        1

    Args:
        frame: The table ``validation`` or ``selection`` of the study.
        measure: ``"slope"``, ``"normalised error"``, or ``"weight"`` of the table ``selection``.
        seed: Which seed; by default the first.
    """
    if "seed" in frame.columns:
        frame = choose(frame, "seed", [frame["seed"].iloc[0] if seed is None else seed])
    rows = choose(frame[frame["layer"].notna()], "measure", [measure])
    table = pd.DataFrame(
        {
            "line": rows["method"],
            "x": rows["layer"].astype(int),
            "panel": rows["truth"] if measure != "slope" else "",
            "mean": rows["score"].clip(upper=2.0),
            "low": rows["score_low"].clip(upper=2.0),
            "high": rows["score_high"].clip(upper=2.0),
        }
    )
    ylabels = {"slope": "slope against what is exact", "weight": "weight in the move"}
    ylabel = ylabels.get(measure, "error over variance")
    return line_figure(table, Layout(ylabel=ylabel, height=2.4), levels=[Level("1", 1.0)])
