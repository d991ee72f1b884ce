"""Read a model from a folder, the Hugging Face hub or a GGUF file, whole or not at all."""

import difflib
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import transformers.modeling_gguf_pytorch_utils as gguf_reading
from gguf import GGUFReader
from huggingface_hub.utils.tqdm import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
)
from safetensors import safe_open
from tqdm.auto import tqdm
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
)
from transformers.utils import find_adapter_config_file
from transformers.utils.logging import set_tqdm_hook

from spade_lens.checks import warn
from spade_lens.models.adapters import OFFICIAL_MODEL_NAMES
from spade_lens.models.catalogue import CATALOG
from spade_lens.models.errors import UnsupportedModelError
from spade_lens.models.precision import of_gguf, say_stored
from spade_lens.models.refusals import refuse_unless_causal
from spade_lens.models.spread import spreading
from spade_lens.models.wanted import Wanted
from spade_lens.settings import limits, progress_bar

_INNER_WRAPPERS = r"(^|\.)_(?:orig_mod|fsdp_wrapped_module|checkpoint_wrapped_module)\."


def read_gguf(path: Path, tokenizer: Any, wanted: Wanted) -> tuple[PreTrainedModel, Any]:
    """Read the model of a GGUF file, and its tokenizer unless there is one already.

    Raises:
        ValueError: If it is no whole GGUF file, or as :func:`read_pretrained` does.
    """
    if path.suffix in (".safetensors", ".bin", ".json", ".pt", ".pth"):
        raise ValueError(
            f"{path} is one file of a model. Give the folder that holds its config.json, weights "
            f"and tokenizer, such as load({str(path.parent)!r})."
        )
    try:
        stored = of_gguf(GGUFReader(path).tensors)
    except Exception as error:  # the reader has no error class of its own
        raise ValueError(
            f"{path} is not a whole GGUF file ({error}). It may be truncated or corrupt; download "
            "it again."
        ) from error
    model, tokenizer = read_pretrained(str(path.parent), tokenizer, wanted, gguf_file=path.name)
    say_stored(model.config, stored)
    return model, tokenizer


@contextmanager
def _bars_as_ours() -> Iterator[None]:
    """Show the bars of transformers as ours: after two seconds, or never if the settings say so.

    Those of downloads come at once, since these take long.
    """

    def bar(items: Any = None, **options: Any) -> Any:
        return progress_bar(items, desc="load", total=options.get("total"))

    silent = not limits().progress and not are_progress_bars_disabled()
    before = set_tqdm_hook(lambda _, args, options: bar(*args, **options))
    # This module asks tqdm itself, where no hook reaches.
    gguf_reading.tqdm = bar
    if silent:
        disable_progress_bars()
    try:
        yield
    finally:
        gguf_reading.tqdm = tqdm
        set_tqdm_hook(before)
        if silent:
            enable_progress_bars()


@_bars_as_ours()
def read_pretrained(
    place: str, tokenizer: Any, wanted: Wanted, **gguf: str
) -> tuple[PreTrainedModel, Any]:
    """Read a model, and its tokenizer unless there is one already.

    Args:
        place: A folder, or a name on the hub.
        tokenizer: The user's own tokenizer; None for that of the model.
        wanted: The number format and place of the weights, and the revision on the hub.
        gguf: ``gguf_file``, the name of a GGUF file in the folder.

    Raises:
        ValueError: If there is no such model, or the weights do not fit the configuration: some
            are missing, left over or of another shape.
        UnsupportedModelError: If it is not a causal language model, or an adapter without one.
    """
    config = _read_config(place, wanted.hub | gguf)
    if not gguf:
        refuse_unless_causal(_kind_of(config, place), config)
    if Path(place).is_dir() and not gguf and not hasattr(config, "quantization_config"):
        _refuse_unlike(Path(place), config)
    stored = None if gguf else config.dtype  # which the model's own dtype takes the place of
    options = {"dtype": wanted.dtype, **wanted.hub, **gguf}
    options |= spreading(config, _kind_of(config, place), wanted.spread)
    with _reading("weights", place):
        model, wrong = _read_weights(place, config, options)
    if mapping := _unwrapping(wrong):
        model, wrong = _read_weights(place, config, options | {"key_mapping": mapping})
        if not any(wrong.values()):
            warn(
                f"The names of the weights in {place} carry the prefix of a wrapper "
                f"({' or '.join(mapping)}), which was taken off."
            )
    if any(wrong.values()):
        raise ValueError(
            f"The weights in {place} are not those of a {type(model).__name__} with its "
            f"configuration: {_told(wrong)}. Give the whole checkpoint with its own config.json. "
            "If this is meant, load it with transformers and give load() the model."
        )
    if hasattr(config, "quantization_config") and not gguf and not hasattr(model, "hf_quantizer"):
        raise ValueError(
            f"The config.json of {place} names a quantisation that transformers does not know: "
            f"{config.quantization_config!r:.200}. Give a checkpoint in float32 or bfloat16."
        )
    say_stored(model.config, getattr(torch, stored) if isinstance(stored, str) else stored)
    if gguf:  # its weights are plain numbers by now, so they may be trained and saved
        vars(model.config).pop("quantization_config", None)
        for name in ("hf_quantizer", "quantization_method", "is_quantized"):
            vars(model).pop(name, None)
    if tokenizer is None:
        with _reading("tokenizer", place):
            tokenizer = AutoTokenizer.from_pretrained(place, **wanted.hub, **gguf)
    return model.eval(), tokenizer


