"""The main job: several tasks read at every layer by the logit lens, SPADE and its ablation.

Each task is sampled and read in small parts, which stay on disk, so that an interrupted run
resumes. Results are a table, figures, tidy CSVs and a JSON.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from os import PathLike
from typing import Any, TypeAlias

import pandas as pd

from spade_lens import plots, report, stats
from spade_lens.checks import check_fields
from spade_lens.lenses.keep import Keep
from spade_lens.lenses.lens import Lens, LogitLens
from spade_lens.lenses.reading import read
from spade_lens.lenses.spade import Spade
from spade_lens.models.model import Model
from spade_lens.prompts.prompt import Prompt
from spade_lens.settings import progress_bar
from spade_lens.storage.content import content_sha256
from spade_lens.studies.base import Findings, Plan, Study, StudyResult, say, show_files
from spade_lens.tasks.resolve import TaskLike, task
from spade_lens.tasks.word_pairs import WordPairTask, pair_names

Pairs: TypeAlias = str | PathLike[str] | Iterable[Sequence[str] | Mapping[str, str]] | WordPairTask
"""A file of pairs, pairs in memory, or a task."""

_PART = 8
"""Prompts of a part on disk."""


@dataclass(frozen=True)
class LensPlan(Plan):
    """Read word-pair tasks with the logit lens, SPADE and the answer token alone.

    Example:
        >>> plan = LensPlan(["present-past"], samples=20, layers=range(12, 31))  # doctest: +SKIP
        >>> sl.study(model, plan).tables["summary"]  # doctest: +SKIP

    Args:
        tasks: Names or tasks; by default all word-pair tasks of the library, or, with ``pairs``,
            none of them.
        pairs: Your own pairs: a JSON or CSV file, a list of pairs, or a task.
        shots: Demonstrations in every prompt.
        samples: Prompts of every task.
        layers: The layers to read, 0 to ``n_layers``; all by default. The last one is always
            read too, since it is the model itself.
        seed: Seed of the sampling.
        out: The folder for results.

    Raises:
        ValueError: If a task is unknown, has too few pairs or occurs twice, a number is out of
            range, pairs cannot be read, or ``out`` cannot be written.
        FileNotFoundError: If ``pairs`` names a file that does not exist.
    """

    tasks: str | Sequence[str | WordPairTask] | None = None
    pairs: Pairs | None = None
    shots: int = 8
    samples: int = 40
    out: str | PathLike[str] = field(default="spade-lens-demo", kw_only=True)

    def __post_init__(self) -> None:
        check_fields(self)
        names = [task.name for task in self.word_pairs]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"Expected tasks of different names, at least one; got {names}.")
        for word_pairs in self.word_pairs:  # raises if it cannot be done
            word_pairs.sample(self.samples, shots=self.shots, seed=self.seed)
        super().__post_init__()

    @cached_property
    def word_pairs(self) -> tuple[WordPairTask, ...]:
        """The tasks, the user's own pairs last."""
        given: list[TaskLike]
        if self.tasks is None:
            given = [*pair_names()] if self.pairs is None else []
        else:
            given = [self.tasks] if isinstance(self.tasks, str) else [*self.tasks]
        if isinstance(self.pairs, str | PathLike | WordPairTask):
            given.append(self.pairs)
        elif self.pairs is not None:
            given.append(task(self.pairs, name="own pairs"))
        return tuple(_word_pairs(one) for one in given)

    @property
    def config(self) -> dict[str, Any]:
        """The arguments that decide the results, ready for JSON."""
        layers = self.chosen_layers
        return {
            "tasks": [task.name for task in self.word_pairs],
            "shots": self.shots,
            "samples": self.samples,
            "layers": "all" if layers is None else list(layers),
            "seed": self.seed,
        }


