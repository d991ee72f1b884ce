"""What a lens is: a map from residuals at a layer to residuals that the model can unembed.

Norm and unembedding are the model's own for every lens. This module does not know what is read
off the logits; :mod:`spade_lens.lenses.readout` does.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from spade_lens.checks import checked, whole_numbers
from spade_lens.models.errors import refuse_vectors
from spade_lens.models.hooks import in_lens
from spade_lens.models.model import Model
from spade_lens.models.residuals import Residuals
from spade_lens.prompts.prompt import Prompt


@dataclass(frozen=True)
class Reading:
    """One place that is read: a prompt, the position in it, and the positions a lens keeps.

    Args:
        prompt: The prompt, as an index into ``Residuals.prompts``.
        answer: The position whose next token is asked for.
        keep: The positions that the lens needs, ascending.
    """

    prompt: int
    answer: int
    keep: tuple[int, ...]


@runtime_checkable
class Lens(Protocol):
    """What decodes residuals at intermediate layers.

    A lens of your own needs these four: ``name`` and ``model``; ``keep``, the positions whose
    residuals it wants; and ``final_residuals``, what it makes of them. A lens that does not read
    at every layer lists those it reads at in ``layers``.

    Example:
        >>> class Halved:
        ...     name = "half"
        ...     def __init__(self, model):
        ...         self.model = model
        ...     def keep(self, prompt, answer):
        ...         return (answer,)
        ...     def final_residuals(self, residuals, readings, layers):
        ...         slots = [residuals.slots(r.prompt, [r.answer])[0] for r in readings]
        ...         return torch.stack([residuals.layer(n)[slots] / 2 for n in layers])
        >>> read("ab", Halved(model)).lenses
        ('half',)
    """

    name: str
    model: Model

    def keep(self, prompt: Prompt, answer: int) -> Sequence[int]:
        """Return the positions of ``prompt`` whose residuals are needed to read at ``answer``."""
        ...

    def final_residuals(
        self, residuals: Residuals, readings: Sequence[Reading], layers: Sequence[int]
    ) -> Float[Tensor, "layer reading d_model"]:
        """Return, for every layer and reading, a residual for final norm and unembedding.

        Args:
            residuals: Residuals that contain every reading's ``keep`` at every layer.
            readings: What to read.
            layers: The layers, ascending.
        """
        ...


_READS = "the layers that it reads, such as (1, 2, 3)"


def keep_of(lens: Lens, prompt: Prompt, answer: int) -> tuple[int, ...]:
    """Return the positions that a lens keeps, checked, since any lens may be a user's own."""
    n = len(prompt)
    expected = f"at least one position from 0 to {n - 1}"
    name = f"keep() of the lens {lens.name!r}: "
    kept = whole_numbers(lens.keep(prompt, answer), name, expected, below=n, distinct=False)
    return tuple(sorted(set(kept)))


def layers_of(lens: Lens) -> list[int]:
    """Return the layers that a lens reads, ascending: all, unless its ``layers`` says otherwise."""
    every = range(lens.model.n_layers + 1)
    name = f"layers of the lens {lens.name!r}: "
    return sorted(whole_numbers(getattr(lens, "layers", every), name, _READS, below=len(every)))


def refuse_other_layers(lenses: Sequence[Lens], asked: Sequence[int]) -> None:
    """Raise if a lens does not read at a layer that is asked for."""
    for lens in lenses:
        missing = sorted(set(asked) - set(layers_of(lens)))
        if missing:
            raise ValueError(
                f"Layers {missing} were asked for; the {lens.name} reads at layers "
                f"{layers_of(lens)} only. Ask for some of these with layers=."
            )


@torch.no_grad()
def finals_of(
    lens: Lens, residuals: Residuals, readings: Sequence[Reading], layers: Sequence[int]
) -> Float[Tensor, "layer reading d_model"]:
    """Return what a lens makes of residuals, checked, in the model's dtype and on its device."""
    model, rising = lens.model, sorted(layers)
    stack = residuals.stack
    # Tensors that inference mode has made count no versions.
    before = stack.clone() if stack.is_inference() else stack._version
    with in_lens():
        finals = lens.final_residuals(residuals, readings, rising)
    same = torch.equal(stack, before) if isinstance(before, Tensor) else stack._version == before
    if not same:
        raise ValueError(
            f"final_residuals of the lens {lens.name!r} changed the residuals it was given, which "
            "other lenses read; give a new tensor, for example by clone()."
        )
    expected = (len(layers), len(readings), model.d_model)
    shape = tuple(finals.shape) if isinstance(finals, Tensor) else type(finals).__name__
    if shape == expected and not finals.is_floating_point():
        raise TypeError(
            f"final_residuals of the lens {lens.name!r} gave {finals.dtype}; expected "
            "floating-point numbers."
        )
    if shape != expected:
        raise (ValueError if isinstance(finals, Tensor) else TypeError)(
            f"final_residuals of the lens {lens.name!r} gave {shape}; expected a tensor of shape "
            f"{expected}, [layer reading d_model]."
        )
    finite = torch.isfinite(finals).all(dim=-1).all(dim=-1)  # [layer]
    if not finite.all():
        first = rising[finite.tolist().index(False)]
        raise ValueError(
            f"final_residuals of the lens {lens.name!r} gave NaN or infinite numbers, first at "
            f"layer {first}; expected finite ones."
        )
    order = [rising.index(layer) for layer in layers]
    finals = finals if order == sorted(order) else finals[order]
    return finals.to(model.device, model.dtype)


def check_readable(highest: Float[Tensor, "*rows"], of: str) -> None:
    """Raise if logits are NaN or infinite: a token on top of such is no answer.

    Args:
        highest: Each row's highest logit, or what NaN and infinity carry over to.
        of: Whose logits they are, for the message.

    Raises:
        ValueError: If one is.
    """
    if not torch.isfinite(highest).all():
        raise ValueError(
            f"The logits of {of} are NaN or infinite, so there is no answer to read. Check the "
            "weights, patches and lens; in half precision, load with dtype=torch.float32."
        )


class LogitLens:
    """The logit lens: final norm and unembedding straight after layer l.

    Source: nostalgebraist (2020). The norm is applied to the residual at hand, with that
    residual's own scale.

    Example:
        >>> LogitLens(model)
        LogitLens(model)

    Args:
        model: The model to read.
    """

    @checked
    def __init__(self, model: Model) -> None:
        refuse_vectors(model.structure, model.name)
        self.model = model
        self.name = "logit lens"

    def __repr__(self) -> str:
        return "LogitLens(model)"

    def keep(self, prompt: Prompt, answer: int) -> Sequence[int]:
        """Return the answer position alone."""
        return (answer,)

    def final_residuals(
        self, residuals: Residuals, readings: Sequence[Reading], layers: Sequence[int]
    ) -> Float[Tensor, "layer reading d_model"]:
        """Return the residuals as they are."""
        slots = [residuals.slots(r.prompt, [r.answer])[0] for r in readings]
        rows = [residuals.layers.index(layer) for layer in layers]
        return residuals.stack[rows][:, slots]
