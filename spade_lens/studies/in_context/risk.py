"""The error of every prediction by the number of examples before it, beside what is exact."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from spade_lens.stats.intervals import ratio_interval
from spade_lens.training.in_context.baselines import baselines
from spade_lens.training.in_context.network import InContextNetwork
from spade_lens.training.in_context.task import Drawn

NETWORK, UNTRAINED = "network", "untrained network"


@torch.no_grad()
def squared_errors(
    trained: InContextNetwork, untrained: InContextNetwork, drawn: Drawn, *, seed: int = 0
) -> pd.DataFrame:
    """Return a row for every predictor, prompt and number of examples before.

    Args:
        trained: The trained network.
        untrained: The same with its first weights.
        drawn: The prompts.
        seed: Of the two-layer networks.
    """
    found: dict[str, Tensor] = {NETWORK: trained(drawn), UNTRAINED: untrained(drawn)}
    found |= baselines(trained.task, drawn, seed=seed)
    frames = []
    n, examples = drawn.targets.shape[:2]
    for name, predictions in found.items():
        errors = (predictions.double() - drawn.targets.double()).square().mean(dim=-1)
        prompt, shots = np.meshgrid(np.arange(n), np.arange(examples), indexing="ij")
        rows = {"prompt": prompt.ravel(), "shots": shots.ravel()}
        frames.append(
            pd.DataFrame({"predictor": name, **rows, "squared_error": errors.numpy().ravel()})
        )
    return pd.concat(frames, ignore_index=True)


def ratios(errors: pd.DataFrame) -> pd.DataFrame:
    """Return the network's mean error over that of every baseline, with paired intervals.

    Over all numbers of examples, and over the last five. Columns ``baseline``, ``last`` (how many
    of the last numbers of examples), ``ratio`` and the ends of its interval over prompts, and
    ``n``.
    """
    examples = int(errors["shots"].max()) + 1
    rows = []
    for last in dict.fromkeys((examples, min(5, examples))):
        some = errors[errors["shots"] >= examples - last]
        means = _means(some)
        for name, of_baseline in means.items():
            if name == NETWORK:
                continue
            own = means[NETWORK]
            low, high = ratio_interval(own, of_baseline)
            rows.append(
                {"baseline": name, "last": last, "ratio": float(own.sum() / of_baseline.sum())}
                | {"ratio_low": low, "ratio_high": high, "n": len(own)}
            )
    return pd.DataFrame(rows)


def _means(errors: pd.DataFrame) -> Mapping[str, "np.ndarray[tuple[int], np.dtype[np.float64]]"]:
    """Return every predictor's mean error by prompt."""
    by = errors.groupby(["predictor", "prompt"], sort=False)["squared_error"].mean()
    return {
        str(name): by.xs(name, level="predictor").to_numpy(dtype=np.float64)
        for name in errors["predictor"].unique()
    }
