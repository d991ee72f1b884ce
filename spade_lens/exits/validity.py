"""Check once what users give and what their own functions and policies return."""

from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor


def checked_rows(returned: Any, n: int, of: str, *, what: str = "confidences") -> Tensor:
    """Return floats, one number for each of ``n`` rows (or one vector of features).

    Args:
        returned: What a function of a user's own returned.
        n: The number of rows.
        of: What returned it, for the message.
        what: ``"confidences"`` or ``"features"``.

    Raises:
        TypeError: If it is no tensor.
        ValueError: If its shape is another one, or a number is NaN.
    """
    expected = f"a tensor of {what} of shape [{n}" + (", feature]" if what == "features" else "]")
    if not isinstance(returned, Tensor):
        raise TypeError(f"{of} returned a {type(returned).__name__}; expected {expected}.")
    if returned.ndim != (2 if what == "features" else 1) or len(returned) != n:
        raise ValueError(f"{of} returned shape {list(returned.shape)}; expected {expected}.")
    if returned.isnan().any():
        raise ValueError(f"{of} returned NaN; expected numbers.")
    return returned.float()


def check_number(name: str, value: Any, *, least: float | None = None, whole: bool = False) -> None:
    """Raise if an argument is no number, or a number below the least one.

    Raises:
        TypeError: If it is no number, or no whole number where one is expected.
        ValueError: If it is below ``least``.
    """
    kind = "a whole number" if whole else "a number"
    expected = kind if least is None else f"{kind}, {least} or more"
    if isinstance(value, bool) or not isinstance(value, Integral if whole else Real):
        raise TypeError(f"{name}={value!r} was given; expected {expected}.")
    if least is not None and not float(value) >= least:
        raise ValueError(f"{name}={value} was given; expected {expected}.")


def checked_decisions(returned: Any, n: int, of: str) -> Tensor:
    """Return a policy's decisions: one boolean for each of ``n`` prompts, on the CPU.

    Raises:
        TypeError: If it is no tensor of booleans.
        ValueError: If its shape is another one.
    """
    if not isinstance(returned, Tensor) or returned.dtype != torch.bool:
        kind = str(returned.dtype) if isinstance(returned, Tensor) else type(returned).__name__
        raise TypeError(f"{of} returned {kind}; expected a tensor of booleans of shape [{n}].")
    if returned.shape != (n,):
        raise ValueError(f"{of} returned shape {list(returned.shape)}; expected [{n}].")
    return returned.cpu()
