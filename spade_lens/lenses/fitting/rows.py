"""Which positions of a text a fit learns from and which it is judged by, and their residuals.

Documents, not positions, are split: neighbouring positions share a context, so a lens that was
fitted to one of them would be tested on nearly the same. The start token is never a row. It is a
massive activation in most models, hundreds of times the norm of any other residual, and its
reading is always the same. This module does not know how maps are fitted.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from spade_lens.lenses.fitting.plan import Positions
from spade_lens.lenses.fitting.text import CalibrationText
from spade_lens.lenses.lens import Reading
from spade_lens.lenses.spade import Spade
from spade_lens.models.hooks import numbered
from spade_lens.models.model import Model
from spade_lens.models.residuals import capture
from spade_lens.prompts.prompt import Prompt

_BATCH_ROWS = 512
"""Rows of a batch.

Not derived from the memory limit: a checkpoint counts batches, and a descent shuffles within them.
"""

_HELD_OUT_ROWS = 1024
"""No more rows than this are kept in memory for validation, and as many for the test."""


@dataclass(frozen=True)
class Places:
    """Positions in pieces of text; ``positions[i]`` are those of ``pieces[i]``."""

    pieces: tuple[Prompt, ...]
    positions: tuple[tuple[int, ...], ...]

    def __len__(self) -> int:
        return sum(len(of_piece) for of_piece in self.positions)

    def batches(self) -> list["Places"]:
        """Return the same places, whole pieces at a time, some hundred positions in each batch."""
        batches: list[Places] = []
        n_rows, first = 0, 0
        for i, of_piece in enumerate(self.positions):
            n_rows += len(of_piece)
            if n_rows >= _BATCH_ROWS or i == len(self.positions) - 1:
                batches.append(Places(self.pieces[first : i + 1], self.positions[first : i + 1]))
                n_rows, first = 0, i + 1
        return batches


@dataclass(frozen=True)
class Split:
    """Places to learn from, to choose by (the ridge, for one) and to report on."""

    train: Places
    validation: Places
    test: Places
    by: str


def split_places(
    text: CalibrationText, positions: Positions, *, held_out: float, seed: int
) -> Split:
    """Choose positions, and split them by document.

    ``held_out`` is the fraction of all positions for validation, and as much for the test.
    """
    draws = torch.Generator().manual_seed(int(seed))
    chosen = [_choose(i, piece, positions, draws) for i, piece in enumerate(text.pieces)]
    n_rows = sum(len(of_piece) for of_piece in chosen)
    wanted = min(held_out * n_rows, _HELD_OUT_ROWS)
    of_document: dict[int, list[int]] = {}
    for i, document in enumerate(text.document):
        of_document.setdefault(document, []).append(i)
    groups = list(of_document.values())
    by = "document"
    if len(groups) < 3:
        # One long text: contiguous parts of it, so that only a border or two is shared.
        groups, by = [[i] for i in range(len(chosen))], "part of one document"
        order = list(reversed(range(len(groups))))
    else:
        order = torch.randperm(len(groups), generator=draws).tolist()
    if len(groups) < 3:
        raise ValueError(
            f"The calibration text has {len(groups)} pieces; at least 3 are needed, to learn from, "
            "to choose by and to report on. Give more text."
        )
    test: list[int] = []
    validation: list[int] = []
    for part, left in ((test, 2), (validation, 1)):
        while len(order) > left and sum(len(chosen[i]) for i in part) < wanted:
            part += groups[order.pop(0)]
    train = [i for n in order for i in groups[n]]
    return Split(
        train=_places(text, chosen, train),
        validation=_places(text, chosen, validation, most=_HELD_OUT_ROWS),
        test=_places(text, chosen, test, most=_HELD_OUT_ROWS),
        by=by,
    )


def _choose(
    number: int, piece: Prompt, positions: Positions, draws: torch.Generator
) -> tuple[int, ...]:
    if len(piece) < 2 or (positions == "answer" and piece.answer == 0):
        raise ValueError(
            f"Piece {number} of the text has nothing to learn from but its start token. Leave it "
            "out."
        )
    if positions == "answer":
        return (piece.answer,)
    n = len(piece) - 1
    if positions == "all":
        return tuple(range(1, n + 1))
    return tuple(sorted((torch.randperm(n, generator=draws)[:positions] + 1).tolist()))


def _places(
    text: CalibrationText,
    chosen: Sequence[tuple[int, ...]],
    part: Sequence[int],
    *,
    most: int | None = None,
) -> Places:
    left = sum(len(chosen[i]) for i in part) if most is None else most
    pieces, positions = [], []
    for i in sorted(part):
        of_piece = chosen[i][:left]
        left -= len(of_piece)
        if of_piece:
            pieces.append(text.pieces[i])
            positions.append(of_piece)
    return Places(tuple(pieces), tuple(positions))


@dataclass(frozen=True)
class Rows:
    """Residuals at several places: where a map starts and where it should lead.

    Args:
        start: The residual at every layer.
        model: The model's own final residual.
        spade: SPADE's final residual from every layer; None where it was not asked for.
    """

    start: Float[Tensor, "layer row d_model"]
    model: Float[Tensor, "row d_model"]
    spade: Float[Tensor, "layer row d_model"] | None

    @property
    def target(self) -> Float[Tensor, "layer row d_model"]:
        """SPADE's final residual if it was asked for, else the model's own, by layer."""
        return self.model.expand_as(self.start) if self.spade is None else self.spade

    @staticmethod
    def join(parts: Sequence["Rows"]) -> "Rows":
        """Return one batch of rows of several."""
        with_spade = [part.spade for part in parts if part.spade is not None]
        return Rows(
            torch.cat([part.start for part in parts], dim=1),
            torch.cat([part.model for part in parts]),
            torch.cat(with_spade, dim=1) if with_spade else None,
        )


def rows_at(model: Model, places: Places, layers: Sequence[int], spade: Spade | None) -> Rows:
    """Run the model, and SPADE if it is given, at all places."""
    readings: list[Reading] = []
    needed: list[list[int]] = []
    for i, (piece, of_piece) in enumerate(zip(places.pieces, places.positions, strict=True)):
        keeps = [(p,) if spade is None else tuple(spade.keep(piece, p)) for p in of_piece]
        for p, keep in zip(of_piece, keeps, strict=True):
            if keep[-1] != p:
                raise ValueError(
                    f"The keep set reads at position {keep[-1]} for the answer position {p}. A "
                    "linear lens starts at the answer token, so give a keep set that ends with it."
                )
        readings += [Reading(i, p, keep) for p, keep in zip(of_piece, keeps, strict=True)]
        needed.append(sorted({p for keep in keeps for p in keep}))
    final = None
    with numbered(None):  # pieces of text in an order of ours
        residuals = capture(  # stack: [layer+1 slot d_model]
            model, places.pieces, layers=[*layers, model.n_layers], positions=needed
        )
        if spade is not None:
            spade.model.expect_rows(len(readings) * len(layers))
            final = spade.final_residuals(residuals, readings, layers)  # [layer row d_model]
    slots = [residuals.slots(r.prompt, [r.answer])[0] for r in readings]
    if final is not None and not torch.isfinite(final).all():
        raise ValueError(f"SPADE's final residual is NaN or infinite on {model.name}.")
    return Rows(residuals.stack[:-1, slots], residuals.stack[-1, slots], final)
