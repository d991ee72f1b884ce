"""One task under way: its prompts, its parts on disk, and how well the model does on it."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import pandas as pd

from spade_lens import stats
from spade_lens.checks import warn
from spade_lens.lenses.answers import check_choices, full_answers
from spade_lens.models.errors import UnsupportedModelError
from spade_lens.models.model import Model
from spade_lens.prompts.prompt import Prompt
from spade_lens.studies.base import Findings, Study, StudyResult, say, show_files
from spade_lens.studies.icl.plan import IclPlan
from spade_lens.studies.icl.registry import find_experiment
from spade_lens.tasks.episodes import write_episodes

_PART = 16
"""Prompts of a part on disk."""


class IclStudy(Study[IclPlan], plan=IclPlan):
    """What experiments on one task share; see :class:`IclPlan`."""

    def __init__(self, model: Model, plan: IclPlan, *, fresh: bool = False) -> None:
        super().__init__(model, plan, fresh=fresh)
        self.prompts, self.others = (
            write_episodes(model.tokenizer, episodes, template=plan.template)
            for episodes in (plan.episodes, plan.other_episodes or ())
        )
        model.check_prompts([*self.prompts, *self.others])
        check_choices(self.prompts)

    def run(self) -> StudyResult:
        """Do the experiments that the model can do; print and write what each found."""
        head = self.head()
        if self.at_chance:
            warn(head)
        say(f"{head}\n")
        results: list[StudyResult] = []
        for name in self.plan.experiments:
            try:
                findings = find_experiment(name).run(self)
            except UnsupportedModelError as error:
                if not results and name == self.plan.experiments[-1]:
                    raise
                # Those that it can do are not lost to one that it cannot.
                warn(f"{name} is left out: {error}")
                continue
            if not isinstance(findings, Findings):
                raise TypeError(
                    f"The experiment {name!r} returned a {type(findings).__name__}; expected "
                    "Findings(tables, figures, text)."
                )
            say(f"{name}\n\n{findings.text}\n")
            results.append(self._write(name, findings, head))
            show_files(results[-1].files)
            print()
        return StudyResult(
            {name: frame for result in results for name, frame in result.tables.items()},
            "\n\n".join([head, *(result.text.removeprefix(f"{head}\n\n") for result in results)]),
            {what: path for result in results for what, path in result.files.items()},
        )

    def _write(self, name: str, findings: Findings, head: str) -> StudyResult:
        findings = replace(findings, text=f"{head}\n\n{findings.text}")
        result = self.write(
            findings, name=name, prefix=name, experiment=name, at_chance=self.at_chance
        )
        renamed = {"table": f"{name} (text)", "how it was made": f"{name} (how it was made)"}
        return replace(result, files={renamed.get(k, k): v for k, v in result.files.items()})

    def identity(self) -> dict[str, Any]:
        """What decides all parts: the prompts, and how they were made."""
        plan = self.plan
        return {
            "task": plan.chosen_task,
            "episodes": [plan.episodes, plan.other_episodes],
            "prompts": [self.prompts, self.others],
            "template": plan.template,
            "seed": plan.seed,
        }

    def some_layers(self, n: int = 7) -> list[int]:
        """Return the plan's layers; by default about ``n``, evenly, for what takes long."""
        if self.plan.chosen_layers is not None:
            return list(self.plan.chosen_layers)
        step = max(1, self.model.n_layers // n)
        return list(range(step, self.model.n_layers, step))

    def all_layers(self) -> list[int]:
        """Return the plan's layers; by default all."""
        return list(self.plan.chosen_layers or range(self.model.n_layers + 1))

    def by_prompts(
        self,
        name: str,
        run: Callable[[Sequence[Prompt]], pd.DataFrame],
        *,
        n: int | None = None,
        **deciding: Any,
    ) -> pd.DataFrame:
        """Return a table made in parts, each of some prompts, with the column ``task``.

        Args:
            name: The table's name.
            run: Takes some prompts and returns their rows; ``prompt`` counts these prompts from 0.
            n: How many of the prompts, the first ones; all by default.
            deciding: As for :meth:`Study.parts`.
        """
        n = len(self.prompts) if n is None else n
        starts = {f"prompts-{first:04}": first for first in range(0, n, _PART)}

        def make(part: str) -> pd.DataFrame:
            first = starts[part]
            frame = run(self.prompts[first : min(n, first + _PART)])
            return frame.assign(prompt=frame["prompt"] + first)

        frame = self.parts(name, list(starts), make, n=n, **deciding)
        frame.insert(0, "task", self.plan.chosen_task.name)
        return frame

    @cached_property
    def answers(self) -> pd.DataFrame:
        """The model's own answers to the prompts."""
        return self.parts(
            "answers", ["all"], lambda _: full_answers(self.model, self.prompts).to_frame()
        )

    @property
    def at_chance(self) -> bool:
        """Whether the model may be choosing the right answer by chance."""
        n, right = len(self.answers), int(self.answers["prefers"].sum())
        return stats.proportion_interval(right, n)[0] <= self.plan.chance

    def head(self) -> str:
        """Describe the task, the prompts and the model's own answers."""
        plan, n = self.plan, len(self.answers)
        fractions = []
        for column in ("correct", "prefers"):
            count = int(self.answers[column].sum())
            low, high = stats.proportion_interval(count, n)
            fractions.append(f"{count / n:.2f} [{low:.2f}, {high:.2f}]")
        lines = [
            f"{plan.chosen_task.name}: {n} prompts of {plan.shots} demonstrations, seed "
            f"{plan.seed}; {self.model.name}, {self.model.n_layers} layers.",
            f"The model itself: accuracy {fractions[0]}; prefers the right answer to the wrong "
            f"ones {fractions[1]}, chance {plan.chance:.2f}.",
        ]
        if self.at_chance:
            lines.append(
                "The model is NOT clearly above chance here: there is nothing to explain. Use "
                "more demonstrations, more prompts or another task."
            )
        return "\n".join(lines)
