"""Every new token leaves at the first layer where a readout is sure enough: CALM's early exit.

The prompt runs whole. A new token runs to the first candidate layer at which a policy lets it
leave. The readout there chooses the next token. In the blocks above, the token's keys and values
are made of its residual at the exit (*state copying*), so that later tokens that go further see
it. Source: Schuster et al., "Confident Adaptive Language Modeling" (arXiv 2207.07061), whose model
is trained for it. Here the model stays as it is. The policies are those of prompts
(:mod:`spade_lens.exits`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor

from spade_lens.checks import is_whole, spelled, whole_numbers
from spade_lens.exits.confidence import MEASURES, Measure, confidence_of
from spade_lens.exits.policies import (
    Checks,
    Patience,
    Policy,
    Threshold,
    check_policy,
    decisions,
    stops_of,
)
from spade_lens.generation.rows import Rows, Run, join_runs
from spade_lens.generation.strategy import PlainWriter, Round
from spade_lens.lenses.linear import LinearLens, check_linear_or_none
from spade_lens.lenses.named import refuse_unread
from spade_lens.models.hooks import rows_are

SATURATION = "saturation"
"""The cosine between the residuals at a layer and at the candidate layer below it."""


@dataclass(frozen=True)
class TokenExit:
    """Let every new token leave at the first layer that is sure of the next one.

    Example:
        >>> from spade_lens.generation import TokenExit
        >>> text = sl.generate("abcabc", 4, model=model, strategy=TokenExit([1, 2, 3], 0.035))
        >>> text
        Generated(1 text of tiny-llama, 4 tokens, token exit, threshold 0.035, top-1 at 1 to 3)
        >>> text.exit_layer.tolist()  # the first token is the prompt's, which runs whole
        [4, 2, 1, 1]

    Args:
        layers: The candidate layers, ascending.
        policy: What decides, from the checks so far: a policy of :mod:`spade_lens.exits`, or a
            number for :class:`~spade_lens.exits.Threshold`.
        confidence: A name or a function; see :class:`spade_lens.exits.Confidence`. CALM's
            ``"saturation"`` is the cosine between the residuals at a layer and at the candidate
            below it (below the first: at layer 0). It needs no logits at a check.
        lens: Reads the exits: a linear lens. By default the model's own norm and unembedding.

    Raises:
        TypeError: If an argument is of another type.
        ValueError: If there are no layers, they do not ascend or lie outside the model, the
            policy does not fit them, or it reads answers and the confidence gives none.
    """

    layers: Sequence[int] | int
    policy: Policy | float = 0.9
    confidence: Measure = "top-1"
    lens: LinearLens | None = None
    drafts = 0
    borders: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        within = "candidate layers from 1, ascending"
        layers = whole_numbers(self.layers, "layers=", within)
        if layers != sorted(layers) or layers[0] < 1:
            raise ValueError(f"layers={layers} was given; expected {within}.")
        policy: Any = self.policy
        if is_whole(policy) or isinstance(policy, float):
            policy = Threshold(float(policy))
        check_policy(policy)
        names, named = (*MEASURES, SATURATION), isinstance(self.confidence, str)
        if self.confidence not in names if named else not callable(self.confidence):
            raise (ValueError if named else TypeError)(
                f"confidence={self.confidence!r} was given; expected "
                f"{', '.join(map(repr, names))}, or a function from logits to confidences."
            )
        if isinstance(policy, Patience) and named and self.confidence == SATURATION:
            raise ValueError(
                "Patience waits for equal answers, and confidence='saturation' reads none. Give "
                "another confidence, such as 'top-1'."
            )
        check_linear_or_none(self.lens)
        object.__setattr__(self, "layers", tuple(layers))
        object.__setattr__(self, "policy", policy)
        object.__setattr__(self, "borders", stops_of(policy, layers))

    @property
    def candidates(self) -> tuple[int, ...]:
        """The candidate layers."""
        return cast(tuple[int, ...], self.layers)

    @property
    def rule(self) -> Policy:
        """The policy."""
        return cast(Policy, self.policy)

    @property
    def name(self) -> str:
        """The name in tables."""
        measure = self.confidence
        measure = measure if isinstance(measure, str) else getattr(measure, "__name__", "own")
        of = f", {measure} at {spelled(self.borders)}" if self.rule.reads else ""
        lens = "" if self.lens is None else f", {self.lens.name}"
        return f"token exit, {self.rule.name}{of}{lens}"

    def writer(self, rows: Rows) -> PlainWriter:
        """Return what writes a batch: plain text where the policy never lets a token leave.

        Raises:
            ValueError: If a layer is not below the model's last, patches or captured layers lie
                above the first exit, or the lens is another model's or does not read the layers.
        """
        leaving = _Leaving(rows, self)
        return leaving if self.borders else PlainWriter(rows)


class _Leaving(PlainWriter):
    def __init__(self, rows: Rows, strategy: TokenExit) -> None:
        super().__init__(rows)
        self._strategy, self._policy = strategy, strategy.rule
        n_layers, name = rows.model.n_layers, rows.model.name
        beyond = [layer for layer in strategy.candidates if layer >= n_layers]
        if beyond:
            raise ValueError(
                f"layers={list(strategy.candidates)} was given; expected candidate layers from 1 "
                f"to {n_layers - 1}, below the last of {name}."
            )
        lowest = min(strategy.borders, default=n_layers)
        above = [layer for layer in rows.steering.touched if layer > lowest]
        if above:
            raise ValueError(
                f"Patches and captured layers at {sorted(above)} lie above the first exit at "
                f"{lowest}, where tokens may have left. Give layers up to it, or "
                "another strategy."
            )
        if strategy.lens is not None:
            refuse_unread(strategy.lens, rows.model, strategy.borders)

    def round(self) -> list[Round]:
        """Return one new token of every row."""
        rows = self.rows
        if self._in_prompt():
            return super().round()
        resid, layers, logits = self._run_new(rows.pending())
        unread = [row for row, of_row in enumerate(logits) if of_row is None]
        if unread:
            with rows_are([rows.numbers[row] for row in unread]):
                for row, of_row in zip(unread, rows.logits(resid[unread]), strict=True):
                    logits[row] = of_row
        new = self.rounds_of(torch.stack([of_row for of_row in logits if of_row is not None]))
        return [replace(one, layer=layer) for one, layer in zip(new, layers, strict=True)]

    def force(self) -> Run:
        """Run all tokens that have not run yet: those of the prompt whole, then one by one."""
        rows, runs = self.rows, []
        whole = rows.tokens
        ends = [len(rows.steering.prompts[i]) for i in rows.numbers]
        if self._in_prompt():
            rows.tokens = [tokens[:end] for tokens, end in zip(whole, ends, strict=True)]
            runs.append(rows.run_pending())
        while any(done < len(tokens) for done, tokens in zip(rows.done, whole, strict=True)):
            new = [tokens[d : d + 1] for d, tokens in zip(rows.done, whole, strict=True)]
            first = torch.tensor(rows.done, device=rows.model.device)[:, None]
            resid, _, _ = self._run_new(new)
            runs.append(Run(resid[:, None], first, list(map(len, new))))
        rows.tokens = whole
        return join_runs(runs)

    def _in_prompt(self) -> bool:
        """Whether the tokens that have not run yet begin in the prompts; all rows are alike."""
        rows = self.rows
        return rows.done[0] < len(rows.steering.prompts[rows.numbers[0]])

    def _run_new(
        self, tokens: Sequence[Sequence[int]]
    ) -> tuple[Float[Tensor, "row d_model"], list[int], list[Tensor | None]]:
        """Run at most one new token of every row to its exit.

        Returns:
            The residuals that are read, the layers they were read at, and the logits of rows that
            were read at a check.
        """
        rows, n_layers = self.rows, self.rows.model.n_layers
        run = rows.enter(tokens, rows.done)
        going = [row for row, new in enumerate(tokens) if new]
        read = run.resid[:, 0].clone()
        layers, n = [n_layers] * len(tokens), len(tokens)
        logits: list[Tensor | None] = [None] * n
        checks = _Made(n)
        for span, layer in enumerate(rows.borders[1:]):
            before = run.resid[:, 0]
            run = rows.climb(run, span)
            if layer == n_layers:
                read[going] = run.resid[going, 0]
                break
            at_exit = run.resid[:, 0]
            if self._strategy.lens is not None:
                at_exit = self._strategy.lens.at(at_exit, layer)
            said = self._check(checks, layer, going, before, run.resid[:, 0], at_exit)
            leaves = decisions(self._policy, checks.of(going)).tolist()
            left = [row for row, goes in zip(going, leaves, strict=True) if goes]
            for row in left:
                read[row], layers[row], logits[row] = at_exit[row], layer, said.get(row)
            if left:
                self._copy(run, left, span + 1)
            going = [row for row, goes in zip(going, leaves, strict=True) if not goes]
            if not going:
                break
            run = replace(run, counts=[int(row in going) for row in range(n)])
        rows.done = [done + len(new) for done, new in zip(rows.done, tokens, strict=True)]
        return read, layers, logits

    def _check(
        self,
        checks: "_Made",
        layer: int,
        going: Sequence[int],
        before: Float[Tensor, "row d_model"],
        here: Float[Tensor, "row d_model"],
        at_exit: Float[Tensor, "row d_model"],
    ) -> dict[int, Tensor]:
        """Add a check of the rows that go on; return the logits that it read."""
        strategy, going = self._strategy, list(going)
        if not self._policy.reads:
            checks.add(layer, going)
            return {}
        if strategy.confidence == SATURATION:
            cosine = torch.nn.functional.cosine_similarity(before[going], here[going], dim=-1)
            checks.add(layer, going, cosine.float().cpu())
            return {}
        with rows_are([self.rows.numbers[row] for row in going]):
            logits = self.rows.logits(at_exit[going])
        confidence = confidence_of(logits, strategy.confidence)
        checks.add(layer, going, confidence.cpu(), logits.argmax(dim=-1).cpu())
        return dict(zip(going, logits, strict=True))

    def _copy(self, run: Run, left: Sequence[int], first_span: int) -> None:
        """Give the caches above an exit the tokens that left, as if no block changed them."""
        some = replace(run, counts=[int(row in left) for row in range(len(run.counts))])
        for span in range(first_span, len(self.rows.borders) - 1):
            self.rows.fill(some, span)


class _Made:
    """The checks of one step, for all rows of a batch."""

    def __init__(self, n_rows: int) -> None:
        self._n = n_rows
        self._layers: list[int] = []
        self._confidence: list[Tensor] = []
        self._answer: list[Tensor] = []

    def add(
        self,
        layer: int,
        rows: list[int],
        confidence: Tensor | None = None,
        answer: Tensor | None = None,
    ) -> None:
        """Add a check; NaN and -1 stand where nothing was read."""
        of_all, said = torch.full((self._n,), torch.nan), torch.full((self._n,), -1)
        if confidence is not None:
            of_all[rows] = confidence
        if answer is not None:
            said[rows] = answer
        self._layers.append(layer)
        self._confidence.append(of_all)
        self._answer.append(said)

    def of(self, rows: list[int]) -> Checks:
        """Return the checks of some rows."""
        confidence, answer = torch.stack(self._confidence), torch.stack(self._answer)
        features = torch.zeros(len(self._layers), len(rows), 0)
        return Checks(tuple(self._layers), confidence[:, rows], answer[:, rows], features)
