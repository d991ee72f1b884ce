"""Summaries as text: lenses by layer for a terminal, and means with intervals, groups downwards.

This module knows summaries only, not what made them.
"""

from collections.abc import Iterable, Sequence
from itertools import groupby
from math import ceil
from typing import Any

import pandas as pd

from spade_lens.checks import checked, spelled, whole_numbers
from spade_lens.stats.frames import TableLike, as_frame, check_columns
from spade_lens.stats.summary import full_model_accuracy, summarise

_HEADINGS = {"accuracy": "accuracy [95% interval]", "agreement": "agreement with the full model"}
_VALUES = ("lens", "layer", "measure", "mean", "low", "high", "n")
_LABEL, _CELL = 6, 15
_WIDTH = 100


@checked
def layer_table(table: TableLike, *, layers: Sequence[int] | None = None) -> str:
    """Return the accuracy and agreement of every lens by layer as text, a block of lines per task.

    Neighbouring layers with the same numbers share a line. The two measures of three lenses fit
    into 100 columns side by side; with more lenses, one measure is below the other.

    Example:
        >>> readout = read(["ab->AB,cd->", "q->"], "spade", model=model, layers=[2, 4])
        >>> print(sl.report.layer_table(readout))  # doctest: +ELLIPSIS
        2 prompts
        <BLANKLINE>
              agreement with the full model...

    Args:
        table: A readout, or a summary from :func:`spade_lens.stats.summarise`, by lens and layer
            and perhaps by task.
        layers: Which layers to show; by default about every third, and for every lens the first
            layer at which it agrees with the model on half of the prompts.

    Raises:
        ValueError: If the table has no lenses and layers.
    """
    summary = _summary(table, "layer_table")
    if "task" not in summary.columns:
        return _block(summary, layers, "")
    tasks = summary["task"].unique()
    return "\n\n".join(_block(summary[summary["task"] == t], layers, f"{t}: ") for t in tasks)


@checked
def first_layers(table: TableLike, *, agreement: float = 0.9) -> pd.DataFrame:
    """Return the first layer at which each lens agrees with the model often enough.

    Args:
        table: A readout, or a summary from :func:`spade_lens.stats.summarise`, by lens and layer
            and perhaps more.
        agreement: The least fraction of prompts.

    Returns:
        One row per lens and whatever else groups the summary, with the column ``layer``; missing
        where a lens never agrees so often. ``layer_low`` and ``layer_high`` are the first layers
        at which the upper and the lower end of the interval are that high: where more prompts
        could put it.
    """
    summary = _summary(table, "first_layers")
    rows = summary[summary["measure"] == "agreement"]
    by = [c for c in rows.columns if c not in _VALUES] + ["lens"]
    found = rows[by].drop_duplicates()
    for column, value in (("layer", "mean"), ("layer_low", "high"), ("layer_high", "low")):
        reached = rows[rows[value] >= agreement].groupby(by, sort=False)["layer"].min()
        reached = reached.astype("Int64").rename(column)
        found = found.merge(reached.reset_index(), how="left", on=by)
    return found


def _summary(table: TableLike, what: str) -> pd.DataFrame:
    frame = as_frame(table)
    check_columns(frame, ["lens", "layer"], what=what, source="spade_lens.read or stats.summarise")
    if "measure" in frame.columns:
        return frame
    return summarise(frame, ["correct", "agrees"] if "correct" in frame.columns else "agrees")


def _block(rows: pd.DataFrame, layers: Sequence[int] | None, title: str) -> str:
    lenses = list(rows["lens"].unique())
    measures = [m for m in _HEADINGS if m in set(rows["measure"])]
    full = full_model_accuracy(rows.drop(columns="task", errors="ignore"))
    lines = [f"{title}{rows['n'].max()} prompts"]
    if len(full):
        lines[0] += f", accuracy of the full model {_number(next(full.itertuples()))}"
    abreast = _LABEL + len(measures) * len(lenses) * _CELL <= _WIDTH
    shown = _layers_worth_showing(rows) if layers is None else _wanted(layers, rows)
    for part in [measures] if abreast else [[m] for m in measures]:
        lines += ["", *_heading(lenses, part), *_body(rows, lenses, part, shown)]
    return "\n".join(lines)


