"""Run the phases of a plan one after the other, and measure held-out answers after each."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from spade_lens.models.identity import refuse_another
from spade_lens.models.model import Model
from spade_lens.prompts.prompt import Prompt
from spade_lens.settings import Settings, progress_bar, scoped
from spade_lens.storage.checkpoint import kept_folder
from spade_lens.storage.content import content_sha256
from spade_lens.training.alternate.answers import dpo_loss, splits
from spade_lens.training.alternate.data import Prepared, check_layer, prepare
from spade_lens.training.alternate.importance import (
    importances,
    mean_squared_changes,
    most_important,
    penalty,
)
from spade_lens.training.alternate.plan import AlternatePlan, Phase
from spade_lens.training.alternate.updates import LowRankUpdates
from spade_lens.training.frozen import frozen
from spade_lens.training.loop import train

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, eq=False)
class Alternated:
    """What alternating training gave. The model itself is as it was.

    Args:
        updates: The trained low-rank updates.
        history: Columns ``phase`` (0 is the start), ``objective``, ``update``, ``sft_loss``,
            ``preference_margin``, ``preferred`` and ``drift``, one row for every phase's end.
            All but the last are of held-out prompts.
        drift: Columns ``phase``, ``block`` and ``drift``: the length of a block's change since
            the start.
        importances: The importance of every tensor for all phases together, by name.
    """

    updates: LowRankUpdates
    history: "pd.DataFrame"
    drift: "pd.DataFrame"
    importances: dict[str, float]

    def applied(self) -> AbstractContextManager[None]:
        """Return a context in which the model has the updates in its weights, for any reading.

        Raises:
            ValueError: On entering, if the model's weights are not those that were trained on:
                they have changed, or the updates are applied already.
        """
        return self.updates.merged()


@scoped
def train_alternating(
    model: Model,
    sft: Sequence[Prompt],
    preferences: Sequence[Prompt],
    *,
    held_out: tuple[Sequence[Prompt], Sequence[Prompt]],
    plan: AlternatePlan | None = None,
    checkpoint: str | PathLike[str] | None = None,
    settings: Settings | None = None,
) -> Alternated:
    """Fine-tune low-rank updates of the last blocks, and train them on preferences, by turns.

    Source: Hbat (arXiv 2406.15178); see :mod:`spade_lens.training.alternate` for what is ours.

    Example:
        >>> from spade_lens.training import AlternatePlan, train_alternating
        >>> plain = [model.prompt(f"{x}>", target=x.lower()) for x in "ABCD"]
        >>> pairs = [model.prompt(f"{x}>", target=x, candidates=(x, x.lower())) for x in "EFGH"]
        >>> plan = AlternatePlan(rounds=2, steps=3, batch=2, layer=2, guard="ewc")
        >>> trained = train_alternating(model, plain, pairs, held_out=(plain, pairs), plan=plan)
        >>> trained.history.objective.tolist()
        ['', 'sft', 'preference', 'sft', 'preference']
        >>> with trained.applied():
        ...     readout = sl.read("Q>", "spade", model=model)

    Args:
        model: The model. Its weights stay as they are.
        sft: Prompts with the answer to learn as ``target``, such as
            ``model.prompt("hot ->", target=" cold")``.
        preferences: Prompts with two candidates, of which the target is the preferred one.
        held_out: Prompts of both kinds on which every phase's end is measured.
        plan: How to train.
        checkpoint: A folder to go on from; see :func:`train`. Every phase has a folder inside it.
        settings: Memory limit and progress; see :class:`spade_lens.Settings`.

    Raises:
        TypeError: If an argument is of another type.
        ValueError: If prompts are missing, lack answers or are fewer than the splits, the layer
            is not one below the last, hooks are in force, or a checkpoint is of another run.
        UnsupportedModelError: If the last blocks have no linear layers.
        FloatingPointError: If a loss is not finite.
    """
    plan = AlternatePlan() if plan is None else plan
    for name, some in (("sft", sft), ("preferences", preferences)):
        _check_splits(name, len(some), plan.rounds)
    folder = kept_folder(checkpoint, None)
    prepared = prepare(model, sft, preferences, held_out, layer=plan.layer)
    return run_plan(prepared, plan, checkpoint=folder)


@scoped
def run_plan(
    prepared: Prepared,
    plan: AlternatePlan,
    *,
    checkpoint: str | PathLike[str] | None = None,
    settings: Settings | None = None,
) -> Alternated:
    """Run a plan on data that are prepared; the rest is as in :func:`train_alternating`.

    Args:
        prepared: From :func:`~spade_lens.training.alternate.data.prepare`.
        plan: How to train. Its layer is not looked at.
        checkpoint: A folder to go on from.
        settings: Whether progress is shown.

    Raises:
        ValueError: If there are fewer data than splits, or the model is not what it was when they
            were prepared.
    """
    check_layer(prepared.model, prepared.layer)
    refuse_another(prepared.model, prepared.about["model"], "What was prepared")
    _check_splits("sft", len(prepared.sft), plan.rounds)
    _check_splits("preferences", len(prepared.pairs), plan.rounds)
    updates = LowRankUpdates(prepared.model, prepared.layer, plan.rank, plan.seed)
    folder = None if checkpoint is None else Path(checkpoint)
    with frozen(prepared.model), updates.acting():
        return _Run(prepared, plan, updates).all(folder)


def _check_splits(name: str, n: int, rounds: int) -> None:
    if 0 < n < rounds:
        raise ValueError(
            f"{n} prompts were given as {name} for rounds={rounds}; expected at least one for "
            "every split. Give more, or fewer rounds."
        )


class _Run:
    """The phases of a run, and what they leave behind for the next."""

    def __init__(self, prepared: Prepared, plan: AlternatePlan, updates: LowRankUpdates) -> None:
        self._plan, self._updates, self._about = plan, updates, prepared.about
        self._model = prepared.model
        self._sft, self._pairs = prepared.sft, prepared.pairs
        self._held_out = prepared.held_out_sft, prepared.held_out_pairs
        self._splits = {
            "sft": list(splits(len(self._sft), plan.rounds)),
            "preference": list(splits(len(self._pairs), plan.rounds)),
        }
        self._changes = torch.zeros(len(updates.factors()), dtype=torch.float64)
        self._update = 0
        self._rows: list[dict[str, Any]] = []
        self._drifts: list[dict[str, Any]] = []

    def all(self, folder: Path | None) -> Alternated:
        """Run every phase; return what they gave."""
        import pandas as pd

        self._measure(0, "")
        phases = list(self._plan.phases())
        for phase in progress_bar(phases, desc="phases", unit="phase", model=self._model):
            before = self._updates.factors()
            with self._frozen_most(phase):
                train(
                    self._updates,
                    self._loss(phase, before),
                    self._plan.training(phase),
                    checkpoint=None if folder is None else folder / f"phase-{phase.number}",
                    about=self._about
                    | {"plan": asdict(self._plan), "phase": asdict(phase)}
                    | {"start": content_sha256(before)},
                )
            self._changes += mean_squared_changes(before, self._updates.factors())
            self._update += self._plan.steps
            self._measure(phase.number, phase.objective)
        of_all = importances(self._changes, self._plan.temperature).tolist()
        self._updates.requires_grad_(False)
        return Alternated(
            self._updates,
            pd.DataFrame(self._rows),
            pd.DataFrame(self._drifts),
            dict(zip(before, of_all, strict=True)),
        )

    def _loss(self, phase: Phase, before: dict[str, Tensor]) -> Callable[[int], Tensor]:
        """Return the loss of a phase's steps. The reference of DPO is the model as it is now."""
        plan = self._plan
        of_sft, of_pairs = (self._splits[kind][phase.split] for kind in ("sft", "preference"))
        reference = None if phase.objective == "sft" else self._pairs.all_margins()
        weights = self._weights(phase)

        def loss(step: int) -> Tensor:
            parts = []
            if phase.objective != "preference":
                parts.append(self._sft.sft_loss(_draw(of_sft, plan.batch)))
            if reference is not None:
                rows = _draw(of_pairs, plan.batch)
                of_preference = dpo_loss(self._pairs.margins(rows), reference[rows], plan.beta)
                factor = plan.preference_weight if phase.objective == "joint" else 1.0
                parts.append(factor * of_preference)
            if weights is not None:
                now = dict(self._updates.named_parameters())
                parts.append(penalty(now, before, weights))
            return torch.stack(parts).sum()

        return loss

    def _weights(self, phase: Phase) -> Tensor | None:
        """Return the weight of every tensor in the penalty; None for no penalty."""
        plan = self._plan
        if phase.number == 1 or plan.guard not in ("ewc", "l2"):
            return None
        changes = self._changes if plan.guard == "ewc" else torch.zeros_like(self._changes)
        temperature = plan.temperature if plan.guard == "ewc" else None
        return plan.strength * importances(changes, temperature)

    @contextmanager
    def _frozen_most(self, phase: Phase) -> Iterator[None]:
        """Keep the most important tensors as they are."""
        names = list(self._updates.factors())
        kept: list[str] = []
        if phase.number > 1 and self._plan.guard == "freeze":
            kept = most_important(self._changes, names, self._plan.frozen)
        try:
            for name in kept:
                self._updates.get_parameter(name).requires_grad_(False)
            yield
        finally:
            for name in kept:
                self._updates.get_parameter(name).requires_grad_(True)

    def _measure(self, number: int, objective: str) -> None:
        sft, pairs = self._held_out
        margins = pairs.all_margins()
        by_block = self._updates.drift()
        self._drifts += [
            {"phase": number, "block": block, "drift": drift} for block, drift in by_block.items()
        ]
        self._rows.append(
            {
                "phase": number,
                "objective": objective,
                "update": self._update,
                "sft_loss": -float(sft.all_logprobs().sum()) / sft.n_tokens(range(len(sft))),
                "preference_margin": float(margins.mean()),
                "preferred": float((margins > 0).float().mean()),
                "drift": sum(drift**2 for drift in by_block.values()) ** 0.5,
            }
        )


def _draw(rows: Tensor, n: int) -> list[int]:
    """Draw rows by torch's generator, each once as long as there are enough."""
    order = torch.randperm(len(rows))[:n]
    drawn: list[int] = rows[order].tolist()
    return drawn
