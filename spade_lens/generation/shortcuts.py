"""Affine maps from the residual at one layer to those at the layers above it.

They stand in for blocks where only keys and values are needed: the tokens of a prompt that do not
go on after an exit are mapped, and give keys and values in all blocks above it. Maps between the
layers of a residual stream are Din et al.'s (arXiv 2303.09435), who have no bias. That the keys and
values of all blocks above an exit can come from the exit's residual is SwiftKV's (Qiao et al.,
arXiv 2410.03960), which trains the model for it. Here the model stays as it is.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from spade_lens.checks import checked
from spade_lens.lenses.fitting.plan import SpadePlan
from spade_lens.lenses.fitting.ridge import Moments, ridge_maps, spectra
from spade_lens.lenses.fitting.rows import Places, Rows, split_places
from spade_lens.lenses.fitting.text import TextSource, calibration_text
from spade_lens.lenses.linear import AffineMaps
from spade_lens.models.hooks import numbered
from spade_lens.models.identity import identity_of, refuse_another, refuse_unnamed
from spade_lens.models.model import Model
from spade_lens.models.residuals import capture
from spade_lens.settings import Settings, progress_bar, scoped
from spade_lens.storage.files import as_path, naming_damage
from spade_lens.storage.records import made_of, read_pair, write_pair

_KIND = "shortcuts"


@dataclass(frozen=True, eq=False)
class Shortcuts:
    """Affine maps from the residual at one layer to those at the layers above it.

    Made by :func:`fit_shortcuts`, or loaded by :func:`load_shortcuts`.

    Args:
        model: The model they were fitted on.
        layer: The layer they start at.
        maps: A map for every layer above it but the last, where no block reads.
        about: How they were fitted, ready for JSON.

    Raises:
        ValueError: If the maps are not those of the layers that follow ``layer``.
    """

    model: Model = field(repr=False)
    layer: int
    maps: AffineMaps = field(repr=False)
    about: Mapping[str, Any] = field(repr=False)

    def __post_init__(self) -> None:
        n = len(self.maps.layers)
        if self.maps.layers != tuple(range(self.layer + 1, self.layer + 1 + n)) or not n:
            raise ValueError(
                f"Maps to layers {list(self.maps.layers)} were given for layer {self.layer}; "
                f"expected one to every layer from {self.layer + 1} to the last but one."
            )

    @property
    def held_out(self) -> pd.DataFrame:
        """How good they are on documents that they were not fitted on.

        Returns:
            One row per layer: ``layer``, ``error`` (the squared error divided by the target's
            variance) and ``error_copied``, the same of the residual that is not mapped.
        """
        return pd.DataFrame(self.about["held_out"])

    def at(
        self, resid: Float[Tensor, "row pos d_model"], layer: int
    ) -> Float[Tensor, "row pos d_model"]:
        """Return what residuals at the first layer become at ``layer``."""
        return resid if layer == self.layer else self.maps(resid, layer)

    def refuse_another(self, model: Model) -> None:
        """Raise if they were fitted on another model."""
        if model is not self.model:
            known = identity_of(self.model)
            refuse_another(model, known, f"The shortcuts from layer {self.layer}")

    def save(self, folder: str | PathLike[str]) -> Path:
        """Write ``shortcuts.safetensors`` and ``shortcuts.json`` into a folder; return it."""
        identity = identity_of(self.model)
        refuse_unnamed(identity, "The shortcuts")
        content = {
            "model": identity,
            "layer": self.layer,
            "layers": list(self.maps.layers),
            "about": dict(self.about),
        }
        path = as_path(folder) / f"{_KIND}.safetensors"
        return write_pair(path, _KIND, self.maps.tensors, content).parent


@checked
def load_shortcuts(folder: str | PathLike[str], model: Model) -> Shortcuts:
    """Return what :meth:`Shortcuts.save` wrote.

    Example:
        >>> load_shortcuts("shortcuts/21", model)  # doctest: +SKIP

    Raises:
        FileNotFoundError: If one of the files is missing.
        ValueError: If they belong to another model, or the files are damaged.
    """
    path = as_path(folder) / f"{_KIND}.safetensors"
    content, tensors = read_pair(path, _KIND)
    refuse_another(model, content.get("model"), f"What is in {str(folder)!r}")
    with naming_damage(path.with_suffix(".json"), again="fit and save the shortcuts"):
        maps = made_of(AffineMaps, {"layers": content["layers"], "down": None} | tensors)
        return Shortcuts(model, content["layer"], maps.to(model.device), content["about"])


@scoped
@checked
@torch.no_grad()
def fit_shortcuts(
    model: Model,
    layer: int,
    text: TextSource = None,
    *,
    n_pieces: int = 160,
    n_tokens: int = 128,
    rank: int | None = None,
    seed: int = 0,
    settings: Settings | None = None,
) -> Shortcuts:
    """Fit affine maps from one layer to all layers above it, by ridge regression.

    The strength of each map's ridge is chosen on documents of its own.

    Example:
        >>> from spade_lens.generation import fit_shortcuts
        >>> text = ["abcdefgh" * 9, "ijklmnop" * 9, "qrstuvwx" * 9]
        >>> fit_shortcuts(model, 2, text, n_tokens=24)
        Shortcuts(layer=2)

    Args:
        model: The model.
        layer: The layer to start at, from 1 to two below the last.
        text: What to learn from; see
            :func:`~spade_lens.lenses.fitting.text.calibration_text`. By default the model writes
            it, which takes long.
        n_pieces: How many pieces of text to take at most. All their positions are learned from.
        n_tokens: The length of a piece in tokens.
        rank: The rank of what a map adds to the identity; None for any.
        seed: The seed of the text and of its split into documents.
        settings: Memory limit, batch size and progress; see :class:`spade_lens.Settings`.

    Raises:
        ValueError: If the layer is outside these, or the text is too little.
    """
    if not 1 <= layer <= model.n_layers - 2:
        raise ValueError(
            f"layer={layer} was given; expected 1 to {model.n_layers - 2}: above it there must be "
            f"a layer that is not the last of {model.name}."
        )
    plan = SpadePlan(rank=rank)
    plan.spade(model)  # refuses a rank beyond the width
    above = tuple(range(layer + 1, model.n_layers))
    pieces = calibration_text(model, text, n_pieces=n_pieces, n_tokens=n_tokens, seed=seed)
    split = split_places(pieces, "all", held_out=0.05, seed=seed)
    if len(split.train) <= model.d_model:
        raise ValueError(
            f"The text gives {len(split.train)} positions to learn from; expected at least "
            f"{model.d_model + 1}, and several times as many to be good. Give more text."
        )
    moments = Moments.none(len(above), model.d_model, model.device)
    with progress_bar(
        total=len(split.train), desc="fit shortcuts", unit="position", model=model
    ) as bar:
        for batch in split.train.batches():
            rows = _rows(model, batch, layer, above)
            moments.add(rows.start, rows.target)
            bar.update(len(batch))
    chosen_by, test = (
        Rows.join([_rows(model, batch, layer, above) for batch in part.batches()])
        for part in (split.validation, split.test)
    )
    maps, ridges = ridge_maps(spectra(moments), above, plan, chosen_by)
    about = {
        "text": {**pieces.about, "sha256": pieces.sha256},
        "positions": {"train": len(split.train), "test": len(split.test)},
        "ridges": ridges,
        "held_out": _errors(maps, test),
    }
    return Shortcuts(model, layer, maps, about)


def _rows(model: Model, places: Places, layer: int, above: tuple[int, ...]) -> Rows:
    """Return the residuals at ``layer``, and as the targets those above it."""
    with numbered(None):  # pieces of text in an order of ours
        layers = [layer, *above]
        stack = capture(model, places.pieces, layers=layers, positions=places.positions).stack
    return Rows(stack[:1].expand_as(stack[1:]), stack[-1], stack[1:])


def _errors(maps: AffineMaps, test: Rows) -> list[dict[str, Any]]:
    start, errors = test.start[0], []
    for layer, target in zip(maps.layers, test.target, strict=True):
        variance = (target - target.mean(dim=0)).square().sum()
        mapped, copied = (
            float((given - target).square().sum() / variance)
            for given in (maps(start, layer), start)
        )
        errors.append({"layer": layer, "error": mapped, "error_copied": copied})
    return errors
