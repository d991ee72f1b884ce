"""What all studies share: plans that check themselves, parts that resume, files, provenance.

This module knows nothing of lenses, exits or experiments. A study is a :class:`Plan` (what to do)
and a :class:`Study` (how it is done); :func:`study` joins the two with a model.
"""

import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar, cast

import pandas as pd
from matplotlib.figure import Figure

from spade_lens import plots
from spade_lens.checks import check_number, visible, whole_numbers
from spade_lens.models.identity import run_identity
from spade_lens.models.model import Model
from spade_lens.models.places import LayersLike
from spade_lens.settings import Settings, scoped
from spade_lens.storage.checkpoint import kept_folder
from spade_lens.storage.content import content_sha256
from spade_lens.storage.files import (
    file_stem,
    output_folder,
    write_atomically,
    write_csv,
    write_json,
)
from spade_lens.storage.origin import provenance, versions
from spade_lens.storage.parts import in_parts

P = TypeVar("P", bound="Plan")


@dataclass(frozen=True, kw_only=True)
class Plan(ABC):
    """What a study will do, checked as soon as it is made, before a model is loaded.

    Args:
        layers: A layer, several, or None for the study's own choice.
        seed: Seed of everything that is drawn.
        out: The folder for results, made where it does not exist.

    Raises:
        TypeError: If a layer is not a whole number.
        ValueError: If the seed or a layer is negative, or ``out`` cannot be written.
    """

    needs_model: ClassVar[bool] = True
    """False for a plan whose study makes its own models."""

    layers: LayersLike = None
    seed: int = 0
    out: str | PathLike[str] = "spade-lens"

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ValueError(f"seed={self.seed} was given; a seed is 0 or more.")
        # Last: a plan that is refused leaves no folder behind.
        self._set(layers=_chosen(self.layers), out=output_folder(self.out))

    @property
    def chosen_layers(self) -> tuple[int, ...] | None:
        """The layers asked for, in the order given; None if none were."""
        return None if self.layers is None else _chosen(self.layers)

    @property
    @abstractmethod
    def config(self) -> dict[str, Any]:
        """The arguments that decide the results, ready for JSON."""

    def check_layers(self, n_layers: int) -> None:
        """Check the layers against a model's."""
        outside = [layer for layer in self.chosen_layers or () if layer > n_layers]
        if outside:
            raise ValueError(
                f"Layers {outside} were asked for; expected layers from 0 (the embedding) to "
                f"{n_layers} (the model's output)."
            )

    def _check_counts(self, *names: str) -> None:
        for name in names:
            check_number(name, getattr(self, name), least=1)

    def _set(self, **values: Any) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)


@dataclass(frozen=True, eq=False)
class Findings:
    """What a study or one of its experiments found, before it is written.

    Args:
        tables: Tidy tables by name; the one named ``""`` is the main one.
        figures: Figures by name, likewise.
        text: What is printed.
    """

    tables: Mapping[str, pd.DataFrame]
    figures: Mapping[str, Figure] = field(default_factory=dict)
    text: str = ""


@dataclass(frozen=True, repr=False, eq=False)
class StudyResult:
    """The tables of a study, the same as text, and the files that hold them.

    Args:
        tables: Tidy tables by name, which is also that of their CSV file.
        text: What was printed.
        files: Every file written, by what it holds.
    """

    tables: dict[str, pd.DataFrame]
    text: str
    files: dict[str, Path]

    def __repr__(self) -> str:
        rows = ", ".join(f"{name} [{len(frame)}]" for name, frame in self.tables.items())
        folder = next((str(path.parent) for path in self.files.values()), "nowhere")
        return f"StudyResult(tables: {rows}; files in {folder!r})"

    def to_frame(self, name: str | None = None) -> pd.DataFrame:
        """Return the table of a name; by default the first one."""
        if name is not None and name not in self.tables:
            raise ValueError(f"There is no table {name!r}; expected one of {list(self.tables)}.")
        return self.tables[next(iter(self.tables)) if name is None else name]


