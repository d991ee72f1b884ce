"""From calibration prompts to an engine: which tokens to keep, what to check, when to leave.

Ours; the paper has one keep set and one check. Keep sets, checks and policies are tried together
on calibration prompts, tail and checks charged, and the combination is taken that costs least at
the loss allowed. Much is chosen at once, so results have to be measured on other prompts.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from os import PathLike
from typing import Any, Literal

import pandas as pd

from spade_lens.checks import checked
from spade_lens.exits.choice import Choice, best_of, certify, tried_policies, warn_unless_supported
from spade_lens.exits.confidence import Confidence
from spade_lens.exits.engine import SpadeExit
from spade_lens.exits.families import FamiliesLike, families, global_thresholds, named_families
from spade_lens.exits.keep_search import KeepsLike, keep_sets
from spade_lens.exits.policies import Policy
from spade_lens.exits.setup import OWN, CheckLike, Setup, candidate_layers
from spade_lens.exits.sweeps import THESE, sweep
from spade_lens.exits.table import ExitTable
from spade_lens.exits.table_pass import tables_of
from spade_lens.lenses.spade import Spade
from spade_lens.models.model import Model
from spade_lens.models.places import LayersLike
from spade_lens.prompts.inputs import PromptsLike
from spade_lens.settings import Settings, scoped

MARGIN = 1.0
"""Standard errors between a loss that is chosen and the loss that is allowed."""


@dataclass(frozen=True, repr=False)
class ExitRule:
    """How to exit: what is kept, what is checked, and the policy, with how it was chosen.

    Args:
        spade: What answers; its name is the keep set's.
        confidence: What is checked.
        family: The family that the policy is from.
        choice: The policy, and its figures on the calibration prompts.
        layers: The candidate layers.
        among: What the calibration prompts were read over, ``"candidates"`` or ``"vocabulary"``;
            None where some had candidates and others none.
    """

    spade: Spade
    confidence: Confidence
    family: str
    choice: Choice
    layers: tuple[int, ...]
    among: Literal["candidates", "vocabulary"] | None = None

    def __repr__(self) -> str:
        check = f"check={self.check!r}, " if self.check else ""
        return (
            f"ExitRule(keep={self.spade.name!r}, {check}policy={self.policy.name!r}; "
            f"on {self.choice.n} prompts: speedup {self.choice.speedup:.2f}, "
            f"loss {self.choice.loss:.3f})"
        )

    @property
    def policy(self) -> Policy:
        """When to leave."""
        return self.choice.policy

    @property
    def check(self) -> str:
        """The name of the check in tables; empty where the policy reads no lens."""
        return self.confidence.name if self.policy.reads else ""

    def table(self, tables: Sequence[ExitTable]) -> ExitTable:
        """Return the one of the tables that is of this rule's keep set and check."""
        names = self.spade.name, self.confidence.name
        return next(t for t in tables if (t.keep, t.check) == names)

    def engine(self) -> SpadeExit:
        """Return the engine that exits by this rule."""
        engine = SpadeExit(
            self.spade.model, self.confidence, self.policy, answerer=self.spade, layers=self.layers
        )
        engine.among = self.among
        return engine


