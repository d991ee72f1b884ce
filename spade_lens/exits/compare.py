"""Compare families of policies at equal compute: chosen on some prompts, measured on others."""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from spade_lens.exits.choice import best_of, tried_policies
from spade_lens.exits.policies import Policy
from spade_lens.exits.sweeps import sweep
from spade_lens.exits.table import ExitTable

BUDGETS = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
"""Fractions of the full model's FLOPs at which accuracies are compared."""


def iso_compute(
    calibration: ExitTable,
    evaluation: ExitTable,
    families: Mapping[str, Sequence[Policy]],
    *,
    budgets: Sequence[float] = BUDGETS,
    measure: str = "accuracy",
    resamples: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """Measure accuracy at equal compute.

    *Our definition*, since the paper's is not public to us. A budget b is a fraction of the full
    model's FLOPs. A policy is affordable if its FLOPs on the calibration prompts are at most b
    times the full model's. Everything is charged: blocks, checks with their unembedding, SPADE's
    tail and the answer's unembedding. Among a family's affordable policies, the one most accurate
    on the calibration prompts is taken (the cheapest of equals). Its accuracy on the evaluation
    prompts is the accuracy at b. The iso-compute accuracy is the mean over the budgets that every
    family can meet; the paper's gain is then a difference of two.

    Args:
        calibration: The prompts that policies are chosen on.
        evaluation: Other prompts, with the same check and keep set.
        families: Policies to choose from, by name.
        budgets: The budgets.
        measure: ``"accuracy"``, or ``"agreement"`` with the full model.
        resamples: Resamples of the bootstrap over evaluation prompts.
        seed: Seed of the bootstrap.

    Returns:
        The columns of :func:`sweep`, with ``family``, ``budget`` and ``iso_compute`` (the same in
        all rows of a family). Budgets that a family cannot meet have no row.

    Raises:
        ValueError: If the tables do not have one check and keep set, or there are no targets.
    """
    _check_pair(calibration, evaluation)
    rows: list[dict[Any, Any]] = []
    for family, policies in families.items():
        costs = sweep(calibration, policies, resamples=0)["compute"]
        for budget in budgets:
            affordable = [p for p, c in zip(policies, costs, strict=True) if c <= budget]
            if affordable:
                tried = tried_policies(affordable, calibration, measure=measure)
                choice = best_of(tried[:-1], loss=None)  # the last one never leaves
                frame = sweep(evaluation, [choice.policy], resamples=resamples, seed=seed)
                about = {"family": family, "budget": budget}
                rows.append(about | frame.iloc[0].to_dict())
    if not rows:
        raise ValueError(
            f"No policy of any family stays within {max(budgets):.0%} of the full model's FLOPs. "
            "Give larger budgets or lower candidate layers."
        )
    frame = pd.DataFrame(rows)
    met = frame.groupby("budget")["family"].nunique()
    common = frame[frame["budget"].isin(met.index[met == len(families)])]
    frame["iso_compute"] = frame["family"].map(common.groupby("family")[measure].mean())
    return frame


def _check_pair(calibration: ExitTable, evaluation: ExitTable) -> None:
    one, other = ((t.model, t.check, t.keep, t.layers) for t in (calibration, evaluation))
    if one != other:
        raise ValueError(
            f"The calibration table is of {one}, the evaluation table of {other}; expected the "
            "same model, check, keep set and candidate layers."
        )
