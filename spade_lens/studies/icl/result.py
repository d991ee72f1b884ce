"""From the experiments' names to tables, figures, and a JSON that says how they came about."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import pandas as pd

from spade_lens import plots, storage
from spade_lens.models.errors import UnsupportedModelError
from spade_lens.models.model import Model
from spade_lens.prompts.few_shot import ARROW, Template
from spade_lens.settings import Settings, scoped
from spade_lens.studies.icl.attention import knockout, saliency
from spade_lens.studies.icl.demonstrations import contributions, patching, shots
from spade_lens.studies.icl.heads import heads
from spade_lens.studies.icl.plan import EXPERIMENTS, IclPlan, plan_icl
from spade_lens.studies.icl.positions import sufficiency
from spade_lens.studies.icl.study import Found, Study
from spade_lens.studies.icl.vectors import geometry, reading
from spade_lens.tasks.resolve import TaskLike

_RUN: Mapping[str, Callable[[Study], Found]] = dict(
    zip(
        EXPERIMENTS,
        (
            shots,
            patching,
            contributions,
            heads,
            knockout,
            saliency,
            geometry,
            sufficiency,
            reading,
        ),
        strict=True,
    )
)


@dataclass(frozen=True)
class IclResult:
    """What an experiment found, and where it was written.

    Args:
        experiment: Its name.
        tables: Tidy tables by name; the one named ``""`` has a row per prompt or vector wherever
            the experiment has such.
        table: What it comes to, as text.
        files: Every file written, by what it holds.
    """

    experiment: str
    tables: dict[str, pd.DataFrame]
    table: str
    files: dict[str, Path]


@scoped
def icl_study(
    model: Model,
    task: TaskLike,
    experiment: str,
    *,
    samples: int = 64,
    shots: int = 16,
    labels: Sequence[str] | None = None,
    other: TaskLike | None = None,
    few: int = 16,
    layers: Sequence[int] | None = None,
    template: Template = ARROW,
    seed: int = 0,
    settings: Settings | None = None,
    out: str | PathLike[str] = "spade-lens-icl",
) -> IclResult:
    """Run one experiment on one task.

    Prints a table and writes into ``out``: tidy CSVs, the table, figures (PNG and PDF), and a
    JSON (versions, seed, model hash, configuration), all under the experiment's name. What takes
    long is kept in ``out/parts``, and the same call after an interruption goes on there.

    Example:
        >>> found = icl_study(model, "animal/country", "patching")  # doctest: +SKIP
        >>> found.tables["chosen"]  # doctest: +SKIP

    Args:
        model: The model.
        task: Two categories with a slash between them (``"animal/country"``), a rule
            (``"string-length"``), word pairs (``"antonym"``), or a task of your own.
        experiment: One of :data:`EXPERIMENTS`.
        samples: How many prompts.
        shots: Demonstrations in every prompt.
        labels: The labels of a rule task, one for each class; ``"A"``, ``"B"``, ... by default.
        other: Another task, for controls; by default one that comes with the library, of the
            same kind.
        few: How many of the prompts, the first ones, those experiments get that take longest:
            contributions, the effects of heads, the smallest sufficient sets, and reading. Ours.
        layers: The layers; by default all, and about seven, evenly, for function vectors, probes,
            the smallest sets and reading, and about five for contributions. Knockout, saliency
            and the effects of heads are of all blocks always.
        template: How a line is written.
        seed: Of the sampling and of all controls.
        settings: Memory limit, batch size and progress; see :class:`spade_lens.Settings`.
        out: The folder for results, made where it is not there.

    Raises:
        ValueError: If an argument is not possible; before compute is spent.

    Warns:
        UserWarning: If the model may be at chance on the task: there is nothing to explain.
    """
    plan = plan_icl(
        task,
        [experiment],
        samples=samples,
        shots=shots,
        labels=labels,
        other=other,
        few=few,
        layers=layers,
        template=template,
        seed=seed,
        out=out,
        n_layers=model.n_layers,
    )
    return run_icl(model, plan)[experiment]


@scoped
def run_icl(
    model: Model, plan: IclPlan, *, settings: Settings | None = None
) -> dict[str, IclResult]:
    """Do what :func:`plan_icl` checked; see :func:`icl_study`.

    Args:
        model: The model.
        plan: What to do.
        settings: Memory limit, batch size and progress; see :class:`spade_lens.Settings`.

    Returns:
        What was found, by the name of the experiment.

    Raises:
        ValueError: If the plan does not fit the model; before compute is spent.
        UnsupportedModelError: If the model can do none of the experiments.

    Warns:
        UserWarning: If the model may be at chance on the task, or an experiment is left out that
            this model cannot do.
    """
    study = Study(model, plan)
    head = study.head()
    if study.at_chance:
        warnings.warn(head, stacklevel=2)
    print(f"{head}\n")
    results: dict[str, IclResult] = {}
    for name in plan.experiments:
        try:
            found = _RUN[name](study)
        except UnsupportedModelError as error:
            if not results and name == plan.experiments[-1]:
                raise
            # Those that it can do are not lost to one that it cannot.
            warnings.warn(f"{name} is left out: {error}", stacklevel=2)
            continue
        print(f"{name}\n\n{found.text}\n")
        results[name] = _write(study, name, found, head)
        for what, path in results[name].files.items():
            print(f"{what:<32}{path}")
        print()
    return results


def _write(study: Study, name: str, found: Found, head: str) -> IclResult:
    out = study.plan.out
    table = f"{head}\n\n{found.text}"
    files = {
        "table": storage.write_atomically(
            out / f"{name}.txt", lambda p: p.write_text(table + "\n", encoding="utf-8")
        )
    }
    for part, frame in found.tables.items():
        stem = f"{name}-{part}" if part else name
        files[stem] = storage.write_csv(out / f"{stem}.csv", frame)
    for part, figure in found.figures.items():
        stem = f"{name}-{part}" if part else name
        files[f"{stem} (PNG)"], files[f"{stem} (PDF)"] = plots.save_figure(figure, out / stem)
    about = storage.provenance(study.model, experiment=name, **study.plan.config)
    about["at_chance"] = study.at_chance
    about["files"] = [path.name for path in files.values()]
    files["how it was made"] = storage.write_json(out / f"{name}.json", about)
    return IclResult(name, found.tables, table, files)
