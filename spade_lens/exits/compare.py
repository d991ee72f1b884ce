"""Ways of exiting beside each other: chosen on calibration prompts, measured on others."""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import torch

from spade_lens.exits.choose import best_choice
from spade_lens.exits.policies import Policy
from spade_lens.exits.simulate import sweep
from spade_lens.exits.table import ExitTable

BUDGETS = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
"""Shares of the full model's FLOPs at which accuracies are compared."""


def operating_points(
    calibration: ExitTable,
    evaluation: ExitTable,
    families: Mapping[str, Sequence[Policy]],
    *,
    losses: Sequence[float | None] = (None, 0.01),
    measure: str = "accuracy",
    resamples: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """For every family of policies the one chosen on some prompts, measured on others.

    The speed-up *at best accuracy* (``loss`` None) is that of the policy with the highest accuracy
    on the calibration prompts, the cheapest of those where several are equal. The speed-up *at a
    loss of at most x* is that of the cheapest policy whose accuracy on the calibration prompts is
    no more than x below the full model's. Speed-ups are ratios of FLOPs summed over the
    evaluation prompts, checks and tail charged. The intervals are over evaluation prompts, given
    the policy.

    Args:
        calibration: The prompts that policies are chosen on.
        evaluation: Other prompts, with the same check and keep set.
        families: Policies to choose from, by name: see :func:`families`.
        losses: The losses wanted; None for best accuracy.
        measure: ``"accuracy"``, or ``"agreement"`` with the full model.
        resamples: Of the bootstrap over evaluation prompts.
        seed: Of the bootstrap.

    Returns:
        The columns of :func:`sweep`, with ``family``, ``wanted`` (the loss; NaN for best
        accuracy) and, of the calibration prompts, ``calibration_loss``, ``calibration_speedup``,
        ``calibration_early`` (how many left; 0 says that nothing was safe and the policy never
        exits) and ``calibration_n``.

    Raises:
        ValueError: If the tables do not have one check and keep set, or there are no targets.
    """
    _check_pair(calibration, evaluation)
    rows = []
    for family, policies in families.items():
        for loss in losses:
            choice = best_choice(policies, calibration, loss=loss, measure=measure)
            found = sweep(evaluation, [choice.policy], resamples=resamples, seed=seed)
            about = {
                "family": family,
                "wanted": torch.nan if loss is None else loss,
                "calibration_loss": choice.loss,
                "calibration_speedup": choice.speedup,
                "calibration_early": choice.early,
                "calibration_n": choice.n,
            }
            rows.append(about | found.iloc[0].to_dict())
    return pd.DataFrame(rows)


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
    """Accuracy at equal compute.

    *Our definition*, since the paper's is not public to us. A budget b is a share of the full
    model's FLOPs. Of a family's policies those are affordable whose FLOPs on the calibration
    prompts, over the full model's on the same prompts, are at most b, with everything charged:
    blocks, checks with their unembedding, SPADE's tail and the answer's unembedding. Among them
    the one most accurate on the calibration prompts is taken (the cheapest of equals). Its
    accuracy on the evaluation prompts is the accuracy at b. The iso-compute accuracy is the mean
    over the budgets that every family can meet; the paper's gain is then a difference of two.

    Args:
        calibration: The prompts that policies are chosen on.
        evaluation: Other prompts, with the same check and keep set.
        families: Policies to choose from, by name.
        budgets: The budgets.
        measure: ``"accuracy"``, or ``"agreement"`` with the full model.
        resamples: Of the bootstrap over evaluation prompts.
        seed: Of the bootstrap.

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
                choice = best_choice(
                    affordable, calibration, loss=None, measure=measure, or_never=False
                )
                found = sweep(evaluation, [choice.policy], resamples=resamples, seed=seed)
                about = {"family": family, "budget": budget}
                rows.append(about | found.iloc[0].to_dict())
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
