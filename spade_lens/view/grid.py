"""The numbers of a page: a readout's table as flat lists of whole numbers, small as JSON.

This module knows nothing of HTML. ``viewer.js`` says how the lists lie.
"""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from pandas.api.types import infer_dtype, is_numeric_dtype

from spade_lens.report.words import shown_text, shown_token, text_tokens
from spade_lens.stats.frames import check_columns

NEEDS = ("lens", "layer", "prompt", "position", "entropy", "agrees", "kl", "top_1", "top_1_logprob")
SOURCE = "spade_lens.read"
_INFINITE = 10**9
"""What stands for infinity in thousandths: JSON has none."""


def readings_of(frame: pd.DataFrame) -> pd.DataFrame:
    """Return every reading's prompt and position once, in the table's order."""
    check_columns(frame, NEEDS, what="the page", source=SOURCE)
    return frame[["prompt", "position"]].drop_duplicates(ignore_index=True)


def data_of(frame: pd.DataFrame, labels: Sequence[str] | None = None) -> dict[str, Any]:
    """Return what a page of a readout shows, as plain values.

    Args:
        frame: The table of a readout, of one model.
        labels: What stands above each reading. By default the tokens of one text, or the numbers
            of prompts.

    Raises:
        ValueError: If the table is of several models, has two rows for a cell, or there are not as
            many labels as readings.
    """
    readings = readings_of(frame)
    _check_values(frame)
    _check(frame, readings, labels)
    lenses = [str(lens) for lens in frame["lens"].unique()]
    layers = sorted(int(layer) for layer in frame["layer"].unique())
    whole = pd.MultiIndex.from_product(
        [frame["lens"].unique(), layers, *[range(len(readings))]],
        names=["lens", "layer", "reading"],
    )
    numbers = readings.reset_index(names="reading")
    cells = frame.merge(numbers, on=["prompt", "position"]).set_index(whole.names)
    cells = cells[~cells["top_1"].isna()].reindex(whole)
    k = next(n for n in range(1, len(frame.columns) + 1) if f"top_{n + 1}" not in frame.columns)
    tops = np.stack([cells[f"top_{n + 1}"].to_numpy(dtype=object) for n in range(k)], axis=-1)
    logprobs = np.stack([cells[f"top_{n + 1}_logprob"].to_numpy() for n in range(k)], axis=-1)
    targets = _targets(frame, readings)
    numbered, words = pd.factorize(np.concatenate([tops.ravel(), targets]))
    return {
        "columns": "position" if frame["prompt"].nunique() == 1 else "prompt",
        "lenses": [shown_text(lens) for lens in lenses],
        "looks": _looks(lenses),
        "layers": layers,
        "labels": _labels(frame, readings, labels),
        "names": [f"position {at}" for at in readings["position"]],
        "targets": numbered[tops.size :].tolist(),
        "k": k,
        "words": [shown_token(word) for word in words],
        "tokens": numbered[: tops.size].tolist(),
        "logprobs": _thousandths(-logprobs.ravel()),
        "measures": _measures(cells),
    }


def _check(frame: pd.DataFrame, readings: pd.DataFrame, labels: Sequence[str] | None) -> None:
    if "model" in frame.columns and frame["model"].nunique() > 1:
        models = list(frame["model"].unique())
        raise ValueError(f"Rows of the models {models} were given; make a page of one at a time.")
    if frame.duplicated(["lens", "layer", "prompt", "position"]).any():
        raise ValueError(
            "Several rows are of one lens, layer, prompt and position; expected one. Make a page "
            "of each readout, or give their prompts different numbers."
        )
    if labels is not None and len(labels) != len(readings):
        raise ValueError(
            f"{len(labels)} labels were given; expected one for each of {len(readings)} readings."
        )


