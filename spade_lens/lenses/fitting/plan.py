"""Everything that decides a fit, in one frozen dataclass for each kind, which checks itself.

This module does not know how maps are fitted.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

from spade_lens.checks import check_number, is_whole
from spade_lens.lenses.keep import Keep, KeepRule
from spade_lens.lenses.linear import LinearLens
from spade_lens.lenses.spade import Spade
from spade_lens.models.model import Model
from spade_lens.models.places import LayersLike, check_layers
from spade_lens.prompts.prompt import StartToken, check_bos
from spade_lens.storage.content import content_sha256

Positions = int | Literal["all", "answer"]
"""So many positions of every piece, all of them, or its answer position; never the start token."""

RIDGES = (1e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0)
"""Strengths of the ridge that are tried, relative to the variance of a coordinate."""


@dataclass(frozen=True, kw_only=True)
class FitPlan:
    """What both kinds of fit go by.

    Args:
        layers: The layers that get a map; by default all below the last.
        per_piece: How many positions of every piece to learn from, drawn at random; ``"all"`` of
            them; or its ``"answer"`` position, for prompts of a task. Never the start token.
        n_pieces: How many pieces of text to take at most.
        n_tokens: The length of a piece in tokens, the start token included.
        bos: The start token of every piece, as in :func:`spade_lens.prompts.prompt.encode`.
        passes: How often to go through the text with Adam.
        rate: The size of a step of Adam, relative to a final residual.
        held_out: The fraction of positions, by document, to choose by; as many to report on.
        seed: The seed of every choice.

    Raises:
        ValueError: If a number is out of range.
    """

    layers: LayersLike = None
    per_piece: Positions = 32
    n_pieces: int = 160
    n_tokens: int = 128
    bos: StartToken = True
    passes: int = 0
    rate: float = 0.03
    held_out: float = 0.1
    seed: int = 0

    method: ClassVar[str]
    least_passes: ClassVar[int] = 0

    def __post_init__(self) -> None:
        check_bos(self.bos)
        if self.passes < self.least_passes or not 0 < self.rate < float("inf"):
            raise ValueError(
                f"passes={self.passes} and rate={self.rate} were given; expected at least "
                f"{self.least_passes} passes, and a rate above 0."
            )
        if not 0 < self.held_out < 0.5:
            raise ValueError(
                f"held_out={self.held_out} was given; expected more than 0 and less than 0.5."
            )
        if self.per_piece not in ("all", "answer") and not (
            is_whole(self.per_piece) and int(self.per_piece) >= 1
        ):
            raise ValueError(
                f"per_piece={self.per_piece!r} was given; expected a number of at least 1, 'all' "
                "or 'answer'."
            )

    def mapped(self, model: Model) -> tuple[int, ...]:
        """Return the layers that get a map."""
        return mapped_layers(model, self.layers)

    def described(self) -> dict[str, Any]:
        """Return all that decides the maps, beside text and layers, ready for JSON."""
        return {
            "method": self.method,
            "passes": self.passes,
            "rate": self.rate,
            "per_piece": self.per_piece,
            "held_out_fraction": self.held_out,
            "seed": self.seed,
        }


@dataclass(frozen=True, kw_only=True)
class SpadePlan(FitPlan):
    """How L-SPADE is fitted: a ridge regression, and so many passes of descent after it.

    Args:
        keep: SPADE's keep set, which must end with the answer token; see
            :class:`~spade_lens.lenses.spade.Spade`.
        positions: Whether SPADE's tokens keep their positions.
        ridges: Strengths to choose from, relative to the variance of a coordinate.
        rank: The rank of what a map adds to the identity; None for any.
    """

    keep: KeepRule | None = None
    positions: Literal["keep", "reset"] = "keep"
    ridges: Sequence[float] = RIDGES
    rank: int | None = None

    method: ClassVar[str] = "L-SPADE: ridge regression on SPADE's final residual"

    def __post_init__(self) -> None:
        super().__post_init__()
        numbers = isinstance(self.ridges, Sequence) and all(
            isinstance(r, int | float) and 0 <= r < float("inf") for r in self.ridges
        )
        if not numbers or not self.ridges:
            raise ValueError(
                f"ridges={self.ridges!r} was given; expected one or more numbers of at least 0."
            )
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"rank={self.rank} was given; expected at least 1, or None.")

    def spade(self, model: Model) -> Spade:
        """Return the SPADE that is approximated."""
        if self.rank is not None and self.rank > model.d_model:
            raise ValueError(
                f"rank={self.rank} was given; expected 1 to {model.d_model}, the width of "
                f"{model.name}, or None."
            )
        return Spade(model, keep=self.keep, positions=self.positions)

    def described(self) -> dict[str, Any]:
        """Return all that decides the maps, beside text and layers, ready for JSON."""
        return super().described() | {
            "keep": _rule_record(self.keep),
            "spade_positions": self.positions,
            "ridges": [float(r) for r in self.ridges],
            "rank": self.rank,
        }


@dataclass(frozen=True, kw_only=True)
class TunedPlan(FitPlan):
    """How the tuned lens is fitted: by descent from the identity."""

    passes: int = 2
    rate: float = 0.1

    method: ClassVar[str] = "tuned lens: descent on KL(model || lens) from the identity"
    least_passes: ClassVar[int] = 1


OPTION_RIDGES = (1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001, 0.0003)
"""Strengths of the ridge of :class:`CandidatePlan`, in nats per unit of squared weights."""


@dataclass(frozen=True, kw_only=True)
class CandidatePlan:
    """How a linear lens is fitted to the candidates of a task's prompts.

    Args:
        layers: The layers that get a map; by default all below the last.
        target: What the candidates' probabilities should be: ``"spade"``, those that SPADE reads
            with the same keep set, or ``"right"``, all of it on the prompt's target.
        keep: SPADE's keep set, which must end with the answer token. Only for ``"spade"``.
        positions: Whether SPADE's tokens keep their positions.
        start: A fitted lens that the ridge shrinks towards; by default the logit lens.
        ridges: Strengths to choose from; see
            :meth:`spade_lens.lenses.fitting.options.Problem.solve`.
        rank: The most principal components of the residuals that are used; None for any.
        folds: The parts of the prompts; the ridge is chosen on each by what the others fitted.
        seed: The seed of the folds.

    Raises:
        TypeError: If ``start`` is no linear lens.
        ValueError: If a number is out of range, or a keep set is given without a use.
    """

    layers: LayersLike = None
    target: Literal["spade", "right"] = "spade"
    keep: KeepRule | None = None
    positions: Literal["keep", "reset"] = "keep"
    start: LinearLens | None = None
    ridges: Sequence[float] = OPTION_RIDGES
    rank: int | None = None
    folds: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        if self.target not in ("spade", "right"):
            raise ValueError(f"target={self.target!r} was given; expected 'spade' or 'right'.")
        if self.target == "right" and (self.keep is not None or self.positions != "keep"):
            raise ValueError(
                "A keep set was given with target='right', which no SPADE is run for; leave out "
                "keep= and positions=, or say target='spade'."
            )
        if self.start is not None and not isinstance(self.start, LinearLens):
            raise TypeError(
                f"start={self.start!r} was given; expected a fitted lens, such as "
                "fit('l-spade', model)."
            )
        numbers = isinstance(self.ridges, Sequence) and all(
            isinstance(r, int | float) and 0 < r < float("inf") for r in self.ridges
        )
        if not numbers or not self.ridges:
            raise ValueError(
                f"ridges={self.ridges!r} was given; expected one or more numbers above 0."
            )
        check_number("folds", self.folds, least=2)
        if self.rank is not None:
            check_number("rank", self.rank, least=1)

    def mapped(self, model: Model) -> tuple[int, ...]:
        """Return the layers that get a map.

        Raises:
            ValueError: If there is none, or ``start`` is another model's or lacks one.
        """
        layers = mapped_layers(model, self.layers)
        if self.start is not None:
            if self.start.model is not model:
                raise ValueError(
                    f"start= is a lens of {self.start.model.name}; expected one of {model.name}."
                )
            missing = sorted(set(layers) - set(self.start.maps.layers))
            if missing:
                raise ValueError(
                    f"Layers {missing} were asked for; start= has maps for "
                    f"{list(self.start.maps.layers)} only. Ask for some of these with layers=."
                )
        return layers

    def spade(self, model: Model) -> Spade | None:
        """Return the SPADE that is approximated, if any."""
        if self.target == "right":
            return None
        return Spade(model, keep=self.keep, positions=self.positions)

    def described(self) -> dict[str, Any]:
        """Return all that decides the maps, beside prompts and layers, ready for JSON."""
        of = "the right answer" if self.target == "right" else "SPADE's probabilities"
        start = None if self.start is None else self.start.name
        return {
            "method": f"descent on the candidates' cross-entropy with {of}, with a ridge",
            "target": self.target,
            "keep": None if self.target == "right" else _rule_record(self.keep),
            "spade_positions": self.positions,
            "start": None if start is None else f"{start}, {content_sha256(self.start)}",
            "ridges": sorted((float(r) for r in self.ridges), reverse=True),
            "rank": self.rank,
            "folds": self.folds,
            "seed": self.seed,
        }


def mapped_layers(model: Model, layers: LayersLike) -> tuple[int, ...]:
    """Return the layers that get a map: those that were asked for, below the last."""
    mapped = tuple(n for n in check_layers(model, layers, rising=True) if n < model.n_layers)
    if not mapped:
        raise ValueError(
            f"Only layer {model.n_layers} was asked for, where a lens is the model and nothing "
            "is fitted. Give layers below it."
        )
    return mapped


def _rule_record(keep: KeepRule | None) -> Any:
    """Return what decides a keep rule, ready for JSON."""
    rule: Any = Keep() if keep is None else keep
    if isinstance(rule, Keep):
        return asdict(rule)
    return f"{getattr(rule, '__qualname__', repr(rule))}, {content_sha256(rule)}"
