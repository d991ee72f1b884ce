"""What gates are fitted on: losses, costs and what checks say, from a table of known prompts."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from spade_lens.exits.gates.features import history_inputs
from spade_lens.exits.policies import Checks
from spade_lens.exits.table import ExitTable

Loss: TypeAlias = Literal["cross-entropy", "wrong", "disagrees"]

FEWEST = 20
"""Gates are not fitted on fewer prompts."""


@dataclass(frozen=True, eq=False)
class GateRows:
    """Prompts to fit gates on.

    Args:
        table: The table of the prompts whose loss is known.
        loss: The loss of answering at every stop; the last stop is the full model.
        trunk: FLOPs of the blocks up to every stop, over the full model's.
        check: FLOPs of a check at every layer, likewise. A cheaper check that comes first is read
            as well: gates let all prompts through.
        answer: FLOPs of answering after a check at every layer and at the end, likewise.
        blind: The same where nothing was checked, so that no check has given the answer already.
    """

    table: ExitTable
    loss: Float[Tensor, "stop prompt"]
    trunk: Float[Tensor, "stop prompt"]
    check: Float[Tensor, "layer prompt"]
    answer: Float[Tensor, "stop prompt"]
    blind: Float[Tensor, "stop prompt"]

    def __len__(self) -> int:
        return len(self.table)

    def inputs(self, checked: Sequence[int]) -> Float[Tensor, "prompt input"]:
        """Return what a gate sees at the last of the layers checked, which are given by index."""
        rows, table = list(checked), self.table
        layers = tuple(table.layers[row] for row in rows)
        values = table.confidence[rows], table.check_answer[rows], table.features[rows]
        return history_inputs(Checks(layers, *values))

    def folds(self, n: int, generator: torch.Generator) -> Int[Tensor, " prompt"]:
        """Return a number from 0 to ``n - 1`` for every prompt, each about as often."""
        return torch.randperm(len(self), generator=generator) % n


def gate_rows(table: ExitTable, loss: Loss) -> GateRows:
    """Return the prompts of a table whose loss is known.

    Raises:
        ValueError: If they are too few, or a number that gates would be fitted on is not finite.
    """
    of = f"the table of check {table.check!r} and keep set {table.keep!r}"
    known = {
        "cross-entropy": table.right_option >= 0,
        "wrong": table.target >= 0,
        "disagrees": torch.ones(len(table), dtype=torch.bool),
    }[loss]
    if loss == "cross-entropy" and not table.logprobs.shape[-1]:
        known = torch.zeros_like(known)
    n = int(known.sum())
    if n < FEWEST:
        need = {"cross-entropy": " with a right one among candidates", "wrong": " with a target"}
        advice = "" if loss == "disagrees" else ", or loss='disagrees', which needs no target"
        raise ValueError(
            f"{n} of the {len(table)} prompts of {of} can teach a gate with loss={loss!r}; "
            f"expected at least {FEWEST} prompts{need.get(loss, '')}. Give more{advice}."
        )
    table = table.of(known.nonzero()[:, 0])
    if loss == "cross-entropy":
        right = rearrange(table.right_option, "prompt -> 1 prompt 1")
        right = right.expand(len(table.logprobs), -1, 1)
        values = -rearrange(
            table.logprobs.double().gather(-1, right), "stop prompt 1 -> stop prompt"
        )
    else:
        answers = torch.cat([table.exit_answer, table.final_answer[None]])
        values = (answers != (table.target if loss == "wrong" else table.final_answer)).double()
    for name, numbers in (
        ("confidences", table.confidence),
        ("features", table.features),
        ("losses", values),
    ):
        bad = int((~numbers.isfinite()).sum())
        if bad:
            raise ValueError(
                f"{bad} {name} of {of} are NaN or infinite; gates expect finite ones. Choose "
                "another measure, features or loss."
            )
    prices, full = table.prices, table.prices.full.double()
    blind = prices.answer / full
    check = prices.check if prices.screen is None else prices.check + prices.screen
    shared = torch.tensor([prices.shared] * len(table.layers) + [False])[:, None]
    return GateRows(
        table=table,
        loss=values,
        trunk=prices.trunk / full,
        check=check / full,
        answer=blind.masked_fill(shared, 0),
        blind=blind,
    )
