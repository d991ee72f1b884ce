"""From calibration prompts to an engine: which tokens to carry, what to check, when to leave.

``keep="auto"``: keep sets, checks and policies are tried together on calibration prompts, tail and
checks charged, and the combination is taken that spends least at the loss wanted. Ours; the paper
has one keep set and one check. Much is chosen at once, so results are to be measured on other
prompts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from typing import Any, Literal

import pandas as pd

from spade_lens.exits.candidates import as_confidence
from spade_lens.exits.choose import Choice, best_of, families, tried_policies, warn_unless_supported
from spade_lens.exits.confidence import Confidence
from spade_lens.exits.engine import SpadeExit
from spade_lens.exits.keep_search import keep_family
from spade_lens.exits.policies import Policy
from spade_lens.exits.table import ExitTable, exit_tables
from spade_lens.lenses.keep import KeepRule, name_of
from spade_lens.lenses.lens import Lens, LogitLens
from spade_lens.lenses.spade import Spade
from spade_lens.models.model import Model
from spade_lens.prompts.prompt import Prompt
from spade_lens.settings import Settings, scoped

Keeps = KeepRule | Mapping[str, KeepRule] | Literal["auto"]
"""One keep set, several by name, or ``"auto"`` for :func:`keep_family`."""

MARGIN = 1.0
"""Standard errors between a loss that is chosen and the loss that is allowed."""


@dataclass(frozen=True)
class ExitRule:
    """One way of exiting: what is kept, what is checked, and the policy, with how it was chosen.

    Args:
        spade: What answers; its name is the keep set's.
        confidence: What is checked.
        family: The family of policies that the policy is from.
        choice: The policy, and its figures on the calibration prompts.
        layers: The candidate layers.
    """

    spade: Spade
    confidence: Confidence
    family: str
    choice: Choice
    layers: tuple[int, ...]

    @property
    def policy(self) -> Policy:
        """When to leave."""
        return self.choice.policy

    @property
    def check(self) -> str:
        """What tables call the check; empty where the policy reads no lens."""
        return self.confidence.name if self.policy.reads else ""

    def engine(self, *, batch_size: int | None = None) -> SpadeExit:
        """The engine that exits this way.

        Args:
            batch_size: As for :class:`SpadeExit`.
        """
        return SpadeExit(
            self.spade.model,
            self.confidence,
            self.policy,
            spade=self.spade,
            layers=self.layers,
            batch_size=batch_size,
        )


@dataclass(frozen=True)
class Ways:
    """What is kept and what is checked, in all combinations that make sense.

    Args:
        spades: What answers, by the name of its keep set.
        confidences: What is checked, by name.
        owner: For a check that is a keep set's own SPADE, the keep set: it is tried there alone.
    """

    spades: Mapping[str, Spade]
    confidences: Mapping[str, Confidence]
    owner: Mapping[str, str]

    @classmethod
    def of(
        cls,
        model: Model,
        prompts: Sequence[Prompt],
        *,
        keep: Keeps = "auto",
        checks: Sequence[Confidence | Lens] | None = None,
        own_check: bool = True,
    ) -> "Ways":
        """The ways that :func:`calibrate` means; its arguments say which.

        Raises:
            ValueError: If two ways have one name, there is nothing to check, or ``keep`` is a
                word that means nothing.
        """
        rules = keep_sets(keep, prompts)
        spades = {name: Spade(model, keep=rule, name=name) for name, rule in rules}
        given = [as_confidence(c) for c in ([LogitLens(model)] if checks is None else checks)]
        own = {name: Confidence(spade) for name, spade in spades.items()} if own_check else {}
        several = [*(c for c in given if c is not None), *own.values()]
        names = [c.name for c in several]
        if len(set(names)) < len(names) or not names or not spades:
            raise ValueError(
                f"The checks are {names} and the keep sets {list(spades)}; expected at least one "
                "of each, and no two of one name. Give lenses names of their own (name=)."
            )
        return cls(spades, {c.name: c for c in several}, {c.name: n for n, c in own.items()})

    @scoped
    def tables(
        self,
        prompts: Sequence[Prompt],
        *,
        layers: Sequence[int] | None = None,
        checkpoint: str | PathLike[str] | None = None,
        settings: Settings | None = None,
    ) -> list[ExitTable]:
        """One pass over prompts for all of them; the arguments are those of :func:`exit_tables`."""
        made = exit_tables(
            next(iter(self.spades.values())).model,
            prompts,
            list(self.confidences.values()),
            spades=list(self.spades.values()),
            layers=layers,
            checkpoint=checkpoint,
        )
        return [t for t in made if self.owner.get(t.check, t.keep) == t.keep]


class Calibration:
    """What calibration prompts say of every keep set, check and policy; see :func:`calibrate`.

    Args:
        tables: A table for every pair of check and keep set.
        ways: What is kept and checked in them.
        measure: ``"accuracy"`` or ``"agreement"``.
    """

    def __init__(
        self,
        tables: Sequence[ExitTable],
        ways: Ways,
        *,
        measure: str = "accuracy",
    ) -> None:
        self.tables = tuple(tables)
        self.ways = ways
        self.measure = measure
        self._tried: dict[tuple[str, str, str], list[Choice]] = {}
        for table in self.tables:
            for family, policies in families(table).items():
                if not policies:
                    continue  # patience, with a single layer
                # A policy that reads no lens is the same whatever the check would be.
                key = table.keep, table.check if policies[0].reads else "", family
                if key not in self._tried:
                    self._tried[key] = tried_policies(policies, table, measure=measure)

    def __len__(self) -> int:
        return len(self.tables[0])

    def table(self, rule: ExitRule) -> ExitTable:
        """The table that a rule was chosen on."""
        return next(
            t for t in self.tables if t.keep == rule.spade.name and t.check == rule.confidence.name
        )

    def best(
        self,
        loss: float | None,
        *,
        keep: str | None = None,
        check: str | None = None,
        family: str | None = None,
        margin: float = MARGIN,
    ) -> ExitRule:
        """The cheapest way whose loss on the calibration prompts is within the one wanted.

        Args:
            loss: The loss allowed; None for best accuracy, and the cheapest of equals.
            keep: Only with the keep set of this name.
            check: Only with the check of this name; policies that read no lens are left out then.
            family: Only policies of this family.
            margin: So many standard errors must fit between the loss and the one allowed, since
                the best of thousands of ways looks better than it is. Ours. Where no prompt loses
                or gains an answer the standard error is 0, and at best accuracy there is none:
                only other prompts can tell.

        Returns:
            The rule; with a warning where nothing saves compute, or few prompts support it.

        Raises:
            ValueError: If there is no such keep set, check or family, or the loss is negative.
        """
        wanted = {"keep": keep, "check": check, "family": family}
        options = [
            (key, choice)
            for key, choices in self._tried.items()
            if all(w in (None, part) for w, part in zip((keep, check, family), key, strict=True))
            for choice in choices
        ]
        if not options:
            have = [sorted({key[i] for key in self._tried} - {""}) for i in range(3)]
            raise ValueError(
                f"Nothing was tried with { {k: v for k, v in wanted.items() if v is not None} }. "
                f"Keep sets: {have[0]}; checks: {have[1]}; families: {have[2]}."
            )
        best = best_of([choice for _, choice in options], loss=loss, margin=margin)
        (name, lens, found), _ = next(o for o in options if o[1] is best)
        warn_unless_supported(best, self.measure)
        return ExitRule(
            spade=self.ways.spades[name],
            confidence=self.ways.confidences[lens or self._any_check(name)],
            family=found,
            choice=replace(best, wanted=loss),
            layers=self.tables[0].layers,
        )

    def tried(self, loss: float | None, *, margin: float = MARGIN) -> pd.DataFrame:
        """The best of every keep set, check and family at a loss, on the calibration prompts.

        Args:
            loss: As for :meth:`best`.
            margin: As for :meth:`best`.

        Returns:
            Columns ``keep, kept`` (tokens, the mean), ``check, family, policy, loss, lost,
            speedup, early, n``, the best first.
        """
        kept = {t.keep: float(t.kept.double().mean()) for t in self.tables}
        rows: list[dict[str, Any]] = []
        for (keep, check, family), choices in self._tried.items():
            found = best_of(choices, loss=loss, margin=margin)
            rows.append(
                {
                    "keep": keep,
                    "kept": kept[keep],
                    "check": check,
                    "family": family,
                    "policy": found.policy.name,
                    "loss": found.loss,
                    "lost": found.lost,
                    "speedup": found.speedup,
                    "early": found.early,
                    "n": found.n,
                }
            )
        return pd.DataFrame(rows).sort_values("speedup", ascending=False, ignore_index=True)

    def _any_check(self, spade: str) -> str:
        return next(t.check for t in self.tables if t.keep == spade)


@scoped
def calibrate(
    model: Model,
    prompts: Sequence[Prompt],
    *,
    keep: Keeps = "auto",
    checks: Sequence[Confidence | Lens] | None = None,
    own_check: bool = True,
    layers: Sequence[int] | None = None,
    measure: str = "accuracy",
    checkpoint: str | PathLike[str] | None = None,
    settings: Settings | None = None,
) -> Calibration:
    """Run calibration prompts once, for every keep set, check and policy.

    Example:
        >>> from spade_lens.exits import calibrate
        >>> prompts = [model.prompt("abcdefghijklmnop"[i:]) for i in range(12)]
        >>> found = calibrate(model, prompts, measure="agreement", layers=[2, 3])
        >>> rule = found.best(1.0)
        >>> rule.engine().run(prompts).exit_layer.unique().tolist()
        [2]

    Args:
        model: The model.
        prompts: Calibration prompts: with targets, or with ``measure="agreement"``.
        keep: The keep sets to choose from.
        checks: What to check: lenses, which stand for their entropy, or confidences; the logit
            lens by default.
        own_check: Try each keep set's own SPADE as a check too. It is dear and knows best; a
            prompt that leaves after it has its answer already.
        layers: The candidate layers; by default those of :class:`SpadeExit`.
        measure: What must not be lost: ``"accuracy"``, or ``"agreement"`` with the full model.
        checkpoint: A folder for notes, as in :func:`exit_tables`.
        settings: Memory limit, batch size and progress; see :class:`spade_lens.Settings`.

    Returns:
        What was found; ``.best(loss)`` chooses from it.

    Raises:
        ValueError: If the prompts do not fit the model, none has a target and accuracy is
            measured, or a keep set does not fit the prompts.
    """
    ways = Ways.of(model, prompts, keep=keep, checks=checks, own_check=own_check)
    check_measure(prompts, measure)
    tables = ways.tables(
        prompts,
        layers=layers,
        checkpoint=checkpoint,
    )
    return Calibration(tables, ways, measure=measure)


def check_measure(prompts: Sequence[Prompt], measure: str) -> None:
    """Raise, before anything is run, if prompts cannot tell what must not be lost.

    Raises:
        ValueError: If the measure is unknown, or it is accuracy and no prompt has a target.
    """
    if measure not in ("accuracy", "agreement"):
        raise ValueError(f"measure={measure!r} was given; expected 'accuracy' or 'agreement'.")
    if measure == "accuracy" and all(p.target is None for p in prompts):
        raise ValueError(
            "No prompt has a target, so no accuracy can be lost. Give prompts with targets, or "
            "measure='agreement'."
        )


def keep_sets(keep: Keeps, prompts: Sequence[Prompt]) -> list[tuple[str, KeepRule]]:
    """The keep sets meant, each with its name.

    Raises:
        ValueError: If it is a word that means none.
    """
    if isinstance(keep, str):
        if keep != "auto":
            raise ValueError(
                f"keep={keep!r} was given; expected 'auto', a keep set, or several by name."
            )
        return list(keep_family(prompts).items())
    if isinstance(keep, Mapping):
        return list(keep.items())
    return [(name_of(keep), keep)]
