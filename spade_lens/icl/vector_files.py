"""Vectors on disk: safetensors, and a JSON beside them that says what they were made with."""

from os import PathLike
from pathlib import Path
from typing import Any

from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor

from spade_lens.models.identity import identity_of, refuse_another
from spade_lens.models.model import Model
from spade_lens.storage.files import file_sha256, read_json, write_json, write_tensors
from spade_lens.storage.provenance import versions


def save_vectors(
    path: str | PathLike[str],
    vectors: Float[Tensor, "*place d_model"],
    model: Model,
    **about: Any,
) -> Path:
    """Write vectors as safetensors, and model, versions and configuration as JSON beside them.

    Example:
        >>> import pathlib, tempfile, torch
        >>> folder = pathlib.Path(tempfile.mkdtemp())
        >>> path = save_vectors(folder / "mean.safetensors", torch.ones(4, 32), model, seed=0)
        >>> vectors, about = load_vectors(path, model)
        >>> vectors.shape, about
        (torch.Size([4, 32]), {'seed': 0})

    Args:
        path: The file, ending in ``.safetensors``; the JSON has the same name.
        vectors: The vectors.
        model: The model that they were taken from.
        about: What else decides them: task, layers, seed, ...; plain values, for JSON.

    Returns:
        The path.

    Raises:
        ValueError: If the path has another ending.
    """
    path = _checked(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "format": 1,
        "shape": list(vectors.shape),
        "model": identity_of(model),
        "packages": versions(),
        "about": about,
        "tensors_sha256": write_tensors(path, {"vectors": vectors}),
    }
    write_json(path.with_suffix(".json"), content)
    return path


def load_vectors(
    path: str | PathLike[str], model: Model
) -> tuple[Float[Tensor, "*place d_model"], dict[str, Any]]:
    """Vectors that :func:`save_vectors` wrote.

    Args:
        path: The ``.safetensors`` file.
        model: The model that they were taken from.

    Returns:
        The vectors, on the model's device, and what was said about them.

    Raises:
        FileNotFoundError: If one of the two files is missing.
        ValueError: If they belong to another model or do not belong together.
    """
    path = _checked(path)
    content = read_json(path.with_suffix(".json"))
    if not path.is_file():
        raise FileNotFoundError(f"There is no {path.name} in {str(path.parent)!r}.")
    refuse_another(model, content.get("model", {}), f"The file {str(path)!r}")
    if file_sha256(path) != content.get("tensors_sha256"):
        raise ValueError(
            f"{path} is not the file that the JSON beside it was written for. It may be damaged, "
            "or left over from vectors that were half replaced; save them again."
        )
    return load_file(path)["vectors"].to(model.device), content["about"]


def _checked(path: str | PathLike[str]) -> Path:
    path = Path(path).expanduser()
    if path.suffix != ".safetensors":
        raise ValueError(f"{path} must end in .safetensors, the format that vectors are saved in.")
    return path