def _wanted(layers: Sequence[int], rows: pd.DataFrame) -> list[int]:
    present = sorted(int(layer) for layer in rows["layer"].unique())
    wanted = whole_numbers(layers, "layers=", f"some of the table's layers, {spelled(present)}")
    if absent := sorted(set(wanted) - set(present)):
        raise ValueError(f"layers={absent} were given; expected some of {spelled(present)}.")
    return wanted


def _heading(lenses: Sequence[str], measures: Sequence[str]) -> list[str]:
    # "SPADE (answer alone)" goes over two lines.
    names = [lens.partition(" (") for lens in lenses] * len(measures)
    upper = [name for name, _, _ in names]
    lower = [f"({rest}" if rest else "" for _, _, rest in names]
    across = "".join(f"{_HEADINGS[m]:<{_CELL * len(lenses)}}" for m in measures)
    lines = [" " * _LABEL + across.rstrip(), _line("layer", upper), _line("", lower)]
    return [line for line in lines if line.strip()]


def _body(
    rows: pd.DataFrame, lenses: Sequence[str], measures: Sequence[str], shown: Sequence[int]
) -> list[str]:
    at = {(row.layer, row.measure, row.lens): _number(row) for row in rows.itertuples()}
    cells = {
        layer: [at[layer, measure, lens] for measure in measures for lens in lenses]
        for layer in sorted(rows["layer"].unique().tolist())
    }
    lines = []
    for same, run in groupby(cells, key=lambda layer: cells[layer]):
        alike = list(run)
        if not set(alike).isdisjoint(shown):
            first, last = alike[0], alike[-1]
            lines.append(_line(str(first) if first == last else f"{first}-{last}", same))
    return lines


def _layers_worth_showing(rows: pd.DataFrame) -> list[int]:
    present = sorted(int(layer) for layer in rows["layer"].unique())
    step = max(1, ceil(present[-1] / 10))
    half = first_layers(rows, agreement=0.5)["layer"].dropna().tolist()
    return [
        layer for layer in present if layer % step == 0 or layer in half or layer == present[-1]
    ]


def _line(label: str, cells: Sequence[str]) -> str:
    return (f"{label:<{_LABEL}}" + "".join(f"{cell:<{_CELL}}" for cell in cells)).rstrip()


def _number(row: Any) -> str:
    return f"{_short(row.mean):>3} [{_short(row.low)} {_short(row.high)}]"


def _short(fraction: float) -> str:
    """Two digits without the zero before the point: .95, and 1.0."""
    return "1.0" if fraction > 0.995 else f"{fraction:.2f}".removeprefix("0")


def grid(
    means: TableLike, rows: Sequence[str], column: str, *, control: str = "", signed: bool = False
) -> str:
    """Return a table of means with their intervals, as text; rows of a control are called so.

    Example:
        >>> import pandas as pd
        >>> means = pd.DataFrame({"lens": ["SPADE", "SPADE"], "layer": [1, 2], "mean": [0.25, 1.0],
        ...                       "low": [0.1, 0.9], "high": [0.4, 1.0]})
        >>> print(grid(means, ["lens"], "layer"))
         lens                 1                 2
        SPADE 0.25 [0.10, 0.40] 1.00 [0.90, 1.00]
    """
    frame = as_frame(means)
    check_columns(frame, [*rows, column, "mean", "low", "high"], what="grid")
    form = "+.2f" if signed else ".2f"
    if control:
        frame = frame.assign(control=frame["control"].map({False: "", True: control}))
    cells = frame.assign(
        cell=[
            f"{m:{form}} [{low:{form}}, {high:{form}}]" if pd.notna(low) else f"{m:{form}}"
            for m, low, high in zip(frame["mean"], frame["low"], frame["high"], strict=True)
        ]
    )
    across = list(dict.fromkeys(cells[column]))
    lines = []
    for key, group in cells.groupby(list(rows), sort=False):
        cell = dict(zip(group[column], group["cell"], strict=True))
        named = dict(zip(rows, key, strict=True))
        lines.append({**named, **{str(value): cell.get(value, "-") for value in across}})
    return pd.DataFrame(lines).to_string(index=False)


def spread(layers: Iterable[int], most: int = 5) -> list[int]:
    """Return as many of the layers as fit a line of text, at equal steps, the last among them.

    Example:
        >>> spread(range(31))
        [2, 9, 16, 23, 30]
    """
    layers = sorted(set(layers))
    step = -(-len(layers) // most)
    return layers[::-1][::step][::-1]
