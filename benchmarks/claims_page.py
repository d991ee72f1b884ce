"""The tables of docs/findings, made of what claims.py measured.

A table of a page stands between ``<!-- table NAME -->`` and ``<!-- end of NAME -->``, and this
writes it there; what is written around the tables is nobody's but the author's. Every table stands
on one page.

    python benchmarks/claims_page.py [--check]
"""

import argparse
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import pandas as pd

HERE = Path(__file__).parent
PAGES = HERE.parent / "docs" / "findings"
MARK = r"<!-- table (.*?) -->"
FILES = {"SmolLM2": "claims.csv", "TinyLlama": "claims-tinyllama-1.1b-chat.csv"}
# What claims.csv calls the conditions that it compares.
SHORT_NAMES = {
    ", less ": " minus ",
    "labels up": "labels to the top",
    "label up": "label to the top",
    "arrow": "final position",
}

Frames = dict[str, pd.DataFrame]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail if it would")
    args = parser.parse_args()
    old = {page: page.read_text(encoding="utf-8") for page in sorted(PAGES.glob("*.md"))}
    check_marks(old.values())
    frames = {name: measured(HERE / file) for name, file in FILES.items()}
    new = {page: filled(text, frames) for page, text in old.items()}
    changed = [page for page in old if new[page] != old[page]]
    if args.check and changed:
        names = ", ".join(str(page) for page in changed)
        sys.exit(f"Not what the CSVs say: {names}. Run python {Path(__file__).name}.")
    for page in changed:
        page.write_text(new[page], encoding="utf-8")


def check_marks(pages: Iterable[str]) -> None:
    """Refuse pages on which a table is missing or stands twice.

    Raises:
        ValueError: If the marks of all pages are not every table once.
    """
    marks = [name for page in pages for name in re.findall(MARK, page)]
    if sorted(marks) != sorted(TABLES):
        raise ValueError(
            f"The pages in {PAGES} have marks of the tables {', '.join(sorted(marks))}; expected "
            f"each of {', '.join(sorted(TABLES))} once. Add or remove '<!-- table NAME -->'."
        )


def measured(path: Path) -> pd.DataFrame:
    """What claims.py wrote; layers and windows of blocks are both names in ``at``."""
    frame = pd.read_csv(path, dtype={"at": str})
    return frame.assign(at=frame["at"].str.removesuffix(".0"))


def filled(page: str, frames: Frames) -> str:
    """The page with its tables as the measurements have them.

    Raises:
        ValueError: If a mark names no table, or a table's end is missing.
    """
    for name in re.findall(MARK, page):
        if name not in TABLES or f"<!-- end of {name} -->" not in page:
            raise ValueError(
                f"The page has a mark of table {name!r}; expected one of {', '.join(TABLES)}, and "
                f"'<!-- end of {name} -->' after it."
            )
        between = re.compile(f"(<!-- table {name} -->\n).*?(\n<!-- end of {name} -->)", re.DOTALL)
        table = f"\n{TABLES[name](frames)}\n"
        page = between.sub(lambda m, table=table: m[1] + table + m[2], page)
    return page


def demonstrations(frames: Frames) -> str:
    counts = (0, 1, 2, 4, 8, 16)
    rows = []
    for model, frame in frames.items():
        some = _of(frame, experiment="shots", measure="preference")
        for task in some["task"].unique():
            name = task if model == "SmolLM2" else f"{task}, {model}"
            rows.append([name, *(_cell(some, task=task, at=n) for n in counts)])
    return _markdown(["task, after demonstrations", *map(str, counts)], rows)


def patching(frames: Frames) -> str:
    conditions = (
        "few-shot",
        "dummy",
        "zero-shot",
        "final position",
        "final position, mean of rule",
        "final position, random",
        "final position, shuffled",
        "final position, opposite",
        "final position, other task",
        "labels to the top",
        "labels to the top, mean of label",
        "labels to the top, random",
        "labels to the top, shuffled",
        "labels to the top, opposite",
        "labels to the top, other task",
        "labels",
        "labels, wrong layer",
        "last label to the top",
    )
    columns = _columns(frames, "patching")

    def cell(frame: pd.DataFrame, task: str, what: str) -> str:
        found = _of(frame, experiment="patching", task=task, what=what, measure="accuracy")
        layers = [f" ({at})" for at in found["at"] if at != "-1"]
        return _cell(found) + "".join(layers)

    rows = [[what, *(cell(frame, task, what) for _, frame, task in columns)] for what in conditions]
    return _markdown(["written", *(f"{model}: {task}" for model, _, task in columns)], rows)


