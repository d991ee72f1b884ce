"""The set-up of early exit: model, candidate layers, checks and lenses that answer, resolved once.

The engine and the tables both start here, so that they mean the same by the same arguments. This
module knows no policies.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from spade_lens.exits.answer_head import AnswerHead
from spade_lens.exits.confidence import Confidence
from spade_lens.exits.costs import Costs, Prices, price
from spade_lens.lenses.lens import Lens, keep_of, refuse_other_layers
from spade_lens.lenses.linear import AffineMaps
from spade_lens.lenses.named import as_lenses
from spade_lens.lenses.spade import Spade
from spade_lens.models.model import Model
from spade_lens.models.places import LayersLike, check_layers
from spade_lens.prompts.inputs import PromptsLike
from spade_lens.prompts.prompt import Prompt

CheckLike = Confidence | Lens | str
"""A confidence; or a lens or its name, which stands for the entropy of its readout."""

OWN = "own"
"""Among checks: each answering lens is also a check, for its own exits alone."""


class ExitWarning(UserWarning):
    """An early exit that will not do what was hoped for; the message says why."""


@dataclass(frozen=True)
class Setup:
    """What is run, what is checked and what answers.

    Args:
        model: The model.
        layers: The candidate layers, ascending.
        checks: The confidences; none for a policy that reads no lens.
        answerers: The lenses that answer for the prompts that leave.
        owner: For a check that is an answering lens's own readout, the name of that lens.
    """

    model: Model
    layers: tuple[int, ...]
    checks: tuple[Confidence, ...]
    answerers: tuple[Lens, ...]
    owner: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        model: Model,
        checks: CheckLike | Sequence[CheckLike],
        answerers: Lens | str | Sequence[Lens | str] | None = None,
        layers: LayersLike = None,
    ) -> "Setup":
        """Resolve what was given.

        Args:
            model: The model.
            checks: What is checked, one or several; a lens stands for its entropy, as in the
                paper; ``"own"`` for the readouts of the lenses that answer.
            answerers: What answers, one or several; SPADE with the paper's two tokens by default.
            layers: The candidate layers. Ours: by default every second one from the middle up.

        Raises:
            TypeError: If something else than lenses, confidences or layers is given.
            ValueError: If a layer is out of range or the model's own output, a lens belongs to
                another model, or two checks or two lenses have one name.
        """
        lenses = as_lenses(Spade(model) if answerers is None else answerers, model)[0]
        given = checks if isinstance(checks, Sequence) and not isinstance(checks, str) else [checks]
        own = [Confidence(lens) for lens in lenses] if OWN in given else []
        confidences = [
            one if isinstance(one, Confidence) else Confidence(as_lenses(one, model)[0][0])
            for one in given
            if one != OWN
        ] + own
        names = [confidence.name for confidence in confidences]
        if len(set(names)) < len(names):
            raise ValueError(
                f"Two checks have one name: {names}. Give lenses names of their own (name=)."
            )
        for confidence in confidences:
            as_lenses(confidence.lens, model)  # refuses a lens of another model
        owner = {confidence.name: confidence.lens.name for confidence in own}
        candidates = candidate_layers(model, layers)
        refuse_other_layers([*(one.lens for one in confidences), *lenses], candidates)
        return cls(model, candidates, tuple(confidences), tuple(lenses), owner)

    @cached_property
    def head(self) -> AnswerHead:
        """What reads answers."""
        return AnswerHead(self.model)

    @cached_property
    def costs(self) -> Costs:
        """What the model's pieces cost."""
        return Costs(self.model, self.head)

    @property
    def pairs(self) -> list[tuple[Confidence, Lens]]:
        """Every check with every lens that answers, except a lens's own check with others."""
        every = product(self.checks, self.answerers)
        return [(c, a) for c, a in every if self.owner.get(c.name, a.name) == a.name]

    @property
    def lenses(self) -> list[Lens]:
        """Every lens that is read, once."""
        lenses = (*(check.lens for check in self.checks), *self.answerers)
        return list({id(lens): lens for lens in lenses}.values())

    def prompts(self, given: PromptsLike) -> list[Prompt]:
        """Return prompts that fit the model and the checks, whatever they were given as.

        Raises:
            TypeError: If something else than prompts is given.
            ValueError: If they do not fit the model, or candidates are asked for and a prompt has
                none.
        """
        prompts = self.model.prompts(given)
        for check in self.checks:
            check.check_prompts(prompts)
        return prompts

    def price(
        self,
        prompts: Sequence[Prompt],
        check: Confidence | None,
        answerer: Lens,
        layers: Sequence[int] | None = None,
    ) -> Prices:
        """Return the prices of prompts; see :func:`spade_lens.exits.costs.price`."""
        layers = self.layers if layers is None else layers
        return price(self.costs, prompts, layers, check, answerer)

    def identity(self, prompts: Sequence[Prompt]) -> dict[str, Any]:
        """Return all that decides the tables of prompts, ready for JSON.

        A lens is identified by its name, by what it keeps of every prompt, and by its maps and the
        way it numbers positions where it has such. Functions of your own go by their names.
        """
        lenses = [*(check.lens for check in self.checks), *self.answerers]
        return {
            "model": self.model.sha256,
            "dtype": str(self.model.dtype),
            "layers": list(self.layers),
            "prompts": _sha256([[p.tokens, p.answer, p.candidates] for p in prompts]),
            "checks": [check.name for check in self.checks],
            "features": [getattr(check.features, "__name__", None) for check in self.checks],
            "answerers": [lens.name for lens in self.answerers],
            "kept": [_sha256([keep_of(s, p, p.answer) for p in prompts]) for s in lenses],
            "maps": [_maps_sha256(getattr(lens, "maps", None)) for lens in lenses],
            "positions": [str(getattr(lens, "positions", None)) for lens in lenses],
        }


def candidate_layers(model: Model, layers: LayersLike) -> tuple[int, ...]:
    """Return the layers at which prompts may leave, ascending.

    Raises:
        TypeError: If something else than layers is given.
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


def targets(prompts: Sequence[Prompt]) -> Int[Tensor, " prompt"]:
    """Return the right tokens; -1 where none is known."""
    return torch.tensor([-1 if p.target is None else p.target for p in prompts])


def _sha256(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]  # messages show it


def _maps_sha256(maps: Any) -> str | None:
    """Return a hash of a linear lens's tensors; None for any other lens."""
    if not isinstance(maps, AffineMaps):
        return None
    digest = hashlib.sha256(json.dumps(maps.layers).encode())
    for name, tensor in sorted(maps.tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        data = tensor.detach().cpu().contiguous().view(-1)
        digest.update(data.view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]
