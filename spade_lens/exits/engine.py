"""SPADE-EXIT: stop the prompt where a readout is sure, and answer with SPADE.

Source: Zheng, Ma, Lin, Yang (arXiv 2507.17618): the prompt runs layer by layer; at candidate
layers the confidence of a cheap readout (theirs: the entropy of L-SPADE) is looked at; where it
suffices, the rest of the network runs on the kept tokens only (theirs: start and answer token)
and gives the answer; a prompt that never gets there is answered by the full model. Which layers
are candidates, which policy decides and with which thresholds, the paper's abstract leaves open.
"""

import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from spade_lens.exits.candidates import (
    ExitWarning,
    as_confidence,
    candidate_layers,
    check_lenses,
    targets,
)
from spade_lens.exits.confidence import AnswerHead, Confidence
from spade_lens.exits.costs import Costs, price, stored
from spade_lens.exits.policies import Checks, Oracle, Policy
from spade_lens.exits.trace import ExitTrace
from spade_lens.lenses.lens import Lens, Reading
from spade_lens.lenses.spade import Spade
from spade_lens.models.model import Model
from spade_lens.models.places import pad_after
from spade_lens.models.residuals import Residuals
from spade_lens.prompts.prompt import Prompt
from spade_lens.settings import Settings, limits, progress_bar, scoped