def paired(frames: Frames) -> str:
    rows = []
    for model, frame, task in _columns(frames, "patching, paired"):
        some = _of(frame, experiment="patching, paired", task=task)
        for what in some["what"].unique():
            mine = _of(some, what=what)
            cells = [_cell(mine, signed=True, measure=m) for m in ("accuracy", "logit difference")]
            rows.append([f"{task}, {model}: {in_full(what)}", mine["at"].iloc[0], *cells])
    return _markdown(["on the same prompts", "layer", "accuracy", "logit difference"], rows)


def in_full(comparison: str) -> str:
    """The conditions of a comparison by their names in the other tables."""
    for short, name in SHORT_NAMES.items():
        comparison = comparison.replace(short, name)
    return comparison


def flips(frames: Frames) -> str:
    columns = [
        (model, frame, task)
        for model, frame, task in _columns(frames, "patching")
        if not _of(frame, task=task, what="labels to the top, opposite").empty
    ]
    rows = [
        [what, *(_cell(frame, task=task, what=what, measure="flips") for _, frame, task in columns)]
        for what in (
            "labels to the top",
            "labels to the top, opposite",
            "final position",
            "final position, opposite",
        )
    ]
    head = ["the wrong answer preferred", *(f"{model}: {task}" for model, _, task in columns)]
    return _markdown(head, rows)


def function_vectors(frames: Frames) -> str:
    kinds = (
        "few-shot",
        "dummy",
        "zero-shot",
        "function vector",
        "function vector, random",
        "function vector, random heads",
        "function vector, opposite",
    )
    rows = []
    for model, frame, task in _columns(frames, "heads"):
        some = _of(frame, experiment="heads", task=task)
        for measure in ("accuracy", "preference"):
            cells = [_cell(some, measure=measure, what=kind) for kind in kinds]
            rows.append([f"{model}: {task}, {measure}", *cells])
    return _markdown(["added", *kinds], rows)


def cuts(frames: Frames) -> str:
    edges = (
        "input -> own label",
        "input -> own arrow, label",
        "label -> later labels",
        "label -> final position",
    )
    columns = _columns(frames, "knockout")

    def windows(frame: pd.DataFrame) -> list[str]:
        """All blocks, and the second and third quarter of them."""
        some = _of(frame, experiment="knockout", what=edges[0])["at"].unique()
        blocks = {at: tuple(map(int, at.split("-"))) for at in some}
        every = max(blocks, key=lambda at: blocks[at][1] - blocks[at][0])
        quarters = sorted((at for at in blocks if at != every), key=lambda at: blocks[at])
        return [every, *quarters[1:3]]

    rows = []
    for edge in edges:
        for what, some in ((edge, slice(None)), (f"{edge}, random edges", slice(1))):
            for k in range(3)[some]:
                cells = [
                    _cell(
                        _of(frame, experiment="knockout", task=task, what=what),
                        signed=True,
                        measure="change of logit difference",
                        at=windows(frame)[k],
                    )
                    for _, frame, task in columns
                ]
                name = ("all", "second quarter", "third quarter")[k]
                rows.append([what, name, *cells])
    return _markdown(["cut", "blocks", *(f"{model}: {task}" for model, _, task in columns)], rows)


def contributions(frames: Frames) -> str:
    shown = {
        ("all rule vectors", "logit difference"): False,
        ("no rule vector", "logit difference"): False,
        ("effective number of demonstrations", "number"): False,
        ("Shapley value above 0", "share"): False,
        ("leave one out", "logit difference"): True,
        ("add one in", "logit difference"): True,
        ("shapley, first demonstration", "logit difference"): True,
        ("shapley, last demonstration", "logit difference"): True,
    }
    rows = []
    for model, frame, task in _columns(frames, "contributions"):
        some = _of(frame, experiment="contributions", task=task)
        for at in sorted(some["at"].unique(), key=int):
            cells = [
                _cell(some, signed=signed, what=what, measure=measure, at=at)
                for (what, measure), signed in shown.items()
            ]
            rows.append([f"{task}, {model}", at, *cells])
    head = [
        "task",
        "layer",
        "with all",
        "with none",
        "effective number",
        "share above 0",
        "leave one out",
        "add one in",
        "Shapley: first",
        "Shapley: last",
    ]
    return _markdown(head, rows)


