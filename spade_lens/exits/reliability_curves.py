"""Reliability curves and calibration error: does a confidence hold what it claims, by layer?"""

from typing import Literal

import pandas as pd
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from spade_lens.checks import checked
from spade_lens.exits.table import ExitTable

Event = Literal["agrees", "correct", "check agrees", "check correct"]
Bins = Literal["equal-mass", "equal-width"]


@checked
def reliability(
    table: ExitTable, *, event: Event = "agrees", bins: Bins = "equal-mass", n_bins: int = 15
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
        n_bins: The number of bins.

    Returns:
        A row for every layer and bin that is not empty: ``check, keep, event, layer, bin, n``,
        the mean ``confidence``, the ``frequency`` of the event, and the layer's ``ece``.

    Raises:
        ValueError: If an argument is none of those, or no prompt has a target and one is needed.
    """
    if n_bins < 1:
        raise ValueError(f"n_bins={n_bins} was given; expected 1 or more.")
    happened, measurable = _event(table, event)
    n = int(measurable.sum())
    rows = []
    for row, layer in enumerate(table.layers):
        confidence = table.confidence[row, measurable].double()
        if bins == "equal-mass":
            place = torch.empty(n, dtype=torch.long)
            place[confidence.argsort(stable=True)] = torch.arange(n) * n_bins // n
        else:
            place = (confidence * n_bins).long().clamp(0, n_bins - 1)
        for b in sorted(set(place.tolist())):
            here = place == b
            rows.append(
                {
                    "layer": layer,
                    "bin": b,
                    "n": int(here.sum()),
                    "confidence": float(confidence[here].mean()),
                    "frequency": float(happened[row, measurable][here].double().mean()),
                }
            )
    frame = pd.DataFrame(rows)
    gap = (frame["confidence"] - frame["frequency"]).abs() * frame["n"]
    frame["ece"] = gap.groupby(frame["layer"]).transform("sum") / n
    about = {"check": table.check, "keep": table.keep, "event": event}
    return frame.assign(**about)[[*about, *frame.columns]]


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