def _kind_of(config: Any, place: str) -> str:
    """Return the class that a configuration names, or else the one of its type."""
    names = config.architectures
    if names and (isinstance(names, str) or not all(isinstance(name, str) for name in names)):
        raise ValueError(
            f"The config.json of {place!r} has architectures={names!r}; expected a list with the "
            "name of a class."
        )
    usual = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    return str(names[0] if names else getattr(usual, "__name__", config.model_type))


def _refuse_unlike(folder: Path, config: Any) -> None:
    """Raise if a look at the headers of a folder's files says that they are not this model's.

    A model that is many times larger than its files could take more memory than there is.
    """
    stored, whole = 0, []
    for path in sorted(folder.glob("*.safetensors")):
        with _reading("weights", str(folder)), safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                weight = file.get_slice(name)
                stored += math.prod(weight.get_shape())
                if name.endswith(("weight", "bias")) and (
                    weight.get_dtype()[0] in "IU" or weight.get_dtype() == "BOOL"
                ):
                    whole.append(name)
    if whole:
        raise ValueError(
            f"Weights in {folder} are whole numbers ({', '.join(whole[:4])}), and its config.json "
            "does not say what they stand for. Give a checkpoint of floating-point numbers."
        )
    with _reading("config.json", str(folder)), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    expected = sum(weight.numel() for weight in model.parameters())
    if stored and expected > 2 * stored:
        raise ValueError(
            f"The weights in {folder} are {stored} numbers, and by its config.json the model has "
            f"{expected}. Give the whole checkpoint with its own config.json."
        )


@contextmanager
def _reading(what: str, place: str) -> Iterator[None]:
    """Turn the errors of five libraries about files into one."""
    try:
        yield
    except (MemoryError, UnsupportedModelError):
        raise
    except Exception as error:
        raise ValueError(
            f"The {what} of {place!r} cannot be read ({type(error).__name__}: {error}). If files "
            "are damaged or missing, download them again."
        ) from error


def _read_config(place: str, options: dict[str, Any]) -> Any:
    adapter = Path(place, "adapter_config.json").is_file()
    hub, file = dict(options), str(options.get("gguf_file", ""))
    hub.pop("gguf_file", None)
    try:
        if not adapter:
            return AutoConfig.from_pretrained(place, **options)
    except MemoryError:
        raise
    except Exception as error:  # transformers lets through whatever a wrong setting causes
        with suppress(OSError, ValueError):  # of a name that no model can have
            adapter = find_adapter_config_file(place, **hub) is not None
        reason = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, OSError):
            reason = str(error).strip().splitlines()[0]
        if not adapter and Path(place).is_dir():
            raise ValueError(
                f"{Path(place, file)} holds no model that transformers can read: {reason}"
            ) from error
        if not adapter:
            names = [*CATALOG, *OFFICIAL_MODEL_NAMES]
            near = difflib.get_close_matches(place, names, n=3, cutoff=0.4) or list(CATALOG)
            raise ValueError(
                f"No model {place!r}: it is not in the catalogue (nearest known names: "
                f"{', '.join(near)}), no local file or folder, and the Hugging Face hub (or its "
                f"local cache) did not give it: {reason}"
            ) from error
    raise UnsupportedModelError(
        f"{place} holds a PEFT adapter (adapter_config.json), not a whole model. Merge it into its "
        "base model with peft: AutoPeftModelForCausalLM.from_pretrained(...).merge_and_unload(). "
        "Then give load() that model, or the folder that it is saved in."
    )


def _read_weights(
    place: str, config: Any, options: dict[str, Any]
) -> tuple[PreTrainedModel, dict[str, list[str]]]:
    """Return a model and the names of weights that are wrong, by what is wrong with them."""
    model, report = AutoModelForCausalLM.from_pretrained(
        place,
        config=config,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
        **options,
    )
    shapes = [
        f"{name} ({list(in_file)} in the file, {list(in_model)} in the model)"
        for name, in_file, in_model in report["mismatched_keys"]
    ]
    return model, {
        "missing": sorted(report["missing_keys"]),
        "unexpected": sorted(report["unexpected_keys"]),
        "of another shape": sorted(shapes),
        "unread": list(report["error_msgs"]),
    }


def _unwrapping(wrong: dict[str, list[str]]) -> dict[str, str]:
    """Return how weights' names are to be rewritten, where a wrapper added to them."""
    for name in wrong["missing"]:
        longer = [other for other in wrong["unexpected"] if other.endswith("." + name)]
        if longer:
            prefix = longer[0].removesuffix(name)
            return {f"^{re.escape(prefix)}": ""} if len(longer) == 1 else {}
    inside = any(re.search(_INNER_WRAPPERS, name) for name in wrong["unexpected"])
    return {_INNER_WRAPPERS: r"\1"} if inside else {}


def _told(wrong: dict[str, list[str]]) -> str:
    parts = []
    for what, names in wrong.items():
        if names:
            more = f", and {len(names) - 4} more" if len(names) > 4 else ""
            parts.append(f"{len(names)} {what} ({', '.join(names[:4])}{more})")
    return "; ".join(parts)
