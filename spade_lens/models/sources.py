"""Make a :class:`Model` of a name, a file, a folder, a Hugging Face model or a TransformerLens one.

This module knows the libraries that models come from. It takes a second or two to import, so only
:func:`spade_lens.load` imports it, when it is called.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from spade_lens.models.adapters import TransformerBridge
from spade_lens.models.catalogue import CATALOG, fetch_model_files
from spade_lens.models.checkpoints import read_gguf, read_pretrained
from spade_lens.models.errors import UnsupportedModelError
from spade_lens.models.hf import HuggingFaceBackbone
from spade_lens.models.hooked import HookedTransformerBackbone
from spade_lens.models.llama2c import load_llama2c
from spade_lens.models.model import Model
from spade_lens.models.native import NativeBackbone
from spade_lens.models.placed import class_of
from spade_lens.models.precision import say_stored
from spade_lens.models.refusals import (
    refuse_misfit,
    refuse_unfit,
    refuse_unless_causal,
    refuse_wrapped,
    several_dtypes,
)
from spade_lens.models.wanted import Wanted
from spade_lens.storage.files import as_path


def from_name(source: str, tokenizer: Any, name: str | None, wanted: Wanted) -> Model:
    """Load a model by its name or path; see :func:`spade_lens.load`."""
    hf_model, tokenizer, own_name = _read(source, tokenizer, wanted)
    if not wanted.spread:
        hf_model.to(wanted.device)
    return _from_hugging_face(hf_model, tokenizer, name or own_name)


def from_object(source: Any, tokenizer: Any, name: str | None) -> Model:
    """Take a loaded model apart; see :func:`spade_lens.load`.

    Raises:
        TypeError: If it is none of the kinds that can be taken apart.
    """
    if isinstance(source, TransformerBridge):
        return _from_bridge(source, tokenizer, name)
    if any(kind.__name__ == "HookedTransformer" for kind in type(source).__mro__):
        return _from_hooked(source, tokenizer, name)
    if isinstance(source, PreTrainedModel):
        place = Path(source.config.name_or_path)
        own_name = place.name if place.is_dir() else source.config.name_or_path
        return _from_hugging_face(source, tokenizer, name or own_name)
    refuse_wrapped(source)
    raise TypeError(
        f"A {type(source).__name__} was given; expected a name, a path, a Hugging Face model, a "
        "TransformerBridge or a HookedTransformer."
    )


def _read(source: str, tokenizer: Any, wanted: Wanted) -> tuple[PreTrainedModel, Any, str]:
    if source in CATALOG:
        wanted.refuse([*wanted.hub, *wanted.spread], f"and {source} is a catalogue model.")
        path, *others = fetch_model_files(source)
        stored = CATALOG[source].precision
        if path.suffix == ".gguf":  # its checksum was compared: no need to look for damage
            read = read_pretrained(str(path.parent), tokenizer, wanted, gguf_file=path.name)
            say_stored(read[0].config, stored)
            return *read, source
        model, own = load_llama2c(path, *others)
        say_stored(model.config, stored)
        return model.to(wanted.dtype).eval(), own if tokenizer is None else tokenizer, source
    path = as_path(source)
    if path.exists():
        wanted.refuse([*wanted.hub], f"and {source} is not on the hub. Leave it out.")
    if path.is_file():
        advice = "load(path).original.save_pretrained(folder)"
        wanted.refuse([*wanted.spread], f"and {source} is a file. Save it as a folder: {advice}.")
        return *read_gguf(path, tokenizer, wanted), path.stem
    if path.is_dir():
        return *read_pretrained(str(path), tokenizer, wanted), path.name
    if path.suffix == ".gguf" or source.startswith((".", "/", "~")):
        raise FileNotFoundError(f"There is no file or folder {source!r}.")
    return *read_pretrained(source, tokenizer, wanted), source


def _from_hugging_face(model: PreTrainedModel, tokenizer: Any, name: str) -> Model:
    kind = class_of(model).__name__

    def take_apart() -> HuggingFaceBackbone:
        refuse_unless_causal(kind, model.config, model)
        attention = model.config._attn_implementation
        if attention not in ("sdpa", "eager"):
            raise UnsupportedModelError(
                f"{kind} runs {attention!r} attention, which takes no free mask. Load it with "
                "attn_implementation='sdpa' or 'eager'."
            )
        refuse_unfit(model)
        refuse_misfit(model)
        return HuggingFaceBackbone(model, tokenizer=tokenizer)

    with _refusing(kind, model):
        return Model(
            take_apart,
            tokenizer=tokenizer,
            name=name or kind,
            reference=lambda tokens: model(tokens, use_cache=False).logits,
            original=model,
        )


@contextmanager
def _refusing(kind: str, model: nn.Module) -> Iterator[None]:
    """Turn any error while a model is taken apart into one that says that it cannot be."""
    try:
        yield
    except UnsupportedModelError:
        raise
    except Exception as error:  # the model's own code runs here, so any error may come
        raise UnsupportedModelError(
            f"{kind} cannot be taken apart into embedding, blocks, final norm and unembedding: "
            f"{type(error).__name__}: {error}. Supported are causal models whose blocks depend on "
            f"residuals, positions and a causal (sliding-window) mask alone.{several_dtypes(model)}"
        ) from error


def _from_bridge(bridge: TransformerBridge, tokenizer: Any, name: str | None) -> Model:
    inner: nn.Module = bridge.original_model
    kind = type(inner).__name__
    if kind == "NativeModel":  # TransformerLens' own, made by boot_native
        return _from_native(bridge, tokenizer, name)

    def take_apart() -> HuggingFaceBackbone:
        refuse_unless_causal(kind, inner.config, inner)
        refuse_unfit(inner)
        return HuggingFaceBackbone(inner, wrapped_by=bridge)

    with _refusing(kind, inner):
        return Model(
            take_apart,
            tokenizer=tokenizer or bridge.tokenizer,
            name=name or bridge.cfg.model_name,
            reference=lambda tokens: bridge(tokens, return_type="logits"),
            original=inner,
        )


def _from_native(bridge: TransformerBridge, tokenizer: Any, name: str | None) -> Model:
    def take_apart() -> NativeBackbone:
        refuse_unfit(bridge.original_model)
        return NativeBackbone(bridge)

    with _refusing("NativeModel", bridge.original_model):
        return Model(
            take_apart,
            tokenizer=tokenizer or bridge.tokenizer,
            name=name or bridge.cfg.model_name,
            reference=lambda tokens: bridge(tokens, return_type="logits"),
            original=bridge.original_model,
        )


def _from_hooked(hooked: Any, tokenizer: Any, name: str | None) -> Model:
    def take_apart() -> HookedTransformerBackbone:
        refuse_unfit(hooked)
        return HookedTransformerBackbone(hooked)

    return Model(
        take_apart,
        tokenizer=tokenizer or hooked.tokenizer,
        name=name or hooked.cfg.model_name,
        reference=lambda tokens: hooked(tokens, return_type="logits"),
        original=hooked,
    )
