"""Where a long run stands, on disk: one file per stage, whole or not at all, known by its run."""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from spade_lens.storage.files import write_tensors

_SECONDS_BETWEEN = 30.0
"""A fit's checkpoint is hundreds of megabytes; writing one takes about a second."""


class Checkpoint:
    """The files of an unfinished run: a fit, or tables of early exit.

    Args:
        folder: Where they are; None keeps none.
        run: What decides the result, ready for JSON. A checkpoint of another run is refused.
    """

    def __init__(self, folder: Path | None, run: Mapping[str, Any]) -> None:
        self._folder = folder
        # As JSON gives it back, so that tuples and lists are the same.
        self._run: dict[str, Any] = json.loads(json.dumps(run))
        self._last = time.monotonic()
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    def load(self, stage: str, device: torch.device) -> dict[str, Tensor] | None:
        """What a stage last saved; None if it has not.

        Raises:
            ValueError: If it was saved by another run.
        """
        path = self._path(stage)
        if path is None or not path.is_file():
            return None
        with safe_open(path, "pt", device=str(device)) as file:
            run = json.loads((file.metadata() or {}).get("run", "{}"))
            if run != self._run:
                keys = sorted(run.keys() | self._run.keys())
                differ = [key for key in keys if run.get(key) != self._run.get(key)]
                raise ValueError(
                    f"{path} is the checkpoint of another run; different are {differ}: there "
                    f"{ {key: run.get(key) for key in differ} }, here "
                    f"{ {key: self._run.get(key) for key in differ} }. Delete it, choose another "
                    "folder, or go on with the same arguments."
                )
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118

    def save(self, stage: str, tensors: Mapping[str, Tensor], *, now: bool = False) -> None:
        """Save a stage, but not much more often than worth the time.

        Args:
            stage: Its name.
            tensors: All that is needed to go on.
            now: Save in any case.
        """
        path = self._path(stage)
        if path is None or not (now or time.monotonic() - self._last >= _SECONDS_BETWEEN):
            return
        write_tensors(path, tensors, metadata={"run": json.dumps(self._run)})
        self._last = time.monotonic()

    def clear(self, *stages: str) -> None:
        """Remove the files of a run that is done."""
        for stage in stages:
            path = self._path(stage)
            if path is not None:
                path.unlink(missing_ok=True)

    def _path(self, stage: str) -> Path | None:
        return None if self._folder is None else self._folder / f"unfinished-{stage}.safetensors"
