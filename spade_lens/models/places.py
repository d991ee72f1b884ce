"""Layers and positions as a user gives them, turned into lists that fit a model and its prompts.

This module knows prompts and the number of layers of a model; it runs nothing.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, SupportsIndex, TypeAlias

import torch
from jaxtyping import Int
from torch import Tensor

from spade_lens.checks import as_plain, as_several, is_whole, whole_numbers
from spade_lens.models.model import Model
from spade_lens.prompts.prompt import Prompt

LayersLike: TypeAlias = SupportsIndex | Iterable[SupportsIndex] | None
"""A layer, several, or None for all."""

PositionsLike: TypeAlias = str | int | Iterable[int] | Iterable[Iterable[int]] | None
"""Positions as :func:`as_positions` takes them."""


def check_layers(model: Model, layers: LayersLike, *, rising: bool = False) -> list[int]:
    """Return the layers asked for, in the order given; all of them for None.

    Args:
        model: The model.
        layers: A layer or several, each once.
        rising: Whether they must be given from low to high, as where prompts climb past them.

    Raises:
        TypeError: If a layer is no whole number.
        ValueError: If there are none, one is out of range or given twice, or they do not rise
            where they must.
    """
    if layers is None:
        return list(range(model.n_layers + 1))
    last = model.n_layers
    expected = (
        f"layers 0 (the embedding) to {last} (the output) of {model.name}, each once, such as "
        "layers=12 or layers=range(6, 13)"
    )
    asked = whole_numbers(layers, "layers=", f"one or several of the {expected}", below=last + 1)
    if rising and asked != sorted(asked):
        raise ValueError(
            f"layers={asked} was given; prompts meet layers from low to high, so expected them "
            f"ascending: layers={sorted(asked)}."
        )
    return asked


def check_below_last(model: Model, layer: int, given: str) -> None:
    """Raise unless a layer lies below the model's last.

    Args:
        model: The model.
        layer: The layer.
        given: How the message begins: what the layer is for, or what was given.

    Raises:
        ValueError: If it does not.
    """
    if layer >= model.n_layers:
        raise ValueError(f"{given}; expected one below {model.n_layers}, the last of {model.name}.")


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
    asked = [positions] if is_whole(positions) else as_several(positions)
    if asked is None:
        raise TypeError(_not_positions(positions))
    if asked and all(map(is_whole, asked)):
        asked = [asked] * len(prompts)
    elif len(asked) != len(prompts):
        raise ValueError(
            f"{len(asked)} lists of positions were given for {len(prompts)} prompts; give one "
            "list for each."
        )
    checked = []
    for number, prompt, given in zip(numbers, prompts, asked, strict=True):
        several = as_several(given)
        if several is None or not all(map(is_whole, several)):
            raise TypeError(_not_positions(given))
        n = len(prompt)
        outside = [int(p) for p in several if not -n <= p < n]
        if outside:
            raise ValueError(
                f"Positions {outside} lie outside prompt {number}, which has {n} tokens "
                f"(positions 0 to {n - 1}, or -{n} to -1 from the end)."
            )
        at = [int(p) % n for p in several]
        twice = [p for p, count in Counter(at).items() if count > 1]
        if twice:
            raise ValueError(
                f"Positions {[int(p) for p in several]} name {twice} of prompt {number} twice; "
                "give each once."
            )
        checked.append(at)
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
