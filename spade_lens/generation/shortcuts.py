"""Keys and values of all blocks above a layer, predicted from the residual at that layer.

They stand in for blocks where only keys and values are needed: the tokens of a prompt that do not
go on after an exit give keys and values in all blocks above it. Each block reads the exit's
residual through its own norm, and has fitted weights in the place of its own projections. So a
token costs a block these projections alone. That the keys and values of all blocks above an exit
can come from the exit's residual is SwiftKV's (Qiao et al., arXiv 2410.03960), which trains the
model for it. Here the model stays as it is, and the weights are a ridge regression's: ours.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from spade_lens.checks import checked
from spade_lens.generation.key_fit import KeyFit, check_fits, residuals_from
from spade_lens.lenses.fitting.rows import split_places
from spade_lens.lenses.fitting.text import TextSource, calibration_text
from spade_lens.models.errors import UnsupportedModelError
from spade_lens.models.identity import identity_of, read_made_with, refuse_another, refuse_unnamed
from spade_lens.models.model import Model
from spade_lens.models.projections import Projections, projections_of
from spade_lens.settings import Settings, progress_bar, scoped
from spade_lens.storage.files import as_path, naming_damage
from spade_lens.storage.records import write_pair

_KIND = "shortcuts"


@dataclass(frozen=True, eq=False)
class Shortcuts:
    """Fitted projections that make keys and values of the residual at a lower layer.

    Made by :func:`fit_shortcuts`, or loaded by :func:`load_shortcuts`.

    Args:
        model: The model they were fitted on.
        layer: The layer whose residual they read. The block there needs none.
        tensors: Weights and biases: ``"{block}.{projection}.weight"`` and ``.bias``.
        about: How they were fitted, ready for JSON.

    Raises:
        ValueError: If a block above the layer has none, or of another shape than its own.
    """

    model: Model = field(repr=False)
    layer: int
    tensors: Mapping[str, Tensor] = field(repr=False)
    about: Mapping[str, Any] = field(repr=False)
    _projections: tuple[Projections, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        found = _projections(self.model, self.layer)
        check_fits(self.tensors, self.layer, found, self.model)
        object.__setattr__(self, "_projections", found)

    @property
    def held_out(self) -> pd.DataFrame:
        """How good they are on documents that they were not fitted on.

        Returns:
            One row per block above the layer's own: ``block``, ``shortcut_error`` and
            ``copied_error``. The first is the squared error of what the projections give, divided
            by its variance: values, keys before the rotary embedding, and queries where one
            weight makes all three. The second is the same where the block's own projections read
            the residual of the layer.
        """
        return pd.DataFrame(self.about["held_out"])

    def keys_alone(self, number: int, block: nn.Module) -> nn.Module:
        """Copy a block so that it makes keys and values of the residual at ``layer``.

        Args:
            number: Which block it is. Those below the layer stay as they are.
            block: The block.
        """
        if number < self.layer:
            return block
        projections = self._projections[number - self.layer]
        if number == self.layer:
            return projections.alone(block)
        dtype = self.model.dtype
        changed = {
            name: (
                self.tensors[f"{number}.{name}.weight"].to(dtype),
                self.tensors[f"{number}.{name}.bias"].to(dtype),
            )
            for name in projections.needed
        }
        return projections.alone(block, changed)

    def refuse_another(self, model: Model) -> None:
        """Raise if they were fitted on another model."""
        if model is not self.model:
            known = self._made_for
            refuse_another(model, known, f"The shortcuts from layer {self.layer}")

    @property
    def _made_for(self) -> Any:
        """Whose they are: the model as it was when they were fitted."""
        known = self.about.get("model")
        return identity_of(self.model) if known is None else known

    def save(self, folder: str | PathLike[str]) -> Path:
        """Write ``shortcuts.safetensors`` and ``shortcuts.json`` into a folder; return it."""
        identity = self._made_for
        refuse_unnamed(identity, "The shortcuts")
        content = {"model": identity, "layer": self.layer, "about": dict(self.about)}
        path = as_path(folder) / f"{_KIND}.safetensors"
        return write_pair(path, _KIND, dict(self.tensors), content).parent


def _projections(model: Model, layer: int) -> tuple[Projections, ...]:
    """Return the projections of the blocks from a layer on."""
    decoder = model.decoder()
    found = [
        None if decoder is None else projections_of(decoder, block)
        for block in range(layer, model.n_layers)
    ]
    known = tuple(one for one in found if one is not None)
    if len(known) < len(found):
        raise UnsupportedModelError(
            f"{model.name} does not show here which of its weights make keys and values: hooks are "
            "registered on it, or its blocks take no cache or have no linear layers of their own. "
            "Leave the hooks, or exit without shortcuts."
        )
    return known


@checked
def load_shortcuts(folder: str | PathLike[str], model: Model) -> Shortcuts:
    """Return what :meth:`Shortcuts.save` wrote.

    Example:
        >>> load_shortcuts("shortcuts/21", model)  # doctest: +SKIP

    Raises:
        FileNotFoundError: If one of the files is missing.
        ValueError: If they belong to another model, or the files are damaged.
    """
    path, content, tensors = read_made_with(model, folder, _KIND)
    with naming_damage(path, again="fit and save the shortcuts"):
        on_device = {name: tensor.to(model.device) for name, tensor in tensors.items()}
        return Shortcuts(model, content["layer"], on_device, content["about"])


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
    seed: int = 0,
    settings: Settings | None = None,
) -> Shortcuts:
    """Fit keys and values of all blocks above a layer to its residual, by ridge regression.

    The strength of each block's ridge is chosen on documents of its own.

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
        seed: The seed of the text and of its split into documents.
        settings: Memory limit, batch size and progress; see :class:`spade_lens.Settings`.

    Raises:
        UnsupportedModelError: If the model does not show which weights make its keys and values.
        ValueError: If the layer is outside these, or the text is too little.
    """
    options: dict[str, Any] = {"n_pieces": n_pieces, "n_tokens": n_tokens, "seed": seed}
    return fit_several(model, [layer], text, **options)[0]


@torch.no_grad()
def fit_several(
    model: Model,
    layers: Sequence[int],
    text: TextSource,
    *,
    n_pieces: int = 160,
    n_tokens: int = 128,
    seed: int = 0,
) -> list[Shortcuts]:
    """Fit shortcuts from each of several layers, for which the text runs once."""
    for layer in layers:
        if not 1 <= layer <= model.n_layers - 2:
            raise ValueError(
                f"layer={layer} was given; expected 1 to {model.n_layers - 2}: above it there must "
                f"be a block beside its own in {model.name}."
            )
    fits = [KeyFit(model, layer, _projections(model, layer)) for layer in layers]
    pieces = calibration_text(model, text, n_pieces=n_pieces, n_tokens=n_tokens, seed=seed)
    split = split_places(pieces, "all", held_out=0.05, seed=seed)
    if len(split.train) <= model.d_model:
        raise ValueError(
            f"The text gives {len(split.train)} positions to learn from; expected at least "
            f"{model.d_model + 1}, and several times as many to be good. Give more text."
        )
    lowest = min(layers)
    with progress_bar(
        total=len(split.train), desc="fit shortcuts", unit="position", model=model
    ) as bar:
        for batch in split.train.batches():
            resid = residuals_from(model, batch, lowest)
            for fit in fits:
                fit.add(resid)
            bar.update(len(batch))
    validation, test = (
        residuals_from(model, part, lowest) for part in (split.validation, split.test)
    )
    identity = identity_of(model)  # as it is now: it may be another one when they are saved
    shortcuts = []
    for layer, fit in zip(layers, fits, strict=True):
        tensors, ridges = fit.solve(validation)
        about = {
            "model": identity,
            "text": {**pieces.about, "sha256": pieces.sha256},
            "positions": {"train": len(split.train), "test": len(split.test)},
            "ridges": ridges,
            "held_out": fit.errors(tensors, test),
        }
        shortcuts.append(Shortcuts(model, layer, tensors, about))
    return shortcuts