class Study(ABC, Generic[P]):
    """A plan and a model: a study under way.

    A subclass says which plans it is for (``class MyStudy(Study[MyPlan], plan=MyPlan)``) and does
    the work in :meth:`run`. Whatever takes long is made by :meth:`parts` and thus resumes, unless
    ``fresh`` says to make it again.
    """

    kinds: ClassVar[dict[type[Plan], "type[Study[Any]]"]] = {}

    def __init_subclass__(cls, *, plan: type[Plan] | None = None, **options: Any) -> None:
        super().__init_subclass__(**options)
        if plan is not None:
            Study.kinds[plan] = cls

    def __init__(self, model: Model | None, plan: P, *, fresh: bool = False) -> None:
        if model is not None:
            plan.check_layers(model.n_layers)
        # None only where the plan says that it needs no model.
        self.model, self.plan, self.fresh = cast(Model, model), plan, fresh
        self.out = Path(plan.out)
        self.used_again: list[str] = []
        self._emptied: set[Path] = set()
        self._started = time.monotonic()

    @abstractmethod
    def run(self) -> StudyResult:
        """Do the work, print what was found, and write it."""

    def identity(self) -> dict[str, Any]:
        """What decides all parts of this study, beside versions and model."""
        return {}

    def folder(self, name: str, **deciding: Any) -> Path | None:
        """Return a folder for parts, named by all that decides them; None where none is kept."""
        model = None if self.model is None else run_identity(self.model)
        everything = [name, versions(), model, self.identity(), deciding]
        folder = self.out / "parts" / f"{file_stem(name)}-{content_sha256(everything)}"
        if self.fresh and folder not in self._emptied:
            shutil.rmtree(folder, ignore_errors=True)
        self._emptied.add(folder)
        return kept_folder(folder, self.model)

    def parts(
        self, name: str, names: Sequence[str], make: Callable[[str], pd.DataFrame], **deciding: Any
    ) -> pd.DataFrame:
        """Return a table made in parts; those on disk are read, the others made and kept.

        Args:
            name: The table's name.
            names: The names of its parts.
            make: Makes the part of that name.
            deciding: Whatever decides the table beside the study's own identity.
        """
        made = []

        def counted(part: str) -> pd.DataFrame:
            made.append(part)
            return make(part)

        frame = in_parts(
            names,
            counted,
            folder=self.folder(name, **deciding),
            config={"table": name, **deciding},
            desc=name,
            model=self.model,
        )
        if not made:
            self.used_again.append(name)
        # As it comes back from disk, so that a resumed run writes the same bytes.
        return pd.DataFrame({str(column): values.tolist() for column, values in frame.items()})

    def write(
        self, findings: Findings, *, name: str, prefix: str = "", **about: Any
    ) -> StudyResult:
        """Write tables, figures, text and a JSON that says how they came about.

        Args:
            findings: What was found.
            name: The name of the JSON, and of the text if there is no prefix.
            prefix: What the names of all tables and figures begin with.
            about: What else the JSON says.
        """

        def stem(part: str) -> str:
            return file_stem("-".join(piece for piece in (prefix, part) if piece))

        text = findings.text
        path = self.out / f"{file_stem(prefix or 'table')}.txt"
        files = {"table": write_atomically(path, lambda p: _write_text(p, text))}
        for part, frame in findings.tables.items():
            files[stem(part)] = write_csv(self.out / f"{stem(part)}.csv", frame)
        for part, figure in findings.figures.items():
            png, pdf = plots.save_figure(figure, self.out / stem(part))
            files[f"{stem(part)} (PNG)"], files[f"{stem(part)} (PDF)"] = png, pdf
        record = provenance(self.model, **self.plan.config)
        record |= {"seconds": round(time.monotonic() - self._started, 1)}
        record |= {"used_again": self.used_again, **about}
        record["files"] = [file.name for file in files.values()]
        files["how it was made"] = write_json(self.out / f"{file_stem(name)}.json", record)
        tables = {stem(part): frame for part, frame in findings.tables.items()}
        return StudyResult(tables, text, files)


@scoped
def study(
    model: Model | Plan,
    plan: Plan | None = None,
    *,
    fresh: bool = False,
    settings: Settings | None = None,
) -> StudyResult:
    """Do what a plan says, and write tables, figures and how they came about.

    What takes long is kept in ``parts`` of the plan's folder. The same call after an interruption
    goes on from there.

    Example:
        >>> plan = IclPlan("animal/country", "patching", samples=32)  # doctest: +SKIP
        >>> sl.study(sl.load(), plan).tables["patching-chosen"]  # doctest: +SKIP

    Args:
        model: The model. A plan that makes its own models stands here alone.
        plan: What to do: a :class:`LensPlan`, :class:`ExitPlan`, :class:`IclPlan`,
            :class:`SpeculationPlan`, or a plan of your own with a :class:`Study` of its own. An
            :class:`InContextPlan` makes its own models.
        fresh: Make parts again that are on disk already.
        settings: Memory limit, batch size and progress; see :class:`spade_lens.Settings`.

    Returns:
        The tables by name, the text that was printed, and the files written.

    Raises:
        TypeError: If the model is no model, or there is no study for such a plan.
        ValueError: If the plan does not fit the model.
    """
    alone = isinstance(model, Plan) and plan is None
    given, todo = (None, model) if alone else (model, plan)
    kinds = [kind for kind in Study.kinds if isinstance(todo, kind)]
    needs = not kinds or kinds[-1].needs_model
    if not kinds or (not isinstance(given, Model) if needs else given is not None):
        names = ", ".join(kind.__name__ for kind in Study.kinds if kind.needs_model)
        others = ", ".join(kind.__name__ for kind in Study.kinds if not kind.needs_model)
        raise TypeError(
            f"study() was given a {type(model).__name__} and a {type(plan).__name__}; expected a "
            f"model, such as spade_lens.load(), and then a plan: {names}. Without a model: "
            f"{others}."
        )
    return Study.kinds[kinds[-1]](cast("Model | None", given), todo, fresh=fresh).run()


def say(text: str) -> None:
    """Print a text, its control characters written out."""
    print(visible(text))


def show_files(files: Mapping[str, Path]) -> None:
    """Print which file holds what."""
    width = max(22, *(len(what) + 2 for what in files))
    for what, path in files.items():
        say(f"{what:<{width}}{path}")


def _chosen(layers: LayersLike) -> tuple[int, ...] | None:
    if layers is None:
        return None
    expected = "layers from 0 on, at least one and each once, such as 12 or range(6, 13)"
    numbers = whole_numbers(layers, "layers=", expected)
    if min(numbers) < 0:
        raise ValueError(f"layers={numbers} were asked for; expected {expected}.")
    return tuple(numbers)


def _write_text(path: Path, text: str) -> None:
    path.write_text(text + "\n", encoding="utf-8")
