"""Exit tables made by hand: token 1 is right everywhere, at layers 10 and 20 of 30."""

import torch

from spade_lens.exits import ExitTable
from spade_lens.exits.costs import Prices

RIGHT, WRONG = 1, 0


def table(
    confidence: torch.Tensor,
    right: torch.Tensor,
    *,
    full: torch.Tensor | None = None,
    known: torch.Tensor | None = None,
    check: int = 1,
) -> ExitTable:
    """Token 1 is right everywhere; layers 10, 20 of 30; a layer costs 1, the tail 2, the end 1."""
    n_layers, n = confidence.shape
    final = torch.full((n,), RIGHT) if full is None else full.long()
    stops = (*range(10, 10 * n_layers + 1, 10), 30)

    def of(values: list[int]) -> torch.Tensor:
        return torch.tensor(values)[:, None].expand(-1, n).contiguous()

    prices = Prices(
        stops=stops,
        trunk=of(list(stops)),
        check=of([check] * n_layers),
        answer=of([2] * n_layers + [1]),
        check_tokens=of([0] * n_layers),
        answer_tokens=of([30 - s for s in stops]),
        length=torch.full((n,), 5),
        shared=False,
    )
    target = torch.full((n,), RIGHT)
    if known is not None:
        target[~known] = -1
    return ExitTable(
        model="made up",
        check="a lens",
        keep="SPADE",
        layers=stops[:-1],
        n_layers=30,
        confidence=confidence.float(),
        features=torch.empty(n_layers, n, 0),
        check_answer=right.long(),
        exit_answer=right.long(),
        final_answer=final,
        target=target,
        n_candidates=torch.zeros(n, dtype=torch.long),
        words={RIGHT: "right", WRONG: "wrong"},
        kept=torch.full((n,), 2),
        logprobs=torch.empty(n_layers + 1, n, 0),
        right_option=torch.full((n,), -1),
        identity=torch.arange(n) + 1000 * int(confidence.sum() * 1000),
        prices=prices,
    )


def noisy(n: int, *, seed: int) -> ExitTable:
    """A confidence that says the chance to be right, at two layers."""
    generator = torch.Generator().manual_seed(seed)
    confidence = torch.rand(2, n, generator=generator).sqrt()
    right = torch.rand(2, n, generator=generator) < confidence
    full = torch.rand(n, generator=generator) < 0.95
    return table(confidence, right, full=full)


SURE = torch.tensor([[0.9, 0.8, 0.3, 0.2], [0.9, 0.9, 0.9, 0.1]])
CORRECT = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0]])
