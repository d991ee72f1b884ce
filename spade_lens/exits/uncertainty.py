"""How far an exit's probabilities are to be trusted: calibration of the mixture, conformal sets.

With early exit, prompts leave at different layers, each with its own readout. What matters to a
user is the mixture of what leaves where, the full model at the end included.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from spade_lens.checks import checked
from spade_lens.exits.policies import Policy
from spade_lens.exits.reliability_curves import Bins, binned
from spade_lens.exits.sweeps import check_pair
from spade_lens.exits.table import ExitTable
from spade_lens.stats.intervals import mean_interval, proportion_interval


@checked
def gated_reliability(
    table: ExitTable,
    policy: Policy,
    *,
    event: Literal["correct", "agrees"] = "correct",
    bins: Bins = "equal-mass",
    n_bins: int | None = None,
) -> pd.DataFrame:
    """Measure how often the answers of early exit are right, by the probability given to them.

    Args:
        table: The prompts; all must have candidates.
        policy: Decides where each leaves.
        event: ``"correct"``, or ``"agrees"`` with the full model.
        bins: As in :func:`spade_lens.exits.reliability`.
        n_bins: The number of bins, also as there.

    Returns:
        ``keep, check, policy, event``, and the columns of
        :func:`spade_lens.exits.reliability` from ``bin`` on.

    Raises:
        ValueError: If a prompt has no candidates, or no right answer is known and one is needed.
    """
    _, logprobs, answer = _at_exit(table, policy)
    known = table.right_option >= 0 if event == "correct" else torch.ones(len(table)).bool()
    if not known.any():
        raise ValueError(f"event={event!r} needs targets among the candidates; no prompt has one.")
    happened = answer == (table.target if event == "correct" else table.final_answer)
    confidence = logprobs.exp().amax(dim=-1).double()
    curve = binned(confidence[known], happened[known], bins=bins, n_bins=n_bins)
    about = {"keep": table.keep, "check": table.check, "policy": policy.name, "event": event}
    return curve.assign(**about)[[*about, *curve.columns]]


@checked
def conformal_sets(
    calibration: ExitTable,
    test: ExitTable,
    policy: Policy,
    *,
    confidence: float = 0.9,
    chosen_on: Sequence[ExitTable] = (),
) -> pd.DataFrame:
    """Return size and coverage of sets of candidates that hold the right one with a guarantee.

    A candidate's score is 1 minus its probability where the prompt leaves. Sets hold all
    candidates whose score is within the quantile of the right ones' scores on calibration
    prompts: one quantile for all, or one for each exit layer. Source: split conformal prediction
    (Vovk et al. 2005; by class of prompts, Mondrian), with crepes; for early exit Regol et al.
    (arXiv 2310.09163).

    Args:
        calibration: Prompts that the quantiles are taken from.
        test: Other prompts, to measure on.
        policy: Decides where each leaves.
        confidence: The coverage asked for.
        chosen_on: Tables of the prompts that lenses, gates and policy were fitted or chosen on.

    Returns:
        A row for all test prompts with one quantile and with one per exit (``quantile``), and a
        row for every exit layer of each: ``keep, check, policy, quantile, layer`` (missing for
        all), ``confidence_wanted``, ``n``, and with ``_low`` and ``_high`` ``coverage`` and
        ``size``.

    Raises:
        ImportError: If crepes is not installed.
        ValueError: If two of the tables share a prompt, ``calibration`` and ``test`` are not of
            one model, check, keep set and list of layers, or a prompt has no right answer among
            its candidates.
    """
    try:
        from crepes import ConformalClassifier
    except ImportError:
        raise ImportError(
            "Conformal sets need crepes, which is not installed: pip install "
            "'spade-lens[conformal]'."
        ) from None
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence} was given; expected a number from 0 to 1.")
    check_pair(calibration, test, "test")
    check_disjoint(
        {"calibration": calibration, "test": test}
        | {f"chosen_on[{i}]": table for i, table in enumerate(chosen_on)}
    )
    scores, exits = [], []
    for table in (calibration, test):
        if (table.right_option < 0).any():
            raise ValueError("Conformal sets need prompts with a right one among their candidates.")
        stop, logprobs, _ = _at_exit(table, policy)
        scores.append(1 - logprobs.double().exp().numpy())
        exits.append(torch.tensor(table.prices.stops)[stop].numpy())
    right = [t.right_option.numpy() for t in (calibration, test)]
    of_right = scores[0][np.arange(len(calibration)), right[0]]
    rows: list[dict[str, Any]] = []
    for quantile in ("one", "per exit"):
        bins: list[Any] = exits if quantile == "per exit" else [None, None]
        classifier = ConformalClassifier()
        classifier.fit(of_right, bins=bins[0])
        sets = np.asarray(
            classifier.predict_set(scores[1], bins=bins[1], confidence=confidence, smoothing=False)
        ).astype(bool)
        sets &= np.arange(sets.shape[1]) < test.n_candidates.numpy()[:, None]
        held = sets[np.arange(len(test)), right[1]]
        size = sets.sum(axis=1).astype(float)
        for layer in (None, *np.unique(exits[1]).tolist()):
            here = np.ones(len(test), dtype=bool) if layer is None else exits[1] == layer
            n = int(here.sum())
            row: dict[str, Any] = {
                "keep": test.keep,
                "check": test.check,
                "policy": policy.name,
                "quantile": quantile,
                "layer": layer,
                "confidence_wanted": confidence,
                "n": n,
            }
            for name, value, ends in (
                ("coverage", held[here], proportion_interval(float(held[here].sum()), n)),
                ("size", size[here], mean_interval(size[here])),
            ):
                row[name], row[f"{name}_low"], row[f"{name}_high"] = float(value.mean()), *ends
            rows.append(row)
    return pd.DataFrame(rows).astype({"layer": "Int64"})


@runtime_checkable
class HasIdentity(Protocol):
    """A table, or what was fitted on one: it knows the prompts by their numbers."""

    @property
    def identity(self) -> Int[Tensor, " prompt"]:
        """The numbers of the prompts."""
        ...


def check_disjoint(tables: Mapping[str, HasIdentity]) -> None:
    """Raise unless no two tables (or gates) share a prompt.

    Raises:
        ValueError: If two do; the message says which, and how many prompts they share.
    """
    names = list(tables)
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            both = set(tables[one].identity.tolist()) & set(tables[other].identity.tolist())
            if both:
                raise ValueError(
                    f"{one} and {other} share {len(both)} prompts; expected none. Give prompts of "
                    "splits that do not mix, such as task.prompts(split='calibration')."
                )


def _at_exit(
    table: ExitTable, policy: Policy
) -> tuple[Int[Tensor, " prompt"], Float[Tensor, "prompt option"], Int[Tensor, " prompt"]]:
    """Return where every prompt leaves, as the index of the stop, its options and answer there."""
    if not table.logprobs.shape[-1]:
        raise ValueError(
            "The probability of an answer is that among a prompt's candidates; a prompt of this "
            "table has none."
        )
    trace = table.simulate(policy)
    stop = torch.searchsorted(torch.tensor(table.prices.stops), trace.exit_layer)
    return stop, table.logprobs[stop, torch.arange(len(table))], trace.answer
