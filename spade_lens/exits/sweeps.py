"""Measure policies on tables: accuracy against compute, its front, families at equal compute."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd

from spade_lens.checks import checked
from spade_lens.exits.choice import best_of, tried_policies
from spade_lens.exits.controls import outcomes
from spade_lens.exits.policies import Oracle, Policy, check_policy
from spade_lens.exits.table import ExitTable
from spade_lens.exits.trace import among

THESE, OTHERS = "these prompts", "other prompts"
"""What a policy was chosen on: the prompts that it is measured on, or others."""

BUDGETS = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
"""Fractions of the full model's FLOPs at which accuracies are compared."""


@checked
def sweep(
    table: ExitTable,
    policies: Policy | Oracle | Sequence[Policy | Oracle],
    *,
    front: Literal["accuracy", "agreement"] | None = None,
) -> pd.DataFrame:
    """Measure accuracy against compute for every policy, with intervals.

    Nothing is chosen here, so the best row is the best *on these prompts*, and its interval does
    not know that it was chosen. For an honest figure choose on other prompts
    (:func:`spade_lens.calibrate`).

    Example:
        >>> from spade_lens.exits import FixedLayer, exit_tables, sweep
        >>> [table] = exit_tables(model, prompts, "logit", layers=[2, 3])
        >>> frame = sweep(table, [FixedLayer(2), FixedLayer(3)])
        >>> frame["policy"].tolist()
        ['layer 2', 'layer 3']

    Args:
        table: The prompts.
        policies: One policy or several.
        front: Return only the front by this measure, ``"accuracy"`` or ``"agreement"``: see
            :func:`pareto`. By default all policies.

    Returns:
        One row per policy: ``model, check, keep, among, policy, n``; ``early``, the fraction of
        prompts that left; ``exit_layer``, the mean; ``compute``, FLOPs over the full model's; and
        ``speedup``, ``agreement``, ``accuracy``, ``loss`` (full model's accuracy minus this
        one's), ``lost`` and ``gained`` (the fractions of prompts whose right answer is given up,
        and whose wrong one is mended), each with ``_low`` and ``_high``. All from ``accuracy`` on
        are NaN without targets. Fractions have Wilson's intervals, the loss has the score
        interval of paired proportions, and the speed-up has Student's of its linear part. With
        ``front``, ``chosen_on`` says that these prompts chose the rows.
    """
    given: list[Any] = list(policies) if isinstance(policies, Sequence) else [policies]
    if not given:
        raise ValueError("policies=[] was given; expected at least one policy.")
    for policy in given:
        if not isinstance(policy, Oracle):
            check_policy(policy)
    about = {"model": table.model, "check": table.check, "keep": table.keep}
    about["among"] = ", ".join(sorted({*among(table.n_candidates)}))
    frame = pd.DataFrame([about | {"policy": p.name} | outcomes(table, p).figures() for p in given])
    return frame if front is None else pareto(frame, measure=front).assign(chosen_on=THESE)


def pareto(frame: pd.DataFrame, *, measure: str = "accuracy") -> pd.DataFrame:
    """Return a sweep's front, ascending in compute: no other row is better or as good for less."""
    if not {"compute", measure} <= set(frame.columns):
        raise ValueError(
            f"A front needs the columns 'compute' and {measure!r}; got {list(frame.columns)}."
        )
    ordered = frame.sort_values(["compute", measure], ascending=[True, False], kind="stable")
    best_before = ordered[measure].cummax().shift(fill_value=-np.inf)
    return ordered[ordered[measure] > best_before].reset_index(drop=True)


def iso_compute(
    calibration: ExitTable,
    evaluation: ExitTable,
    families: Mapping[str, Sequence[Policy]],
    *,
    budgets: Sequence[float] = BUDGETS,
    measure: str = "accuracy",
) -> pd.DataFrame:
    """Measure accuracy at equal compute.

    *Our definition*, since the paper's is not public to us. A budget b is a fraction of the full
    model's FLOPs. A policy is affordable if its FLOPs on the calibration prompts are at most b
    times the full model's. Everything is charged: blocks, checks with their unembedding, SPADE's
    tail and the answer's unembedding. Among a family's affordable policies, the one most accurate
    on the calibration prompts is taken (the cheapest of equals). Its accuracy on the evaluation
    prompts is the accuracy at b. The iso-compute accuracy is the mean over the budgets that every
    family can meet; the paper's gain is then a difference of two.

    Returns:
        The columns of :func:`sweep`, with ``family``, ``budget`` and ``iso_compute`` (the same in
        all rows of a family). Budgets that a family cannot meet have no row.
    """
    check_pair(calibration, evaluation)
    rows: list[dict[Any, Any]] = []
    for family, policies in families.items():
        costs = sweep(calibration, policies)["compute"]
        for budget in budgets:
            affordable = [p for p, c in zip(policies, costs, strict=True) if c <= budget]
            if affordable:
                tried = tried_policies(affordable, calibration, measure=measure)
                choice = best_of(tried[:-1], loss=None)  # the last one never leaves
                frame = sweep(evaluation, [choice.policy])
                about = {"family": family, "budget": budget, "chosen_on": OTHERS}
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


def check_pair(calibration: ExitTable, other: ExitTable, name: str = "evaluation") -> None:
    """Raise unless a table is of the model, check, keep set and layers of the calibration table.

    Raises:
        ValueError: If it is of others; the message gives both.
    """
    known, given = ((t.model, t.check, t.keep, t.layers) for t in (calibration, other))
    if known != given:
        raise ValueError(
            f"The calibration table is of {known}, the {name} table of {given}; expected the "
            "same model, check, keep set and candidate layers."
        )
