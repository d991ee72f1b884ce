"""What TransformerLens knows of other people's models: where their blocks are, and bridges.

TransformerLens is imported here and nowhere else. Its import silences transformers' log and a
warning for the whole process, which is undone here.
"""

import logging
import warnings
from typing import Any

import torch
import transformers  # noqa: F401  # first, so that it has set its log level
from torch import nn

from spade_lens.models.errors import UnsupportedModelError
from spade_lens.models.placed import class_of

_log, _filters = logging.getLogger("transformers"), list(warnings.filters)
_level = _log.level

from transformer_lens.config import TransformerBridgeConfig  # noqa: E402
from transformer_lens.factories.architecture_adapter_factory import (  # noqa: E402
    ArchitectureAdapterFactory,
)
from transformer_lens.model_bridge import TransformerBridge  # noqa: E402
from transformer_lens.model_bridge.sources import (  # noqa: E402
    build_bridge_config_from_hf,
    build_bridge_from_module,
)
from transformer_lens.supported_models import OFFICIAL_MODEL_NAMES  # noqa: E402

_log.setLevel(_level)
# Filters of other libraries are about their own kinds of warnings, and stay.
warnings.filters[:] = [f for f in warnings.filters if f in _filters or f[2] is not Warning]  # type: ignore[index]

__all__ = [
    "OFFICIAL_MODEL_NAMES",
    "TransformerBridge",
    "adapter_for",
    "bridge_over",
    "native_bridge",
    "native_model",
]


def adapter_for(hf_model: nn.Module) -> Any:
    """Return TransformerLens' adapter, which names a model's blocks, norm and unembedding.

    Raises:
        UnsupportedModelError: If it has none for this architecture.
    """
    name = class_of(hf_model).__name__
    config = build_bridge_config_from_hf(
        hf_model.config, name, name, next(hf_model.parameters()).dtype
    )
    try:
        adapter = ArchitectureAdapterFactory.select_architecture_adapter(config)
    except ValueError as error:
        raise UnsupportedModelError(
            f"TransformerLens has no adapter for {name}, so its blocks, final norm and "
            "unembedding are not known. Causal language models of the families that "
            "TransformerBridge supports can be loaded."
        ) from error
    # Some adapters only know the final names once they have seen the module tree.
    adapter.setup_component_testing(hf_model)
    return adapter


def bridge_over(hf_model: Any, tokenizer: Any = None) -> Any:
    """Return a ``TransformerBridge`` over a model, whose modules it rebuilds.

    Args:
        hf_model: The model, which the bridge takes over.
        tokenizer: A tokenizer for the bridge alone.
    """
    bridge = build_bridge_from_module(hf_model, type(hf_model).__name__, hf_config=hf_model.config)
    if tokenizer is not None:
        # TransformerLens' own setup reloads the tokenizer, if needed from the hub.
        tokens = tokenizer("a")["input_ids"]
        bridge.cfg.tokenizer_prepends_bos = tokens[0] == tokenizer.bos_token_id
        bridge.cfg.tokenizer_appends_eos = tokens[-1] == tokenizer.eos_token_id
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        bridge.tokenizer = tokenizer
    return bridge


def native_model(**config: Any) -> nn.Module:
    """Return one of TransformerLens' own small models, with random weights.

    Args:
        config: Fields of ``TransformerBridgeConfig``; ``seed`` decides the weights.

    Raises:
        UnsupportedModelError: If this version of TransformerLens has none.
    """
    try:
        from transformer_lens.model_bridge.sources.native import (
            NativeModel,
            initialize_native_model,
        )
    except ImportError as error:
        raise UnsupportedModelError(
            "This version of TransformerLens has no models of its own for a bridge (boot_native). "
            "Install transformer-lens 4 or later."
        ) from error
    cfg = TransformerBridgeConfig.from_dict(config)
    with torch.random.fork_rng():  # modules draw weights that are thrown away
        model = NativeModel(cfg)
        initialize_native_model(model, cfg)
    return model


def native_bridge(model: Any, name: str) -> Any:
    """Return a ``TransformerBridge`` over a model of :func:`native_model`, which it takes over.

    Args:
        model: The model, whose modules the bridge rebuilds.
        name: What the bridge calls it.
    """
    first = next(model.parameters())
    return build_bridge_from_module(
        model,
        architecture="TransformerLensNative",
        tl_config=model.cfg,
        dtype=first.dtype,
        device=first.device,
        model_name=name,
    )
