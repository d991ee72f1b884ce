"""The table of a patching sweep, as a result that sums up, saves and draws itself.

This module does not know how the table was measured.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from spade_lens.checks import visible
from spade_lens.lazy import verb
from spade_lens.lenses.answers import Answers
from spade_lens.stats.summary import summarise
from spade_lens.storage.files import (
    as_path,
    file_sha256,
    naming_damage,
    output_folder,
    read_json,
    refuse_missing,
    write_csv,
    write_json,
)
from spade_lens.storage.origin import versions


@dataclass(frozen=True, eq=False)
class PatchSweep:
    """What a model answers under every condition, at every layer, to every prompt.

    Args:
        frame: One row per condition, layer and prompt: ``task``, ``condition``, ``layer``,
            ``prompt`` (its number), ``correct``, ``prefers``, ``logit_diff`` and ``ambiguous`` (see
            :class:`spade_lens.lenses.answers.Answers`). All are measured by the episode's own
            answer: under the opposite mapping, a prompt that does not prefer it has flipped. The
            baselines ``zero-shot``, ``dummy`` and ``few-shot`` stand first, with layer -1.
        about: What decides the numbers, as plain values: the model, the seed, ...
    """

    frame: pd.DataFrame
    about: Mapping[str, Any]

    def __repr__(self) -> str:
        patched = self.frame[self.frame["layer"] >= 0]
        columns = ("condition", "layer", "prompt")
        counts = [f"{n} {c}{'s' * (n != 1)}" for c in columns if (n := patched[c].nunique())]
        return visible(
            f"PatchSweep({', '.join(self.frame['task'].unique())}: {' x '.join(counts)}; "
            f"{self.about['model']['name']})"
        )

    def to_frame(self) -> pd.DataFrame:
        """Return the table."""
        return self.frame.copy()

    def summary(self) -> pd.DataFrame:
        """Return accuracy, preference, flips and logit difference with their intervals."""
        return summarise(self.frame)

    def plot(self, **options: Any) -> Figure:
        """Draw the conditions beside their controls, by patched layer."""
        figure: Figure = verb("plot")(self, **options)
        return figure

    def save(self, path: str | PathLike[str]) -> Path:
        """Write the table as CSV, and what it was made with as JSON beside it.

        Args:
            path: The file, ending in ``.csv``; the JSON has the same name.

        Raises:
            ValueError: If the path has another ending.
        """
        path = _csv(path)
        output_folder(path.parent)
        about = {"packages": versions(), "about": dict(self.about)}
        digest = file_sha256(write_csv(path, self.frame))
        write_json(path.with_suffix(".json"), about | {"csv_sha256": digest})
        return path

    @classmethod
    def load(cls, path: str | PathLike[str]) -> "PatchSweep":
        """Read what :meth:`save` wrote.

        Raises:
            FileNotFoundError: If one of the two files is missing.
            ValueError: If one is damaged.
        """
        path = _csv(path)
        content = read_json(path.with_suffix(".json"))
        with naming_damage(path.with_suffix(".json"), again="save the sweep"):
            about = dict(content["about"])
            name, digest = about["model"]["name"], content["csv_sha256"]
        refuse_missing(path)
        with naming_damage(path, again=f"save the sweep of {name!r}"):
            if file_sha256(path) != digest:
                raise ValueError(f"it is not the file that {path.stem}.json was written for")
            # By Python's own float, so that numbers come back to the bit; "null" stays a word.
            frame = pd.read_csv(path, dtype=str, keep_default_na=False)
            for column in ("layer", "prompt"):
                frame[column] = frame[column].astype(int)
            for column in {"correct", "prefers", "ambiguous"} & {*frame.columns}:
                frame[column] = frame[column] == "True"
            return cls(frame.assign(logit_diff=frame["logit_diff"].map(float)), about)


def answered(
    answers: Answers, task: str, conditions: Sequence[str], layer: int, prompts: Sequence[int]
) -> pd.DataFrame:
    """Return the rows of a sweep for some answers."""
    about = {"task": task, "condition": conditions, "layer": layer, "prompt": list(prompts)}
    return pd.DataFrame(about).join(answers.to_frame())


def _csv(path: str | PathLike[str]) -> Path:
    path = as_path(path)
    if path.suffix != ".csv":
        raise ValueError(f"{path} must end in .csv, the format that sweeps are saved in.")
    return path