class Calibration:
    """What calibration prompts say of every keep set, check and policy; see :func:`calibrate`."""

    def __init__(
        self, tables: Sequence[ExitTable], setup: Setup, *, families: FamiliesLike | None = None
    ) -> None:
        self.tables = tuple(tables)
        self.setup = setup
        self.families = named_families(families)
        self._choices: dict[str, dict[tuple[str, str, str], list[Choice]]] = {}

    def __len__(self) -> int:
        return len(self.tables[0])

    def __repr__(self) -> str:
        names = [sorted({getattr(t, name) for t in self.tables}) for name in ("keep", "check")]
        return (
            f"Calibration({len(self)} prompts, keep sets {names[0]}, checks {names[1]}, "
            f"families {list(self.families)})"
        )

    @checked
    def best(
        self,
        loss: float | None,
        *,
        measure: str = "accuracy",
        keep: str | None = None,
        check: str | None = None,
        family: str | None = None,
        margin: float = MARGIN,
    ) -> ExitRule:
        """Return the cheapest rule whose loss on the calibration prompts is within the one allowed.

        Args:
            loss: The loss allowed; None for best accuracy, and the cheapest of equals.
            measure: What must not be lost: ``"accuracy"``, or ``"agreement"`` with the full model.
            keep: Only the keep set of this name.
            check: Only the check of this name, which leaves out policies that read no lens.
            family: Only policies of this family.
            margin: The number of standard errors that must fit between the loss and the one
                allowed, since the best of thousands of rules looks better than it is. Ours. The
                standard error is 0 where no prompt loses or gains an answer, and at best accuracy
                it is not used: only other prompts can tell.

        Returns:
            The rule; with a warning where nothing saves compute, or few prompts support it.

        Raises:
            ValueError: If there is no such keep set, check or family, the loss is negative, or no
                prompt has a target and accuracy is measured.
        """
        tried = self._tried(measure)
        wanted = {"keep": keep, "check": check, "family": family}
        options = [
            (key, choice)
            for key, choices in tried.items()
            if all(w in (None, part) for w, part in zip(wanted.values(), key, strict=True))
            for choice in choices
        ]
        if not options:
            have = [sorted({key[i] for key in tried} - {""}) for i in range(3)]
            raise ValueError(
                f"Nothing was tried with { {k: v for k, v in wanted.items() if v is not None} }; "
                f"there are keep sets {have[0]}, checks {have[1]} and families {have[2]}."
            )
        best = best_of([choice for _, choice in options], loss=loss, margin=margin)
        key = next(key for key, choice in options if choice is best)
        warn_unless_supported(best, measure)
        return self._rule(key, replace(best, wanted=loss))

    @checked
    def certified(self, loss: float, *, risk: float = 0.05, measure: str = "accuracy") -> ExitRule:
        """Return a rule whose loss on new prompts is bounded with probability 1 - ``risk``.

        Keep set and check are chosen on the first half of the calibration prompts; a threshold
        is certified on the second half by Learn-then-Test, see
        :func:`spade_lens.exits.choice.certify`.

        Args:
            loss: The loss allowed.
            risk: The probability that the guarantee fails.
            measure: ``"accuracy"`` or ``"agreement"``.

        Raises:
            ValueError: If there are too few prompts; the message says how many are needed.
        """
        half = len(self) // 2
        first = [table.of(range(half)) for table in self.tables]
        chosen = Calibration(first, self.setup, families="threshold")
        rule = chosen.best(loss, measure=measure)
        table = rule.table(self.tables).of(range(half, len(self)))
        choice = certify(global_thresholds(), table, loss=loss, risk=risk, measure=measure)
        return replace(rule, family="threshold, certified", choice=choice)

    @checked
    def tried(
        self, loss: float | None, *, measure: str = "accuracy", margin: float = MARGIN
    ) -> pd.DataFrame:
        """Return the best policy of every keep set, check and family, the best first.

        Args:
            loss: The loss allowed; see :meth:`best`.
            measure: ``"accuracy"`` or ``"agreement"``.
            margin: Standard errors; see :meth:`best`.

        Returns:
            Columns ``keep, kept`` (the mean), ``check, family, policy, loss, lost, gained,
            speedup, early`` (the fraction of prompts), ``n``, all on the calibration prompts,
            which also chose: ``chosen_on`` says so, and there are no intervals.
        """
        kept = {t.keep: float(t.kept.double().mean()) for t in self.tables}
        rows: list[dict[str, Any]] = []
        for (keep, check, family), choices in self._tried(measure).items():
            best = best_of(choices, loss=loss, margin=margin)
            rows.append(
                {
                    "keep": keep,
                    "kept": kept[keep],
                    "check": check,
                    "family": family,
                    "policy": best.policy.name,
                    "loss": best.loss,
                    "lost": best.lost,
                    "gained": best.gained,
                    "speedup": best.speedup,
                    "early": best.early / best.n,
                    "n": best.n,
                    "chosen_on": THESE,
                }
            )
        return pd.DataFrame(rows).sort_values("speedup", ascending=False, ignore_index=True)

    @checked
    def sweep(self, *, front: Literal["accuracy", "agreement"] | None = None) -> pd.DataFrame:
        """Measure every policy of every keep set and check on the calibration prompts.

        Args:
            front: Only the front of each keep set and check, by ``"accuracy"`` or
                ``"agreement"``, for the figure ``"front"`` of :func:`spade_lens.plot`.

        Returns:
            The columns of :func:`spade_lens.exits.sweep`.
        """
        frames = []
        for table in self.tables:
            policies = [p for ps in families(table, self.families).values() for p in ps]
            frames.append(sweep(table, policies, front=front))
        return pd.concat(frames, ignore_index=True)

    def _tried(self, measure: str) -> dict[tuple[str, str, str], list[Choice]]:
        """Return the figures of every policy by keep set, check and family."""
        if measure not in self._choices:
            tried: dict[tuple[str, str, str], list[Choice]] = {}
            for table in self.tables:
                for family, policies in families(table, self.families).items():
                    # A policy that reads no lens is the same whatever the check.
                    reads = any(policy.reads for policy in policies)
                    key = table.keep, table.check if reads else "", family
                    if key not in tried:
                        tried[key] = tried_policies(policies, table, measure=measure)
            self._choices[measure] = tried
        return self._choices[measure]

    def _rule(self, key: tuple[str, str, str], choice: Choice) -> ExitRule:
        keep, check, family = key
        check = check or next(t.check for t in self.tables if t.keep == keep)
        chosen = {bool(n) for n in self.tables[0].n_candidates.tolist()}
        return ExitRule(
            spade=next(s for s in self.setup.answerers if s.name == keep),  # type: ignore[arg-type]
            confidence=next(c for c in self.setup.checks if c.name == check),
            family=family,
            choice=choice,
            layers=self.tables[0].layers,
            among=None if len(chosen) > 1 else "candidates" if chosen.pop() else "vocabulary",
        )


