"""Resume a long run: partial results on disk, each whole or absent, and only for the same run.

A run is identified by all that decides its result. Partial results of another run are refused, so
that two experiments never end up in one result. :mod:`spade_lens.storage.parts` keeps tables by
the same rule.
"""

import json
import time
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from spade_lens.checks import warn
from spade_lens.storage.content import content_sha256
from spade_lens.storage.files import (
    naming_damage,
    output_folder,
    refuse_missing,
    set_aside,
    write_tensors,
)
from spade_lens.storage.origin import versions

_FORMAT = 2

_SECONDS_BETWEEN = 30.0
"""A fit's checkpoint is hundreds of megabytes; writing one takes about a second."""


def kept_folder(folder: str | PathLike[str] | None, model: Any) -> Path | None:
    """Return the folder in which finished work is kept, made if it does not exist; None for none.

    Args:
        folder: The folder; None keeps nothing.
        model: The model that runs. Inside hooks that have no name nothing is kept, since nothing
            tells them from other hooks.

    Raises:
        ValueError: If the folder cannot be written.

    Warns:
        UserWarning: If the hooks in force have no name.
    """
    if folder is None:
        return None
    if model is not None and model.hooked and model.hook_name is None:
        warn(
            f"Hooks without a name are in force, so nothing is read from {str(folder)!r} or kept "
            "there. Name them to keep finished work: model.hooks(fwd_hooks, name='no head 3')."
        )
        return None
    return output_folder(folder)


class Checkpoint:
    """The tensors of a run that is not done yet, one file for each stage.

    Args:
        folder: Where they are, from :func:`kept_folder`; None keeps none.
        run: All that decides the result, ready for JSON.
    """

    def __init__(self, folder: Path | None, run: Mapping[str, Any]) -> None:
        self._folder = None if folder is None else output_folder(folder)
        self._run = as_read(run)
        self._last = time.monotonic()

    def load(self, stage: str, device: torch.device) -> dict[str, Tensor] | None:
        """Return what a stage last saved; None if it has not.

        Raises:
            ValueError: If it was saved by another run.

        Warns:
            UserWarning: If the file is damaged. It is set aside, as if nothing had been saved.
        """
        path = self._path(stage)
        if path is None:
            return None
        try:
            refuse_missing(path)
            with naming_damage(path, again="run it"), safe_open(path, "pt", str(device)) as file:
                run = json.loads((file.metadata() or {})["run"])
                tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
                if content_sha256(tensors) != (file.metadata() or {})["sha256"]:
                    raise ValueError("its numbers are not those that were written")
        except FileNotFoundError:
            return None
        except ValueError as error:
            set_aside(path, error)
            return None
        refuse_another_run(path, there=run, here=self._run)
        return tensors

    def save(self, stage: str, tensors: Mapping[str, Tensor], *, now: bool = False) -> None:
        """Save a stage, at most every half minute.

        Args:
            stage: Its name.
            tensors: All that is needed to go on.
            now: Save in any case.
        """
        path = self._path(stage)
        if path is None or not (now or time.monotonic() - self._last >= _SECONDS_BETWEEN):
            return
        ordered = dict(sorted(tensors.items()))
        about = {"run": json.dumps(self._run), "sha256": content_sha256(ordered)}
        write_tensors(path, ordered, metadata=about)
        self._last = time.monotonic()

    def clear(self, *stages: str) -> None:
        """Remove the files of a run that is done."""
        for stage in stages:
            path = self._path(stage)
            if path is not None:
                path.unlink(missing_ok=True)

    def _path(self, stage: str) -> Path | None:
        return None if self._folder is None else self._folder / f"unfinished-{stage}.safetensors"


def as_read(run: Mapping[str, Any]) -> dict[str, Any]:
    """Return what decides a run as JSON gives it back, with the version that wrote it.

    Tuples and lists are then equal, and what JSON does not know is there as a hash.
    """
    about = {"format": _FORMAT, "spade_lens": versions()["spade-lens"]}
    plain: dict[str, Any] = json.loads(json.dumps({**run, **about}, default=content_sha256))
    return plain


def refuse_another_run(path: Path, *, there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Raise if partial results are those of another run.

    Args:
        path: The file or folder that holds them, for the message.
        there: The run that wrote them.
        here: This run, from :func:`as_read`.

    Raises:
        ValueError: If the two differ; the message says in what.
    """
    keys = sorted(key for key in there.keys() | here.keys() if there.get(key) != here.get(key))
    if keys:
        raise ValueError(
            f"{path} holds partial results of another run; different are {keys}: there "
            f"{ {key: there.get(key) for key in keys} }, here "
            f"{ {key: here.get(key) for key in keys} }. "
            "Delete it, choose another folder, or give the same arguments to go on."
        )
