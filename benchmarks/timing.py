"""Ratios of running times on a machine whose speed drifts.

A shared machine can be eight times slower from one minute to the next, so a time by itself says
little. Here base and subject take turns in one process, every turn of the subject is divided by
the mean of the base's turns just before and just after it, and the median of these ratios is
reported with an interval. Subjects that take many times as long as the base are interrupted at
seams of their own, where the base gets a turn, so that no ratio spans more than moments.
"""

import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

Run = Callable[[], object]


@dataclass(frozen=True)
class Turn:
    """Seconds of one call: as the user waits, and as all threads of this process work."""

    wall: float
    cpu: float


@dataclass(frozen=True)
class Ratio:
    """The median of ratios to the base, with an interval that covers it 19 times in 20.

    With fewer than six rounds no such interval exists, and it is the range.
    """

    ratio: float
    low: float
    high: float
    cpu_ratio: float
    rounds: int
    base_seconds: float


def timed(run: Run) -> Turn:
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return Turn(time.perf_counter() - wall, time.process_time() - cpu)


def interleave(
    base: Run, subjects: Mapping[str, Run], *, rounds: int, seconds: float = math.inf
) -> dict[str, Ratio]:
    """Base, subject, base, next subject, base, ... for ``rounds`` rounds or about ``seconds``.

    At least five rounds are done however long they take; the first one warms up and is not
    counted.
    """
    for run in (base, *subjects.values()):
        run()
    ratios: dict[str, list[Turn]] = {name: [] for name in subjects}
    bases = [timed(base)]
    end = time.monotonic() + seconds
    for done in range(rounds):
        if done >= min(5, rounds) and time.monotonic() > end:
            break
        for name, subject in subjects.items():
            turn = timed(subject)
            bases.append(timed(base))
            ratios[name].append(_over(turn, *bases[-2:]))
    base_seconds = statistics.median(b.wall for b in bases)
    return {name: _summary(turns, base_seconds) for name, turns in ratios.items()}


def interleave_at_seams(
    base: Run, subject: Run, seams: Sequence[tuple[Any, str]], *, turns: int, rounds: int
) -> Ratio:
    """The same for one long subject: the base gets a turn after every few calls of its methods.

    Stretch by stretch the median over rounds is taken (a subject does the same work in the same
    stretch of every round), and the stretches are added up.

    Args:
        base: The base.
        subject: The subject; it calls the seams equally often in every round.
        seams: Pairs of an object and the name of a method that the subject calls.
        turns: About how many turns the base gets in every round.
        rounds: How many rounds.
    """
    base()
    with _pauses(seams, math.inf, base, []) as (_, calls):
        subject()
    every = max(1, len(calls) // turns)
    bases: list[Turn] = []
    by_round: list[list[Turn]] = []
    for _ in range(rounds):
        before = timed(base)
        marks: list[tuple[Turn, Turn]] = []
        with _pauses(seams, every, base, marks) as (pause, _):
            subject()
            pause()
        stretches = []
        for stretch, after in marks:
            stretches.append(_over(stretch, before, after))
            before = after
        bases += [after for _, after in marks]
        by_round.append(stretches)
    base_seconds = statistics.median(b.wall for b in bases)

    def total(some: Sequence[Sequence[Turn]]) -> Turn:
        stretches = list(zip(*some, strict=True))
        return Turn(
            sum(statistics.median(t.wall for t in turns) for turns in stretches),
            sum(statistics.median(t.cpu for t in turns) for turns in stretches),
        )

    whole = total(by_round)
    draw = random.Random(0)
    again = sorted(total(draw.choices(by_round, k=rounds)).wall for _ in range(1000))
    return Ratio(whole.wall, again[24], again[974], whole.cpu, rounds, base_seconds)


@contextmanager
def _pauses(
    seams: Sequence[tuple[Any, str]], every: float, base: Run, marks: list[tuple[Turn, Turn]]
) -> Iterator[tuple[Run, list[str]]]:
    """Fill ``marks`` with (stretch of the subject, turn of the base after it).

    Yields a pause to make by hand, at the end, and the seams' calls so far.
    """
    calls: list[str] = []
    since = [0.0, 0.0]

    def go_on() -> None:
        since[:] = time.perf_counter(), time.process_time()

    def pause() -> None:
        stretch = Turn(time.perf_counter() - since[0], time.process_time() - since[1])
        marks.append((stretch, timed(base)))
        go_on()

    def with_pause(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            result = method(*args, **kwargs)
            calls.append(name)
            if len(calls) % every == 0:
                pause()
            return result

        return call

    with ExitStack() as stack:
        for owner, name in seams:
            method = with_pause(name, getattr(owner, name))
            stack.enter_context(patch.object(owner, name, method))
        go_on()
        yield pause, calls


def _over(turn: Turn, before: Turn, after: Turn) -> Turn:
    return Turn(2 * turn.wall / (before.wall + after.wall), 2 * turn.cpu / (before.cpu + after.cpu))


def _summary(turns: Sequence[Turn], base_seconds: float) -> Ratio:
    walls = sorted(t.wall for t in turns)
    n = len(walls)
    # The k-th smallest and k-th largest enclose the median but for twice the chance that fewer
    # than k of n coins fall heads.
    k, tail = 0, 2 * 0.5**n
    while tail <= 0.05:
        k += 1
        tail += 2 * math.comb(n, k) * 0.5**n
    k = max(k, 1)
    return Ratio(
        ratio=statistics.median(walls),
        low=walls[k - 1],
        high=walls[n - k],
        cpu_ratio=statistics.median(t.cpu for t in turns),
        rounds=n,
        base_seconds=base_seconds,
    )