class LensStudy(Study[LensPlan], plan=LensPlan):
    """Reads every task of a plan; see :class:`LensPlan`."""

    def __init__(self, model: Model, plan: LensPlan, *, fresh: bool = False) -> None:
        super().__init__(model, plan, fresh=fresh)
        wanted = plan.chosen_layers or range(model.n_layers + 1)
        self.layers = list(dict.fromkeys((*wanted, model.n_layers)))
        self.lenses: list[Lens] = [
            LogitLens(model),
            Spade(model),
            Spade(model, keep=Keep(start=False), name="SPADE (answer alone)"),
        ]
        self.prompts = {
            t.name: t.prompts(model.tokenizer, plan.samples, shots=plan.shots, seed=plan.seed)
            for t in plan.word_pairs
        }
        for prompts in self.prompts.values():
            model.check_prompts(prompts)

    def run(self) -> StudyResult:
        """Read the tasks, print the table, and write everything."""
        plan, model = self.plan, self.model
        say(
            f"{model.name}: {model.n_layers} layers, sha256 {model.sha256[:12]}. "
            f"{plan.samples} prompts per task, {plan.shots} demonstrations, seed {plan.seed}."
        )
        tasks = progress_bar(plan.word_pairs, desc="tasks", unit="task", model=model)
        readings = pd.concat([self.read_task(t) for t in tasks], ignore_index=True)
        if self.used_again:
            say(f"Read from {self.out / 'parts'}, not again: {', '.join(self.used_again)}.")
        result = self.write(
            _findings(readings),
            name="demo",
            lenses=[lens.name for lens in self.lenses],
            layers_read=self.layers,
        )
        say(f"\n{result.text}\n")
        show_files(result.files)
        return result

    def read_task(self, task: WordPairTask) -> pd.DataFrame:
        """Read a task: a row per lens, layer and prompt."""
        plan, prompts = self.plan, self.prompts[task.name]
        starts = {f"prompts-{first:04}": first for first in range(0, len(prompts), _PART)}
        frame = self.parts(
            task.name,
            list(starts),
            lambda part: self._read_part(prompts, starts[part]),
            prompts=prompts,
            layers=self.layers,
            lenses={lens.name: content_sha256(lens) for lens in self.lenses},
        )
        sampled = task.sample(plan.samples, shots=plan.shots, seed=plan.seed)
        queries = [query for _, (query, _) in sampled]
        frame.insert(0, "task", task.name)
        frame.insert(5, "query", [queries[i] for i in frame["prompt"]])
        return frame.sort_values(["lens", "layer", "prompt"], kind="stable", key=_in_order)

    def _read_part(self, prompts: Sequence[Prompt], first: int) -> pd.DataFrame:
        part = prompts[first : first + _PART]
        frame = read(part, self.lenses, layers=self.layers, top_k=1).to_frame()
        return frame.assign(prompt=frame["prompt"] + first)


def _word_pairs(given: TaskLike) -> WordPairTask:
    """Return a task of word pairs; refuse other kinds, which have no free answers to read."""
    chosen = task(given)
    if not isinstance(chosen, WordPairTask):
        raise ValueError(
            f"{chosen!r} is no task of word pairs; expected one of {', '.join(pair_names())}, or "
            "a WordPairTask."
        )
    return chosen


def _in_order(column: "pd.Series[Any]") -> "pd.Series[Any]":
    """Sort by first appearance: lenses stay in the order they were given in."""
    return pd.Series(pd.factorize(column)[0], index=column.index)


def _findings(readings: pd.DataFrame) -> Findings:
    summary = stats.summarise(readings, by=["task", "lens", "layer"])
    first = report.first_layers(summary)
    ends = [first[c].astype("string").fillna("-") for c in ("layer", "layer_low", "layer_high")]
    first["layer"] = ends[0] + " [" + ends[1] + ", " + ends[2] + "]"
    reached = first.pivot(index="task", columns="lens", values="layer")
    order = [list(summary[c].unique()) for c in ("task", "lens")]
    reached = reached.reindex(index=order[0], columns=order[1]).rename_axis(None, axis=0)
    reached = reached.rename_axis(None, axis=1)
    text = (
        f"{report.layer_table(summary)}\n\n"
        f"The first layer that agrees with the full model on at least .90 of the prompts, and\n"
        f"the layers that the intervals allow for it\n"
        f"{reached.to_string()}"
    )
    figures = {value: plots.plot_by_layer(summary, value) for value in ("accuracy", "agreement")}
    return Findings({"readings": readings, "summary": summary}, figures, text)
