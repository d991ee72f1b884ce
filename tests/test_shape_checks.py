"""The run-time checks of tests refuse what they should: types, shapes, and sizes that differ."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import jaxtyping
import pytest
import torch
from beartype import BeartypeConf, beartype
from jaxtyping import Float
from torch import Tensor

import spade_lens as sl

checked = jaxtyping.jaxtyped(typechecker=beartype(conf=BeartypeConf(violation_type=TypeError)))


@checked
def product(a: Float[Tensor, "row inner"], b: Float[Tensor, "inner column"], *, up: bool = True):
    return a @ b if up else a


@checked
def cut(a: Float[Tensor, "row column"], n: int) -> Float[Tensor, " row"]:
    return a[:n, 0]


@checked
def sized(width: int) -> Float[Tensor, "{width}"]:  # noqa: F821
    return torch.zeros(3)


@checked
def counting(n: int) -> Iterator[int]:
    yield from range(n)


def adding(more: float):
    @checked
    def add(a: Float[Tensor, " n"], b: Float[Tensor, " n"], *, times: float = more):
        return (a + b) * times + more

    return add


@checked
@dataclass
class Pair:
    first: Float[Tensor, " n"]
    second: "Float[Tensor, ' n']"


def test_parameters_and_returns_are_checked() -> None:
    assert product(torch.ones(2, 3), torch.ones(3, 4)).shape == (2, 4)
    assert product(torch.ones(5, 6), torch.ones(6, 7)).shape == (5, 7)  # sizes are of one call
    assert cut(torch.ones(2, 3), 2).shape == (2,)
    assert sized(3).shape == (3,) and list(counting(2)) == [0, 1]
    assert Pair(torch.ones(2), torch.ones(2)).first.shape == (2,)
    one, two = adding(1), adding(2)  # of one definition, each with what is its own
    assert one(torch.ones(3), torch.ones(3)).tolist() == [3.0] * 3
    assert two(torch.ones(3), torch.ones(3)).tolist() == [6.0] * 3
    wrong: dict[str, Callable[[], object]] = {
        "sizes differ": lambda: product(torch.ones(2, 3), torch.ones(2, 4)),
        "an axis is missing": lambda: product(torch.ones(2, 3), torch.ones(3)),
        "integers": lambda: product(torch.ones(2, 3, dtype=torch.long), torch.ones(3, 4)),
        "no bool": lambda: product(torch.ones(2, 3), torch.ones(3, 4), up="yes"),
        "what is returned": lambda: cut(torch.ones(2, 3), 1),
        "the value of an argument": lambda: sized(4),
        "a generator": lambda: counting("2"),
        "a function inside": lambda: one(torch.ones(2), torch.ones(3)),
        "and once more": lambda: two(torch.ones(2), torch.ones(3)),
        "a dataclass": lambda: Pair(torch.ones(2), torch.ones(3)),
    }
    for name, call in wrong.items():
        try:
            call()
        except TypeError as error:
            assert re.search("violates type hint|Type-check error", str(error)), name
        else:
            raise AssertionError(name)


def test_the_package_is_checked(tiny_llama: sl.Model) -> None:
    with pytest.raises(TypeError, match="violates type hint"):
        tiny_llama.logits(torch.ones(32))
    with pytest.raises(TypeError, match="violates type hint"):
        tiny_llama.run_blocks(torch.ones(1, 2, 32), torch.zeros(1, 3, dtype=torch.long), 0, 1)
