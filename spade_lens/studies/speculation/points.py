"""What a setting of drafts reaches: acceptance, tokens a round, bounds and measured speed."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from spade_lens.stats.intervals import mean_interval
from spade_lens.studies.speculation.costs import CostModel

WINDOWS = range(1, 7)
"""The windows of Kangaroo's consistent token acceptance rate."""
SETTING = ["drafter", "layer", "draft_tokens", "eta", "adaptive"]
"""What names a setting."""
FASTER, SLOWER, UNDECIDED = "faster", "slower", "undecided"

RoundsOfText = Sequence[tuple[int, int, int]]
"""For every round of a text, how many tokens were drafted, accepted and written."""


@dataclass(frozen=True)
class Setting:
    """A drafter, how many tokens it drafts, and what ends a draft.

    Args:
        drafter: The drafter's name.
        layer: Its layer; 0 for one that reads tokens alone.
        draft_tokens: How many tokens a round drafts, at most.
        eta: A draft ends after a token whose probability is below this.
        adaptive: Whether drafts are as long as pays.
    """

    drafter: str
    layer: int
    draft_tokens: int
    eta: float = 0.0
    adaptive: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Return the columns that name it."""
        return {name: getattr(self, name) for name in SETTING}


def by_prompt(
    setting: Setting, rounds: Sequence[RoundsOfText], kinds: Sequence[str], costs: CostModel
) -> pd.DataFrame:
    """Return a row for every prompt: counts of its rounds, and the speed that costs predict."""
    rows = []
    for prompt, (kind, several) in enumerate(zip(kinds, rounds, strict=True)):
        drafted, accepted, written = (sum(column) for column in zip(*several, strict=True))
        each = [n for n, _, _ in several]
        row = {"kind": kind, "prompt": prompt, "rounds": len(several), "n_new": written}
        row |= {"n_drafted": drafted, "n_accepted": accepted}
        row |= {"acceptance": accepted / drafted if drafted else np.nan}
        rows.append(setting.to_dict() | row | {"predicted_speedup": costs.speedup(each, written)})
    return pd.DataFrame(rows)


def point(
    setting: Setting,
    kind: str,
    prompts: pd.DataFrame,
    rounds: Sequence[RoundsOfText],
    costs: CostModel,
    n_layers: int,
) -> dict[str, Any]:
    """Summarise a setting over the prompts of a kind.

    Args:
        setting: The setting.
        kind: The kind.
        prompts: Rows of :func:`by_prompt` of these prompts.
        rounds: Their rounds.
        costs: The costs of its rounds.
        n_layers: How many blocks the model has.
    """
    every = [one for several in rounds for one in several]
    drafted = [n for n, _, _ in every]
    per_round = sum(drafted) / len(every)
    # LayerSkip's: of every text, and then the mean.
    accepted = prompts["acceptance"].dropna().to_numpy(dtype=float)
    acceptance = float(accepted.mean()) if len(accepted) else np.nan
    low, high = mean_interval(accepted) if len(accepted) else (np.nan, np.nan)
    low, high = np.clip([low, high], 0.0, 1.0).tolist()
    written = np.array([new for _, _, new in every])
    row = {"kind": kind, **setting.to_dict(), "n": len(prompts)}
    row |= {"acceptance": acceptance, "acceptance_low": low, "acceptance_high": high}
    # Break-even is of all drafts together, so what is held against it is too.
    pooled = sum(n for _, n, _ in every) / sum(drafted) if sum(drafted) else np.nan
    row |= {"pooled_acceptance": pooled, "break_even": costs.break_even(drafted)}
    row |= {"drafted_per_round": per_round}
    row |= {"tokens_per_round": float(written.mean())}
    row |= {f"ctar_{window}": float((written > window).mean()) for window in WINDOWS}
    layers_run = sum(drafted) * setting.layer + len(every) * n_layers
    row["layer_bound"] = float(n_layers * written.sum() / layers_run)
    row |= geometric_mean("predicted_speedup", prompts["predicted_speedup"])
    return row


def geometric_mean(name: str, ratios: "pd.Series[Any]") -> dict[str, float]:
    """Return the geometric mean of ratios with Student's interval of their logarithms."""
    logs = np.log(ratios.dropna().to_numpy(dtype=float))
    low, high = mean_interval(logs) if len(logs) else (np.nan, np.nan)
    mean = logs.mean() if len(logs) else np.nan
    values = {name: mean, f"{name}_low": low, f"{name}_high": high}
    return {column: float(np.exp(value)) for column, value in values.items()}


def verdict(low: float, high: float) -> str:
    """Say whether an interval of a ratio lies above 1 (faster), below it (slower), or around it."""
    return FASTER if low > 1 else SLOWER if high < 1 else UNDECIDED


def speeds(times: pd.DataFrame) -> pd.DataFrame:
    """Return how many times as fast as plain text each setting wrote each prompt.

    Times are medians over turns of the whole call less those of one token, which leaves what comes
    after the prompt. A text of one token has none.

    Args:
        times: A row for every turn, with the columns of a setting, ``prompt``, ``whole`` (or
            one token alone), ``wall_seconds`` and ``cpu_seconds``. Plain text has the drafter "".

    Returns:
        For every setting and prompt, ``wall_speedup`` and ``cpu_speedup``.
    """
    clocks = ["wall_seconds", "cpu_seconds"]
    keys = [*SETTING, "prompt"]
    medians = times.groupby([*keys, "whole"])[clocks].median().unstack("whole")
    after = pd.DataFrame({c: medians[c][True] - medians[c][False] for c in clocks}).reset_index()
    plain = after[after["drafter"] == ""].set_index("prompt")
    rest = after[after["drafter"] != ""].copy()
    for clock in clocks:
        base = plain.loc[rest["prompt"], clock].to_numpy()
        own = rest[clock].to_numpy()
        known = (base > 0) & (own > 0)
        ratio = np.where(known, base / np.where(known, own, 1.0), np.nan)
        rest[clock.replace("seconds", "speedup")] = ratio
    return rest.drop(columns=clocks)
