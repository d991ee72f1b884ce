"""Saved linear lenses: ours, and those that the package ``tuned-lens`` has trained.

A lens reads nonsense, without a warning, with any other model than its own. So it remembers a
hash of its model's weights, and refuses all others. This module does not know how maps are fitted.
"""

import hashlib
from os import PathLike
from os.path import isfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from spade_lens.checks import checked
from spade_lens.lenses.linear import (
    AffineMaps,
    CandidateHead,
    FittedLens,
    LinearSpade,
    TunedLens,
)
from spade_lens.models.identity import refuse_another, unembedding
from spade_lens.models.model import Model
from spade_lens.storage.files import as_path, naming_damage, read_json
from spade_lens.storage.records import made_of, read_pair

_KINDS: dict[str, type[FittedLens]] = {
    kind.kind: kind for kind in (TunedLens, LinearSpade, CandidateHead)
}


@checked
def load_lens(place: str | PathLike[str], model: Model, *, strict: bool = True) -> FittedLens:
    """Return a lens that ``lens.save(place)`` wrote, or that the package ``tuned-lens`` has saved.

    That package's translators count layers as we do: translator ``l`` reads the residual stream
    that block ``l`` sees, which is the one after ``l`` blocks. They add to it, ``h + W h + b``, as
    ours do.

    Example:
        >>> lens = load_lens("lenses/l-spade", model)  # doctest: +SKIP

    Args:
        place: The folder with ``lens.json`` and ``lens.safetensors``; or, of ``tuned-lens``, that
            with ``config.json`` and ``params.pt``, or the file ``params.pt``.
        model: The model that the lens was fitted on.
        strict: Refuse a lens of ``tuned-lens`` that was trained with another unembedding. The
            package hashes one decimal of a few entries, and of the dtype that was loaded, so
            weights in half precision can differ in the hash alone.

    Returns:
        The lens, of the kind that was saved.

    Raises:
        FileNotFoundError: If one of the files is missing.
        ValueError: If the lens belongs to another model, or the files are damaged, do not belong
            together or are of a kind that is not known here.
    """
    path = as_path(place)
    theirs = path if isfile(path) else path / "params.pt"  # isfile: False where nothing may be seen
    if isfile(path) or (isfile(path / "config.json") and not isfile(path / "lens.json")):
        return _tuned_lens(theirs, model, strict)
    return _own_lens(path, model)


def _own_lens(place: Path, model: Model) -> FittedLens:
    content, tensors = read_pair(place / "lens.safetensors", *_KINDS)
    refuse_another(model, content.get("model"), f"The lens in {str(place)!r}")
    with naming_damage(place / "lens.json", again="fit and save the lens"):
        layers = {"layers": content["layers"], "down": None}
        maps = made_of(AffineMaps, layers | tensors)
        kind = _KINDS[content["kind"]]
        lens = kind(model, maps, name=content["name"], about={**content["fit"]})
    lens.folder = place
    return lens


def _tuned_lens(params: Path, model: Model, strict: bool) -> TunedLens:
    config = read_json(params.parent / "config.json")
    if not params.is_file():
        raise FileNotFoundError(f"There is no params.pt in {str(params.parent)!r}.")
    _check_tuned_lens(model, config, f"The tuned lens in {str(params.parent)!r}", strict)
    with naming_damage(params, again="save the lens"):
        # Only tensors: a pickle could run anything.
        state = torch.load(params, map_location="cpu", weights_only=True)
        shapes = {key: tuple(tensor.shape) for key, tensor in state.items()}
    n, d_model = model.n_layers, model.d_model
    expected: dict[str, tuple[int, ...]]
    expected = {f"{layer}.weight": (d_model, d_model) for layer in range(n)}
    if config.get("bias", True):
        expected |= {f"{layer}.bias": (d_model,) for layer in range(n)}
    if shapes != expected:
        differ = sorted(set(shapes.items()) ^ set(expected.items()))[:4]
        raise ValueError(
            f"{params} does not hold the {len(expected)} tensors that its config.json asks for; "
            f"the first that differ: {differ}."
        )
    weights = torch.stack([state[f"{layer}.weight"] for layer in range(n)]).float()
    biases = [state.get(f"{layer}.bias", torch.zeros(d_model)) for layer in range(n)]
    maps = AffineMaps(tuple(range(n)), weights, torch.stack(biases).float())
    about = {"method": "trained by the package tuned-lens", "config": config}
    return TunedLens(model, maps, about=about)


def _check_tuned_lens(model: Model, config: dict[str, Any], what: str, strict: bool) -> None:
    trained_on = config.get("base_model_name_or_path")
    sizes = {"num_hidden_layers": model.n_layers, "d_model": model.d_model}
    differ = {key: config.get(key) for key, size in sizes.items() if config.get(key) != size}
    if differ:
        raise ValueError(
            f"{what} was trained on {trained_on!r} with {differ}; {model.name!r} has "
            f"{ {key: sizes[key] for key in differ} }. Load it with the model it was trained on."
        )
    theirs = config.get("unembed_hash")
    if strict and theirs and theirs != _their_hash(model):
        raise ValueError(
            f"{what} was trained on {trained_on!r} with another unembedding than that of "
            f"{model.name!r} ({model.dtype}). Load it with the model it was trained on; if it is "
            "the same model in another precision, say strict=False."
        )


def _their_hash(model: Model) -> str:
    """Return the package's hash of an unembedding: of how numpy prints it, with one decimal."""
    matrix = unembedding(model).detach().cpu().float().numpy()
    # Numpy's defaults are hashed, whatever the user has set.
    with np.printoptions(edgeitems=3, threshold=1000, linewidth=75, suppress=False):
        return hashlib.sha256(np.array_str(matrix, precision=1).encode()).hexdigest()
