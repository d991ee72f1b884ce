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
from spade_lens.models.wanted import Wanted
from spade_lens.prompts.prompt import check_tokenizer


@checked
def load(
    source: Any = "smollm2-135m-instruct",
    *,
    tokenizer: Any = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    name: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    device_map: str | dict[str, Any] | None = None,
    tp_plan: str | dict[str, str] | None = None,
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
        dtype: ``torch.float32`` (default), ``torch.bfloat16``, ``torch.float64``, or
            ``torch.float16`` for GPUs. Objects keep theirs.
        name: How results call the model; by default what the source says.
        revision: The branch, tag or commit of a model on the hub.
        token: An access token for the hub, or whether to use the one that is stored.
        device_map: How to spread a folder or a model of the hub over devices: ``"auto"``, or a
            device for every module by name (``"cpu"`` and ``"disk"`` offload it). Accelerate moves
            weights and inputs while blocks run.
        tp_plan: How to split weights over the processes of ``torchrun``: ``"auto"`` for the
            family's plan in transformers, or a style for every module by name. All processes make
            the same calls.

    Returns:
        The model.

    Raises:
        TypeError: If the tokenizer is none, or the name is no text.
        ValueError: If the name is unknown (nearest names are offered), a file is no GGUF, weights
            are missing from a checkpoint or left over in it, torch sees no such device, the dtype
            is another one, a device map leaves weights out, the family has no plan, or an argument
            does not go with the source.
        FileNotFoundError: If a path leads nowhere.
        UnsupportedModelError: If the model is not a causal language model, is in training mode,
            has weights that are not finite or not there, or cannot be taken apart exactly; the
            message says why.
        DownloadError: If a catalogue model cannot be fetched; the message says what to do.

    Warns:
        UserWarning: If the dtype is ``torch.float16`` on a CPU.
    """
    if name is not None:
        plain_name(name, "a model")
    if tokenizer is not None:
        check_tokenizer(tokenizer)
    both = {"device_map": device_map, "tp_plan": tp_plan}, {"revision": revision, "token": token}
    spread, hub = ({k: v for k, v in some.items() if v is not None} for some in both)
    wanted = Wanted(dtype=dtype, device=device, spread=spread, hub=hub)
    if not isinstance(source, str | Path):
        wanted.refuse(
            wanted.names,
            "for names, folders and files; a loaded model stays as it is. Move or cast it yourself "
            "before load().",
        )
        from spade_lens.models.sources import from_object

        return from_object(source, tokenizer, name)
    wanted = wanted.checked()
    from spade_lens.models.sources import from_name

    return from_name(str(source), tokenizer, name, wanted)
