"""What is read off a lens: top tokens, targets, candidates, entropy, agreement, divergence.

Logits are made and summed up a few rows at a time; nothing of size layers x prompts x vocabulary
is ever held.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from spade_lens.models.model import Model
from spade_lens.settings import limits


@dataclass(frozen=True)
class Readout:
    """Everything read, by lens, layer and reading. Logarithms are natural (nats).

    Args:
        lenses: Names of the lenses.
        layers: The layers.
        prompt: The prompt of every reading.
        position: The position at which it was read.
        top_tokens: The most likely tokens, best first.
        top_logprobs: Their log-probabilities.
        entropy: Entropy over the vocabulary.
        agrees: Whether the top token is the model's own.
        kl: Kullback-Leibler divergence of the lens' distribution from the model's own,
            KL(model || lens).
        target: The target token of every reading; -1 where there is none.
        target_logprob: Its log-probability; NaN where there is none.
        target_rank: Its rank, 0 for the top token; -1 where there is no target.
        candidates: The candidate tokens of every reading; -1 where there are fewer.
        candidate_logprobs: Their log-probabilities (over the vocabulary); NaN likewise.
        words: The text of every token id that occurs here.
        model: The name of the model.
    """

    lenses: tuple[str, ...]
    layers: tuple[int, ...]
    prompt: Int[Tensor, " reading"]
    position: Int[Tensor, " reading"]
    top_tokens: Int[Tensor, "lens layer reading k"]
    top_logprobs: Float[Tensor, "lens layer reading k"]
    entropy: Float[Tensor, "lens layer reading"]
    agrees: Bool[Tensor, "lens layer reading"]
    kl: Float[Tensor, "lens layer reading"]
    target: Int[Tensor, " reading"]
    target_logprob: Float[Tensor, "lens layer reading"]
    target_rank: Int[Tensor, "lens layer reading"]
    candidates: Int[Tensor, "reading candidate"]
    candidate_logprobs: Float[Tensor, "lens layer reading candidate"]
    words: dict[int, str] = field(repr=False)
    model: str = ""

    def to_frame(self) -> pd.DataFrame:
        """A tidy table: one row for every lens, layer and reading.

        Returns:
            Columns ``model, lens, layer, prompt, position, entropy, agrees, kl``; ``top_1``,
            ``top_1_logprob``, ... to k; where there are targets ``target, target_logprob,
            target_rank, correct``; where there are candidates ``choice`` (the likeliest of them)
            and ``candidate_1``, ``candidate_1_logprob``, ...; tokens as text.
        """
        n_lenses, n_layers, n_readings = self.entropy.shape
        index = pd.MultiIndex.from_product(
            [self.lenses, self.layers, range(n_readings)], names=["lens", "layer", "reading"]
        )
        columns: dict[str, Any] = {
            "model": self.model,
            "prompt": self.prompt.repeat(n_lenses * n_layers),
            "position": self.position.repeat(n_lenses * n_layers),
            "entropy": self.entropy.flatten(),
            "agrees": self.agrees.flatten(),
            "kl": self.kl.flatten(),
        }
        for k in range(self.top_tokens.shape[-1]):
            columns[f"top_{k + 1}"] = self._text(self.top_tokens[..., k])
            columns[f"top_{k + 1}_logprob"] = self.top_logprobs[..., k].flatten()
        if (self.target >= 0).any():
            columns["target"] = self._text(self.target.repeat(n_lenses * n_layers))
            columns["target_logprob"] = self.target_logprob.flatten()
            rank = pd.Series(self.target_rank.flatten().numpy(), dtype="Int64")
            rank = rank.mask(rank < 0)
            columns["target_rank"] = rank.array
            columns["correct"] = rank.eq(0).array
        if self.candidates.shape[-1]:
            choice = self.candidate_logprobs.nan_to_num(-torch.inf).argmax(dim=-1, keepdim=True)
            everywhere = self.candidates.expand(n_lenses, n_layers, -1, -1)
            columns["choice"] = self._text(everywhere.gather(-1, choice)[..., 0])
            for c in range(self.candidates.shape[-1]):
                columns[f"candidate_{c + 1}"] = self._text(everywhere[..., c])
                columns[f"candidate_{c + 1}_logprob"] = self.candidate_logprobs[..., c].flatten()
        columns = {
            name: column.numpy() if isinstance(column, Tensor) else column
            for name, column in columns.items()
        }
        frame = pd.DataFrame(columns, index=index).reset_index().drop(columns="reading")
        first = ["model", "lens", "layer", "prompt", "position"]
        return frame[[*first, *(c for c in frame.columns if c not in first)]]

    def _text(self, tokens: Tensor) -> list[str | None]:
        return [self.words.get(token) for token in tokens.flatten().tolist()]

    @staticmethod
    def join(parts: Sequence["Readout"]) -> "Readout":
        """One readout of several with the same lenses and layers, reading after reading."""
        first = parts[0]
        joined: dict[str, Any] = {}
        for f in fields(first):
            values = [getattr(part, f.name) for part in parts]
            if not isinstance(values[0], Tensor):
                joined[f.name] = values[0]
            elif f.name in _READING_FIRST:
                joined[f.name] = torch.cat(values)
            else:
                joined[f.name] = torch.cat(values, dim=2)
        joined["words"] = {token: word for part in parts for token, word in part.words.items()}
        return Readout(**joined)


_READING_FIRST = {"prompt", "position", "target", "candidates"}


@torch.no_grad()
def read_off(
    model: Model,
    finals: Float[Tensor, "lens layer reading d_model"],
    own: Float[Tensor, "reading d_model"],
    *,
    top_k: int,
    target: Int[Tensor, " reading"],
    candidates: Int[Tensor, "reading candidate"],
) -> dict[str, Tensor]:
    """Unembed and sum up, a few readings at a time.

    Args:
        model: Gives final norm and unembedding.
        finals: What the lenses made of the residuals.
        own: The model's own residual at layer ``n_layers``, for agreement and divergence.
        top_k: How many top tokens to keep.
        target: A token of every reading, or -1.
        candidates: Tokens of every reading, or -1.

    Returns:
        The fields of :class:`Readout` that have a lens axis, on the CPU.
    """
    n_lenses, n_layers, n_readings, _ = finals.shape
    k = min(top_k, model.d_vocab)
    shape = (n_lenses, n_layers, n_readings)
    out = {
        "top_tokens": torch.empty(*shape, k, dtype=torch.long),
        "top_logprobs": torch.empty(*shape, k),
        "entropy": torch.empty(shape),
        "agrees": torch.empty(shape, dtype=torch.bool),
        "kl": torch.empty(shape),
        "target_logprob": torch.empty(shape),
        "target_rank": torch.empty(shape, dtype=torch.long),
        "candidate_logprobs": torch.empty(*shape, candidates.shape[-1]),
    }
    at_once = limits(model).rows(4 * model.d_vocab)
    for first in range(0, n_readings, at_once):
        part = slice(first, first + at_once)
        own_logprobs = model.logits(own[part]).log_softmax(dim=-1)
        top = own_logprobs.argmax(dim=-1)
        probs = own_logprobs.exp()
        scratch = torch.empty_like(probs)
        reference = _Reference(
            probs=probs,
            entropy=-own_logprobs.mul_(probs).sum(dim=-1),
            top=top,
            target=target[part].to(model.device),
            candidates=candidates[part].to(model.device),
        )
        for lens in range(n_lenses):
            for layer in range(n_layers):
                logits = model.logits(finals[lens, layer, part])
                rows = _sum_up(logits, reference, k, scratch)
                for name, values in rows.items():
                    out[name][lens, layer, part] = values.cpu()
    return out


@dataclass(frozen=True)
class _Reference:
    """What rows of logits are compared with."""

    probs: Float[Tensor, "row d_vocab"]
    entropy: Float[Tensor, " row"]
    top: Int[Tensor, " row"]
    target: Int[Tensor, " row"]
    candidates: Int[Tensor, "row candidate"]


def _sum_up(
    logits: Float[Tensor, "row d_vocab"],
    reference: _Reference,
    k: int,
    scratch: Float[Tensor, "row d_vocab"],
) -> dict[str, Tensor]:
    """Sum up rows of logits, which are overwritten.

    Memory traffic is what this costs, new memory most of all: so every pass writes to ``scratch``
    or in place. Sums of floats are as fast as reading; those of truth values, logsumexp and
    vecdot are not.
    """
    top_logits, top = logits.topk(k, dim=-1)
    target_logit = logits.gather(-1, reference.target.clamp(min=0)[:, None])
    candidate_logits = logits.gather(-1, reference.candidates.clamp(min=0))
    # Exact: floats count to 2**24, which is more than any vocabulary.
    rank = torch.gt(logits, target_logit, out=scratch).sum(dim=-1).long()
    expected_logit = torch.mul(reference.probs, logits, out=scratch).sum(dim=-1)
    # From here on logits are relative to the highest, so that exp() cannot overflow.
    logits -= top_logits[:, :1]
    z = torch.exp(logits, out=scratch).sum(dim=-1)
    mean_logit = scratch.mul_(logits).sum(dim=-1) / z
    log_z = (top_logits[:, 0] + z.log())[:, None]
    no_target = reference.target < 0
    return {
        "top_tokens": top,
        "top_logprobs": top_logits - log_z,
        "entropy": z.log() - mean_logit,
        "agrees": top[:, 0] == reference.top,
        # Rounding can make the divergence of equal distributions a hair negative.
        "kl": (log_z[:, 0] - expected_logit - reference.entropy).clamp(min=0),
        "target_logprob": (target_logit - log_z)[:, 0].masked_fill(no_target, torch.nan),
        "target_rank": rank.masked_fill(no_target, -1),
        "candidate_logprobs": (candidate_logits - log_z).masked_fill(
            reference.candidates < 0, torch.nan
        ),
    }
