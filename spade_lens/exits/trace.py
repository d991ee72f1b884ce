"""What came of running prompts with early exit: one record, from the engine or the simulation."""

from dataclasses import dataclass

import pandas as pd
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class ExitTrace:
    """Per prompt: where it left, what it answered and what it cost.

    Args:
        policy: The policy's name.
        n_layers: The number of blocks; a prompt whose exit layer this is ran to the end.
        exit_layer: Where the prompt left.
        answer: The token it answered.
        target: The right token; -1 where none is known.
        checks: How many readouts were made.
        layer_tokens: Tokens times blocks, of trunk, checks and tail.
        flops_blocks: FLOPs of the blocks below the exit, on the prompt's own tokens.
        flops_checks: FLOPs of its checks, unembedding included.
        flops_answer: FLOPs of its answer: SPADE's tail and the unembedding.
        flops_padding: FLOPs spent on padding in its row; 0 where it is simulated.
        full_flops: What the full model spends on it without padding.
        seconds: Its share of the wall-clock time: every step's time is shared evenly by the
            prompts in it. NaN where it is simulated.
    """

    policy: str
    n_layers: int
    exit_layer: Int[Tensor, " prompt"]
    answer: Int[Tensor, " prompt"]
    target: Int[Tensor, " prompt"]
    checks: Int[Tensor, " prompt"]
    layer_tokens: Int[Tensor, " prompt"]
    flops_blocks: Int[Tensor, " prompt"]
    flops_checks: Int[Tensor, " prompt"]
    flops_answer: Int[Tensor, " prompt"]
    flops_padding: Int[Tensor, " prompt"]
    full_flops: Int[Tensor, " prompt"]
    seconds: Float[Tensor, " prompt"]

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
        """The share of right answers among prompts with a target; NaN without any."""
        known = self.target >= 0
        return float((self.answer == self.target)[known].double().mean())

    def to_frame(self) -> pd.DataFrame:
        """A tidy table, one row for every prompt.

        Returns:
            Columns ``policy, prompt, exit_layer, early, answer``; ``target, correct`` where there
            are targets; then the ledger: ``checks, layer_tokens, flops_blocks, flops_checks,
            flops_answer, flops, flops_padding, full_flops, seconds``.
        """
        frame = pd.DataFrame(
            {
                "policy": self.policy,
                "prompt": range(len(self.answer)),
                "exit_layer": self.exit_layer.numpy(),
                "early": (self.exit_layer < self.n_layers).numpy(),
                "answer": self.answer.numpy(),
            }
        )
        known = (self.target >= 0).numpy()
        if known.any():
            frame["target"] = pd.Series(self.target.numpy(), dtype="Int64").where(known)
            right = (self.answer == self.target).numpy()
            frame["correct"] = pd.Series(right, dtype="boolean").where(known)
        for name in (
            *("checks", "layer_tokens", "flops_blocks", "flops_checks", "flops_answer", "flops"),
            *("flops_padding", "full_flops", "seconds"),
        ):
            frame[name] = getattr(self, name).numpy()
        return frame
