"""What ``load`` is asked for besides the source: the dtype, the place, and the hub's revision."""

from dataclasses import dataclass, field
from typing import Any

import torch

from spade_lens.checks import warn

_DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.float16)


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """How a name, a folder or a file is to be loaded.

    Args:
        dtype: The dtype of weights; None for float32.
        device: Where to put all weights; None for the CPU.
        spread: ``device_map`` or ``tp_plan``, if one was given: where to put each.
        hub: ``revision`` and ``token``, those that were given.
    """

    dtype: Any = None
    device: Any = None
    spread: dict[str, Any] = field(default_factory=dict)
    hub: dict[str, Any] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """The arguments that were given."""
        own = [name for name in ("device", "dtype") if getattr(self, name) is not None]
        return [*own, *self.spread, *self.hub]

    def refuse(self, names: list[str], reason: str) -> None:
        """Raise if one of some arguments was given, and say why it cannot be.

        Raises:
            ValueError: If one was.
        """
        if wrong := [name for name in names if name in self.names]:
            were = "was" if len(wrong) == 1 else "were"
            raise ValueError(f"{' and '.join(wrong)} {were} given, {reason}")

    def checked(self) -> "Wanted":
        """Return the same with its defaults, once it is known that all of it can be had.

        Raises:
            ValueError: If the dtype is another one, torch sees no such device, or two arguments say
                where weights go.

        Warns:
            UserWarning: If the dtype is ``torch.float16`` on a CPU.
        """
        if len(placing := [n for n in self.names if n in ("device", "device_map", "tp_plan")]) > 1:
            raise ValueError(
                f"{' and '.join(placing)} were given, and each says where weights go. Give one."
            )
        dtype = torch.float32 if self.dtype is None else self.dtype
        if dtype not in _DTYPES:
            raise ValueError(
                f"dtype={dtype} was given; expected torch.float32, torch.bfloat16, torch.float64 "
                "or, on a GPU, torch.float16."
            )
        device = checked_device("cpu" if self.device is None else self.device)
        if dtype == torch.float16 and device.type == "cpu" and not self.spread:
            warn(
                "dtype=torch.float16 was given for a CPU, where it is many times slower than "
                "torch.float32. Give torch.float32, or torch.bfloat16 to save memory."
            )
        devices = self.spread.get("device_map")
        for place in devices.values() if isinstance(devices, dict) else ():
            if place != "disk":
                checked_device(place, "device_map: a device")
        return Wanted(dtype=dtype, device=device, spread=self.spread, hub=self.hub)


def checked_device(device: Any, of: str = "device") -> torch.device:
    """Return a device that torch has here.

    Args:
        device: What was given.
        of: What messages call it.

    Raises:
        ValueError: If it is none.
    """
    expected = f"{of}={device!r} was given; expected 'cpu' or 'cuda'"
    if of != "device":
        expected += ", 'disk', or the number of a GPU"
    try:
        device = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"{expected}.") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"{expected}.")
    n_devices = torch.cuda.device_count()
    if device.type == "cuda" and n_devices and (device.index or 0) >= n_devices:
        raise ValueError(f"{of}='{device}' was given; torch sees {n_devices} CUDA devices here.")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"{of}='{device}' was given, but torch sees no CUDA device here. Use 'cpu', or "
            "install a CUDA build of torch on a machine with a GPU."
        )
    return device
