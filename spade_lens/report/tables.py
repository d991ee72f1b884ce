"""Summaries as text for a terminal."""

from collections.abc import Sequence
from itertools import groupby
from math import ceil
from typing import Any

import pandas as pd

from spade_lens.stats.summary import full_model_accuracy

_HEADINGS = {"accuracy": "accuracy [95% interval]", "agreement": "agreement with the full model"}
_VALUES = ("lens", "layer", "measure", "mean", "low", "high", "n")
_LABEL, _CELL = 6, 15
_WIDTH = 100


def layer_table(summary: pd.DataFrame, *, layers: Sequence[int] | None = None) -> str:
    """Accuracy and agreement of every lens by layer, a block of lines per task.

    Neighbouring layers with the same numbers share a line. Three lenses fit the two measures side
    by side into 100 columns; with more, one stands below the other.

    Args:
        summary: From :func:`spade_lens.stats.summarise`, by lens and layer and perhaps by task.
        layers: Which layers to show; by default every third or so, and for every lens the first
            layer at which it agrees with the model on half of the prompts.

    Returns:
        The lines, joined.
    """
    if "task" not in summary.columns:
        return _block(summary, layers, "")
    tasks = summary["task"].unique()
    return "\n\n".join(_block(summary[summary["task"] == t], layers, f"{t}: ") for t in tasks)


def first_layers(summary: pd.DataFrame, *, agreement: float = 0.9) -> pd.DataFrame:
    """The first layer at which each lens agrees with the model often enough.

    Args:
        summary: From :func:`spade_lens.stats.summarise`, by lens and layer and perhaps more.
        agreement: The least share of prompts.

    Returns:
        One row per lens and whatever else groups the summary, with the column ``layer``; missing
        where a lens never agrees so often.
    """
    rows = summary[summary["measure"] == "agreement"]
    by = [c for c in rows.columns if c not in _VALUES] + ["lens"]
    reached = rows[rows["mean"] >= agreement].groupby(by, sort=False)["layer"].min()
    every = rows[by].drop_duplicates()
    return every.merge(reached.astype("Int64").reset_index(), how="left", on=by)


def _block(rows: pd.DataFrame, layers: Sequence[int] | None, title: str) -> str:
    lenses = list(rows["lens"].unique())
    measures = [m for m in _HEADINGS if m in set(rows["measure"])]
    full = full_model_accuracy(rows.drop(columns="task", errors="ignore"))
    lines = [f"{title}{rows['n'].max()} prompts"]
    if len(full):
        lines[0] += f", accuracy of the full model {_number(next(full.itertuples()))}"
    abreast = _LABEL + len(measures) * len(lenses) * _CELL <= _WIDTH
    shown = _layers_worth_showing(rows) if layers is None else list(layers)
    for some in [measures] if abreast else [[m] for m in measures]:
        lines += ["", *_heading(lenses, some), *_body(rows, lenses, some, shown)]
    return "\n".join(lines)


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
        together = list(run)
        if not set(together).isdisjoint(shown):
            first, last = together[0], together[-1]
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


def _short(share: float) -> str:
    """Two digits without the zero before the point: .95, and 1.0."""
    return "1.0" if share > 0.995 else f"{share:.2f}".removeprefix("0")
