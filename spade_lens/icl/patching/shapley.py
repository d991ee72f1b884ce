"""Shapley values: what each of several players contributes to what they reach together.

Plain tensors: a coalition is a row of booleans, its worth a number. Nothing here knows of models.
"""

import numpy as np
import torch
from einops import rearrange, reduce
from jaxtyping import Bool, Float, Int
from torch import Tensor

MOST_EXACT = 16
"""Two to the power of this many coalitions is the most that is listed."""


def all_coalitions(n: int) -> Bool[Tensor, "coalition player"]:
    """All coalitions of ``n`` players; player ``i`` is bit ``i`` of a row's number.

    Example:
        >>> all_coalitions(2).int().tolist()
        [[0, 0], [1, 0], [0, 1], [1, 1]]
    """
    if not 1 <= n <= MOST_EXACT:
        raise ValueError(
            f"All coalitions of {n} players were asked for; expected 1 to {MOST_EXACT}. Sample "
            "permutations instead."
        )
    numbers = torch.arange(2**n)
    return (numbers[:, None] >> torch.arange(n)) % 2 == 1


def shapley_exact(worth: Float[Tensor, " coalition"]) -> Float[Tensor, " player"]:
    """Shapley values from the worth of every coalition, in the order of :func:`all_coalitions`.

    Example:
        >>> shapley_exact(torch.tensor([0.0, 1.0, 2.0, 5.0])).tolist()
        [2.0, 3.0]
    """
    n = len(worth).bit_length() - 1
    if n < 1 or len(worth) != 2**n:
        raise ValueError(
            f"The worth of {len(worth)} coalitions was given; expected that of all, a power of two."
        )
    members = all_coalitions(n)
    sizes = members.sum(dim=1)
    # A coalition of s others comes before the player in s! (n - 1 - s)! of n! orders.
    factorial = torch.tensor([1.0, *range(1, n + 1)], dtype=torch.float64).cumprod(0)
    weight = factorial[:n] * factorial[:n].flip(0) / factorial[n]
    exact = worth.double()
    values = []
    for player in range(n):
        without = (~members[:, player]).nonzero().flatten()
        gain = exact[without + 2**player] - exact[without]
        values.append((weight[sizes[without]] * gain).sum())
    return torch.stack(values).to(worth.dtype)


def sampled_orders(n: int, orders: int, *, seed: int = 0) -> Int[Tensor, "order player"]:
    """Random orders in which players join, each followed by its reverse.

    Pairs of an order and its reverse (antithetic sampling) make the error smaller.

    Example:
        >>> first, second, _, _ = sampled_orders(3, 4).tolist()
        >>> first == second[::-1]
        True
    """
    if orders < 4 or orders % 2:
        raise ValueError(f"orders={orders} was given; expected an even number of at least 4.")
    rng = np.random.default_rng(seed)
    forward = torch.from_numpy(np.stack([rng.permutation(n) for _ in range(orders // 2)]))
    return rearrange(torch.stack([forward, forward.flip(1)]), "two order n -> (order two) n")


def coalitions_of(orders: Int[Tensor, "order player"]) -> Bool[Tensor, "order size player"]:
    """The coalitions of sizes 0 to n that come about as players join in an order."""
    n = orders.shape[1]
    rank = orders.argsort(dim=1)  # [order player]: when each joins
    return rearrange(rank, "order player -> order 1 player") < torch.arange(n + 1)[:, None]


def shapley_sampled(
    worth: Float[Tensor, "order size"], orders: Int[Tensor, "order player"]
) -> tuple[Float[Tensor, " player"], Float[Tensor, " player"]]:
    """Shapley values, and their standard errors over the pairs of :func:`sampled_orders`."""
    joined = worth.diff(dim=1)  # the gain as each place of the order is taken
    gains = torch.empty_like(joined).scatter_(1, orders.to(worth.device), joined)
    pairs = reduce(gains, "(pair two) player -> pair player", "mean", two=2)
    return pairs.mean(dim=0), pairs.std(dim=0) / len(pairs) ** 0.5


def effective_number(values: Float[Tensor, "*rows player"]) -> Float[Tensor, "*rows"]:
    """How many players contribute, in effect: the inverse participation ratio of sizes.

    ``(Σ|s|)² / Σ s²``: 1 where one player does all, n where all do the same. Ours.

    Example:
        >>> effective_number(torch.tensor([[1.0, 0.0, 0.0], [2.0, -2.0, 2.0]])).tolist()
        [1.0, 3.0]
    """
    return values.abs().sum(dim=-1) ** 2 / (values**2).sum(dim=-1)
