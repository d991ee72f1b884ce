"""The main job: several tasks read at every layer by the logit lens, SPADE and its ablation.

Joins all floors: samples prompts, reads them, and leaves a table, figures, tidy CSVs and a JSON
that says how they came about. Finished tasks are kept as part files, so that a run that was
interrupted goes on where it stopped.
"""

import hashlib
import json
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import pandas as pd
from tqdm.auto import tqdm

from spade_lens import report, stats, storage
from spade_lens.lenses.keep import Keep
from spade_lens.lenses.lens import Lens, LogitLens
from spade_lens.lenses.reading import read
from spade_lens.lenses.spade import Spade
from spade_lens.models.model import Model
from spade_lens.plots.by_layer import plot_by_layer
from spade_lens.plots.style import save_figure
from spade_lens.prompts.prompt import Prompt
from spade_lens.settings import progress_bar
from spade_lens.studies.exits.line import exit_line
from spade_lens.tasks.resolve import TaskLike, task
from spade_lens.tasks.word_pairs import WordPairTask, pair_names

Pairs = str | PathLike[str] | Iterable[Sequence[str] | Mapping[str, str]] | WordPairTask
"""A file of pairs, pairs in memory, or a task."""

_AT_ONCE = 8
"""Prompts read between two steps of the progress bar."""


@dataclass(frozen=True)
class DemoPlan:
    """What a run will do, checked as far as that is possible without the model.

    Args:
        tasks: The tasks.
        shots: Demonstrations in every prompt.
        samples: Prompts of every task.
        layers: The layers to read, ascending; None for all.
        seed: Of the sampling.
        out: The folder for results, which exists and can be written.
    """

    tasks: tuple[WordPairTask, ...]
    shots: int
    samples: int
    layers: tuple[int, ...] | None
    seed: int
    out: Path

    @property
    def config(self) -> dict[str, Any]:
        """What decides the results, ready for JSON."""
        return {
            "tasks": [t.name for t in self.tasks],
            "shots": self.shots,
            "samples": self.samples,
            "layers": "all" if self.layers is None else list(self.layers),
            "seed": self.seed,
        }


@dataclass(frozen=True)
class DemoResult:
    """What a run found, and where it was written.

    Args:
        readings: One row per task, lens, layer and prompt.
        summary: Accuracy and agreement with their intervals, by task, lens and layer.
        table: The summary as text.
        files: Every file written, by what it holds.
    """

    readings: pd.DataFrame
    summary: pd.DataFrame
    table: str
    files: dict[str, Path]


def plan_demo(
    *,
    tasks: Sequence[str | WordPairTask] | None = None,
    pairs: Pairs | None = None,
    shots: int = 8,
    samples: int = 40,
    layers: Sequence[int] | None = None,
    seed: int = 0,
    out: str | PathLike[str] = "spade-lens-demo",
    n_layers: int | None = None,
) -> DemoPlan:
    """Check the arguments of :func:`demo` before a model is loaded.

    Args:
        tasks: As for :func:`demo`.
        pairs: As for :func:`demo`.
        shots: As for :func:`demo`.
        samples: As for :func:`demo`.
        layers: As for :func:`demo`.
        seed: As for :func:`demo`.
        out: As for :func:`demo`.
        n_layers: The model's number of blocks, where it is known already.

    Raises:
        ValueError: If a task is unknown, has too few pairs or occurs twice, a number is out of
            range, pairs cannot be read, or ``out`` cannot be written.
        FileNotFoundError: If ``pairs`` names a file that is not there.
    """
    if tasks is None:
        tasks = pair_names() if pairs is None else []
    chosen = [_word_pairs(t) for t in tasks]
    if pairs is not None:
        chosen.append(_own_task(pairs))
    names = [t.name for t in chosen]
    if not chosen or len(set(names)) < len(names):
        raise ValueError(f"Expected tasks of different names, at least one; got {names}.")
    for t in chosen:
        t.sample(samples, shots=shots, seed=seed)  # raises if it cannot be done
    if layers is not None:
        last = f"0 (the embedding) to {n_layers} (the model's output)"
        outside = [i for i in layers if i < 0 or (n_layers is not None and i > n_layers)]
        if outside or not len(layers):
            expected = "layers from 0 on" if n_layers is None else f"layers {last}"
            raise ValueError(f"Layers {list(layers)} were asked for; expected {expected}.")
        layers = tuple(sorted(set(layers)))
    return DemoPlan(tuple(chosen), shots, samples, layers, seed, storage.output_folder(out))


