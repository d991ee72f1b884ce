"""One task under way: its prompts, its parts on disk, and how well the model does on it."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from spade_lens import stats, storage
from spade_lens.lenses.answers import check_choices, full_answers
from spade_lens.models.model import Model
from spade_lens.prompts.prompt import Prompt
from spade_lens.storage.parts import in_parts
from spade_lens.studies.icl.plan import IclPlan

_AT_ONCE = 16
"""Prompts of a part on disk."""


@dataclass(frozen=True)
class Found:
    """What an experiment found.

    Args:
        tables: Tidy tables by name; the one named ``""`` is the experiment's own.
        figures: Figures by name, likewise.
        text: What is printed.
    """

    tables: dict[str, pd.DataFrame]
    figures: dict[str, Figure]
    text: str


class Study:
    """What experiments on one task share.

    Args:
        model: The model.
        plan: What to do.

    Raises:
        ValueError: If the plan does not fit the model; before compute is spent.
    """

    def __init__(self, model: Model, plan: IclPlan) -> None:
        plan.check_layers(model.n_layers)
        self.model, self.plan = model, plan
        self.prompts = [e.prompt(model.tokenizer, template=plan.template) for e in plan.episodes]
        self.others = [e.prompt(model.tokenizer, template=plan.template) for e in plan.other or ()]
        model.check_prompts([*self.prompts, *self.others])
        check_choices(self.prompts)

    def some_layers(self, n: int = 7) -> list[int]:
        """The plan's layers; without them about ``n``, evenly, for what takes long."""
        if self.plan.layers is not None:
            return list(self.plan.layers)
        step = max(1, self.model.n_layers // n)
        return list(range(step, self.model.n_layers, step))

    def all_layers(self) -> list[int]:
        """The plan's layers; without them all."""
        every = range(self.model.n_layers + 1)
        return list(every if self.plan.layers is None else self.plan.layers)

    @cached_property
    def answers(self) -> pd.DataFrame:
        """The model's own answers to the prompts."""

        def make(_: str) -> pd.DataFrame:
            answers = full_answers(self.model, self.prompts)
            return answers.to_frame()

        return self.parts("answers", ["all"], make)

    @property
    def at_chance(self) -> bool:
        """Whether the model may be choosing the right answer by chance."""
        n, right = len(self.answers), int(self.answers["prefers"].sum())
        return stats.proportion_interval(right, n)[0] <= self.plan.chance

    def head(self) -> str:
        """The task, the prompts and the model's own answers, in lines."""
        plan, n = self.plan, len(self.answers)
        shares = []
        for column in ("correct", "prefers"):
            count = int(self.answers[column].sum())
            low, high = stats.proportion_interval(count, n)
            shares.append(f"{count / n:.2f} [{low:.2f}, {high:.2f}]")
        lines = [
            f"{plan.task.name}: {n} prompts of {plan.shots} demonstrations, seed {plan.seed}; "
            f"{self.model.name}, {self.model.n_layers} layers.",
            f"The model itself: accuracy {shares[0]}; prefers the right answer to the wrong ones "
            f"{shares[1]}, chance {plan.chance:.2f}.",
        ]
        if self.at_chance:
            lines.append(
                "The model is NOT clearly above chance here: there is nothing to explain. Use "
                "more demonstrations, more prompts or another task."
            )
        return "\n".join(lines)

    def parts(
        self, name: str, names: Sequence[str], make: Callable[[str], pd.DataFrame], **ways: Any
    ) -> pd.DataFrame:
        """A table made in parts, those that are on disk already left out."""
        frame = in_parts(
            names,
            make,
            folder=self.folder(name, **ways),
            config={"experiment": name, **ways},
            desc=name,
        )
        # As it comes back from disk, so that a resumed run writes the same bytes.
        return pd.DataFrame({str(name): column.tolist() for name, column in frame.items()})

    def by_prompts(
        self,
        name: str,
        run: Callable[[Sequence[Prompt]], pd.DataFrame],
        *,
        n: int | None = None,
        **ways: Any,
    ) -> pd.DataFrame:
        """The same for what treats prompts one by one: so many prompts are a part."""
        n = len(self.prompts) if n is None else n
        starts = {f"prompts-{first:04}": first for first in range(0, n, _AT_ONCE)}

        def make(part: str) -> pd.DataFrame:
            first = starts[part]
            frame = run(self.prompts[first : min(n, first + _AT_ONCE)])
            return frame.assign(prompt=frame["prompt"] + first)

        frame = self.parts(name, list(starts), make, n=n, **ways)
        frame.insert(0, "task", self.plan.task.name)
        return frame

    def folder(self, name: str, **ways: Any) -> Path:
        """A place on disk, named by everything that decides what will be there."""
        plan, model = self.plan, self.model
        deciding = {
            "versions": storage.versions(),
            "model": [model.name, model.sha256, str(model.dtype), model.device.type],
            "episodes": [asdict(e) for e in [*plan.episodes, *(plan.other or ())]],
            "prompts": [[p.tokens, p.answer, p.candidates] for p in self.prompts],
            "template": asdict(plan.template),
            "seed": plan.seed,
            "ways": ways,
        }
        key = hashlib.sha256(json.dumps(deciding, default=str).encode()).hexdigest()[:16]
        return plan.out / "parts" / f"{name}-{key}"
