"""Everything that early exit could do on some prompts: a table, and any policy simulated on it.

An :class:`ExitTable` holds, for every prompt and candidate layer, what the check would say, what
would be answered and what both would cost. Simulation needs no model, and gives exactly the
engine's exits, answers and FLOPs.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from os import PathLike
from pathlib import Path
from typing import Any, SupportsIndex

import pandas as pd
import torch
from einops import repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor

from spade_lens.checks import whole_numbers
from spade_lens.exits.costs import Prices
from spade_lens.exits.policies import (
    Checks,
    Oracle,
    Policy,
    check_made_for,
    check_policy,
    decisions,
    stops_of,
)
from spade_lens.exits.screened import check_screen, let_through
from spade_lens.exits.trace import ExitTrace, among, target_columns, text_of
from spade_lens.lazy import verb
from spade_lens.storage.records import load_record, save_record


@dataclass(frozen=True, repr=False, eq=False)
class ExitTable:
    """What one check and one lens that answers say of every prompt at every layer.

    Args:
        model: The model's name.
        check: The name of the confidence that is checked.
        keep: The name of the lens that answers; SPADE's is that of its keep set.
        layers: The candidate layers, ascending.
        n_layers: The layer of the model's own output.
        confidence: The check's confidence; larger is surer.
        features: The check's features; of width 0 without ``Confidence(features=...)``.
        check_answer: What the check's own readout answers.
        exit_answer: What a prompt that exits there answers.
        final_answer: What the full model answers.
        target: The right token; -1 where none is known.
        n_candidates: How many candidates answers are chosen from; 0 for the vocabulary.
        logprobs: Log-probabilities of the prompt's candidates among themselves, at every exit and
            at the end; -inf where a prompt has fewer. Of width 0 unless all prompts have some.
        right_option: Which of the candidates is right; -1 where that is not known.
        identity: A number made of the prompt's tokens, to see whether tables share prompts.
        kept: How many tokens the keep set keeps.
        prices: What everything costs; also holds the prompts' lengths.
        words: The text of every token id that occurs here.
        ambiguous: Whether the target's token also begins another answer, or the query; None where
            it is not known.
        screen: The confidence of the cheaper check that comes first; None where there is none.
        screen_answer: What that one's readout answers.
    """

    model: str
    check: str
    keep: str
    layers: tuple[int, ...]
    n_layers: int
    confidence: Float[Tensor, "layer prompt"]
    features: Float[Tensor, "layer prompt feature"]
    check_answer: Int[Tensor, "layer prompt"]
    exit_answer: Int[Tensor, "layer prompt"]
    final_answer: Int[Tensor, " prompt"]
    target: Int[Tensor, " prompt"]
    n_candidates: Int[Tensor, " prompt"]
    logprobs: Float[Tensor, "stop prompt option"]
    right_option: Int[Tensor, " prompt"]
    identity: Int[Tensor, " prompt"]
    kept: Int[Tensor, " prompt"]
    prices: Prices
    words: dict[int, str]
    ambiguous: Bool[Tensor, " prompt"] | None = None
    screen: Float[Tensor, "layer prompt"] | None = None
    screen_answer: Int[Tensor, "layer prompt"] | None = None

    def __len__(self) -> int:
        return len(self.final_answer)

    def __repr__(self) -> str:
        return (
            f"ExitTable({self.model!r}, check={self.check!r}, keep={self.keep!r}, "
            f"{len(self)} prompts, layers {list(self.layers)} of {self.n_layers})"
        )

    @property
    def agrees(self) -> Bool[Tensor, "layer prompt"]:
        """Whether the answer at an exit is the full model's."""
        return self.exit_answer == self.final_answer

    @property
    def accuracy(self) -> float:
        """The full model's accuracy; NaN where no prompt has a target."""
        has_target = self.target >= 0
        return float((self.final_answer == self.target)[has_target].double().mean())

    def of(self, prompts: SupportsIndex | Iterable[SupportsIndex]) -> "ExitTable":
        """Return the table of some prompts, by index, for example one half of a split.

        Raises:
            TypeError: If the prompts are not whole numbers.
            ValueError: If there are none, or one is out of range.
        """
        expected = f"numbers of the {len(self)} prompts, from 0 to {len(self) - 1}"
        index = torch.tensor(
            whole_numbers(prompts, "prompts=", expected, below=len(self), distinct=False)
        )
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        tensors: dict[str, Any] = {
            name: value[index] if value.ndim == 1 else value[:, index]
            for name, value in values.items()
            if isinstance(value, Tensor)
        }
        return replace(self, prices=self.prices.of(index), **tensors)

    def simulate(self, policy: Policy | Oracle) -> ExitTrace:
        """Return what the engine would do with this policy.

        Example:
            >>> from spade_lens.exits import FixedLayer, exit_tables
            >>> [table] = exit_tables(model, prompts, LogitLens(model), layers=[2, 3])
            >>> table.simulate(FixedLayer(3)).exit_layer.tolist()
            [3, 3]

        Args:
            policy: A policy, or the oracle.

        Returns:
            The trace; seconds are NaN, and padding is 0.

        Raises:
            TypeError: If it is no policy, or a policy of your own returns something else than it
                should.
            ValueError: If the policy does not fit the table's candidate layers.
        """
        n, end = len(self), len(self.layers)
        through = torch.ones(end, n, dtype=torch.bool)
        if isinstance(policy, Oracle):
            stop, checked = policy.first(self.agrees), []
        else:
            check_policy(policy)
            check = self.check if policy.reads else None
            check_made_for(policy, model=self.model, check=check, keep=self.keep)
            check_screen(policy, self.check, screened=self.screen is not None)
            stops = stops_of(policy, self.layers)
            rows = [self.layers.index(layer) for layer in stops]
            stop = torch.full((n,), end)
            for made in range(1, len(stops) + 1):
                if policy.reads and self.screen is not None:
                    passing = let_through(policy, self.screen[rows[:made]], stops[:made])
                    through[rows[made - 1]] = passing
                checks = self._checks(rows[:made], through, reads=policy.reads)
                leaves = decisions(policy, checks) & through[rows[made - 1]] & (stop == end)
                stop[leaves] = rows[made - 1]
            checked = rows if policy.reads else []
        answers = torch.cat([self.exit_answer, self.final_answer[None]])
        answer = answers[stop, torch.arange(n)]
        tokens = {*answer.tolist(), *self.target.tolist()}
        return ExitTrace(
            policy=policy.name,
            n_layers=self.n_layers,
            exit_layer=torch.tensor(self.prices.stops)[stop],
            answer=answer,
            target=self.target,
            n_candidates=self.n_candidates,
            flops_padding=torch.zeros(n, dtype=torch.long),
            full_flops=self.prices.full,
            seconds=torch.full((n,), torch.nan),
            words={token: self.words[token] for token in sorted(tokens - {-1})},
            ambiguous=self.ambiguous,
            **self.prices.settle(stop, checked, through),
        )

    def _checks(
        self, rows: Sequence[int], through: Bool[Tensor, "layer prompt"], *, reads: bool
    ) -> Checks:
        rows = list(rows)
        layers = tuple(self.layers[row] for row in rows)
        confidence, answer, features = (
            self.confidence[rows],
            self.check_answer[rows],
            self.features[rows],
        )
        if not reads:
            unread = torch.full_like(confidence, torch.nan)
            return Checks(layers, unread, torch.full_like(answer, -1), features[..., :0])
        if self.screen is None or self.screen_answer is None:
            return Checks(layers, confidence, answer, features)
        kept = ~through[rows]
        return Checks(
            layers,
            confidence.masked_fill(kept, -torch.inf),
            torch.where(kept, self.screen_answer[rows], answer),
            features.masked_fill(kept[..., None], torch.nan),
            self.screen[rows],
        )

    def to_frame(self) -> pd.DataFrame:
        """Return a tidy table: one row for every candidate layer and prompt.

        Returns:
            Columns ``model, check, keep, layer, prompt, length, kept, confidence``; answers as
            text and ids: ``check_answer, exit_answer, final_answer`` and each with ``_id``;
            ``among, agrees``; ``target, target_id, correct, ambiguous`` where there
            are targets;
            ``flops_blocks, flops_check, flops_answer, full_flops``.
        """
        n_layers, n = self.confidence.shape

        def by_prompt(values: Tensor) -> Tensor:
            return repeat(values, "prompt -> (layer prompt)", layer=n_layers)

        columns: dict[str, Any] = {
            "model": self.model,
            "check": self.check,
            "keep": self.keep,
            "layer": repeat(torch.tensor(self.layers), "layer -> (layer prompt)", prompt=n),
            "prompt": by_prompt(torch.arange(n)),
            "length": by_prompt(self.prices.length),
            "kept": by_prompt(self.kept),
            "confidence": self.confidence.flatten(),
        }
        answers = {
            "check_answer": self.check_answer.flatten(),
            "exit_answer": self.exit_answer.flatten(),
            "final_answer": by_prompt(self.final_answer),
        }
        for name, tokens in answers.items():
            columns |= {name: text_of(self.words, tokens), f"{name}_id": tokens}
        columns |= {"among": among(by_prompt(self.n_candidates)), "agrees": self.agrees.flatten()}
        flags = None if self.ambiguous is None else by_prompt(self.ambiguous)
        target = by_prompt(self.target)
        columns |= target_columns(self.words, target, answers["exit_answer"], flags)
        columns |= {
            "flops_blocks": self.prices.trunk[:-1].flatten(),
            "flops_check": self.prices.check.flatten(),
            "flops_answer": self.prices.answer[:-1].flatten(),
            "full_flops": by_prompt(self.prices.full),
        }
        return pd.DataFrame(
            {k: v.numpy() if isinstance(v, Tensor) else v for k, v in columns.items()}
        )

    def save(self, folder: str | PathLike[str]) -> Path:
        """Write ``table.safetensors`` and ``table.json`` into a folder; return the folder."""
        return save_record(self, folder, kind="table")

    @classmethod
    def load(cls, folder: str | PathLike[str]) -> "ExitTable":
        """Return the table that :meth:`save` wrote, equal to it in every field.

        Example:
            >>> table = ExitTable.load("tables/antonym")  # doctest: +SKIP

        Raises:
            FileNotFoundError: If one of the files is missing.
            ValueError: If the files are damaged, do not belong together or describe something
                else.
        """
        return load_record(cls, folder, kind="table", prices=Prices)

    def plot(self, **options: Any) -> Any:
        """Draw the table; see :func:`spade_lens.plot`."""
        return verb("plot")(self, **options)
