"""In how many bits the weights of a model were stored, which no dtype tells once it is loaded.

A GGUF file of 2.3 bits a weight becomes a model in float32 whose numbers are those of 2.3 bits.
What was stored is written in the model's configuration, so that a copy saved by
``save_pretrained`` says it too.
"""

from typing import Any

import torch

_KEY = "stored_precision"


def precision_of(original: Any) -> str:
    """Return how the weights of a model are or were stored.

    Example:
        >>> from types import SimpleNamespace
        >>> precision_of(SimpleNamespace(dtype=torch.bfloat16))
        'bfloat16, 16 bits a weight'

    Args:
        original: The model as it was loaded.
    """
    config = getattr(original, "config", None)
    if (stored := getattr(config, _KEY, None)) is not None:
        return str(stored)
    if (quantised := getattr(config, "quantization_config", None)) is not None:
        about = quantised if isinstance(quantised, dict) else quantised.to_dict()
        method = getattr(about.get("quant_method"), "value", about.get("quant_method"))
        bits = about.get("bits") or 4 * bool(about.get("load_in_4bit"))
        bits = bits or 8 * bool(about.get("load_in_8bit"))
        return f"{method}, {bits} bits a weight" if bits else str(method)
    dtype = getattr(original, "dtype", None)
    return of_dtype(dtype if dtype is not None else next(original.parameters()).dtype)


def of_dtype(dtype: torch.dtype) -> str:
    """Return what is said of weights of a dtype."""
    return f"{str(dtype).removeprefix('torch.')}, {8 * dtype.itemsize} bits a weight"


def of_gguf(tensors: Any) -> str:
    """Return what is said of the tensors of a GGUF file: the usual type, and the mean of all."""
    sizes: dict[str, int] = {}
    for tensor in tensors:
        kind = tensor.tensor_type.name
        sizes[kind] = sizes.get(kind, 0) + int(tensor.n_elements)
    bits = 8 * sum(int(tensor.n_bytes) for tensor in tensors) / sum(sizes.values())
    return f"{max(sizes, key=lambda kind: sizes[kind])}, {bits:.1f} bits a weight"


def say_stored(config: Any, stored: str | torch.dtype | None) -> None:
    """Write into a configuration how its weights were stored, unless it says so already.

    Args:
        config: The configuration of a loaded model.
        stored: In words, or the dtype in the files; None where that is unknown.
    """
    if isinstance(stored, torch.dtype):
        stored = None if stored == config.dtype else of_dtype(stored)
    if stored is not None and getattr(config, _KEY, None) is None:
        setattr(config, _KEY, stored)
