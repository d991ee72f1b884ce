"""Layers and positions as a user gives them, turned into lists that fit a model and its prompts.

This module knows prompts and the number of layers of a model; it runs nothing.
"""

from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any, TypeAlias, TypeGuard

import torch
from jaxtyping import Int
from torch import Tensor

from spade_lens.models.model import Model
from spade_lens.prompts.prompt import Prompt

LayersLike: TypeAlias = int | Iterable[int] | None
"""A layer, several, or None for all."""

PositionsLike: TypeAlias = str | int | Iterable[int] | Iterable[Iterable[int]] | None
"""Positions as :func:`as_positions` takes them."""


def check_layers(model: Model, layers: LayersLike) -> list[int]:
    """Return the layers asked for, ascending, each once; all of them for None.

    Raises:
        TypeError: If a layer is no whole number.
        ValueError: If there are none or one is out of range.
    """
    if layers is None:
        return list(range(model.n_layers + 1))
    given = as_plain(layers)
    asked: Any = [given] if isinstance(given, Integral) else given
    if not _is_several(asked):
        raise TypeError(_not_layers(model, layers))
    asked = [as_plain(layer) for layer in asked]
    if any(isinstance(layer, bool) or not isinstance(layer, Integral) for layer in asked):
        raise TypeError(_not_layers(model, layers))
    outside = [int(layer) for layer in asked if not 0 <= layer <= model.n_layers]
    if outside or not asked:
        raise ValueError(
            f"Layers {[int(layer) for layer in asked]} were asked for; {model.name} has layers 0 "
            f"(the embedding) to {model.n_layers} (its output)"
            + (f", and {outside} lie outside." if outside else ".")
        )
    return sorted({int(layer) for layer in asked})


def _not_layers(model: Model, layers: Any) -> str:
    return (
        f"layers={layers!r} was given; expected a whole number from 0 to {model.n_layers} or "
        "several, such as layers=12 or layers=range(6, 13)."
    )


def as_positions(
    prompts: Sequence[Prompt], positions: PositionsLike, *, numbers: Sequence[int] | None = None
) -> list[list[int]]:
    """Return the positions asked for, prompt by prompt, none of them negative.

    Example:
        >>> as_positions([Prompt((1, 2, 3)), Prompt((1, 2))], "last")
        [[2], [1]]
        >>> as_positions([Prompt((1, 2, 3)), Prompt((1, 2))], [0, -1])
        [[0, 2], [0, 1]]

    Args:
        prompts: The prompts.
        positions: ``"all"`` or None for all; ``"last"``; the name of a span of the prompts; a
            position or several, the same in every prompt, where negative ones count from the
            end; or one list of positions for each prompt.
        numbers: What messages call the prompts; 0, 1, 2, ... by default.

    Raises:
        TypeError: If something else is given.
        ValueError: If a position lies outside its prompt, a prompt has no such span, or the
            lists are not as many as the prompts.
    """
    numbers = range(len(prompts)) if numbers is None else numbers
    positions = as_plain(positions)
    if positions is None or (isinstance(positions, str) and positions == "all"):
        return [list(range(len(prompt))) for prompt in prompts]
    if isinstance(positions, str):
        named = zip(numbers, prompts, strict=True)
        return [_span(number, prompt, positions) for number, prompt in named]
    if isinstance(positions, bool):
        raise TypeError(_not_positions(positions))
    if isinstance(positions, Integral):
        positions = [int(positions)]
    if not _is_several(positions):
        raise TypeError(_not_positions(positions))
    asked: list[Any] = [as_plain(given) for given in positions]
    if asked and all(isinstance(position, Integral) for position in asked):
        asked = [asked] * len(prompts)
    elif len(asked) != len(prompts):
        raise ValueError(
            f"{len(asked)} lists of positions were given for {len(prompts)} prompts; give one "
            "list for each."
        )
    checked = []
    for number, prompt, given in zip(numbers, prompts, asked, strict=True):
        if not _is_several(given):
            raise TypeError(_not_positions(given))
        given = [as_plain(position) for position in given]
        if any(isinstance(p, bool) or not isinstance(p, Integral) for p in given):
            raise TypeError(_not_positions(given))
        n = len(prompt)
        outside = [int(p) for p in given if not -n <= p < n]
        if outside:
            raise ValueError(
                f"Positions {outside} lie outside prompt {number}, which has {n} tokens "
                f"(positions 0 to {n - 1}, or -{n} to -1 from the end)."
            )
        checked.append([int(p) % n for p in given])
    return checked


def _span(number: int, prompt: Prompt, name: str) -> list[int]:
    if name == "last":
        return [len(prompt) - 1]
    if name not in prompt.spans:
        raise ValueError(
            f"positions={name!r} was given; expected 'last', 'all' or a span of prompt {number}, "
            f"which has {sorted(prompt.spans)}."
        )
    return list(prompt.spans[name])


def as_plain(given: Any) -> Any:
    """Return arrays, tensors and columns as lists or numbers, anything else as it is."""
    return given.tolist() if hasattr(given, "tolist") else given


def _is_several(given: Any) -> TypeGuard[Iterable[Any]]:
    return isinstance(given, Iterable) and not isinstance(given, str | bytes | Mapping)


def _not_positions(given: Any) -> str:
    return (
        f"positions={given!r} was given; expected 'last', 'all', the name of a span, a whole "
        "number or several (negative ones count from the end), or one such list for each prompt."
    )


def pad_after(rows: Sequence[Sequence[int]], device: torch.device) -> Int[Tensor, "batch pos"]:
    """Make one tensor of rows of different lengths; a row's last value repeats after its end."""
    longest = max(len(row) for row in rows)
    padded = [[*row, *[row[-1]] * (longest - len(row))] for row in rows]
    return torch.tensor(padded, device=device)
