"""What a sweep of self-speculation will do, checked before a model is loaded."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

from spade_lens.checks import as_several, check_fields, whole_numbers
from spade_lens.generation.drafters import Drafter, LayerExit
from spade_lens.generation.speculate import LOOKUPS, Speculate
from spade_lens.storage.content import content_sha256
from spade_lens.studies.base import Plan
from spade_lens.studies.speculation.prompts import GivenPrompts, prompts_by_kind

_LAYERS = 6


@dataclass(frozen=True)
class SpeculationPlan(Plan):
    """Which layer should draft, and how many tokens: acceptance, costs and measured speed.

    Every prompt is written once, greedily. One pass of a drafter over that text then says what it
    would have drafted anywhere. So acceptance is counted exactly for *every* draft length and
    ``eta`` at the price of one; see :mod:`spade_lens.generation.known_text`. What passes over a
    few tokens cost is measured, which predicts the speed of every setting. Only the settings that
    are predicted to be fastest are run and timed, beside plain text, in turns.

    Example:
        >>> plan = SpeculationPlan(layers=[8, 16, 24], drafts=(1, 2, 4))  # doctest: +SKIP
        >>> sl.study(model, plan).tables["points"]  # doctest: +SKIP

    Args:
        prompts: Prompts, prompts by kind (``{"chat": [...], "code": [...]}``), or the
            :class:`~pathlib.Path` of a file: one prompt a line, or JSON lines with ``prompt`` and
            perhaps ``kind``. By default 24 short ones of four kinds.
        drafts: How many tokens a round drafts, one number or several.
        eta: A draft from a layer ends after a token whose probability is below this; one number or
            several, 0 for no such end.
        max_new_tokens: How many tokens every text has at most.
        samples: How many prompts of every kind, the first ones; by default all.
        lookups: Whether n-grams of the text draft too: with every number of drafts, and with as
            many as pay.
        drafters: Drafters of your own, or several in a row that draft together.
        timed: How many settings are timed: the best of every drafter by prediction, and then the
            next best. 0 for none, a large number for all. Lookups as long as pays are timed
            beside them.
        rounds: How many turns every setting gets on every prompt.
        layers: The layers that draft, from 1 to ``n_layers - 1``; by default six, evenly.
        seed: Seed of the order in which parts of a round are timed.
        out: The folder for results.

    Raises:
        TypeError: If a number or a drafter is of another type.
        ValueError: If a number is out of range or occurs twice, there are no prompts, or ``out``
            cannot be written.
        FileNotFoundError: If the file of prompts does not exist.
    """

    prompts: GivenPrompts = None
    drafts: int | Sequence[int] = (1, 2, 3, 4, 6, 8)
    eta: float | Sequence[float] = 0.0
    max_new_tokens: int = 48
    samples: int | None = None
    lookups: bool = True
    drafters: Drafter | Sequence[Drafter | Sequence[Drafter]] = ()
    timed: int = 3
    rounds: int = 2
    out: str | PathLike[str] = field(default="spade-lens-speculate", kw_only=True)

    def __post_init__(self) -> None:
        check_fields(self)
        self._check_counts("max_new_tokens", "rounds")
        if self.samples is not None:
            self._check_counts("samples")
        if self.timed < 0:
            raise ValueError(f"timed={self.timed} was given; expected 0 or more.")
        drafts = whole_numbers(self.drafts, "drafts=", "numbers of tokens, 1 or more, each once")
        if min(drafts) < 1:
            raise ValueError(f"drafts={drafts} was given; expected numbers of tokens, 1 or more.")
        several = as_several(self.eta)
        etas = [float(one) for one in ([self.eta] if several is None else several)]  # type: ignore[arg-type]
        if not etas:
            raise ValueError("eta=[] was given; expected at least one number from 0 to 1.")
        if len(set(etas)) < len(etas) or not all(0 <= one <= 1 for one in etas):
            raise ValueError(f"eta={etas} was given; expected numbers from 0 to 1, each once.")
        given: Any = self.drafters
        own = given if isinstance(given, Sequence) else (given,)
        # Raises if one is no drafter.
        names = [" + ".join(d.name for d in Speculate(one).several) for one in own]
        if len(set(names)) < len(names) or {"lookups", "exit"} & set(names):
            raise ValueError(
                f"drafters= has the names {names}; expected names of their own, each once, and "
                "none of them 'lookups' or 'exit', which are the library's."
            )
        prompts_by_kind(self.prompts)  # raises if there are none
        self._set(drafts=tuple(drafts), eta=tuple(etas))
        super().__post_init__()

    def check_layers(self, n_layers: int) -> None:
        """Check the layers that draft against a model's."""
        outside = [n for n in self.chosen_layers or () if not 0 < n < n_layers]
        if outside:
            raise ValueError(
                f"Layers {outside} were asked for; expected layers that can draft, from 1 to "
                f"{n_layers - 1}."
            )

    def exit_layers(self, n_layers: int) -> tuple[int, ...]:
        """Return the layers that draft, on a model of so many."""
        if self.chosen_layers is not None:
            return self.chosen_layers
        even = {round(n_layers * n / (_LAYERS + 1)) for n in range(1, _LAYERS + 1)}
        return tuple(sorted(layer for layer in even if 0 < layer < n_layers))

    def several(self, n_layers: int) -> dict[tuple[str, int], tuple[Drafter, ...]]:
        """Return what drafts, by name and layer: lookups, exits, and drafters of the user's own."""
        found: dict[tuple[str, int], tuple[Drafter, ...]] = {}
        if self.lookups:
            found["lookups", 0] = LOOKUPS
        found |= {("exit", layer): (LayerExit(layer),) for layer in self.exit_layers(n_layers)}
        given: Any = self.drafters
        for one in given if isinstance(given, Sequence) else (given,):
            drafters = Speculate(one).several
            name = " + ".join(drafter.name for drafter in drafters)
            found[name, drafters[-1].layer] = drafters
        return found

    @property
    def config(self) -> dict[str, Any]:
        """The arguments that decide the results, ready for JSON."""
        names = ("max_new_tokens", "samples", "lookups", "timed", "rounds", "seed")
        own = "the library's own" if self.prompts is None else "given"
        given = str(self.prompts) if isinstance(self.prompts, Path) else own
        return {
            "prompts": given,
            "prompts_sha256": content_sha256(prompts_by_kind(self.prompts)),
            "layers": "evenly" if self.chosen_layers is None else list(self.chosen_layers),
            "drafts": list(self.drafts),  # type: ignore[arg-type]
            "eta": list(self.eta),  # type: ignore[arg-type]
            **{name: getattr(self, name) for name in names},
        }
