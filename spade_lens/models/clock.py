"""How long work takes, measured once a device has done all that it was asked for."""

import time
from collections.abc import Callable

import torch


def now(device: torch.device, *, of_process: bool = False) -> float:
    """Return a time in seconds; only differences mean something.

    Args:
        device: Where the work runs. A GPU is waited for.
        of_process: Count the processor time of this process, but on a GPU the wall-clock time.
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time() if of_process else time.perf_counter()


def seconds_of(
    run: Callable[[], object], device: torch.device, *, of_process: bool = False
) -> float:
    """Run something, and return how long it took; see :func:`now`."""
    since = now(device, of_process=of_process)
    run()
    return now(device, of_process=of_process) - since
