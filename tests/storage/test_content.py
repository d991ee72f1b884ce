"""Things that look alike have one hash only if they are alike."""

import functools
import os
import subprocess
import sys
from abc import ABC
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from spade_lens.exits import Threshold
from spade_lens.storage.content import content_sha256

FACTOR = 2.0


def scaled(factor: float) -> Callable[[float], float]:
    return lambda x: x * factor


def by_global(x: float) -> float:
    return x * FACTOR


def through(x: float) -> float:
    return by_global(x) + 1


class Scorer:
    bias = 0.0

    def __init__(self, weights: Any) -> None:
        self.weights = weights

    def __call__(self, x: Any) -> Any:
        return self.weights * x + self.bias

    @functools.cached_property
    def total(self) -> float:
        return float(self.weights.sum())


@dataclass(frozen=True)
class Held(ABC):
    value: Any


ONE = torch.arange(4.0)

ALIKE: dict[str, Callable[[], Any]] = {
    "plain values": lambda: {"a": [1, 2.5, None, True, "x"], "b": {3, 1}},
    "tensors": lambda: torch.arange(4.0),
    "arrays": lambda: np.arange(4),
    "closures": lambda: scaled(2.0),
    "partials": lambda: functools.partial(max, 3),
    "objects": lambda: Scorer(torch.arange(4.0)),
    "methods": lambda: Scorer(ONE).__call__,
    "dataclasses": lambda: Held((1, ONE)),
    "modules": lambda: torch.nn.Linear(2, 2, bias=False).requires_grad_(False).apply(
        lambda m: m.weight.fill_(1)
    ),
    "words in a set": lambda: {"some", "words", "here"},
}  # fmt: skip

DIFFERENT: dict[str, tuple[Any, Any]] = {
    "values": ([1, 2], [2, 1]),
    "numbers and truth": (1, True),
    "numbers and text": (1, "1"),
    "nested or not": ([[1], 2], [[1, 2]]),
    "entries": (ONE, ONE + torch.tensor([0, 0, 0, 1e-6])),
    "dtypes": (ONE, ONE.double()),
    "shapes": (ONE, ONE[None]),
    "closures": (scaled(2.0), scaled(3.0)),
    "code": (lambda x: x + 1, lambda x: x - 1),
    "constants": (lambda x: x + 1, lambda x: x + 2),
    "defaults": (lambda x=1: x, lambda x=2: x),
    "inner functions": (lambda: lambda x: x + 1, lambda: lambda x: x + 2),
    "what is called": (lambda x: torch.exp(x), lambda x: torch.log(x)),
    "partials": (functools.partial(max, 3), functools.partial(max, 4)),
    "objects": (Scorer(ONE), Scorer(2 * ONE)),
    "classes": (Scorer(ONE), Held(ONE)),
    "policies": (Threshold(0.5), Threshold(0.25)),
    "modules": (torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)),
    "unknown": ((x for x in ()), (x for x in ())),
}


@pytest.mark.parametrize("kind", ALIKE)
def test_what_is_alike_has_one_hash(kind: str) -> None:
    assert content_sha256(ALIKE[kind]()) == content_sha256(ALIKE[kind]())


@pytest.mark.parametrize("kind", DIFFERENT)
def test_what_differs_has_two(kind: str) -> None:
    one, other = DIFFERENT[kind]
    assert content_sha256(one) != content_sha256(other)


def test_what_a_function_uses_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    before = [content_sha256(f) for f in (by_global, through)]
    monkeypatch.setitem(globals(), "FACTOR", 3.0)
    after = [content_sha256(f) for f in (by_global, through)]
    assert all(a != b for a, b in zip(before, after, strict=True))


def test_what_a_class_does_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = Scorer(ONE)
    before = content_sha256(scorer)
    assert scorer.total == 6 and content_sha256(scorer) == before  # what is kept for later is not
    monkeypatch.setattr(Scorer, "bias", 1.0)
    assert content_sha256(scorer) != before


def test_a_thing_that_holds_itself_has_a_hash() -> None:
    held: list[Any] = [1]
    held.append(held)
    assert content_sha256(held) != content_sha256([1])


def test_it_is_the_same_in_another_process() -> None:
    code = (
        "from spade_lens.storage.content import content_sha256 as h\n"
        "print(h([lambda x: x in {'some', 'words', 'here'}, {'more', 'words'}, 1.5]))"
    )
    told = {
        subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            env=os.environ | {"PYTHONHASHSEED": str(seed), "PYTHONPATH": os.pathsep.join(sys.path)},
        ).stdout
        for seed in (1, 2)
    }
    assert len(told) == 1 and len(told.pop()) == 17
