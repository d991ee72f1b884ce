"""Models that cannot be served, each refused for its true reason before anything is computed."""

import re
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    PreTrainedModel,
)

from spade_lens.checks import spelled
from spade_lens.models.errors import UnsupportedModelError
from spade_lens.models.placed import class_of, is_moved, offloaded
from spade_lens.models.tree import trains

_CAUSAL = ("ForCausalLM", "LMHeadModel")


def refuse_unless_causal(kind: str, config: Any, model: nn.Module | None = None) -> None:
    """Raise unless a class name and a configuration are those of a causal language model.

    Args:
        kind: The name of the model's class.
        config: Its configuration.
        model: The model, where it is loaded already.

    Raises:
        UnsupportedModelError: If it is an encoder, an encoder-decoder, a base model or multimodal.
    """
    text = config.get_text_config()
    fills_gaps = type(text) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(text, "is_decoder", True)
    looks_ahead = config.is_encoder_decoder or fills_gaps
    kinds = [kind] if model is None else [each.__name__ for each in type(model).__mro__]
    if any(each.endswith(_CAUSAL) for each in kinds) and not looks_ahead:
        return
    if text is not config and not looks_ahead:
        raise UnsupportedModelError(
            f"{kind} is a multimodal model. Load its language model alone, as a "
            f"*ForCausalLM: {_language_model(model)}"
        )
    if kind.endswith("Model") and not looks_ahead and type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        whole = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].__name__
        raise UnsupportedModelError(
            f"{kind} is a base model, without the unembedding that logits need. Load the whole "
            f"model with AutoModelForCausalLM: a {whole}."
        )
    if not looks_ahead and type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UnsupportedModelError(
            f"{kind} has the head of another task, which gives no next token. Give a "
            f"{MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].__name__}."
        )
    raise UnsupportedModelError(
        f"{kind} is not a causal language model. SPADE reads what comes next from a residual "
        "stream that only looks back; encoders and encoder-decoders have none. Give a "
        "*ForCausalLM model."
    )


def refuse_unfit(model: nn.Module) -> None:
    """Raise if a model's modules or weights are in a state in which it cannot be served.

    Args:
        model: The model as the user has it.

    Raises:
        UnsupportedModelError: If modules are in training mode or quantise over a batch, or
            weights are absent, spread without accelerate, of 8 bits, or not finite.
    """
    kind, modules = class_of(model).__name__, dict(model.named_modules())
    weights = dict(model.named_parameters()) | dict(model.named_buffers())
    elsewhere = offloaded(model)
    devices = sorted({str(weight.device) for weight in model.parameters() if not weight.is_meta})
    absent = [n for n, weight in weights.items() if weight.is_meta and n not in elsewhere]
    if absent:
        raise UnsupportedModelError(
            f"Weights of {kind} are on the meta device, so they have no values ({_at(absent)}). "
            "Load them: from_pretrained with a device_map, or to_empty and load_state_dict."
        )
    if len(devices) > 1 and not any(map(is_moved, modules.values())):
        raise UnsupportedModelError(
            f"{kind} is spread over several devices: {', '.join(devices)}, and nothing moves its "
            "inputs there. Load it on one, or by load(..., device_map='auto')."
        )
    if quantised := [name for name, module in modules.items() if _quantises(module)]:
        raise UnsupportedModelError(
            f"{kind} has layers of torch's int8 quantisation ({_at(quantised)}). They round by the "
            "range of a whole batch, so a token's result depends on the others. Load it in float32 "
            "or bfloat16."
        )
    if eight := [
        name for name, p in weights.items() if p.dtype.is_floating_point and p.itemsize < 2
    ]:
        raise UnsupportedModelError(
            f"{kind} has weights of 8 bits ({weights[eight[0]].dtype}, {_at(eight)}), in which "
            "blocks do not run. Load it in float32 or bfloat16."
        )
    if training := [name for name, module in modules.items() if trains(module, model)]:
        raise UnsupportedModelError(
            f"{kind} is in training mode (dropout is on) {_at(training)}. Call .eval() on it first."
        )
    values = ((n, elsewhere[n]() if w.is_meta else w) for n, w in model.named_parameters())
    if bad := [name for name, weight in values if not _finite(weight)]:
        raise UnsupportedModelError(
            f"{kind} has NaN or infinite weights ({_at(bad)}). Load weights that are whole; a "
            "conversion to float16 or an interrupted training run leaves such."
        )


