"""Files that are whole or not there at all, and hashes by which a lens knows its model."""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor

from spade_lens.models import Model


def write_whole(path: Path, writer: Callable[[Path], Any]) -> None:
    """Write a file next to its place, then move it there in one step.

    Args:
        path: The file; an old one of that name is replaced once the new one is whole.
        writer: Writes the path it is given.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        writer(part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], *, metadata: dict[str, str] | None = None
) -> str:
    """Write tensors as safetensors, atomically.

    Args:
        path: The file.
        tensors: Tensors by name.
        metadata: Text for the file's header.

    Returns:
        The file's sha256, by which a JSON beside it can tell that the two belong together.
    """
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    digest = ""

    def writer(part: Path) -> None:
        nonlocal digest
        save_file(whole, part, metadata=metadata)
        digest = file_sha256(part)

    write_whole(path, writer)
    return digest


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write indented JSON, atomically."""
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    write_whole(path, lambda part: part.write_text(text, encoding="utf-8"))


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no JSON object.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no {path.name} in {str(path.parent)!r}.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}); it may be damaged.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}; expected a JSON object.")
    return content


def file_sha256(path: Path) -> str:
    """The checksum of a file, in lower-case hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def unembedding_sha256(model: Model) -> str:
    """A hash of the unembedding matrix, in float32."""
    data = unembedding(model).detach().cpu().float().contiguous()
    return hashlib.sha256(data.numpy().data).hexdigest()


def identity_of(model: Model) -> dict[str, Any]:
    """What a saved lens remembers of its model."""
    return {
        "name": model.name,
        "sha256": model.sha256,
        "dtype": str(model.dtype),
        "n_layers": model.n_layers,
        "d_model": model.d_model,
        "unembedding_sha256": unembedding_sha256(model),
    }


def refuse_another(model: Model, known: Mapping[str, Any], what: str) -> None:
    """Raise if a model is not the one whose identity was written down.

    Args:
        model: The model at hand.
        known: From :func:`identity_of`.
        what: How the message begins, for example ``"The lens in 'folder'"``.

    Raises:
        ValueError: If it is another model; the message names both.
    """
    if known.get("sha256") == model.sha256:
        return
    raise ValueError(
        f"{what} belongs to {known.get('name')!r} ({known.get('n_layers')} layers, "
        f"{known.get('dtype')}, sha256 {str(known.get('sha256'))[:12]}), and was given "
        f"{model.name!r} ({model.n_layers} layers, {model.dtype}, sha256 {model.sha256[:12]}). "
        "Load it with the model it was fitted on, with the same weights and dtype, or fit one "
        "for this model."
    )


def unembedding(model: Model) -> Float[Tensor, "d_vocab d_model"]:
    """The unembedding matrix itself."""
    if hasattr(model.original, "get_output_embeddings"):
        return model.original.get_output_embeddings().weight
    weight: Tensor = model.original.W_U  # a HookedTransformer's, the other way round
    return weight.T


def package_versions() -> dict[str, str]:
    """Versions of what makes a fitted lens what it is."""
    from importlib.metadata import version

    import spade_lens  # here, since the package is importing this module

    packages = {name: version(name) for name in ("torch", "transformers", "safetensors")}
    return {"spade-lens": spade_lens.__version__} | packages


def read_tensors(path: Path, sha256: str, *, of: str, again: str) -> dict[str, Tensor]:
    """The tensors that were written together with a JSON beside them.

    Args:
        path: The safetensors file.
        sha256: Its hash, as the JSON has it.
        of: What it holds, for messages.
        again: What to do where it is damaged, likewise.

    Raises:
        FileNotFoundError: If it is not there.
        ValueError: If it is another file than the one that was written.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no {path.name} in {str(path.parent)!r}.")
    if file_sha256(path) != sha256:
        raise ValueError(
            f"{path} is not the file that {path.stem}.json beside it was written for. It may be "
            f"damaged, or left over from a {of} that was half replaced; {again} again."
        )
    return load_file(path)