def demo(
    model: Model,
    *,
    tasks: Sequence[str | WordPairTask] | None = None,
    pairs: Pairs | None = None,
    shots: int = 8,
    samples: int = 40,
    layers: Sequence[int] | None = None,
    seed: int = 0,
    out: str | PathLike[str] = "spade-lens-demo",
    fresh: bool = False,
) -> DemoResult:
    """Read several tasks at every layer with the logit lens, SPADE and the answer token alone.

    Prints what it does and a table, and writes into ``out``: ``readings.csv``, ``summary.csv``,
    ``table.txt``, the figures ``accuracy`` and ``agreement`` (PNG and PDF) and ``demo.json``
    (versions, seed, model hash, configuration). Tasks that are finished are kept in
    ``out/parts``; the same call after an interruption goes on with the next.

    Args:
        model: The model.
        tasks: Names or tasks; by default all that come with the library, or, with ``pairs``,
            none of them.
        pairs: A JSON or CSV file of the user's own pairs, a list of pairs, or a task.
        shots: Demonstrations in every prompt.
        samples: Prompts of every task.
        layers: The layers to read, 0 to ``n_layers``; all by default. The last one is always
            read too, since it is the model itself.
        seed: Of the sampling of prompts.
        out: The folder for results, made where it is not there.
        fresh: Read every task anew, whatever is finished.

    Returns:
        The tables, and where everything was written.

    Raises:
        ValueError: If an argument is not possible; before compute is spent.
        FileNotFoundError: If ``pairs`` names a file that is not there.
    """
    plan = plan_demo(
        tasks=tasks,
        pairs=pairs,
        shots=shots,
        samples=samples,
        layers=layers,
        seed=seed,
        out=out,
        n_layers=model.n_layers,
    )
    return run_demo(model, plan, fresh=fresh)


def run_demo(model: Model, plan: DemoPlan, *, fresh: bool = False) -> DemoResult:
    """Do what :func:`plan_demo` checked; see :func:`demo`.

    Args:
        model: The model.
        plan: What to do.
        fresh: Read every task anew, whatever is finished.

    Raises:
        ValueError: If the plan does not fit the model; before compute is spent.
    """
    # Once more, for plans that were made before the number of layers was known.
    wanted = range(model.n_layers + 1) if plan.layers is None else plan.layers
    if max(wanted) > model.n_layers:
        raise ValueError(
            f"Layer {max(wanted)} was asked for; {model.name} has layers 0 (the embedding) to "
            f"{model.n_layers} (its output)."
        )
    layers = sorted({*wanted, model.n_layers})
    lenses: list[Lens] = [
        LogitLens(model),
        Spade(model),
        Spade(model, keep=Keep(start=False), name="SPADE (answer alone)"),
    ]
    prompts = {
        t.name: t.prompts(model.tokenizer, plan.samples, shots=plan.shots, seed=plan.seed)
        for t in plan.tasks
    }
    for some in prompts.values():
        model.check_prompts(some)
    parts = {t.name: _part(model, plan, t, layers, lenses) for t in plan.tasks}
    done = [name for name, part in parts.items() if part.exists() and not fresh]
    print(
        f"{model.name}: {model.n_layers} layers, sha256 {model.sha256[:12]}. "
        f"{plan.samples} prompts a task, {plan.shots} demonstrations, seed {plan.seed}."
    )
    if done:
        print(f"Already finished, and used again from {plan.out / 'parts'}: {', '.join(done)}.")

    started = time.monotonic()
    with progress_bar(
        total=plan.samples * len(plan.tasks), initial=plan.samples * len(done), unit="prompt"
    ) as bar:
        for t in plan.tasks:
            if t.name not in done:
                bar.set_description(t.name)
                frame = _read_task(plan, t, prompts[t.name], layers, lenses, bar)
                parts[t.name].parent.mkdir(exist_ok=True)
                storage.write_csv(parts[t.name], frame)
    seconds = round(time.monotonic() - started, 1)

    # All from the files, just written or not, so that a resumed run gives the same numbers.
    readings = pd.concat([_load(part) for part in parts.values()], ignore_index=True)
    about = storage.provenance(
        model, **plan.config, lenses=[lens.name for lens in lenses], layers_read=layers
    )
    about |= {"seconds_reading": seconds, "used_again": done}
    about["early_exit"] = _exit_line(model, plan)
    result = _write(readings, plan, about)
    print(f"\n{result.table}\n")
    print(f"{about['early_exit']}\n")
    for what, path in result.files.items():
        print(f"{what:<22}{path}")
    return result


