"""SPADE-EXIT: stop the prompt where a readout is sure, and answer with SPADE.

Source: Zheng, Ma, Lin, Yang (arXiv 2507.17618). The prompt runs layer by layer. At candidate
layers a cheap readout is checked (theirs: the entropy of L-SPADE). Where it is sure enough, the
rest of the network runs on the kept tokens only (theirs: start and answer token) and gives the
answer. A prompt that never exits is answered by the full model. The paper's abstract leaves open
which layers are candidates, which policy decides and with which thresholds.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import compress
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from spade_lens.checks import checked, warn
from spade_lens.exits.checking import Checking, read_rows
from spade_lens.exits.costs import price, stored
from spade_lens.exits.policies import Oracle, Policy, check_made_for, check_policy, stops_of
from spade_lens.exits.screened import check_screen
from spade_lens.exits.setup import CheckLike, ExitWarning, Setup, targets
from spade_lens.exits.trace import ExitTrace
from spade_lens.lenses.lens import Lens, keep_of
from spade_lens.lenses.measures import words_of
from spade_lens.lenses.spade import Spade
from spade_lens.models.clock import now
from spade_lens.models.hooks import numbered, rows_are, side_by_side
from spade_lens.models.model import Model
from spade_lens.models.places import LayersLike, pad_after
from spade_lens.prompts.inputs import PromptsLike
from spade_lens.prompts.prompt import Prompt
from spade_lens.settings import Settings, limits, progress_bar, scoped


class SpadeExit:
    """Early exit that really stops.

    Prompts of any lengths run side by side, block by block from one candidate layer to the next.
    Prompts that the policy lets go leave the batch at once, and no block above sees any of their
    tokens but the kept ones.

    Example:
        >>> from spade_lens.exits import SpadeExit, Threshold
        >>> engine = SpadeExit(model, "logit", Threshold(0.0), layers=[2, 3])
        >>> engine
        SpadeExit('tiny-llama', 'logit lens, entropy', 'threshold 0', 'SPADE', layers [2, 3])
        >>> engine.run(["ab", "abc"]).exit_layer.tolist()
        [2, 2]

    Args:
        model: The model.
        check: What is checked: a :class:`Confidence`; or a lens or its name, which stands for the
            entropy of its readout. None for a policy that reads no lens.
        policy: Decides who leaves.
        answerer: What answers for the prompts that leave: SPADE with the paper's two tokens by
            default. Any other lens can, for comparison.
        layers: The candidate layers. Ours: by default every second one from the middle up.

    Raises:
        TypeError: If the policy is the oracle, which can only be simulated, or an argument is of
            another type.
        ValueError: If a candidate layer is out of range or the model's last, the policy does not
            fit the candidates or reads a lens and none is given, or a lens is another model's.
    """

    among: Literal["candidates", "vocabulary"] | None = None
    """What a calibrated rule was chosen over; None where that is not known."""

    @checked
    def __init__(
        self,
        model: Model,
        check: CheckLike | None,
        policy: Policy,
        *,
        answerer: Lens | str | None = None,
        layers: LayersLike = None,
    ) -> None:
        if isinstance(policy, Oracle):
            raise TypeError(
                "The oracle knows the final answer before it is computed, so it cannot be run. "
                "Use ExitTable.simulate()."
            )
        check_policy(policy)
        setup = Setup.of(model, [] if check is None else [check], answerer, layers)
        self.setup = setup if policy.reads else replace(setup, checks=())
        self.policy = policy
        self.check = next(iter(self.setup.checks), None)
        self.answerer = self.setup.answerers[0]
        name = None if self.check is None else self.check.name
        check_made_for(policy, model=model.name, check=name, keep=self.answerer.name)
        self.stops = stops_of(policy, self.setup.layers)
        if policy.reads and self.check is None:
            raise ValueError(f"The policy {policy.name!r} reads a lens; give one as check.")
        if self.check is not None:
            check_screen(policy, self.check.name, screened=self.check.after is not None)
        if not self.stops:
            warn(
                f"The policy {policy.name!r} never exits at layers {list(self.setup.layers)}: "
                "every prompt will run to the end.",
                ExitWarning,
            )
        _ = self.setup.costs  # measured here, not in a run

    def __repr__(self) -> str:
        check = None if self.check is None else self.check.name
        return (
            f"SpadeExit({self.setup.model.name!r}, {check!r}, {self.policy.name!r}, "
            f"{self.answerer.name!r}, layers {list(self.setup.layers)})"
        )

    @scoped
    @torch.no_grad()
    def run(self, prompts: PromptsLike, *, settings: Settings | None = None) -> ExitTrace:
        """Answer prompts, each with as many layers as it needs.

        Args:
            prompts: A text, a prompt, or several, in any order and of any lengths.
            settings: Memory limit, batch size and progress; see :class:`spade_lens.Settings`.

        Returns:
            The answers and the costs, in the order of the prompts.

        Raises:
            TypeError: If something else than prompts is given.
            ValueError: If prompts do not fit the model, candidates are asked for and a prompt
                has none, or a calibrated rule was chosen over something else.
        """
        prompts = self.setup.prompts(prompts)
        self.refuse_another_scale(prompts)
        model, n = self.setup.model, len(prompts)
        model.expect_rows(n)
        progress = _Progress(
            stop=torch.full((n,), model.n_layers),
            answer=torch.full((n,), -1),
            padding=torch.zeros(n, dtype=torch.long),
            seconds=torch.zeros(n),
            through=torch.ones(len(self.stops), n, dtype=torch.bool),
        )
        with progress_bar(total=n, desc="exit", unit="prompt", model=self.setup.model) as bar:
            for batch in self.batches(prompts):
                self._run_batch(prompts, batch, progress)
                bar.update(len(batch))
        prices = price(self.setup.costs, prompts, self.stops, self.check, self.answerer)
        stop = torch.searchsorted(torch.tensor(prices.stops), progress.stop)
        checked = range(len(self.stops)) if self.policy.reads else ()
        target = targets(prompts)
        return ExitTrace(
            policy=self.policy.name,
            n_layers=model.n_layers,
            exit_layer=progress.stop,
            answer=progress.answer,
            target=target,
            n_candidates=torch.tensor([len(p.candidates) for p in prompts]),
            flops_padding=progress.padding,
            full_flops=prices.full,
            seconds=progress.seconds,
            words=words_of(model, torch.cat([progress.answer, target])),
            ambiguous=torch.tensor([p.shares_first_token for p in prompts]),
            **prices.settle(stop, checked, progress.through),
        )

    def refuse_another_scale(self, prompts: Sequence[Prompt]) -> None:
        """Raise if prompts would be read over something else than the rule was chosen over.

        Raises:
            ValueError: If the check reads candidates where there are some, the rule was chosen on
                prompts with candidates and one here has none, or the other way round.
        """
        if self.among is None or self.check is None or self.check.over is not None:
            return
        for i, prompt in enumerate(prompts):
            here = "candidates" if prompt.candidates else "vocabulary"
            if here != self.among:
                raise ValueError(
                    f"The rule was chosen with confidences over the {self.among} of its prompts, "
                    f"and prompt {i} would be read over the {here}, on another scale. Calibrate "
                    "with Confidence(lens, over='vocabulary'), or on such prompts as these."
                )

    def batches(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Return prompts of similar lengths together, so that little is spent on padding."""
        most = limits(self.setup.model)

        def fits(n_rows: int, longest: int) -> bool:
            if most.batch_size is not None:
                return n_rows <= most.batch_size
            return longest * n_rows <= 4 * most.batch_tokens

        return side_by_side(self.setup.model, [len(prompt) for prompt in prompts], fits)

    def _run_batch(
        self, prompts: Sequence[Prompt], batch: list[int], progress: "_Progress"
    ) -> None:
        """Run one batch, which shrinks; ``active`` are the prompts of the rows of ``resid``."""
        model, blocks = self.setup.model, self.setup.costs.blocks
        active, layer = batch, 0
        clock = _Clock(model, progress.seconds)
        tokens = pad_after([prompts[i].tokens for i in active], model.device)
        positions = torch.arange(tokens.shape[1], device=model.device)
        with rows_are(active, [len(prompts[i]) for i in active]):
            resid = model.embed(tokens, positions.expand_as(tokens))  # [row pos d_model]
        checking = Checking(self.setup.head, self.check, self.policy)
        for stop in (*self.stops, model.n_layers):
            with rows_are(active, [len(prompts[i]) for i in active]):
                resid = model.run_blocks(resid, positions.expand(resid.shape[:2]), layer, stop)
            for i in active:
                unpadded = blocks(layer, stop, len(prompts[i]))
                progress.padding[i] += blocks(layer, stop, resid.shape[1]) - unpadded
            clock.charge(active)
            layer = stop
            if stop == model.n_layers:
                break
            with numbered(active):
                some = [prompts[i] for i in active]
                through, leaves = checking.at(resid, range(len(active)), some, layer)
            progress.through[len(checking.layers) - 1, active] = through
            if leaves.any():
                clock.charge(active)
                self._answer(prompts, resid, active, leaves, checking, progress)
                clock.charge(list(compress(active, leaves.tolist())))
                stays = ~leaves
                active = list(compress(active, stays.tolist()))
                if not active:
                    return
                width = max(len(prompts[i]) for i in active)
                resid = resid[stays.to(model.device), :width]
                positions = positions[:width]
                checking.keep(stays)
            clock.charge(active)
        last = torch.tensor([prompts[i].answer for i in active], device=model.device)
        rows = resid[torch.arange(len(active), device=model.device), last]
        with numbered(active):
            final = self.setup.head.read(rows, [prompts[i] for i in active])
            progress.answer[active] = final.answer
        clock.charge(active)

    def _answer(
        self,
        prompts: Sequence[Prompt],
        resid: Float[Tensor, "row pos d_model"],
        active: Sequence[int],
        leaves: Bool[Tensor, " row"],
        checking: Checking,
        progress: "_Progress",
    ) -> None:
        """Answer the rows that leave, all at once."""
        rows = leaves.nonzero()[:, 0].tolist()
        leaving = [active[row] for row in rows]
        left = [prompts[i] for i in leaving]
        layer = checking.layers[-1]
        progress.stop[leaving] = layer
        if self.check is not None and self.check.lens is self.answerer:
            progress.answer[leaving] = checking.readings[-1].answer[leaves]  # read by the check
            return
        with numbered(leaving):
            finals = read_rows(self.answerer, resid, rows, left, layer)
            progress.answer[leaving] = self.setup.head.read(finals, left).answer
        if isinstance(self.answerer, Spade):
            progress.padding[leaving] += self._tail_padding(left, layer)

    def _tail_padding(self, prompts: Sequence[Prompt], layer: int) -> Int[Tensor, " prompt"]:
        """Return FLOPs of padding in SPADE's tail, where prompts keep unequal numbers of tokens."""
        kept = [keep_of(self.answerer, p, p.answer) for p in prompts]
        skip = [stored(self.setup.model, p, k) for p, k in zip(prompts, kept, strict=True)]
        # SPADE runs prompts that share a start token side by side.
        group = [p.tokens[0] if s else None for p, s in zip(prompts, skip, strict=True)]
        widest = {g: max(len(k) for k, h in zip(kept, group, strict=True) if h == g) for g in group}
        cost, n_layers = self.setup.costs.blocks, self.setup.model.n_layers
        return torch.tensor(
            [
                cost(layer, n_layers, widest[g] - s, widest[g])
                - cost(layer, n_layers, len(k) - s, len(k))
                for k, s, g in zip(kept, skip, group, strict=True)
            ]
        )


@dataclass
class _Progress:
    """Where every prompt of a run stands."""

    stop: Int[Tensor, " prompt"]
    answer: Int[Tensor, " prompt"]
    padding: Int[Tensor, " prompt"]
    seconds: Float[Tensor, " prompt"]
    through: Bool[Tensor, "stop prompt"]


class _Clock:
    """Divides the time since the last look evenly among prompts."""

    def __init__(self, model: Model, seconds: Float[Tensor, " prompt"]) -> None:
        self._device, self._seconds = model.device, seconds
        self._since = now(self._device)

    def charge(self, prompts: Sequence[int]) -> None:
        at = now(self._device)
        self._seconds[list(prompts)] += (at - self._since) / len(prompts)
        self._since = at
