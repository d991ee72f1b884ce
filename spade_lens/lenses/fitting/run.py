"""One fit from text to lens: what the two kinds of fit have in common, step by step.

This module does not know which kind is fitted.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

import torch

from spade_lens.lenses.fitting.held_out import held_out_figures
from spade_lens.lenses.fitting.plan import FitPlan
from spade_lens.lenses.fitting.ridge import Moments, Spectrum, spectra
from spade_lens.lenses.fitting.rows import Places, Rows, Split, rows_at, split_places
from spade_lens.lenses.fitting.text import CalibrationText, TextSource, calibration_text, sampled
from spade_lens.lenses.linear import LinearLens
from spade_lens.lenses.spade import Spade
from spade_lens.models.identity import run_identity
from spade_lens.models.model import Model
from spade_lens.prompts.prompt import Prompt
from spade_lens.settings import progress_bar
from spade_lens.storage.checkpoint import Checkpoint, kept_folder

_Lens = TypeVar("_Lens", bound=LinearLens)


@dataclass(frozen=True)
class FitRun:
    """A fit that has begun, with all that decides its result (``record``), ready for JSON."""

    model: Model
    plan: FitPlan
    layers: tuple[int, ...]
    split: Split
    record: Mapping[str, Any]
    checkpoint: Checkpoint
    began: float = field(default_factory=time.monotonic)

    @classmethod
    def begin(
        cls, model: Model, text: TextSource, plan: FitPlan, checkpoint: str | PathLike[str] | None
    ) -> "FitRun":
        """Check everything, get the text and split it."""
        began = time.monotonic()
        layers = plan.mapped(model)
        folder = kept_folder(checkpoint, model)
        identity = run_identity(model)
        calibration = _text(model, text, plan, folder, identity)
        split = split_places(calibration, plan.per_piece, held_out=plan.held_out, seed=plan.seed)
        if len(split.train) <= model.d_model:
            raise ValueError(
                f"The calibration text gives {len(split.train)} positions to learn from; a map of "
                f"{model.name} has {model.d_model + 1} unknowns for every output, so at least "
                f"{model.d_model + 1} are needed, and several times as many to be good. Give more "
                "text, or more positions of each piece (per_piece)."
            )
        parts = ("train", "validation", "test")
        record = plan.described() | {
            "layers": list(layers),
            "text": {**calibration.about, "sha256": calibration.sha256},
            "positions": {part: len(getattr(split, part)) for part in parts},
            "split_by": split.by,
            "model": identity,
        }
        stages = Checkpoint(folder, record)
        return cls(model, plan, layers, split, record, stages, began)

    def problems(self, spade: Spade | None) -> list[Spectrum]:
        """Return every layer's regression on SPADE's final residual, or else on the model's own."""
        model, device = self.model, self.model.device
        moments = Moments.none(len(self.layers), model.d_model, device)
        done = 0
        saved = self.checkpoint.load("moments", device)
        if saved is not None:
            done = int(saved.pop("batches"))
            moments = Moments(**saved)
        batches = self.split.train.batches()
        with self._bar("learn", batches, done) as bar:
            for number, batch in enumerate(batches[done:], start=done + 1):
                rows = rows_at(model, batch, self.layers, spade)
                moments.add(rows.start, rows.target)
                self.checkpoint.save(
                    "moments",
                    {**vars(moments), "batches": torch.tensor(number)},
                    now=number == len(batches),
                )
                bar.update(len(batch))
        return spectra(moments)

    def rows(self, places: Places, spade: Spade | None, what: str) -> Rows:
        """Return the residuals of a part that is small enough to be kept."""
        batches = places.batches()
        with self._bar(what, batches, 0) as bar:
            parts = []
            for batch in batches:
                parts.append(rows_at(self.model, batch, self.layers, spade))
                bar.update(len(batch))
        return Rows.join(parts)

    def finish(self, lens: _Lens, spade: Spade, about: Mapping[str, Any]) -> _Lens:
        """Return the lens with its held-out figures and the record of the fit."""
        test = self.rows(self.split.test, spade, "held-out rows")
        figures = held_out_figures(lens, test, self.layers)
        complete = {
            **self.record,
            **about,
            "held_out": figures,
            "seconds": round(time.monotonic() - self.began, 1),
        }
        self.checkpoint.clear("text", "moments", "descent")
        return type(lens)(self.model, lens.maps, name=lens.name, about=complete)

    def _bar(self, what: str, batches: Sequence[Places], done: int) -> Any:
        return progress_bar(
            total=sum(len(batch) for batch in batches),
            initial=sum(len(batch) for batch in batches[:done]),
            desc=what,
            unit="position",
            model=self.model,
        )


def _text(
    model: Model, text: TextSource, plan: FitPlan, folder: Path | None, identity: Mapping[str, Any]
) -> CalibrationText:
    """Return the calibration text; one that the model writes is kept, so that it writes it once."""
    sizes: dict[str, Any] = {
        name: getattr(plan, name) for name in ("n_pieces", "n_tokens", "bos", "seed")
    }
    if text is not None or folder is None:
        return calibration_text(model, text, **sizes)
    stages = Checkpoint(folder, {"text of": identity, **sizes})
    saved = stages.load("text", torch.device("cpu"))
    if saved is not None:
        pieces = [Prompt(tokens=tuple(row)) for row in saved["tokens"].tolist()]
        return sampled(model, pieces, seed=plan.seed)
    written = calibration_text(model, **sizes)
    stages.save("text", {"tokens": torch.tensor([p.tokens for p in written.pieces])}, now=True)
    return written
