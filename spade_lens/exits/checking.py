"""The checks of prompts on their way through the blocks: what is read, and who leaves.

Whoever runs the blocks asks here at every candidate layer: the engine for answers, and generation
for prompts that go on as text.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from spade_lens.exits.answer_head import AnswerHead, HeadReading
from spade_lens.exits.confidence import Confidence
from spade_lens.exits.policies import Checks, Policy, decisions
from spade_lens.exits.screened import let_through
from spade_lens.lenses.lens import Lens, Reading, finals_of, keep_of
from spade_lens.models.hooks import numbered
from spade_lens.models.residuals import Residuals
from spade_lens.prompts.prompt import Prompt


class Checking:
    """The checks of the prompts that still run.

    Args:
        head: What reads answers.
        check: What is checked; None where the policy reads nothing.
        policy: Decides who leaves.

    Attributes:
        layers: The layers that were checked.
        readings: What was read at each.
    """

    def __init__(self, head: AnswerHead, check: Confidence | None, policy: Policy) -> None:
        self._head, self._check, self._policy = head, check, policy
        self.layers: list[int] = []
        self.readings: list[HeadReading] = []
        self._screens: list[Tensor] = []

    def at(
        self,
        resid: Float[Tensor, "row pos d_model"],
        rows: Sequence[int],
        prompts: Sequence[Prompt],
        layer: int,
    ) -> tuple[Bool[Tensor, " prompt"], Bool[Tensor, " prompt"]]:
        """Check the prompts at the layer that they have reached.

        Args:
            resid: The residuals there.
            rows: The row of each prompt.
            prompts: The prompts that still run.
            layer: The layer.

        Returns:
            For which prompts the check was read, and which leave.
        """
        self.layers.append(layer)
        read = self._read(resid, list(rows), prompts, layer)
        # Where nobody is let through, nothing was read that a policy could decide by.
        leaves = decisions(self._policy, self._checks()) & read if read.any() else read
        return read, leaves

    def keep(self, prompts: Bool[Tensor, " prompt"]) -> None:
        """Go on with some of the prompts."""
        self.readings = [
            HeadReading(r.answer[prompts], r.confidence[prompts], r.features[prompts])
            for r in self.readings
        ]
        self._screens = [screen[prompts] for screen in self._screens]

    def _read(
        self,
        resid: Float[Tensor, "row pos d_model"],
        rows: Sequence[int],
        prompts: Sequence[Prompt],
        layer: int,
    ) -> Bool[Tensor, " prompt"]:
        """Add a reading of every prompt; return for which of them the check was read."""
        check, n, head = self._check, len(prompts), self._head
        if check is None:
            unread = torch.full((n,), torch.nan)
            self.readings.append(HeadReading(torch.full((n,), -1), unread, torch.empty(n, 0)))
            return torch.ones(n, dtype=torch.bool)
        if check.after is None:
            finals = read_rows(check.lens, resid, rows, prompts, layer)
            self.readings.append(head.read(finals, prompts, check))
            return torch.ones(n, dtype=torch.bool)
        first = read_rows(check.after.lens, resid, rows, prompts, layer)
        screen = head.read(first, prompts, check.after)
        self._screens.append(screen.confidence)
        through = let_through(self._policy, torch.stack(self._screens), self.layers)
        passing = through.nonzero()[:, 0].tolist()
        answer, confidence = screen.answer, torch.full((n,), -torch.inf)
        features = torch.empty(n, 0)
        if passing:
            some = [prompts[i] for i in passing]
            with numbered(passing):
                finals = read_rows(check.lens, resid, [rows[i] for i in passing], some, layer)
                read = head.read(finals, some, check)
            features = torch.full((n, read.features.shape[1]), torch.nan)
            features[passing] = read.features
            answer[passing], confidence[passing] = read.answer, read.confidence
        self.readings.append(HeadReading(answer, confidence, features))
        return through

    def _checks(self) -> Checks:
        width = max(r.features.shape[1] for r in self.readings)
        # Where nobody was let through, there are no features yet.
        features = [
            r.features
            if r.features.shape[1] == width
            else r.confidence.new_full((len(r.answer), width), torch.nan)
            for r in self.readings
        ]
        return Checks(
            layers=tuple(self.layers),
            confidence=torch.stack([r.confidence for r in self.readings]),
            answer=torch.stack([r.answer for r in self.readings]),
            features=torch.stack(features),
            screen=torch.stack(self._screens) if self._screens else None,
        )


def read_rows(
    lens: Lens,
    resid: Float[Tensor, "row pos d_model"],
    rows: Sequence[int],
    prompts: Sequence[Prompt],
    layer: int,
) -> Float[Tensor, "reading d_model"]:
    """Return what a lens makes of some rows at the layer they have reached."""
    kept = [keep_of(lens, p, p.answer) for p in prompts]
    # A lens reads at its keep set; the answer position is there for those that ask for it.
    wanted = [sorted({p.answer, *k}) for p, k in zip(prompts, kept, strict=True)]
    row = [r for r, positions in zip(rows, wanted, strict=True) for _ in positions]
    column = [position for positions in wanted for position in positions]
    residuals = Residuals(
        stack=resid[row, column][None],
        layers=(layer,),
        prompt=torch.tensor([n for n, positions in enumerate(wanted) for _ in positions]),
        position=torch.tensor(column),
        prompts=tuple(prompts),
    )
    readings = [Reading(n, p.answer, kept[n]) for n, p in enumerate(prompts)]
    return finals_of(lens, residuals, readings, [layer])[0]
