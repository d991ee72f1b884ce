"""Split examples into train, calibration and test, which never mix."""

from collections.abc import Mapping, Sequence
from itertools import combinations
from types import MappingProxyType
from typing import Literal, get_args

import numpy as np

from spade_lens.tasks.decisions.template import Example

Split = Literal["train", "calibration", "test"]

Splits = Mapping[Split, tuple[Example, ...]]

SPLITS: tuple[Split, ...] = get_args(Split)

FRACTIONS = (0.2, 0.3, 0.5)
"""The fractions of train, calibration and test, by default."""


def checked_splits(name: str, splits: Splits) -> Splits:
    """Return the splits of a task as tuples that cannot be changed."""
    if set(splits) != set(SPLITS) or not all(splits.values()):
        raise ValueError(
            f"Task {name!r} needs examples in each of the splits {', '.join(SPLITS)}, got "
            f"{ {split: len(examples) for split, examples in splits.items()} }."
        )
    fixed = MappingProxyType({split: tuple(splits[split]) for split in SPLITS})
    for one, other in combinations(SPLITS, 2):
        shared = {content(e) for e in fixed[one]} & {content(e) for e in fixed[other]}
        if shared:
            raise ValueError(
                f"Task {name!r} has {len(shared)} examples in both {one} and {other}, for "
                f"instance {next(iter(shared))[0]!r}. Splits must not mix; "
                "DecisionTask.from_examples keeps one of each."
            )
    return fixed


def make_splits(
    given: Mapping[str, Sequence[Example]], fractions: tuple[float, float, float], seed: int
) -> tuple[dict[Split, tuple[Example, ...]], int]:
    """Return train, calibration and test, and how many examples were left out as repetitions.

    See :meth:`spade_lens.tasks.DecisionTask.from_examples`.
    """
    seen: set[tuple[str, ...]] = set()
    distinct: dict[str, list[Example]] = {}
    repeated = 0
    for split in ("test", "validation", "calibration", "train"):
        for example in given.get(split, ()):
            if content(example) in seen:
                repeated += 1
            else:
                seen.add(content(example))
                distinct.setdefault(split, []).append(example)
    # Not seeded by the name: the same questions written in two ways have the same splits.
    rng = np.random.default_rng(seed)
    return _fill(distinct, dict(zip(SPLITS, fractions, strict=True)), rng), repeated


def content(example: Example) -> tuple[str, ...]:
    """Return what makes two examples the same, whatever their answers."""
    return (example.question, example.passage, *sorted(example.options))


def _fill(
    given: Mapping[str, Sequence[Example]],
    fractions: Mapping[Split, float],
    rng: np.random.Generator,
) -> dict[Split, tuple[Example, ...]]:
    """Make the absent splits out of those that are there."""
    splits: dict[Split, tuple[Example, ...]] = {s: tuple(given[s]) for s in SPLITS if s in given}
    absent = [split for split in SPLITS if split not in splits]
    pool = tuple(given.get("validation", ()))
    if pool and not absent:
        absent = ["calibration"]  # there to be tuned on, as calibration is
        pool += splits["calibration"]
    elif not pool and absent and splits:
        pool = splits[next(iter(splits))]
        absent.append(next(iter(splits)))
    if not absent:
        return splits
    order = rng.permutation(len(pool)).tolist()
    total = sum(fractions[split] for split in absent)
    start, edge = 0, 0.0
    for split in absent:
        edge += fractions[split] / total
        stop = round(edge * len(pool))
        splits[split] = tuple(pool[i] for i in order[start:stop])
        start = stop
    return {split: splits[split] for split in SPLITS}