def convergence(frames: Frames) -> str:
    """Within a prompt, beside prompts without the rule; then what another task's mean makes."""
    layers = {"SmolLM2": (0, 6, 12, 18, 24, 30), "TinyLlama": (4, 8, 12, 16, 20, 22)}
    beside = (
        ("nothing", "own, within a prompt"),
        ("nothing", "outputs shuffled, within a prompt"),
        ("nothing", "own less shuffled, within a prompt"),
        ("nothing", "own and another task's, across rules"),
        ("mean of shuffled", "own, within a prompt"),
        ("mean of shuffled", "outputs shuffled, within a prompt"),
    )
    rows = []
    for model, frame, task in _columns(frames, "geometry"):
        some = _of(frame, experiment="geometry", task=task)
        labels = "same" if some["what"].str.contains("labels same").any() else "any"
        for taken, what in beside if labels == "any" else ():
            cells = [
                _cell(some, signed=True, measure=f"cosine, taken off: {taken}", what=what, at=layer)
                for layer in layers[model]
            ]
            rows.append([f"{task}, {model}: {what}; taken off: {taken}", *cells])
        for what in ("within a prompt", "across rules") if labels == "same" else ():
            cells = [
                _cell(some, signed=True, measure="cosine", what=f"{what}, labels {labels}", at=at)
                for at in layers[model]
            ]
            rows.append([f"{task}, {model}: {what}, same label; taken off: mean of all", *cells])
    return _markdown(["cosine", *_both(layers)], rows)


def probes(frames: Frames) -> str:
    layers = {"SmolLM2": (4, 12, 20, 28), "TinyLlama": (4, 8, 16, 22)}
    rows = []
    for model, frame, task in _columns(frames, "geometry"):
        some = _of(frame, experiment="geometry", measure="accuracy", task=task)
        for what in some["what"].unique():
            cells = [_cell(some, what=what, at=layer) for layer in layers[model]]
            rows.append([f"{task}, {model}: {what}", *cells])
    return _markdown(["accuracy at layer", *_both(layers)], rows)


def sufficiency(frames: Frames) -> str:
    layers = {"SmolLM2": (6, 10, 14, 18, 22), "TinyLlama": (4, 8, 12, 16, 20)}
    sets = (
        "query",
        "query+labels",
        "query+same labels",
        "query+other labels",
        "query+random, as many as query+other labels",
        "query+random, as many as query+labels",
        "query+inputs",
        "answer",
    )
    rows = []
    for model, frame, task in _columns(frames, "sufficiency"):
        some = _of(frame, experiment="sufficiency", measure="accuracy", task=task)
        for what in sets:
            if what in set(some["what"]):
                cells = [_cell(some, what=what, at=layer) for layer in layers[model]]
                rows.append([f"{task}, {model}: {what}", *cells])
    return _markdown(["kept from layer", *_both(layers)], rows)


TABLES: dict[str, Callable[[Frames], str]] = {
    "demonstrations": demonstrations,
    "patching": patching,
    "flips": flips,
    "paired": paired,
    "function vectors": function_vectors,
    "cuts": cuts,
    "contributions": contributions,
    "convergence": convergence,
    "probes": probes,
    "sufficiency": sufficiency,
}


def _columns(frames: Frames, experiment: str) -> list[tuple[str, pd.DataFrame, str]]:
    """Every model and task that an experiment was done with."""
    return [
        (model, frame, task)
        for model, frame in frames.items()
        for task in _of(frame, experiment=experiment)["task"].unique()
    ]


def _both(layers: dict[str, Sequence[int]]) -> list[str]:
    """The heads of columns that are of one layer for each model."""
    return [" / ".join(map(str, each)) for each in zip(*layers.values(), strict=True)]


def _of(frame: pd.DataFrame, **values: object) -> pd.DataFrame:
    for column, value in values.items():
        frame = frame[frame[column] == (str(value) if column == "at" else value)]
    return frame


def _cell(frame: pd.DataFrame, *, signed: bool = False, **values: object) -> str:
    """A value with its interval; nothing where it was not measured."""
    found = _of(frame, **values)
    if found.empty:
        return ""
    form = "+.2f" if signed else ".2f"
    value, low, high = found[["value", "low", "high"]].astype(float).iloc[0]
    return f"{value:{form}}" + ("" if pd.isna(low) else f" [{low:{form}}, {high:{form}}]")


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    main()
