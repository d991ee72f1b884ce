"""Lenses by name, so that a lens can be asked for before there is one.

This module does not know what lenses are used for.
"""

from collections.abc import Callable, Sequence
from typing import TypeAlias

from spade_lens.checks import plain_name
from spade_lens.lenses.lens import Lens, LogitLens, refuse_other_layers
from spade_lens.lenses.spade import Spade
from spade_lens.models.model import Model

LensLike: TypeAlias = Lens | str
"""A lens or its name."""

NAMED: dict[str, Callable[[Model], Lens]] = {"logit": LogitLens, "spade": Spade}
"""Lenses that need nothing but a model, by name. Add your own: ``NAMED["mine"] = MyLens``."""


def refuse_unread(lens: Lens, model: Model, layers: Sequence[int]) -> None:
    """Raise a ValueError if a lens is another model's, or does not read at one of some layers."""
    as_lenses(lens, model)
    refuse_other_layers([lens], layers)


def as_lenses(
    given: LensLike | Sequence[LensLike], model: Model | None = None
) -> tuple[list[Lens], Model]:
    """Return lenses of one model, whatever they were given as, and that model.

    Example:
        >>> [lens.name for lens in as_lenses(["logit", Spade(model)])[0]]
        ['logit lens', 'SPADE']
    """
    several = [given] if isinstance(given, str) or not isinstance(given, Sequence) else list(given)
    if not several:
        raise ValueError("No lens was given. Give at least one, for example Spade(model).")
    for one in several:
        if not isinstance(one, str | Lens):
            raise TypeError(
                f"A lens of type {type(one).__name__} was given; expected a lens such as "
                f"Spade(model), or a name: {', '.join(NAMED)}."
            )
        if isinstance(one, str) and one not in NAMED:
            raise ValueError(f"There is no lens named {one!r}; expected {', '.join(NAMED)}.")
    models = [one.model for one in several if not isinstance(one, str)]
    if not all(isinstance(one, Model) for one in models):
        kinds = [type(one).__name__ for one in models]
        raise TypeError(f"The lenses' models are of types {kinds}; expected spade_lens.Model.")
    if model is None and not models:
        raise ValueError(
            "No model was given. Give model=, for example read(text, model=spade_lens.load())."
        )
    shared = models[0] if model is None else model
    if any(other is not shared for other in models):
        names = sorted({shared.name, *(other.name for other in models)})
        raise ValueError(
            f"The lenses belong to different models ({', '.join(names)}); read with those of one "
            "model at a time."
        )
    lenses = [NAMED[one](shared) if isinstance(one, str) else one for one in several]
    for one, lens in zip(several, lenses, strict=True):
        if not isinstance(lens, Lens) or not isinstance(lens.name, str):
            raise TypeError(
                f"{one!r} is no lens; expected a name that is text, a model, keep() and "
                "final_residuals()."
            )
        plain_name(lens.name, "a lens")
    names = [lens.name for lens in lenses]
    if len(set(names)) < len(names):
        raise ValueError(
            f"Two lenses have one name: {names}. Tables could not tell them apart; give name=."
        )
    return lenses, shared
