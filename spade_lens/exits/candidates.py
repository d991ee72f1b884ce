"""Check and resolve the candidate layers, lenses and confidence of an early-exit run."""

from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from spade_lens.exits.confidence import Confidence
from spade_lens.lenses.lens import Lens
from spade_lens.models.model import Model
from spade_lens.models.places import check_layers
from spade_lens.prompts.prompt import Prompt


class ExitWarning(UserWarning):
    """An early exit that will not do what was hoped for, and the message says why."""


def as_confidence(confidence: Confidence | Lens | None) -> Confidence | None:
    """A lens alone stands for its entropy, as in the paper."""
    if confidence is None or isinstance(confidence, Confidence):
        return confidence
    return Confidence(confidence)


def candidate_layers(model: Model, layers: Sequence[int] | None) -> tuple[int, ...]:
    """The layers at which prompts may leave, ascending.

    Raises:
        ValueError: If one is out of range, or is the model's own output.
    """
    if layers is None:
        return tuple(range((model.n_layers + 1) // 2, model.n_layers, 2))
    checked = check_layers(model, layers)
    if checked[-1] == model.n_layers:
        raise ValueError(
            f"Layer {model.n_layers} is the model's own output, so there is nothing to exit from; "
            f"expected candidate layers from 0 to {model.n_layers - 1}."
        )
    return tuple(checked)


def check_lenses(model: Model, confidence: Confidence | None, spade: Lens) -> None:
    """Raise if a lens belongs to another model.

    Raises:
        ValueError: Then.
    """
    for lens in (spade, *([] if confidence is None else [confidence.lens])):
        if lens.model is not model:
            raise ValueError(
                f"The lens {lens.name!r} belongs to the model {lens.model.name!r}, not to this "
                f"one ({model.name!r}). Make it of the model that runs."
            )


def targets(prompts: Sequence[Prompt]) -> Int[Tensor, " prompt"]:
    """The right tokens; -1 where none is known."""
    return torch.tensor([-1 if p.target is None else p.target for p in prompts])
