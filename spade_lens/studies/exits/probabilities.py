"""Are the probabilities of early exit's answers right? Reliability and conformal sets."""

import math
from collections.abc import Mapping, Sequence
from typing import get_args

import pandas as pd

from spade_lens.exits.calibration import ExitRule
from spade_lens.exits.reliability_curves import Bins
from spade_lens.exits.table import ExitTable
from spade_lens.exits.uncertainty import conformal_sets, gated_reliability

Rules = Mapping[tuple[str, float | None], ExitRule]
"""Rules for exiting, by who made them and the loss of accuracy wanted."""

_FEWEST = 20
"""Half of the test prompts give quantiles; of fewer than so many these say little."""


def reliability_of(rules: Rules, tables: Sequence[ExitTable]) -> pd.DataFrame:
    """Return how often answers are right by their probability, all exits together, by rule."""
    frames = []
    for (who, loss), rule in rules.items():
        table = rule.table(tables)
        for bins in get_args(Bins):
            frame = gated_reliability(table, rule.policy, bins=bins)
            frames.append(frame.assign(rule=who, wanted=_number(loss), bins=bins))
    return pd.concat(frames, ignore_index=True)


def conformal_of(
    rules: Rules, tables: Sequence[ExitTable], *, chosen_on: Sequence[ExitTable], confidence: float
) -> pd.DataFrame:
    """Return the conformal sets of every rule: quantiles from the first half of the test prompts.

    Empty where a prompt has no right candidate, there are too few prompts, or crepes is missing.
    """
    frames = []
    for (who, loss), rule in rules.items():
        table = rule.table(tables)
        half = len(table) // 2
        if half < _FEWEST or (table.right_option < 0).any():
            break
        quantiles, test = table.of(range(half)), table.of(range(half, len(table)))
        try:
            # The prompts that chose are the same whatever the check and the keep set.
            frame = conformal_sets(
                quantiles, test, rule.policy, confidence=confidence, chosen_on=chosen_on[:1]
            )
        except ImportError:
            break
        frames.append(frame.assign(rule=who, wanted=_number(loss)))
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()


def _number(loss: float | None) -> float:
    return math.nan if loss is None else loss
