"""Any policy on a table, without the model: the engine's exits, answers and FLOPs exactly."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from spade_lens.exits.policies import Checks, Oracle, Policy
from spade_lens.exits.table import ExitTable
from spade_lens.exits.trace import ExitTrace


def simulate(table: ExitTable, policy: Policy | Oracle) -> ExitTrace:
    """What the engine would do with this policy, from a table.

    Example:
        >>> from spade_lens.exits import FixedLayer, exit_tables, simulate
        >>> [table] = exit_tables(model, prompts, LogitLens(model), layers=[2, 3])
        >>> simulate(table, FixedLayer(3)).exit_layer.tolist()
        [3, 3]

    Args:
        table: From :func:`exit_tables`.
        policy: A policy, or the oracle.

    Returns:
        The trace; seconds are NaN, and padding is 0.

    Raises:
        ValueError: If the policy does not fit the table's candidate layers.
    """
    n = len(table)
    if isinstance(policy, Oracle):
        stop, checked = policy.first(table.agrees), []
    else:
        stops = policy.stops(table.layers)
        rows = [table.layers.index(layer) for layer in stops]
        stop = torch.full((n,), len(table.layers))
        for made in range(1, len(stops) + 1):
            checks = _checks(table, stops[:made], rows[:made], reads=policy.reads)
            here = policy.leaves(checks) & (stop == len(table.layers))
            stop[here] = rows[made - 1]
        checked = rows if policy.reads else []
    answers = torch.cat([table.exit_answer, table.final_answer[None]])
    return ExitTrace(
        policy=policy.name,
        n_layers=table.n_layers,
        exit_layer=torch.tensor(table.prices.stops)[stop],
        answer=answers[stop, torch.arange(n)],
        target=table.target,
        flops_padding=torch.zeros(n, dtype=torch.long),
        full_flops=table.prices.full,
        seconds=torch.full((n,), torch.nan),
        **table.prices.settle(stop, checked),
    )


def _checks(table: ExitTable, layers: Sequence[int], rows: Sequence[int], *, reads: bool) -> Checks:
    confidence, answer = table.confidence[list(rows)], table.check_answer[list(rows)]
    if not reads:
        confidence, answer = torch.full_like(confidence, torch.nan), torch.full_like(answer, -1)
    return Checks(tuple(layers), confidence, answer)


def sweep(
    table: ExitTable,
    policies: Sequence[Policy | Oracle],
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """Accuracy against compute of every policy, with intervals: the raw material of a front.

    Nothing is chosen here, so the best row is the best *on these prompts*; for an honest figure
    use :func:`operating_points`.

    Args:
        table: The prompts.
        policies: The policies.
        resamples: Of the bootstrap over prompts; the 2.5 and 97.5 percentiles are reported.
        seed: Of the bootstrap. All policies meet the same resamples.

    Returns:
        One row per policy: ``model, check, keep, policy, n``; ``early``, the share of prompts
        that left; ``exit_layer``, the mean; ``compute``, FLOPs over the full model's; and
        ``speedup``, ``agreement``, ``accuracy`` and ``loss`` (full model's accuracy minus this
        one's), each with ``_low`` and ``_high``. The last two are NaN without targets.
    """
    draws = _draws(len(table), resamples, seed)
    about = {"model": table.model, "check": table.check, "keep": table.keep}
    return pd.DataFrame(
        [about | _measure(table, simulate(table, policy), draws) for policy in policies]
    )


def _draws(n: int, resamples: int, seed: int) -> Tensor:
    """How often each prompt is drawn in each resample, [resample prompt]."""
    counts = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples)
    return torch.from_numpy(counts).double()


def _measure(table: ExitTable, trace: ExitTrace, draws: Tensor) -> dict[str, Any]:
    n = len(table)
    known = (table.target >= 0).double()
    right = ((trace.answer == table.target) * known).double()
    full_right = ((table.final_answer == table.target) * known).double()
    columns = torch.stack(
        [
            trace.full_flops.double(),
            trace.flops.double(),
            (trace.answer == table.final_answer).double(),
            torch.ones(n, dtype=torch.double),
            right,
            full_right - right,
            known,
        ],
        dim=1,
    )
    # The first row is the prompts themselves, the others are the resamples.
    sums = torch.cat([torch.ones(1, n, dtype=torch.double), draws]) @ columns
    full, flops, agreeing, count, rights, lost, knowns = sums.T
    values = {
        "speedup": full / flops,
        "agreement": agreeing / count,
        "accuracy": rights / knowns,
        "loss": lost / knowns,
    }
    row: dict[str, Any] = {
        "policy": trace.policy,
        "n": n,
        "early": float((trace.exit_layer < trace.n_layers).double().mean()),
        "exit_layer": float(trace.exit_layer.double().mean()),
        "compute": float(flops[0] / full[0]),
    }
    for name, value in values.items():
        row[name] = float(value[0])
        ends = [torch.nan, torch.nan]
        if len(draws) and bool(value[0].isfinite()):
            ends = np.nanpercentile(value[1:].numpy(), [2.5, 97.5]).tolist()
        row[f"{name}_low"], row[f"{name}_high"] = ends
    return row


def pareto(frame: pd.DataFrame, *, measure: str = "accuracy") -> pd.DataFrame:
    """The front of a sweep: rows than which no other is as good for less, or better for as much.

    Args:
        frame: From :func:`sweep`, one or several put together.
        measure: The column that should be large; ``compute`` should be small.

    Returns:
        The rows of the front, ascending in compute.

    Raises:
        ValueError: If the frame lacks a column.
    """
    if not {"compute", measure} <= set(frame.columns):
        raise ValueError(
            f"A front needs the columns 'compute' and {measure!r}; got {list(frame.columns)}."
        )
    ordered = frame.sort_values(["compute", measure], ascending=[True, False], kind="stable")
    best_before = ordered[measure].cummax().shift(fill_value=-np.inf)
    return ordered[ordered[measure] > best_before].reset_index(drop=True)