@scoped
def calibrate(
    model: Model,
    prompts: PromptsLike,
    *,
    keep: KeepsLike = "auto",
    checks: CheckLike | Sequence[CheckLike] = ("logit", OWN),
    families: FamiliesLike | None = None,
    layers: LayersLike = None,
    checkpoint: str | PathLike[str] | None = None,
    settings: Settings | None = None,
) -> Calibration:
    """Run calibration prompts once, to choose among keep sets, checks and policies.

    Example:
        >>> import spade_lens as sl
        >>> prompts = ["abcdefghijklmnop"[i:] for i in range(12)]
        >>> calibration = sl.calibrate(model, prompts, layers=[2, 3])
        >>> rule = calibration.best(1.0, measure="agreement")
        >>> rule.engine().run(prompts).exit_layer.unique().tolist()
        [2]

    Args:
        model: The model.
        prompts: Calibration prompts: texts, or prompts with targets for a choice by accuracy.
        keep: The keep sets to choose from: ``"auto"`` for the whole family, a rule, rules by
            name, or a list of rules and of names such as ``["last 8", "query+labels",
            "attention 8", "learned 8"]``.
        checks: What to check: confidences, lenses or names of lenses, which stand for the
            entropy of their readouts. ``"own"`` is each keep set's own SPADE: the most expensive
            and most accurate check, after which a prompt that exits needs no extra answer pass.
            ``Own(after=Confidence(lens))`` reads it only where a cheaper check is sure enough.
        families: The policies to choose from: names of families, policies of your own, or
            policies by name; see :func:`spade_lens.exits.families.families`. All families by
            default.
        layers: The candidate layers. Ours: by default every second one from the middle up.
        checkpoint: A folder for partial results: the same call goes on from them after an
            interruption.
        settings: Memory limit, batch size and progress; see :class:`spade_lens.Settings`.

    Returns:
        The calibration; ``.best(loss)`` chooses from it.

    Raises:
        TypeError: If an argument is of another type.
        ValueError: If the prompts, layers or lenses do not fit the model, a keep set does not fit
            the prompts, there is nothing to choose from, or the checkpoint is another call's.
    """
    named = named_families(families)
    prompts = model.prompts(prompts)
    candidates = candidate_layers(model, layers)
    rules = keep_sets(model, prompts, keep, candidates)
    spades = [Spade(model, keep=rule, name=name) for name, rule in rules.items()]
    setup = Setup.of(model, checks, spades, candidates)
    tables = tables_of(setup, setup.prompts(prompts), checkpoint=checkpoint)
    return Calibration(tables, setup, families=named)
