"""Does a confidence hold what it claims, by layer? Reliability curves, calibration error, AUROC."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from spade_lens.checks import checked
from spade_lens.exits.table import ExitTable
from spade_lens.stats.auroc import auroc
from spade_lens.stats.intervals import calibration_error_interval, mean_interval

Event = Literal["agrees", "correct", "check agrees", "check correct"]
Bins = Literal["equal-mass", "equal-width"]


@checked
def reliability(
    table: ExitTable,
    *,
    event: Event = "agrees",
    bins: Bins = "equal-mass",
    n_bins: int | None = None,
) -> pd.DataFrame:
    """Measure how often the event that a confidence predicts happens, by bin and layer.

    The expected calibration error (ECE) of a layer is the mean over bins, weighted by their
    prompts, of the distance between mean confidence and frequency. It shrinks with the number of
    prompts and grows with noise: compare it between tables of the same size only. With equal-mass
    bins it is more robust.

    Example:
        >>> from spade_lens.exits import Confidence, exit_tables, reliability
        >>> top_1 = Confidence(LogitLens(model), "top-1")
        >>> [table] = exit_tables(model, prompts, top_1, layers=[1, 2])
        >>> sorted(set(reliability(table)["layer"]))
        [1, 2]

    Args:
        table: The prompts; the confidence should be a top-1 probability, the only measure that
            claims to be the probability of an event.
        event: ``"agrees"``: the answer at the exit is the full model's, which is what an exit
            relies on. ``"correct"``: it is right. ``"check agrees"`` and ``"check correct"``: the
            same of the check's own answer, the usual notion of calibration.
        bins: ``"equal-mass"``: as many prompts in each, up to rounding, ties broken by order;
            ``"equal-width"``: equal parts of the interval from 0 to 1.
        n_bins: The number of bins; by default as many as hold 20 prompts each, but 4 to 15. In
            small bins the interval of the ECE is too wide to say anything.

    Returns:
        A row for every layer and bin that is not empty: ``check, keep, event, layer, bin, n``,
        the mean ``confidence`` and the ``frequency`` of the event. The same in all rows of a
        layer, with ``_low`` and ``_high``: ``ece``, whose interval holds 0 where noise alone
        could have given it, and ``brier``, the mean squared distance of confidence and event.

    Raises:
        ValueError: If an argument is none of those, or no prompt has a target and one is needed.
    """
    happened, measurable = _event(table, event)
    frames = []
    for row, layer in enumerate(table.layers):
        confidence = table.confidence[row, measurable].double()
        curve = binned(confidence, happened[row, measurable], bins=bins, n_bins=n_bins)
        curve.insert(0, "layer", layer)
        frames.append(curve)
    frame = pd.concat(frames, ignore_index=True)
    about = {"check": table.check, "keep": table.keep, "event": event}
    return frame.assign(**about)[[*about, *frame.columns]]


@checked
def check_auroc(
    tables: ExitTable | Sequence[ExitTable], *, event: Event = "agrees"
) -> pd.DataFrame:
    """Measure how well each check tells good exits from bad ones, by keep set and layer.

    The area under the ROC curve (AUROC) is the chance that a prompt for which the event happens
    has the higher confidence of two. It is .5 for a check that knows nothing, whatever the
    threshold and however often the event happens.

    Example:
        >>> from spade_lens.exits import check_auroc, exit_tables
        >>> tables = exit_tables(model, prompts, ["logit", "own"], layers=[1, 2])
        >>> check_auroc(tables).columns.tolist()[:5]
        ['check', 'keep', 'event', 'layer', 'auroc']

    Args:
        tables: One table, or several of any checks and keep sets.
        event: What the confidence should tell; see :func:`reliability`.

    Returns:
        A row for every table and layer: ``check, keep, event, layer, auroc, auroc_low,
        auroc_high``, the ``frequency`` of the event, and ``n``, the prompts. The interval is
        the jackknife's over prompts; see :func:`spade_lens.stats.auroc.auroc`. All three are NaN
        where the event happens for every prompt or for none.

    Raises:
        TypeError: If it is no exit table.
        ValueError: If there is no table, or no prompt has a target and one is needed.
    """
    tables = [tables] if isinstance(tables, ExitTable) else list(tables)
    if not tables:
        raise ValueError("tables=[] was given; expected at least one exit table.")
    for table in tables:
        if not isinstance(table, ExitTable):
            raise TypeError(f"tables= holds {table!r}; expected exit tables.")
    rows = []
    for table in tables:
        happened, measurable = _event(table, event)
        prompt = measurable.nonzero()[:, 0].numpy()
        for row, layer in enumerate(table.layers):
            confidence = table.confidence[row, measurable].double().numpy()
            true = happened[row, measurable].numpy()
            area, low, high = auroc(confidence, true, prompt)
            rows.append(
                {
                    "check": table.check,
                    "keep": table.keep,
                    "event": event,
                    "layer": layer,
                    "auroc": area,
                    "auroc_low": low,
                    "auroc_high": high,
                    "frequency": float(true.mean()),
                    "n": len(true),
                }
            )
    return pd.DataFrame(rows)


def binned(
    confidence: Float[Tensor, " prompt"],
    happened: Bool[Tensor, " prompt"],
    *,
    bins: Bins = "equal-mass",
    n_bins: int | None = None,
) -> pd.DataFrame:
    """Return the reliability curve of one confidence: a row for every bin that is not empty.

    Returns:
        The columns of :func:`reliability` from ``bin`` on.

    Raises:
        ValueError: If there are no bins.
    """
    n, rows, event = len(confidence), [], happened.double()
    if n_bins is None:
        n_bins = max(4, min(15, n // 20))
    if n_bins < 1:
        raise ValueError(f"n_bins={n_bins} was given; expected 1 or more.")
    if bins == "equal-mass":
        place = torch.empty(n, dtype=torch.long)
        place[confidence.argsort(stable=True)] = torch.arange(n) * n_bins // n
    else:
        place = (confidence * n_bins).long().clamp(0, n_bins - 1)
    for b in sorted(set(place.tolist())):
        here = place == b
        rows.append(
            {
                "bin": b,
                "n": int(here.sum()),
                "confidence": float(confidence[here].mean()),
                "frequency": float(event[here].mean()),
            }
        )
    frame = pd.DataFrame(rows)
    means, frequencies, counts = (frame[c].to_numpy() for c in ("confidence", "frequency", "n"))
    error = float((counts / n * np.abs(means - frequencies)).sum())
    squares = (confidence - event).square().numpy()
    values = {
        "ece": (error, *calibration_error_interval(means, frequencies, counts)),
        "brier": (float(squares.mean()), *mean_interval(squares)),
    }
    for name, value in values.items():
        frame[name], frame[f"{name}_low"], frame[f"{name}_high"] = value
    return frame


def _event(
    table: ExitTable, event: str
) -> tuple[Bool[Tensor, "layer prompt"], Bool[Tensor, " prompt"]]:
    """Return whether the event happened, and for which prompts that can be said."""
    answers: dict[str, Int[Tensor, "layer prompt"]] = {
        "agrees": table.exit_answer,
        "correct": table.exit_answer,
        "check agrees": table.check_answer,
        "check correct": table.check_answer,
    }
    if event.endswith("agrees"):
        return answers[event] == table.final_answer, torch.ones(len(table), dtype=torch.bool)
    has_target = table.target >= 0
    if not has_target.any():
        raise ValueError(f"event={event!r} needs targets, and no prompt has one.")
    return answers[event] == table.target, has_target