def _exit_line(model: Model, plan: DemoPlan) -> str:
    """What early exit saves on one of the tasks; why it cannot be told where it cannot."""
    by_name = {t.name: t for t in plan.tasks}
    chosen = by_name.get("present-past", plan.tasks[0])
    try:
        return exit_line(model, chosen, shots=plan.shots, seed=plan.seed)
    except ValueError as error:
        return f"SPADE-EXIT was left out: {error}"


def _own_task(pairs: Pairs) -> WordPairTask:
    if isinstance(pairs, WordPairTask):
        return pairs
    if isinstance(pairs, (str, PathLike)):
        return WordPairTask.from_file(pairs)
    return WordPairTask.from_pairs(pairs, name="own pairs")


def _part(
    model: Model, plan: DemoPlan, t: WordPairTask, layers: Sequence[int], lenses: Sequence[Lens]
) -> Path:
    """The file of a task's readings, named by everything that decides them."""
    deciding = {
        "versions": storage.versions(),
        "model": [model.name, model.sha256, str(model.dtype), model.device.type],
        "pairs": t.pairs,
        "config": [plan.shots, plan.samples, plan.seed, list(layers)],
        "lenses": [lens.name for lens in lenses],
    }
    key = hashlib.sha256(json.dumps(deciding).encode()).hexdigest()[:16]
    safe_name = re.sub(r"[^-.\w]", "_", t.name)
    return plan.out / "parts" / f"{safe_name}-{key}.csv"


def _read_task(
    plan: DemoPlan,
    t: WordPairTask,
    prompts: Sequence[Prompt],
    layers: Sequence[int],
    lenses: Sequence[Lens],
    bar: "tqdm[Any]",
) -> pd.DataFrame:
    queries = [query for _, (query, _) in t.sample(plan.samples, shots=plan.shots, seed=plan.seed)]
    frames = []
    for first in range(0, len(prompts), _AT_ONCE):
        some = prompts[first : first + _AT_ONCE]
        frame = read(some, lenses, layers=layers, top_k=1).to_frame()
        frame["prompt"] += first
        frames.append(frame)
        bar.update(len(some))
    whole = pd.concat(frames, ignore_index=True)
    whole.insert(0, "task", t.name)
    whole.insert(5, "query", [queries[i] for i in whole["prompt"]])
    return whole.sort_values(["lens", "layer", "prompt"], kind="stable", key=_in_order)


def _in_order(column: "pd.Series[Any]") -> "pd.Series[Any]":
    """Sorts by first appearance: lenses stay in the order they were given in."""
    return pd.Series(pd.factorize(column)[0], index=column.index)


def _load(part: Path) -> pd.DataFrame:
    # Tokens such as "null" and "NA" are words here, not missing values.
    return pd.read_csv(part, keep_default_na=False, lineterminator="\n")


def _write(readings: pd.DataFrame, plan: DemoPlan, about: dict[str, Any]) -> DemoResult:
    summary = stats.summarise(readings, by=["task", "lens", "layer"])
    reached = report.first_layers(summary).pivot(index="task", columns="lens", values="layer")
    order = [list(summary[c].unique()) for c in ("task", "lens")]
    reached = reached.reindex(index=order[0], columns=order[1]).rename_axis(None, axis=0)
    reached = reached.rename_axis(None, axis=1).astype("string").fillna("-")
    table = (
        f"{report.layer_table(summary)}\n\n"
        f"The first layer that agrees with the full model on at least .90 of the prompts\n"
        f"{reached.to_string()}"
    )
    out = plan.out
    files = {
        "readings": storage.write_csv(out / "readings.csv", readings),
        "summary": storage.write_csv(out / "summary.csv", summary),
        "table": storage.write_atomically(
            out / "table.txt", lambda p: p.write_text(table + "\n", encoding="utf-8")
        ),
    }
    for value in ("accuracy", "agreement"):
        figure = plot_by_layer(summary, value)
        files[f"{value} (PNG)"], files[f"{value} (PDF)"] = save_figure(figure, out / value)
    about["files"] = [path.name for path in files.values()]
    files["how it was made"] = storage.write_json(out / "demo.json", about)
    return DemoResult(readings, summary, table, files)


def _word_pairs(given: TaskLike) -> WordPairTask:
    """Return a task of word pairs; refuse other kinds, which have no free answers to read."""
    chosen = task(given)
    if not isinstance(chosen, WordPairTask):
        raise ValueError(
            f"{chosen!r} is no task of word pairs; expected one of {', '.join(pair_names())}, or "
            "a WordPairTask."
        )
    return chosen
