"""Tell one model from another, so that nothing made with one is taken for another's."""

import functools
import hashlib
import json
from collections.abc import Iterator, Mapping
from os import PathLike
from pathlib import Path
from types import FunctionType, MethodType
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor

from spade_lens.models.model import Model
from spade_lens.models.placed import class_of, only_moves, own_forward, whole
from spade_lens.storage.content import content_sha256
from spade_lens.storage.files import as_path
from spade_lens.storage.records import read_pair

UNNAMED = "hooks without a name"
_FUNCTIONS = (FunctionType, MethodType, functools.partial)
_DECIDING = {"sha256": "weights", "architecture": "configuration", "hooks": "hooks"}


def identity_of(model: Model) -> dict[str, Any]:
    """Describe a model and the hooks in force, ready for JSON, for :func:`refuse_another`."""
    return {
        "name": model.name,
        "sha256": model.sha256,
        "architecture": architecture_sha256(model),
        "dtype": str(model.dtype),
        "n_layers": model.n_layers,
        "d_model": model.d_model,
        "hooks": hooks_of(model),
    }


def run_identity(model: Model) -> dict[str, Any]:
    """Describe all of a model that decides a table: also its tokenizer and the device."""
    tokenizer = {"tokenizer": tokenizer_sha256(model.tokenizer), "device": model.device.type}
    return identity_of(model) | tokenizer


def hooks_of(model: Model) -> str | None:
    """Return the name of the hooks in force, where they act and a hash of what they do.

    None if there are none.
    """
    if not model.hooked or model.hook_name is None:
        return UNNAMED if model.hooked else None
    at = model.hook_places
    some = f"{at[0]} and {len(at) - 1} more, {content_sha256(at)}" if len(at) > 3 else ", ".join(at)
    return f"{model.hook_name} ({some}; {model.hook_content})"


def architecture_sha256(model: Model) -> str:
    """Return a hash of what decides a model's numbers beside its parameters.

    That are the classes of its modules, their numbers and words (such as the epsilon of a norm),
    their functions, those put in the place of a class's own, its configuration, and buffers that no
    checkpoint holds.
    """
    digest = hashlib.sha256()
    for piece in _architecture(model.original):
        digest.update(f"{json.dumps(piece, sort_keys=True, default=str)}\n".encode())
    return digest.hexdigest()[:16]


def _architecture(original: torch.nn.Module) -> Iterator[Any]:
    saved, configs = original.state_dict().keys(), set()
    for name, module in original.named_modules():
        kind = class_of(module)
        yield name, f"{kind.__module__}.{kind.__qualname__}", content_sha256(kind.forward)
        for key, value in vars(module).items():
            if key in ("config", "cfg") and id(value) not in configs:
                configs.add(id(value))
                yield _plain_config(value)
            elif key[0] != "_" and key not in ("training", "name", "name_or_path"):
                if isinstance(value, bool | int | float | str | tuple):
                    yield key, value
                elif isinstance(value, _FUNCTIONS) and not only_moves(module, key):
                    if key == "forward":
                        value = own_forward(module)
                    # What a method is of is the model itself, which counts already.
                    yield key, content_sha256(getattr(value, "__func__", value))
        for key, buffer in module.named_buffers(recurse=False):
            if (f"{name}.{key}" if name else key) not in saved:
                # In bfloat16, since two devices compute a rotary base with other last bits.
                rounded = buffer.bfloat16() if buffer.is_floating_point() else buffer
                yield key, content_sha256(rounded)


def _plain_config(config: Any) -> dict[str, Any]:
    content = config.to_dict() if hasattr(config, "to_dict") else getattr(config, "__dict__", {})
    other = (
        "transformers_version",
        "dtype",
        "torch_dtype",
        "architectures",
        "device",
        "stored_precision",
    )
    return {k: v for k, v in content.items() if k[0] != "_" and k not in other}


def tokenizer_sha256(tokenizer: Any) -> str | None:
    """Return a hash of what a tokenizer makes of texts; None for none."""
    if tokenizer is None:
        return None
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        vocabulary = tokenizer.get_vocab() if hasattr(tokenizer, "get_vocab") else vars(tokenizer)
        rules = json.dumps(vocabulary, sort_keys=True, default=str)
    else:
        # Padding and truncation, which change with use, stand before these. As text: item by item
        # a vocabulary takes seconds.
        rules = backend.to_str().partition('"added_tokens"')[2]
    names = ("special_tokens_map", "chat_template", "add_bos_token", "add_eos_token")
    about = {name: getattr(tokenizer, name, None) for name in names}
    return content_sha256([type(tokenizer), rules, about])


def refuse_another(model: Model, known: Any, what: str) -> None:
    """Raise if a model is not the one whose identity was written down.

    Args:
        model: The model at hand.
        known: From :func:`identity_of`.
        what: How the message begins, for example ``"The lens in 'folder'"``.

    Raises:
        ValueError: If it is another model, or other hooks are in force; the message names both.
    """
    if not isinstance(known, Mapping) or not known.keys() >= _DECIDING.keys():
        raise ValueError(
            f"{what} does not say whose it is. It may be damaged; make and save it again."
        )
    here = identity_of(model)
    differ = [name for key, name in _DECIDING.items() if known[key] != here[key]]
    if differ:
        raise ValueError(
            f"{what} belongs to {_described(known)}, and was given {_described(here)}. They differ "
            f"in {', '.join(differ)}. Load it with the model that it was made with, in the same "
            "dtype and hooks, or make one for this model."
        )


def read_made_with(
    model: Model, folder: str | PathLike[str], kind: str
) -> tuple[Path, dict[str, Any], dict[str, Tensor]]:
    """Read the pair of files of something that was made with a model and saved in a folder.

    Args:
        model: The model at hand.
        folder: The folder.
        kind: The kind of file, which is also its name.

    Returns:
        The path of the JSON, its content, and the tensors.

    Raises:
        FileNotFoundError: If one of the files is missing.
        ValueError: If they belong to another model, or are damaged.
    """
    path = as_path(folder) / f"{kind}.safetensors"
    content, tensors = read_pair(path, kind)
    refuse_another(model, content.get("model"), f"What is in {str(folder)!r}")
    return path.with_suffix(".json"), content, tensors


def refuse_unnamed(identity: Mapping[str, Any], what: str) -> None:
    """Raise if something was made inside hooks that have no name: no reader could check them.

    Raises:
        ValueError: If it was.
    """
    if identity.get("hooks") == UNNAMED:
        raise ValueError(
            f"{what} of {identity['name']!r} was made with {UNNAMED} in force, so nothing could "
            "tell later which they were. Name them: model.hooks(fwd_hooks, name='no head 3')."
        )


def _described(identity: Mapping[str, Any]) -> str:
    hooks = f", hooks {identity['hooks']!r}" if identity.get("hooks") else ""
    return (
        f"{identity.get('name')!r} ({identity.get('n_layers')} layers, {identity.get('dtype')}, "
        f"sha256 {str(identity.get('sha256'))[:12]}{hooks})"
    )


def unembedding(model: Model) -> Float[Tensor, "d_vocab d_model"]:
    """Return the unembedding matrix."""
    if hasattr(model.original, "get_output_embeddings"):
        head = model.original.get_output_embeddings()
        return cast(Tensor, whole(head)).to(model.device)
    if hasattr(model.original, "head"):  # TransformerLens' own small models
        return model.original.head.weight
    weight: Tensor = model.original.W_U  # a HookedTransformer's, the other way round
    return weight.T
