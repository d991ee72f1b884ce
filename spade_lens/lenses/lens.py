"""What a lens is: a way from residuals at a layer to a residual that the model can unembed.

Norm and unembedding are the model's own for every lens, and what is read off the logits is the
business of :mod:`spade_lens.lenses.readout`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

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
    """Decodes residuals at intermediate layers.

    A lens of your own needs these four: ``name`` and ``model``; ``keep``, the positions whose
    residuals it wants; and ``final_residuals``, what it makes of them.
    """

    name: str
    model: Model

    def keep(self, prompt: Prompt, answer: int) -> Sequence[int]:
        """The positions of ``prompt`` whose residuals are needed to read at ``answer``."""
        ...

    def final_residuals(
        self, residuals: Residuals, readings: Sequence[Reading], layers: Sequence[int]
    ) -> Float[Tensor, "layer reading d_model"]:
        """For every layer and reading, a residual to go through final norm and unembedding.

        Args:
            residuals: Residuals that contain every reading's ``keep`` at every layer.
            readings: What to read.
            layers: The layers, ascending.
        """
        ...


class LogitLens:
    """The logit lens: final norm and unembedding straight after layer l.

    Source: nostalgebraist (2020). The norm is applied to the residual at hand, with that
    residual's own scale.

    Args:
        model: The model to read.
    """

    def __init__(self, model: Model) -> None:
        self.model = model
        self.name = "logit lens"

    def keep(self, prompt: Prompt, answer: int) -> Sequence[int]:
        """The answer position alone."""
        return (answer,)

    def final_residuals(
        self, residuals: Residuals, readings: Sequence[Reading], layers: Sequence[int]
    ) -> Float[Tensor, "layer reading d_model"]:
        """The residuals as they are."""
        slots = [residuals.slots(r.prompt, [r.answer])[0] for r in readings]
        rows = [residuals.layers.index(layer) for layer in layers]
        return residuals.stack[rows][:, slots]
