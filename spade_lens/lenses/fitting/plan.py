"""Everything that decides a fit, in one frozen dataclass for each kind, which checks itself.

This module does not know how maps are fitted.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

from spade_lens.checks import is_whole
from spade_lens.lenses.keep import Keep, KeepRule
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
        layers = tuple(
            n for n in check_layers(model, self.layers, rising=True) if n < model.n_layers
        )
        if not layers:
            raise ValueError(
                f"Only layer {model.n_layers} was asked for, where a lens is the model and nothing "
                "is fitted. Give layers below it."
            )
        return layers

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
        rule: Any = Keep() if self.keep is None else self.keep
        return super().described() | {
            "keep": asdict(rule)
            if isinstance(rule, Keep)
            else f"{getattr(rule, '__qualname__', repr(rule))}, {content_sha256(rule)}",
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
