"""Tell transformers over which devices or processes to spread the weights, or say why it cannot."""

import inspect
import os
from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")


def spreading(config: Any, kind: str, spread: Mapping[str, Any]) -> dict[str, Any]:
    """Return what ``from_pretrained`` is to be told of the places of weights.

    Args:
        config: The configuration of the model.
        kind: The name of its class, for messages.
        spread: ``device_map`` or ``tp_plan``, if one was given.

    Raises:
        ValueError: If a device map leaves weights out or names modules that are not there, the
            family has no plan, or this is no process of ``torchrun``.
    """
    if "device_map" in spread:
        _check_map(config, kind, spread["device_map"])
    if "tp_plan" not in spread:
        return dict(spread)
    plan = spread["tp_plan"]
    if isinstance(plan, str) and plan != "auto":
        raise ValueError(
            f"tp_plan={plan!r} was given; expected 'auto', or a dictionary of module names and "
            "styles."
        )
    if plan == "auto" and not getattr(config, "base_model_tp_plan", None):
        raise ValueError(
            f"transformers has no tensor-parallel plan for a {kind}. Give tp_plan a dictionary of "
            "module names and styles, or spread the model by device_map='auto'."
        )
    if "WORLD_SIZE" not in os.environ and not torch.distributed.is_initialized():
        raise ValueError(
            "tp_plan was given, and this is no process of torchrun. Start the script as "
            "`torchrun --nproc-per-node N script.py`, or spread the model by device_map='auto'."
        )
    # In earlier versions the plan is an argument of its own.
    has_plan = "tp_plan" in inspect.signature(DistributedConfig).parameters
    return {"distributed_config": DistributedConfig(tp_plan=plan)} if has_plan else dict(spread)


def _check_map(config: Any, kind: str, devices: Any) -> None:
    """Raise unless a device map has a device for every weight, and no other names."""
    if isinstance(devices, str):
        if devices not in _MAPS:
            raise ValueError(
                f"device_map={devices!r} was given; expected {', '.join(map(repr, _MAPS))}, or a "
                "dictionary of module names and devices."
            )
        return
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    weights = [name for name, _ in model.named_parameters()]
    known = {*(name for name, _ in model.named_modules()), *weights}
    absent = [w for w in weights if not any(f"{w}.".startswith(f"{n}.") for n in devices if n)]
    absent, unknown = [] if "" in devices else absent, [n for n in devices if n not in known]
    told = [f"no device for {len(absent)} weights ({', '.join(absent[:3])})"] if absent else []
    told += [f"names that are not there ({', '.join(map(str, unknown[:3]))})"] if unknown else []
    if told:
        raise ValueError(
            f"The device_map does not fit a {kind}: it has {' and '.join(told)}. Give every "
            "module a device, or device_map='auto'."
        )
