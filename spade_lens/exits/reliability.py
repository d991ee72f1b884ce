"""Is a confidence worth its number? Reliability curves and calibration error, layer by layer."""

from typing import Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from spade_lens.exits.table import ExitTable

Event = Literal["agrees", "correct", "check agrees", "check correct"]
Bins = Literal["equal-mass", "equal-width"]


def reliability(
    table: ExitTable,
    *,
    event: Event = "agrees",
    bins: Bins = "equal-mass",
    n_bins: int = 15,
) -> pd.DataFrame:
    """How often what a confidence stands for comes true, bin by bin, at every layer.

    Args:
        table: The prompts; the confidence should be a top-1 probability, which alone claims to
            be the chance of an event.
        event: ``"agrees"``: SPADE's answer from there is the full model's, which is what an exit
            bets on. ``"correct"``: it is right. With ``"check"`` before: the same of the check's own
            answer, the usual notion of calibration.
        bins: ``"equal-mass"``: as many prompts in each, but for rounding, ties broken by order;
            ``"equal-width"``: equal parts of the interval from 0 to 1.
        n_bins: How many.

    Returns:
        A row for every layer and bin that is not empty: ``check, keep, event, layer, bin, n``,
        the mean ``confidence`` and the ``frequency`` of the event.

    Raises:
        ValueError: If an argument is none of those, or no prompt has a target and one is needed.
    """
    if n_bins < 1:
        raise ValueError(f"n_bins={n_bins} was given; expected 1 or more.")
    happened, known = _event(table, event)
    n = int(known.sum())
    rows = []
    for row, layer in enumerate(table.layers):
        confidence = table.confidence[row, known].double()
        if bins == "equal-mass":
            place = torch.empty(n, dtype=torch.long)
            place[confidence.argsort(stable=True)] = torch.arange(n) * n_bins // n
        elif bins == "equal-width":
            place = (confidence * n_bins).long().clamp(0, n_bins - 1)
        else:
            raise ValueError(f"bins={bins!r} was given; expected 'equal-mass' or 'equal-width'.")
        for b in sorted(set(place.tolist())):
            here = place == b
            rows.append(
                {
                    "layer": layer,
                    "bin": b,
                    "n": int(here.sum()),
                    "confidence": float(confidence[here].mean()),
                    "frequency": float(happened[row, known][here].double().mean()),
                }
            )
    frame = pd.DataFrame(rows)
    for place_of, (name, value) in enumerate(
        {"check": table.check, "keep": table.keep, "event": event}.items()
    ):
        frame.insert(place_of, name, value)
    return frame


def calibration_error(
    table: ExitTable,
    *,
    event: Event = "agrees",
    bins: Bins = "equal-mass",
    n_bins: int = 15,
) -> pd.DataFrame:
    """The expected calibration error (ECE) at every layer.

    It is the mean over bins, weighted by their prompts, of the distance between mean confidence
    and frequency. It shrinks with the number of bins and grows with noise: compare it between
    tables of the same size only.

    Args:
        table: The prompts.
        event: See :func:`reliability`.
        bins: Likewise; the error with equal-mass bins is the more robust one.
        n_bins: Likewise.

    Returns:
        One row per layer: ``check, keep, event, layer, n, ece``.

    Raises:
        ValueError: As for :func:`reliability`.
    """
    curve = reliability(table, event=event, bins=bins, n_bins=n_bins)
    gap = (curve["confidence"] - curve["frequency"]).abs() * curve["n"]
    grouped = curve.assign(gap=gap).groupby(["check", "keep", "event", "layer"], sort=False)
    sums = grouped[["n", "gap"]].sum().reset_index()
    sums["ece"] = np.divide(sums.pop("gap"), sums["n"])
    return sums


def _event(
    table: ExitTable, event: str
) -> tuple[Bool[Tensor, "layer prompt"], Bool[Tensor, " prompt"]]:
    """Whether it happened, and for which prompts one can tell."""
    answers: dict[str, Int[Tensor, "layer prompt"]] = {
        "agrees": table.exit_answer,
        "correct": table.exit_answer,
        "check agrees": table.check_answer,
        "check correct": table.check_answer,
    }
    if event not in answers:
        raise ValueError(f"event={event!r} was given; expected one of {sorted(answers)}.")
    if event.endswith("agrees"):
        return answers[event] == table.final_answer, torch.ones(len(table), dtype=torch.bool)
    known = table.target >= 0
    if not known.any():
        raise ValueError(f"event={event!r} needs targets, and no prompt has one.")
    return answers[event] == table.target, known
