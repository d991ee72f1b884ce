"""How many tokens to draft: as many as pay, by what was accepted so far in the same text.

The cost of a pass over a few tokens is counted in steps, passes over one token. On a CPU it is that
of ``models/few_rows.py``: two to four tokens cost a fiftieth of a step more than one, nine tokens a
quarter more. Which drafts are made changes no greedy text.
"""

from collections.abc import Sequence

from spade_lens.models.model import Model

STEPS = (1.0, 1.02, 1.02, 1.02, 1.1, 1.11, 1.2, 1.2, 1.28, 1.36, 1.44, 1.52)
"""What a pass over 1, 2, ... tokens costs on a CPU in float32; SmolLM2-135M, one thread.

Passes and heads of ``benchmarks/speculate-costs.csv``, timed in turns in one process. Those of two
to four tokens differ less than their intervals and are pooled. From ten tokens on each costs as
much as the ninth, which is a guess. ``benchmarks/speculation.py --costs`` measures all twelve.
"""
_BELIEVED, _AFTER = 1.5, 2.0
"""Of two drafts one and a half are believed to be accepted before anything is known."""
_DECAY = 0.9
_SUREST = 0.98
_PAUSE = 16
"""So many rounds a drafter that does not pay is not asked; after a trial that fails, twice as many.

A text changes: what was guessed badly at its beginning may be easy further on.
"""


def steps_of(model: Model, most: int) -> tuple[float, ...]:
    """Return what a pass over 1 to ``most + 1`` tokens costs, in steps.

    Beyond what was measured a token costs as much as the last one did. On other devices a pass
    over a few tokens is taken to cost one step.
    """
    slow = model.device.type == "cpu"
    known = STEPS if slow else (1.0,)
    last = STEPS[-1] / len(STEPS) if slow else 0.0
    return tuple(
        known[n] if n < len(known) else known[-1] + (n + 1 - len(known)) * last
        for n in range(most + 1)
    )


class Acceptance:
    """How often a drafter was right in one text, of late more than long ago."""

    def __init__(self) -> None:
        self._accepted, self._tried = _BELIEVED, _AFTER
        self._paused, self._pause = 0, _PAUSE

    def update(self, drafted: int, accepted: int) -> None:
        """Take in a round. Drafts after the first wrong one say nothing."""
        if self._paused > self._pause:  # this was a trial: what is old counts as one draft
            self._accepted, self._tried = self._accepted / self._tried, 1.0
            self._pause = _PAUSE if accepted else 2 * self._pause
        self._paused = 0
        tried = accepted + (accepted < drafted)
        kept = _DECAY**tried
        self._accepted = self._accepted * kept + accepted
        self._tried = self._tried * kept + tried

    def next_length(self, most: int, steps: Sequence[float], per_draft: float = 0.0) -> int:
        """Return how many tokens to draft in a round, which is counted if none pay.

        After a number of such rounds one token is tried again, if drafts that are always right
        would pay. The arguments are those of :meth:`best_length`.
        """
        length = self.best_length(most, steps, per_draft)
        if length or not _pays_most(_SUREST, most, steps, per_draft):
            return length
        self._paused += 1
        return int(self._paused > self._pause)

    def best_length(self, most: int, steps: Sequence[float], per_draft: float = 0.0) -> int:
        """Return how many tokens to draft, for the most new tokens a step; 0 if none pay.

        Args:
            most: How many at most.
            steps: What a pass over 1, 2, ... tokens costs.
            per_draft: What making one draft costs, in steps.
        """
        rate = min(_SUREST, self._accepted / self._tried)
        return _pays_most(rate, most, steps, per_draft)


def _pays_most(rate: float, most: int, steps: Sequence[float], per_draft: float) -> int:
    """Return the length of drafts that gives most, where drafts are accepted at a rate."""
    best, length = 1.0 / steps[0], 0
    for n in range(1, most + 1):
        new = (1 - rate ** (n + 1)) / (1 - rate)
        value = new / (steps[n] + n * per_draft)
        if value > best + 1e-9:
            best, length = value, n
    return length
