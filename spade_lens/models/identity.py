"""Tell one model from another: hashes of the unembedding, kept with what was fitted on it."""

import hashlib
from collections.abc import Mapping
from typing import Any

from jaxtyping import Float
from torch import Tensor

from spade_lens.models.model import Model


def unembedding_sha256(model: Model) -> str:
    """Return a hash of the unembedding matrix, in float32."""
    data = unembedding(model).detach().cpu().float().contiguous()
    return hashlib.sha256(data.numpy().data).hexdigest()


def identity_of(model: Model) -> dict[str, Any]:
    """Describe a model, ready for JSON, so that :func:`refuse_another` can tell it from others."""
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
    """Return the unembedding matrix."""
    if hasattr(model.original, "get_output_embeddings"):
        return model.original.get_output_embeddings().weight
    weight: Tensor = model.original.W_U  # a HookedTransformer's, the other way round
    return weight.T
