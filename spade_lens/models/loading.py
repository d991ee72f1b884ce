"""``load``: from a name, a file, a folder or a live object to a checked :class:`Model`.

This module is the door and stays light. What knows Hugging Face and TransformerLens is in
:mod:`spade_lens.models.sources`, which is imported when the first model is loaded: it takes three
times as long to import as torch.
"""

from pathlib import Path
from typing import Any

import torch

from spade_lens.checks import checked, plain_name
from spade_lens.models.model import Model
from spade_lens.prompts.prompt import check_tokenizer

_DTYPES = (torch.float32, torch.bfloat16, torch.float64)


@checked
def load(
    source: Any = "smollm2-135m-instruct",
    *,
    tokenizer: Any = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    name: str | None = None,
) -> Model:
    """Load a causal language model and prove that its pieces are the model.

    Example:
        >>> model = load("smollm2-135m-instruct")  # doctest: +SKIP
        >>> model.n_layers  # doctest: +SKIP
        30

    Args:
        source: A name of the catalogue (:func:`spade_lens.models.catalog`), a Hugging Face hub
            name, a local folder, a GGUF file, a loaded Hugging Face ``*ForCausalLM``, a
            ``TransformerBridge`` (of ``boot_native`` too), or a ``HookedTransformer``
            (TransformerLens 3.9). Objects are never changed.
        tokenizer: A Hugging Face tokenizer, for a loaded model that brings none.
        device: ``"cpu"`` or ``"cuda"``; the CPU by default. Objects stay where they are.
        dtype: ``torch.float32`` (default), ``torch.bfloat16`` or ``torch.float64``. Objects keep
            theirs.
        name: How results call the model; by default what the source says.

    Returns:
        The model.

    Raises:
        TypeError: If the tokenizer is none, or the name is no text.
        ValueError: If the name is unknown (nearest names are offered), a file is no GGUF, weights
            are missing from a checkpoint or left over in it, torch sees no such device, or the
            dtype is another one.
        FileNotFoundError: If a path leads nowhere.
        UnsupportedModelError: If the model is not a causal language model, is in training mode,
            has weights that are not finite or not there, or cannot be taken apart exactly; the
            message says why.
        DownloadError: If a catalogue model cannot be fetched; the message says what to do.
    """
    if name is not None:
        plain_name(name, "a model")
    if tokenizer is not None:
        check_tokenizer(tokenizer)
    if isinstance(source, str | Path):
        device = _checked_device("cpu" if device is None else device)
        dtype = torch.float32 if dtype is None else dtype
        if dtype not in _DTYPES:
            raise ValueError(
                f"dtype={dtype} was given; expected torch.float32, torch.bfloat16 or torch.float64."
            )
    elif device is not None or dtype is not None:
        raise ValueError(
            "device and dtype are for names, folders and files; a loaded model stays as it is. "
            "Move or cast it yourself before load()."
        )
    from spade_lens.models.sources import from_name, from_object

    if isinstance(source, str | Path):
        assert isinstance(device, torch.device) and dtype is not None
        return from_name(str(source), tokenizer, name, device=device, dtype=dtype)
    return from_object(source, tokenizer, name)


def _checked_device(device: Any) -> torch.device:
    try:
        device = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device={device!r} was given; expected 'cpu' or 'cuda'.") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device='{device}' was given; expected 'cpu' or 'cuda'.")
    n_devices = torch.cuda.device_count()
    if device.type == "cuda" and n_devices and (device.index or 0) >= n_devices:
        raise ValueError(f"device='{device}' was given; torch sees {n_devices} CUDA devices here.")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "device='cuda' was given, but torch sees no CUDA device here. Use device='cpu', or "
            "install a CUDA build of torch on a machine with a GPU."
        )
    return device
