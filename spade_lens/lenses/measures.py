"""What is read off rows of logits: top tokens, targets, candidates, entropy, agreement, divergence.

Logits are made and summed up a few rows at a time; nothing of size layers x prompts x vocabulary
is ever held. This module does not know how a lens made its residuals.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from spade_lens.lenses.lens import check_readable
from spade_lens.lenses.readout import Readout
from spade_lens.models.hooks import in_lens, rows_are
from spade_lens.models.model import Model
from spade_lens.settings import limits


def words_of(model: Model, tokens: Int[Tensor, "..."]) -> dict[int, str]:
    """Return the text of token ids, without -1.

    Args:
        model: The model whose tokenizer writes them.
        tokens: Token ids.
    """
    return {token: model.word(token) for token in sorted(set(tokens.flatten().tolist()) - {-1})}


@dataclass(frozen=True)
class Asked:
    """Where readings are taken, and which tokens are asked about.

    Args:
        prompt: The prompt of every reading.
        position: The position at which it is read.
        target: The target token of every reading; -1 if there is none.
        candidates: The candidate tokens of every reading; -1 for those with fewer.
        ambiguous: Whether the target's token also begins another answer, or the query.
    """

    prompt: Int[Tensor, " reading"]
    position: Int[Tensor, " reading"]
    target: Int[Tensor, " reading"]
    candidates: Int[Tensor, "reading candidate"]
    ambiguous: Bool[Tensor, " reading"]

    @classmethod
    def of(cls, rows: Sequence[tuple[int, int, int, bool, Sequence[int]]], width: int) -> "Asked":
        """Make it of rows (prompt, position, target, ambiguous, candidates), these padded."""
        padded = [[*tokens, *[-1] * (width - len(tokens))] for *_, tokens in rows]
        candidates = torch.tensor(padded, dtype=torch.long).reshape(len(rows), width)
        prompt, position, target = torch.tensor([row[:3] for row in rows]).unbind(dim=1)
        return cls(prompt, position, target, candidates, torch.tensor([row[3] for row in rows]))


def readout_of(
    model: Model,
    finals: Float[Tensor, "lens layer reading d_model"],
    own: Float[Tensor, "reading d_model"],
    asked: Asked,
    *,
    lenses: Sequence[str],
    layers: Sequence[int],
    top_k: int,
) -> Readout:
    """Return the readout of residuals that lenses made.

    Args:
        model: Gives final norm and unembedding.
        finals: The residuals that the lenses give.
        own: The model's own residual at layer ``n_layers``, for agreement and divergence.
        asked: Where, and which tokens.
        lenses: The names of the lenses.
        layers: The layers.
        top_k: How many top tokens to keep.
    """
    whose = [[f"the lens {lens!r} at layer {layer}" for layer in layers] for lens in lenses]
    values = _read_off(model, finals, own, asked, top_k, whose)
    tokens = (values["top_tokens"], asked.target, asked.candidates)
    return Readout(
        lenses=tuple(lenses),
        layers=tuple(layers),
        words=words_of(model, torch.cat([ids.flatten() for ids in tokens])),
        model=model.name,
        **vars(asked),
        **values,
    )


@torch.no_grad()
def _read_off(
    model: Model,
    finals: Float[Tensor, "lens layer reading d_model"],
    own: Float[Tensor, "reading d_model"],
    asked: Asked,
    top_k: int,
    whose: Sequence[Sequence[str]],
) -> dict[str, Tensor]:
    """Return the fields of :class:`Readout` that have a lens axis, a few readings at a time."""
    n_lenses, n_layers, n_readings, _ = finals.shape
    k = min(top_k, model.d_vocab)
    shape, device = (n_lenses, n_layers, n_readings), model.device
    # On the model's device: on a GPU every move to the host waits for all that was asked before.
    out = {
        "top_tokens": torch.empty(*shape, k, dtype=torch.long, device=device),
        "top_logprobs": torch.empty(*shape, k, device=device),
        "entropy": torch.empty(shape, device=device),
        "agrees": torch.empty(shape, dtype=torch.bool, device=device),
        "kl": torch.empty(shape, device=device),
        "target_logprob": torch.empty(shape, device=device),
        "target_rank": torch.empty(shape, dtype=torch.long, device=device),
        "candidate_logprobs": torch.empty(*shape, asked.candidates.shape[-1], device=device),
    }
    targets, candidates = asked.target.to(device), asked.candidates.to(device)
    own_highest = torch.empty(n_readings, device=device)
    prompts = asked.prompt.tolist()
    at_once = limits(model).rows(4 * model.d_vocab)
    for first in range(0, n_readings, at_once):
        part = slice(first, first + at_once)
        with rows_are(prompts[part]):
            own_logprobs = model.logits(own[part]).log_softmax(dim=-1)
        own_highest[part] = own_logprobs.amax(dim=-1)
        probs = own_logprobs.exp()
        scratch = torch.empty_like(probs)
        reference = _Reference(
            probs=probs,
            entropy=-own_logprobs.mul_(probs).sum(dim=-1),
            highest=probs.amax(dim=-1),
            target=targets[part],
            candidates=candidates[part],
        )
        for lens in range(n_lenses):
            for layer in range(n_layers):
                with in_lens(), rows_are(prompts[part]):
                    logits = model.logits(finals[lens, layer, part])
                for name, values in _sum_up(logits, reference, k, scratch).items():
                    out[name][lens, layer, part] = values
    check_readable(own_highest, f"{model.name} itself")
    found = {name: values.cpu() for name, values in out.items()}
    for lens, layer in product(range(n_lenses), range(n_layers)):
        check_readable(found["entropy"][lens, layer], whose[lens][layer])
    return found


@dataclass(frozen=True)
class _Reference:
    """What rows of logits are compared with."""

    probs: Float[Tensor, "row d_vocab"]
    entropy: Float[Tensor, " row"]
    highest: Float[Tensor, " row"]
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
        # In half precision several tokens may share the model's highest probability.
        "agrees": reference.probs.gather(-1, top[:, :1])[:, 0] == reference.highest,
        # Rounding can make the divergence of equal distributions slightly negative.
        "kl": (log_z[:, 0] - expected_logit - reference.entropy).clamp(min=0),
        "target_logprob": (target_logit - log_z)[:, 0].masked_fill(no_target, torch.nan),
        "target_rank": rank.masked_fill(no_target, -1),
        "candidate_logprobs": (candidate_logits - log_z).masked_fill(
            reference.candidates < 0, torch.nan
        ),
    }