def refuse_misfit(model: PreTrainedModel) -> None:
    """Raise if a model's attention or its two embeddings are of a kind that is not served.

    Raises:
        UnsupportedModelError: If attention has ALiBi, there is no unembedding matrix, or it is of
            more tokens than the embedding.
    """
    kind, config = type(model).__name__, model.config
    of_attention = getattr(config, "attn_config", None)
    if config.model_type == "bloom" or any(getattr(c, "alibi", 0) for c in (config, of_attention)):
        raise UnsupportedModelError(
            f"{kind} adds ALiBi to attention: biases that its code makes of the whole prompt, so "
            "tokens cannot be run apart from the rest. Give a model with another kind of position."
        )
    into, out = model.get_input_embeddings(), model.get_output_embeddings()
    if not isinstance(getattr(out, "weight", None), Tensor):
        raise UnsupportedModelError(
            f"The unembedding of {kind} is a {type(out).__name__}, without a matrix of weights. "
            "Give a model whose unembedding is linear."
        )
    if len(out.weight) > len(into.weight):
        raise UnsupportedModelError(
            f"{kind} has an embedding of {len(into.weight)} tokens and an unembedding of "
            f"{len(out.weight)}. Resize them together: model.resize_token_embeddings(n)."
        )


def refuse_idle(model: PreTrainedModel, ran: Sequence[bool]) -> None:
    """Raise if a run of a model left out some of its blocks.

    Args:
        model: The model.
        ran: Whether each block ran.

    Raises:
        UnsupportedModelError: If one did not.
    """
    if idle := [number for number, did in enumerate(ran) if not did]:
        n = getattr(model.config.get_text_config(), "num_hidden_layers", None)
        raise UnsupportedModelError(
            f"{type(model).__name__} has {len(ran)} blocks and does not run blocks {spelled(idle)} "
            f"(config.num_hidden_layers is {n}). Take out the blocks that shall not run, or set it "
            "to their number."
        )


def several_dtypes(model: nn.Module) -> str:
    """Return what to say of a model whose weights are of several dtypes; nothing of others."""
    dtypes = sorted({str(weight.dtype) for weight in model.parameters()})
    advice = f" Its weights are {' and '.join(dtypes)}; cast them to one, such as model.float()."
    return advice if len(dtypes) > 1 else ""


def refuse_wrapped(source: Any) -> None:
    """Raise if an object is a wrapper around a Hugging Face model, and say where that is.

    Raises:
        TypeError: If it is.
    """
    if not isinstance(source, nn.Module) or isinstance(source, PreTrainedModel):
        return
    for name, module in source.named_modules():
        if isinstance(module, PreTrainedModel):
            raise TypeError(
                f"A {type(source).__name__} was given, which wraps a {type(module).__name__}. "
                f"Give load() that model: .{name}."
            )


def _at(names: Iterable[str]) -> str:
    """Name the first few places."""
    named = [name or "the whole model" for name in names]
    return "at " + ", ".join(named[:3]) + (f" and {len(named) - 3} more" if len(named) > 3 else "")


def _language_model(model: nn.Module | None) -> str:
    """Say how the language model of a multimodal one is loaded."""
    if model is None:
        return "load the model with transformers, then give load() that submodule."
    parts = [(n, m) for n, m in model.named_modules() if n and isinstance(m, PreTrainedModel)]
    for name, part in parts:
        if type(part).__name__.endswith(_CAUSAL):
            return f"give load() the submodule {name} (a {type(part).__name__})."
    for name, part in parts:
        if type(part.config) in MODEL_FOR_CAUSAL_LM_MAPPING and "language" in name:
            return (
                f"its submodule {name} with the unembedding. In code: text = AutoModelForCausalLM."
                f"from_config(model.config.get_text_config()).eval(); text.base_model."
                f"load_state_dict(model.{name}.state_dict()); text.lm_head = model.lm_head; "
                "load(text)."
            )
    return "its submodules are " + ", ".join(name for name, _ in parts) + "."


def _quantises(module: nn.Module) -> bool:
    return re.match(r"torch\.(ao\.)?nn\.(\w+\.)*quantized\.", type(module).__module__) is not None


def _finite(weight: Tensor) -> bool:
    """Return whether all values of a weight are finite, without a copy of it."""
    plain = type(weight) in (Tensor, nn.Parameter) and weight.is_floating_point()
    if not plain or not weight.numel():
        return True
    return bool(torch.stack(torch.aminmax(weight.detach())).isfinite().all())