def _check_values(frame: pd.DataFrame) -> None:
    """Raise if a column that the page shows is there twice, or holds what a readout's does not."""
    twice = list(frame.columns[frame.columns.duplicated()])
    tops = [c for c in map(str, frame.columns) if re.fullmatch(r"top_\d+", c)]
    needed = [f"{top}_logprob" for top in tops]
    needed += ["target_rank", "target_logprob"] if "target_rank" in frame.columns else []
    check_columns(frame, needed, what="the page", source=SOURCE)
    if twice:
        raise ValueError(f"The columns {twice} are there more than once; expected each once.")
    numbers = ["entropy", "kl", "agrees", *needed]
    texts = [c for c in (*tops, "target") if c in frame.columns]
    wrong = [] if _are(frame["layer"], "integer") else ["layer (expected whole numbers)"]
    wrong += [f"{c} (expected numbers)" for c in numbers if not _are(frame[c], *_NUMBERS)]
    wrong += [f"{c} (expected text)" for c in texts if not _are(frame[c], "string", "empty")]
    if wrong:
        raise ValueError(
            f"These columns are not those of a readout: {', '.join(wrong)}. Give a readout, or its "
            "frame."
        )


_NUMBERS = ("integer", "floating", "mixed-integer-float", "boolean")


def _are(column: pd.Series, *kinds: str) -> bool:
    """Return whether the values of a column that are there are all of some kinds."""
    known = column.dropna()
    kind = infer_dtype(known.astype(object))
    if kinds == ("integer",):
        return len(known) == len(column) and kind in _NUMBERS[:3] and bool((known % 1 == 0).all())
    # A column of numbers of which none is there is one all the same.
    return kind in kinds or (kind == "empty" and is_numeric_dtype(column.dtype))


def _looks(lenses: Sequence[str]) -> list[int]:
    """Every lens' colour and dashes by number; SPADE and the logit lens have those of figures."""
    others = [lens for lens in lenses if lens not in _NAMED]
    return [_NAMED[n] if n in _NAMED else 2 + others.index(n) % 5 for n in lenses]


_NAMED = {"SPADE": 0, "logit lens": 1}


def _labels(frame: pd.DataFrame, readings: pd.DataFrame, labels: Sequence[str] | None) -> list[str]:
    if labels is None and frame["prompt"].nunique() > 1:
        return [f"prompt {number}" for number in readings["prompt"]]
    if labels is None:
        labels = text_tokens(frame, readings["position"].tolist())
    return [shown_token(label) for label in labels]


def _targets(frame: pd.DataFrame, readings: pd.DataFrame) -> Any:
    """Every reading's target, None where there is none."""
    if "target" not in frame.columns:
        return np.full(len(readings), None, dtype=object)
    found = frame.drop_duplicates(["prompt", "position"])["target"]
    return found.where(found.notna(), None).to_numpy(dtype=object)


def _measures(cells: pd.DataFrame) -> list[dict[str, Any]]:
    """What colours a cell; the probability of the top token stands among the top tokens."""
    measures: list[dict[str, Any]] = [
        _measure("probability of the top token", "probability", "probability", None),
        _measure("entropy (nats)", "entropy", "nats", _thousandths(cells["entropy"])),
        _measure("KL from the model (nats)", "KL", "nats", _thousandths(cells["kl"]), log=True),
        _measure("agreement with the model", "agrees", "yes", _whole(cells["agrees"])),
    ]
    if "target_rank" in cells.columns:
        rank, logprob = _whole(cells["target_rank"]), _thousandths(-cells["target_logprob"])
        measures += [
            _measure("rank of the target (0: top)", "target's rank", "rank", rank, log=True),
            _measure("probability of the target", "target's probability", "probability", logprob),
        ]
    return measures


def _measure(
    name: str, short: str, kind: str, values: list[int | None] | None, *, log: bool = False
) -> dict[str, Any]:
    return {"name": name, "short": short, "kind": kind, "log": log, "values": values}


def _whole(column: pd.Series) -> list[int | None]:
    return _numbers(column.astype("Float64").to_numpy(dtype=float, na_value=np.nan))


def _thousandths(column: Any) -> list[int | None]:
    return _numbers(1000 * np.asarray(column, dtype=float))


def _numbers(values: Any) -> list[int | None]:
    """Rounded numbers, None where there is none."""
    whole = np.rint(np.clip(values, -_INFINITE, _INFINITE))
    known = ~np.isnan(whole)
    found = np.full(whole.shape, None, dtype=object)
    found[known] = whole[known].astype(np.int64)
    return [None if one is None else int(one) for one in found]
