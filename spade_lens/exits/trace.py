"""The record of one run with early exit, from the engine or from the simulation."""

from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import pandas as pd
from jaxtyping import Bool, Float, Int
from torch import Tensor

from spade_lens.lazy import verb
from spade_lens.storage.records import load_record, save_record

_COSTS = (
    *("checks", "layer_tokens", "flops_blocks", "flops_checks", "flops_answer", "flops"),
    *("flops_padding", "full_flops", "seconds"),
)


@dataclass(frozen=True, repr=False, eq=False)
class ExitTrace:
    """For every prompt: where it left, what it answered and what it cost.

    Args:
        policy: The policy's name.
        n_layers: The number of blocks; a prompt whose exit layer this is ran to the end.
        exit_layer: Where the prompt left.
        answer: The token it answered.
        target: The right token; -1 where none is known.
        n_candidates: How many candidates its answer was chosen from; 0 for the vocabulary.
        checks: How many checks were read, without cheaper ones that come first.
        layer_tokens: Tokens times blocks, of trunk, checks and tail.
        flops_blocks: FLOPs of the blocks below the exit, on the prompt's own tokens.
        flops_checks: FLOPs of all its checks, unembedding included.
        flops_answer: FLOPs of its answer: SPADE's tail and the unembedding.
        flops_padding: FLOPs spent on padding in its row; 0 where it is simulated.
        full_flops: What the full model spends on it without padding.
        seconds: Its part of the wall-clock time: the time of every step is divided evenly among
            the prompts in it. NaN where it is simulated.
        words: The text of every token id that occurs here.
        ambiguous: Whether the target's token also begins another answer, or the query; None where
            it is not known, as in files of older versions.
    """

    policy: str
    n_layers: int
    exit_layer: Int[Tensor, " prompt"]
    answer: Int[Tensor, " prompt"]
    target: Int[Tensor, " prompt"]
    n_candidates: Int[Tensor, " prompt"]
    checks: Int[Tensor, " prompt"]
    layer_tokens: Int[Tensor, " prompt"]
    flops_blocks: Int[Tensor, " prompt"]
    flops_checks: Int[Tensor, " prompt"]
    flops_answer: Int[Tensor, " prompt"]
    flops_padding: Int[Tensor, " prompt"]
    full_flops: Int[Tensor, " prompt"]
    seconds: Float[Tensor, " prompt"]
    words: dict[int, str]
    ambiguous: Bool[Tensor, " prompt"] | None = None

    def __len__(self) -> int:
        return len(self.answer)

    def __repr__(self) -> str:
        early = float((self.exit_layer < self.n_layers).double().mean())
        return (
            f"ExitTrace({self.policy!r}, {len(self)} prompts, {early:.0%} early, "
            f"accuracy {self.accuracy:.3f}, speedup {self.speedup:.2f})"
        )

    @property
    def flops(self) -> Int[Tensor, " prompt"]:
        """Blocks, checks and answer, without padding: what the prompt costs in any batch."""
        return self.flops_blocks + self.flops_checks + self.flops_answer

    @property
    def speedup(self) -> float:
        """The full model's FLOPs over the FLOPs spent, both summed over prompts."""
        return int(self.full_flops.sum()) / int(self.flops.sum())

    @property
    def accuracy(self) -> float:
        """The fraction of right answers among prompts with a target; NaN without any."""
        has_target = self.target >= 0
        return float((self.answer == self.target)[has_target].double().mean())

    def to_frame(self) -> pd.DataFrame:
        """Return a tidy table, one row for every prompt.

        Returns:
            Columns ``policy, prompt, exit_layer, early, answer, answer_id, among``; ``target,
            target_id, correct, ambiguous`` where there are targets; then the costs: ``checks,
            layer_tokens, flops_blocks, flops_checks, flops_answer, flops, flops_padding,
            full_flops, seconds``.
        """
        columns: dict[str, Any] = {
            "policy": self.policy,
            "prompt": range(len(self)),
            "exit_layer": self.exit_layer.numpy(),
            "early": (self.exit_layer < self.n_layers).numpy(),
            "answer": text_of(self.words, self.answer),
            "answer_id": self.answer.numpy(),
            "among": among(self.n_candidates),
        }
        columns |= target_columns(self.words, self.target, self.answer, self.ambiguous)
        columns |= {name: getattr(self, name).numpy() for name in _COSTS}
        return pd.DataFrame(columns)

    def save(self, folder: str | PathLike[str]) -> Path:
        """Write ``trace.safetensors`` and ``trace.json`` into a folder; return the folder."""
        return save_record(self, folder, kind="trace")

    @classmethod
    def load(cls, folder: str | PathLike[str]) -> "ExitTrace":
        """Return the trace that :meth:`save` wrote.

        Raises:
            FileNotFoundError: If one of the files is missing.
            ValueError: If the files are damaged or describe something else.
        """
        return load_record(cls, folder, kind="trace")

    def plot(self, **options: Any) -> Any:
        """Draw where prompts leave; see :func:`spade_lens.plot`."""
        return verb("plot")(self, **{"n_layers": self.n_layers} | options)


def among(n_candidates: Tensor) -> list[str]:
    """Return what each answer was chosen from: the candidates, or the vocabulary."""
    return ["candidates" if n else "vocabulary" for n in n_candidates.tolist()]


def text_of(words: dict[int, str], tokens: Tensor) -> list[str | None]:
    """Return the text of every token; None for -1."""
    return [words.get(token) for token in tokens.flatten().tolist()]


def target_columns(
    words: dict[int, str], target: Tensor, answer: Tensor, ambiguous: Tensor | None
) -> dict[str, Any]:
    """Return ``target``, ``target_id``, ``correct`` and ``ambiguous``; nothing without targets."""
    has_target = (target >= 0).numpy()
    if not has_target.any():
        return {}
    correct = pd.Series((answer == target).numpy(), dtype="boolean")
    return {
        "target": text_of(words, target),
        "target_id": pd.Series(target.numpy(), dtype="Int64").where(has_target),
        "correct": correct.where(has_target),
    } | ({} if ambiguous is None else {"ambiguous": ambiguous.numpy()})
