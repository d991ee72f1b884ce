"""The set-up of early exit: model, candidate layers, checks and lenses that answer, resolved once.

The engine and the tables both start here, so that they mean the same by the same arguments. This
module knows no policies.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from spade_lens.checks import as_several
from spade_lens.exits.answer_head import AnswerHead
from spade_lens.exits.confidence import MEASURES, Confidence, Own
from spade_lens.exits.costs import Costs
from spade_lens.lenses.lens import Lens, refuse_other_layers
from spade_lens.lenses.named import as_lenses
from spade_lens.lenses.spade import Spade
from spade_lens.models.identity import run_identity
from spade_lens.models.model import Model
from spade_lens.models.places import LayersLike, check_layers
from spade_lens.prompts.inputs import PromptsLike
from spade_lens.prompts.prompt import Prompt
from spade_lens.storage.content import content_sha256

CheckLike = Confidence | Own | Lens | str
"""A confidence; or a lens or its name, which stands for the entropy of its readout."""

OWN = "own"
"""Among checks: each answering lens is also a check, for its own exits alone."""


def _own(check: Any) -> Own | None:
    """Return what a check says of answering lenses' own readouts; None if it is another check."""
    if isinstance(check, Own):
        return check
    return Own() if isinstance(check, str) and check == OWN else None


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
        """Resolve what was given; see :func:`spade_lens.exits.exit_tables`."""
        lenses = as_lenses(Spade(model) if answerers is None else answerers, model)[0]
        several = as_several(checks)
        given: list[Any] = [checks] if several is None else several
        own = [one.of(lens) for one in map(_own, given) if one is not None for lens in lenses]
        confidences = [
            one if isinstance(one, Confidence) else Confidence(as_lenses(one, model)[0][0])
            for one in given
            if _own(one) is None
        ] + own
        names = [confidence.name for confidence in confidences]
        if len(set(names)) < len(names):
            raise ValueError(
                f"Two checks have one name: {names}. Give lenses names of their own (name=)."
            )
        read = [one.lens for one in _every(confidences)]
        for lens in read:
            as_lenses(lens, model)  # refuses a lens of another model
        owner = {confidence.name: confidence.lens.name for confidence in own}
        candidates = candidate_layers(model, layers)
        refuse_other_layers([*read, *lenses], candidates)
        return cls(model, candidates, tuple(confidences), tuple(lenses), owner)

    @property
    def head(self) -> AnswerHead:
        """What reads answers."""
        return self._of_structure[1]

    @property
    def costs(self) -> Costs:
        """What the model's pieces cost."""
        return self._of_structure[2]

    @property
    def _of_structure(self) -> tuple[Any, AnswerHead, Costs]:
        """Head and costs, made anew where the model's modules are not what they were."""
        structure = self.model.structure
        known: tuple[Any, AnswerHead, Costs] | None = vars(self).get("_known")
        if known is None or known[0] is not structure:
            head = AnswerHead(self.model)
            known = vars(self)["_known"] = structure, head, Costs(self.model, head)
        return known

    @property
    def pairs(self) -> list[tuple[Confidence, Lens]]:
        """Every check with every lens that answers, except a lens's own check with others."""
        every = product(self.checks, self.answerers)
        return [(c, a) for c, a in every if self.owner.get(c.name, a.name) == a.name]

    @property
    def lenses(self) -> list[Lens]:
        """Every lens that is read, once."""
        lenses = (*(check.lens for check in _every(self.checks)), *self.answerers)
        return list({id(lens): lens for lens in lenses}.values())

    def prompts(self, given: PromptsLike) -> list[Prompt]:
        """Return prompts that fit the model and the checks, whatever they were given as."""
        prompts = self.model.prompts(given)
        for check in self.checks:
            check.check_prompts(prompts)
        return prompts

    def identity(self, prompts: Sequence[Prompt]) -> dict[str, Any]:
        """Return all that decides the tables of prompts, ready for JSON.

        Lenses, measures and features are identified by all that they are made of, your own
        functions by what they do; see :func:`spade_lens.storage.content.content_sha256`.
        """
        every = _every(self.checks)
        measures = [MEASURES.get(c.measure) for c in every if isinstance(c.measure, str)]
        return {
            "model": run_identity(self.model),
            "layers": list(self.layers),
            "prompts": content_sha256(prompts),
            "checks": {check.name: content_sha256(check) for check in self.checks},
            "measures": content_sha256(measures),
            "answerers": {lens.name: content_sha256(lens) for lens in self.answerers},
        }


def _every(checks: Sequence[Confidence]) -> list[Confidence]:
    """Return checks, and those that come before them."""
    return [one for check in checks for one in (check, check.after) if one is not None]


def candidate_layers(model: Model, layers: LayersLike) -> tuple[int, ...]:
    """Return the layers at which prompts may leave, ascending."""
    if layers is None:
        return tuple(range((model.n_layers + 1) // 2, model.n_layers, 2))
    checked = check_layers(model, layers, rising=True)
    if checked[-1] == model.n_layers:
        raise ValueError(
            f"Layer {model.n_layers} is the model's own output, so there is nothing to exit from; "
            f"expected candidate layers from 0 to {model.n_layers - 1}."
        )
    return tuple(checked)


def targets(prompts: Sequence[Prompt]) -> Int[Tensor, " prompt"]:
    """Return the right tokens; -1 where none is known."""
    return torch.tensor([-1 if p.target is None else p.target for p in prompts])
