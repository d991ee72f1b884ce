"""One fit from text to lens: what the two kinds of fit have in common, step by step."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

import torch

from spade_lens.lenses.fitting.descent import Course, better_of, descend
from spade_lens.lenses.fitting.held_out import held_out_figures
from spade_lens.lenses.fitting.ridge import Moments, Spectrum, spectra
from spade_lens.lenses.fitting.rows import Places, Positions, Rows, Split, rows_at, split_places
from spade_lens.lenses.fitting.text import CalibrationText, TextSource, calibration_text, sampled
from spade_lens.lenses.linear import AffineMaps, LinearLens
from spade_lens.lenses.spade import Spade
from spade_lens.models.model import Model
from spade_lens.models.residuals import check_layers
from spade_lens.prompts.prompt import Prompt
from spade_lens.settings import progress_bar
from spade_lens.storage.checkpoint import Checkpoint

_Lens = TypeVar("_Lens", bound=LinearLens)


@dataclass(frozen=True)
class FitRun:
    """A fit under way.

    Args:
        model: The model.
        layers: The layers that get a map.
        split: What is learned from, chosen by and reported on.
        arguments: All that decides the result, ready for JSON.
        checkpoint: Where its stand is noted.
        progress: Whether progress bars are shown.
        began: When, in seconds of the monotonic clock.
    """

    model: Model
    layers: tuple[int, ...]
    split: Split
    arguments: Mapping[str, Any]
    checkpoint: Checkpoint
    began: float = field(default_factory=time.monotonic)

    @classmethod
    def begin(
        cls,
        model: Model,
        text: TextSource,
        *,
        layers: Sequence[int] | None,
        per_piece: Positions,
        held_out: float,
        seed: int,
        checkpoint: str | PathLike[str] | None,
        arguments: Mapping[str, Any],
    ) -> "FitRun":
        """Check everything, get the text and split it.

        Raises:
            ValueError: If an argument is out of range or the text too little.
        """
        began = time.monotonic()
        mapped = tuple(check_layers(model, layers))
        mapped = tuple(layer for layer in mapped if layer < model.n_layers)
        if not mapped:
            raise ValueError(
                f"Only layer {model.n_layers} was asked for, where a lens is the model and nothing "
                "is fitted. Name layers below it."
            )
        folder = None if checkpoint is None else Path(checkpoint).expanduser()
        calibration = _text(model, text, seed, folder)
        split = split_places(calibration, per_piece, held_out=held_out, seed=seed)
        if len(split.train) <= model.d_model:
            raise ValueError(
                f"The calibration text gives {len(split.train)} positions to learn from; a map of "
                f"{model.name} has {model.d_model + 1} unknowns for every output, so at least "
                f"{model.d_model + 1} are needed, and several times as many to be good. Give more "
                "text, or more positions of each piece (per_piece)."
            )
        known = {
            **arguments,
            "layers": list(mapped),
            "text": {**calibration.about, "sha256": calibration.sha256},
            "per_piece": per_piece,
            "positions": {
                part: len(getattr(split, part)) for part in ("train", "validation", "test")
            },
            "split_by": split.by,
            "held_out_fraction": held_out,
            "seed": seed,
        }
        notes = Checkpoint(folder, {"model": model.sha256, **known})
        return cls(model, mapped, split, known, notes, began)

    def problems(self, spade: Spade | None) -> list[Spectrum]:
        """Every layer's regression on SPADE's final residual, or else on the model's own."""
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
        """Residuals of a part that is small enough to be kept."""
        batches = places.batches()
        with self._bar(what, batches, 0) as bar:
            parts = []
            for batch in batches:
                parts.append(rows_at(self.model, batch, self.layers, spade))
                bar.update(len(batch))
        return Rows.join(parts)

    def descend(
        self,
        maps: AffineMaps,
        problems: Sequence[Spectrum],
        spade: Spade | None,
        course: Course,
        validation: Rows,
    ) -> tuple[AffineMaps, list[int]]:
        """Maps gone downhill, and the layers where that did not help and was undone."""
        after = descend(
            self.model,
            maps,
            problems,
            self.split.train,
            spade,
            course,
            self.checkpoint,
        )
        return better_of(self.model, maps, after, validation)

    def finish(self, lens: _Lens, spade: Spade, about: Mapping[str, Any]) -> _Lens:
        """The lens with its figures on the last part of the text and all that led to it."""
        test = self.rows(self.split.test, spade, "held-out rows")
        figures = held_out_figures(lens, test, self.layers)
        whole = {
            **self.arguments,
            **about,
            "held_out": figures,
            "seconds": round(time.monotonic() - self.began, 1),
        }
        self.checkpoint.clear("text", "moments", "descent")
        return type(lens)(self.model, lens.maps, name=lens.name, about=whole)

    def _bar(self, what: str, batches: Sequence[Places], done: int) -> Any:
        return progress_bar(
            total=sum(len(batch) for batch in batches),
            initial=sum(len(batch) for batch in batches[:done]),
            desc=what,
            unit="position",
        )


def _text(
    model: Model,
    text: TextSource,
    seed: int,
    folder: Path | None,
) -> CalibrationText:
    """The calibration text; one that the model wrote is kept, so that it is written only once."""
    if text is not None or folder is None:
        return calibration_text(model, text, seed=seed)
    notes = Checkpoint(folder, {"text of": model.sha256, "seed": seed})
    saved = notes.load("text", torch.device("cpu"))
    if saved is not None:
        pieces = [Prompt(tokens=tuple(row)) for row in saved["tokens"].tolist()]
        return sampled(model, pieces, seed=seed)
    made = calibration_text(model, seed=seed)
    notes.save("text", {"tokens": torch.tensor([p.tokens for p in made.pieces])}, now=True)
    return made