class SpadeExit:
    """Early exit that really stops.

    Prompts of any lengths run side by side, block by block from one candidate layer to the next.
    Those that the policy lets go leave the batch at once, and no block above sees any of their
    tokens but the kept ones.

    Example:
        >>> from spade_lens.exits import SpadeExit, Threshold
        >>> engine = SpadeExit(model, LogitLens(model), Threshold(0.0), layers=[2, 3])
        >>> trace = engine.run(prompts)
        >>> trace.exit_layer.tolist()
        [2, 2]

    Args:
        model: The model.
        confidence: What is checked: a :class:`Confidence`, or a lens, whose entropy is then
            taken. None for a policy that reads no lens.
        policy: Decides who leaves.
        spade: What answers the prompts that leave: SPADE with the paper's two tokens by default.
            Any other lens can, for comparison.
        layers: The candidate layers. Ours: by default every second layer from the middle up.
        batch_size: How many prompts run side by side; by default as many as have 8192 tokens.

    Raises:
        ValueError: If a candidate layer is out of range or the model's last, the policy does not
            fit the candidates or reads a lens and none is given, or a lens is another model's.
        TypeError: If the policy is the oracle, which can only be simulated.
    """

    def __init__(
        self,
        model: Model,
        confidence: Confidence | Lens | None,
        policy: Policy,
        *,
        spade: Lens | None = None,
        layers: Sequence[int] | None = None,
        batch_size: int | None = None,
    ) -> None:
        if isinstance(policy, Oracle):
            raise TypeError(
                "The oracle knows the final answer before it is computed, so it cannot be run. "
                "Use simulate()."
            )
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size={batch_size} was given; expected 1 or more.")
        self.model = model
        self.confidence = as_confidence(confidence) if policy.reads else None
        self.policy: Policy = policy
        self.spade: Lens = Spade(model) if spade is None else spade
        self.layers = candidate_layers(model, layers)
        self.batch_size = batch_size
        self.stops = policy.stops(self.layers)
        if policy.reads and self.confidence is None:
            raise ValueError(f"The policy {policy.name!r} reads a lens; give one as confidence.")
        check_lenses(model, self.confidence, self.spade)
        if not self.stops:
            warnings.warn(
                f"The policy {policy.name!r} never exits at layers {list(self.layers)}: every "
                "prompt will run to the end.",
                ExitWarning,
                stacklevel=2,
            )
        self.head = AnswerHead(model)
        self.costs = Costs(model, self.head)

    @scoped
    @torch.no_grad()
    def run(self, prompts: Sequence[Prompt], *, settings: Settings | None = None) -> ExitTrace:
        """Answer prompts, each with as many layers as it needs.

        Args:
            prompts: The prompts, in any order and of any lengths.
            settings: Memory limit, batch size and progress; see :class:`spade_lens.Settings`.

        Returns:
            The answers and the ledger, in the order of the prompts.

        Raises:
            ValueError: If prompts do not fit the model, or candidates are asked for and a prompt
                has none.
        """
        self.model.check_prompts(prompts)
        if self.confidence is not None:
            self.confidence.check_prompts(prompts)
        n = len(prompts)
        done = _Done(
            stop=torch.full((n,), self.model.n_layers),
            answer=torch.full((n,), -1),
            padding=torch.zeros(n, dtype=torch.long),
            seconds=torch.zeros(n),
        )
        with progress_bar(total=n, desc="exit", unit="prompt") as bar:
            for batch in self.batches(prompts):
                self._run_batch(prompts, batch, done)
                bar.update(len(batch))
        prices = price(self.costs, prompts, self.stops, self.confidence, self.spade)
        stop = torch.searchsorted(torch.tensor(prices.stops), done.stop)
        checked = range(len(self.stops)) if self.policy.reads else ()
        return ExitTrace(
            policy=self.policy.name,
            n_layers=self.model.n_layers,
            exit_layer=done.stop,
            answer=done.answer,
            target=targets(prompts),
            flops_padding=done.padding,
            full_flops=prices.full,
            seconds=done.seconds,
            **prices.settle(stop, checked),
        )

    def batches(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Prompts of like lengths together, so that little is spent on padding."""
        most = limits(self.model)
        batch_size = self.batch_size or most.batch_size
        batches: list[list[int]] = [[]]
        for i in sorted(range(len(prompts)), key=lambda i: len(prompts[i])):
            full = len(batches[-1]) == batch_size
            if batch_size is None:
                full = len(prompts[i]) * (len(batches[-1]) + 1) > 4 * most.batch_tokens
            if batches[-1] and full:
                batches.append([])
            batches[-1].append(i)
        return batches

    def _run_batch(self, prompts: Sequence[Prompt], batch: list[int], done: "_Done") -> None:
        """One batch, shrinking; ``active`` are the prompts of the rows of ``resid``."""
        model, active, layer = self.model, batch, 0
        clock = _Clock(model, done)
        tokens = pad_after([prompts[i].tokens for i in active], model.device)
        at = torch.arange(tokens.shape[1], device=model.device)
        resid = model.embed(tokens, at.expand_as(tokens))
        history = _History()
        for stop in (*self.stops, model.n_layers):
            resid = model.run_blocks(resid, at.expand(resid.shape[:2]), layer, stop)
            for i in active:
                own = self.costs.blocks(layer, stop, len(prompts[i]))
                done.padding[i] += self.costs.blocks(layer, stop, resid.shape[1]) - own
            clock.share(active)
            layer = stop
            if stop == model.n_layers:
                break
            some = [prompts[i] for i in active]
            self._check(resid, some, stop, history)
            leaves = self.policy.leaves(history.checks())
            if leaves.any():
                clock.share(active)
                self._answer(prompts, resid, active, leaves, history, done)
                clock.share([i for i, left in zip(active, leaves.tolist(), strict=True) if left])
                stays = ~leaves
                active = [i for i, stay in zip(active, stays.tolist(), strict=True) if stay]
                if not active:
                    return
                width = max(len(prompts[i]) for i in active)
                resid = resid[stays.to(model.device), :width]
                at = at[:width]
                history.keep(stays)
            clock.share(active)
        last = torch.tensor([prompts[i].answer for i in active], device=model.device)
        rows = resid[torch.arange(len(active), device=model.device), last]
        done.answer[active] = self.head.read(rows, [prompts[i] for i in active])[1]
        clock.share(active)

    def _check(
        self,
        resid: Float[Tensor, "row pos d_model"],
        prompts: Sequence[Prompt],
        layer: int,
        history: "_History",
    ) -> None:
        """Read the lens where there is one, at the answer positions only."""
        if self.confidence is None:
            history.add(layer, torch.full((len(prompts),), torch.nan), None)
            return
        rows = list(range(len(prompts)))
        finals = _read(self.confidence.lens, resid, rows, prompts, layer)
        sure, answer = self.head.read(
            finals, prompts, measure=self.confidence.measure, over=self.confidence.over
        )
        history.add(layer, sure, answer)

    def _answer(
        self,
        prompts: Sequence[Prompt],
        resid: Float[Tensor, "row pos d_model"],
        active: Sequence[int],
        leaves: Bool[Tensor, " row"],
        history: "_History",
        done: "_Done",
    ) -> None:
        """Answer the rows that leave, all in one go."""
        rows = leaves.nonzero()[:, 0].tolist()
        leaving = [active[row] for row in rows]
        some = [prompts[i] for i in leaving]
        layer = history.layers[-1]
        done.stop[leaving] = layer
        if self.confidence is not None and self.confidence.lens is self.spade:
            done.answer[leaving] = history.answer[-1][leaves]  # the check has read it already
            return
        finals = _read(self.spade, resid, rows, some, layer)
        done.answer[leaving] = self.head.read(finals, some)[1]
        if isinstance(self.spade, Spade):
            done.padding[leaving] += self._tail_padding(some, layer)

    def _tail_padding(self, prompts: Sequence[Prompt], layer: int) -> Int[Tensor, " prompt"]:
        """FLOPs of padding in SPADE's tail, where prompts keep different numbers of tokens."""
        kept = [tuple(self.spade.keep(p, p.answer)) for p in prompts]
        skip = [stored(self.model, p, k) for p, k in zip(prompts, kept, strict=True)]
        # SPADE runs the prompts with one start token side by side, and the others likewise.
        group = [p.tokens[0] if s else None for p, s in zip(prompts, skip, strict=True)]
        widest = {g: max(len(k) for k, h in zip(kept, group, strict=True) if h == g) for g in group}
        cost = self.costs.blocks
        n_layers = self.model.n_layers
        return torch.tensor(
            [
                cost(layer, n_layers, widest[g] - s, widest[g])
                - cost(layer, n_layers, len(k) - s, len(k))
                for k, s, g in zip(kept, skip, group, strict=True)
            ]
        )


@dataclass
class _Done:
    """What is known of every prompt so far."""

    stop: Int[Tensor, " prompt"]
    answer: Int[Tensor, " prompt"]
    padding: Int[Tensor, " prompt"]
    seconds: Float[Tensor, " prompt"]


class _History:
    """The checks of the prompts still running."""

    def __init__(self) -> None:
        self.layers: list[int] = []
        self.confidence: list[Tensor] = []
        self.answer: list[Tensor] = []

    def add(self, layer: int, confidence: Tensor, answer: Tensor | None) -> None:
        self.layers.append(layer)
        self.confidence.append(confidence)
        self.answer.append(torch.full((len(confidence),), -1) if answer is None else answer)

    def keep(self, rows: Tensor) -> None:
        self.confidence = [c[rows] for c in self.confidence]
        self.answer = [a[rows] for a in self.answer]

    def checks(self) -> Checks:
        return Checks(tuple(self.layers), torch.stack(self.confidence), torch.stack(self.answer))


class _Clock:
    """Shares out the time since it was last looked at."""

    def __init__(self, model: Model, done: _Done) -> None:
        self._cuda = model.device.type == "cuda"
        self._seconds = done.seconds
        self._since = self._now()

    def _now(self) -> float:
        if self._cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def share(self, prompts: Sequence[int]) -> None:
        now = self._now()
        self._seconds[list(prompts)] += (now - self._since) / len(prompts)
        self._since = now


def _read(
    lens: Lens,
    resid: Float[Tensor, "row pos d_model"],
    rows: Sequence[int],
    prompts: Sequence[Prompt],
    layer: int,
) -> Float[Tensor, "reading d_model"]:
    """What a lens makes of some rows at the layer they have reached; no more is gathered."""
    kept = [tuple(lens.keep(p, p.answer)) for p in prompts]
    # A lens reads at its keep set; the answer position is there for those that ask for it.
    wanted = [sorted({p.answer, *k}) for p, k in zip(prompts, kept, strict=True)]
    row = [r for r, some in zip(rows, wanted, strict=True) for _ in some]
    column = [position for some in wanted for position in some]
    residuals = Residuals(
        stack=resid[row, column][None],
        layers=(layer,),
        prompt=torch.tensor([n for n, some in enumerate(wanted) for _ in some]),
        position=torch.tensor(column),
        prompts=tuple(prompts),
    )
    readings = [Reading(n, p.answer, kept[n]) for n, p in enumerate(prompts)]
    return lens.final_residuals(residuals, readings, [layer])[0]
