"""What is read off a lens: top tokens, targets, candidates, entropy, agreement, divergence.

Logits are made and summed up a few rows at a time; nothing of size layers x prompts x vocabulary
is ever held. This module does not know how a lens made its residuals.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import product
from os import PathLike
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from einops import repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor

from spade_lens.checks import checked, spelled, visible
from spade_lens.lazy import verb
from spade_lens.lenses.lens import check_readable
from spade_lens.models.hooks import in_lens, rows_are
from spade_lens.models.model import Model
from spade_lens.settings import limits
from spade_lens.storage.records import load_record, save_record


@dataclass(frozen=True, eq=False)
class Readout:
    """Everything read, by lens, layer and reading. Logarithms are natural (nats).

    Example:
        >>> read(["ab", "abc"], LogitLens(model))
        Readout(1 lens × 5 layers × 2 readings, top 5, of tiny-llama: logit lens; layers 0 to 4)

    Args:
        lenses: Names of the lenses.
        layers: The layers.
        prompt: The prompt of every reading.
        position: The position at which it was read.
        top_tokens: The most likely tokens, best first.
        top_logprobs: Their log-probabilities.
        entropy: Entropy over the vocabulary.
        agrees: Whether the top token is the model's own, or one of several that it ranks first.
        kl: Kullback-Leibler divergence of the lens' distribution from the model's own,
            KL(model || lens).
        target: The target token of every reading; -1 where there is none.
        target_logprob: Its log-probability; NaN where there is none.
        target_rank: Its rank, 0 for the top token; -1 where there is no target.
        candidates: The candidate tokens of every reading; -1 where there are fewer.
        candidate_logprobs: Their log-probabilities (over the vocabulary); NaN likewise.
        ambiguous: Whether the target's token also begins another answer, or the query.
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
    ambiguous: Bool[Tensor, " reading"]
    words: dict[int, str]
    model: str = ""

    def __repr__(self) -> str:
        *shape, k = self.top_tokens.shape
        words = (("lens", "lenses"), ("layer", "layers"), ("reading", "readings"))
        sizes = [f"{n} {word[n != 1]}" for n, word in zip(shape, words, strict=True)]
        return visible(
            f"Readout({' × '.join(sizes)}, top {k}, of {self.model}: {', '.join(self.lenses)}; "
            f"layers {spelled(self.layers)})"
        )

    def to_frame(self) -> pd.DataFrame:
        """Return a tidy table: one row for every lens, layer and reading.

        Tokens are there as text and, under the same name with ``_id``, as token ids.

        Returns:
            Columns ``model, lens, layer, prompt, position, entropy, agrees, kl``; ``top_1``,
            ``top_1_id``, ``top_1_logprob``, ... to k; if there are targets ``target, target_id,
            target_logprob, target_rank, correct, ambiguous``; if there are candidates ``choice``,
            ``choice_id`` (the likeliest of them) and ``candidate_1``, ``candidate_1_id``,
            ``candidate_1_logprob``, ...; if there are both, ``prefers``. ``correct`` is over the
            vocabulary, ``prefers`` among the candidates, which is what early exit decides by.
        """
        n_lenses, n_layers, n_readings = self.entropy.shape
        index = pd.MultiIndex.from_product(
            [self.lenses, self.layers, range(n_readings)], names=["lens", "layer", "reading"]
        )
        everywhere = {"lens": n_lenses, "layer": n_layers}
        columns: dict[str, Any] = {
            "model": self.model,
            "prompt": repeat(self.prompt, "r -> (lens layer r)", **everywhere),
            "position": repeat(self.position, "r -> (lens layer r)", **everywhere),
            "entropy": self.entropy.flatten(),
            "agrees": self.agrees.flatten(),
            "kl": self.kl.flatten(),
        }
        for k in range(self.top_tokens.shape[-1]):
            columns |= self._token(f"top_{k + 1}", self.top_tokens[..., k])
            columns[f"top_{k + 1}_logprob"] = self.top_logprobs[..., k].flatten()
        if (self.target >= 0).any():
            columns |= self._token(
                "target", repeat(self.target, "r -> (lens layer r)", **everywhere)
            )
            columns["target_logprob"] = self.target_logprob.flatten()
            columns["target_rank"] = _or_missing(self.target_rank)
            columns["correct"] = pd.Series(columns["target_rank"]).eq(0).array
            columns["ambiguous"] = repeat(self.ambiguous, "r -> (lens layer r)", **everywhere)
        if self.candidates.shape[-1]:
            best = self.candidate_logprobs.nan_to_num(-torch.inf).argmax(dim=-1, keepdim=True)
            options = repeat(self.candidates, "r c -> lens layer r c", **everywhere)
            choice = options.gather(-1, best)[..., 0]
            columns |= self._token("choice", choice)
            if (self.target >= 0).any():
                target = repeat(self.target, "r -> lens layer r", **everywhere)
                known = ((target >= 0) & (choice >= 0)).flatten().numpy()
                prefers = pd.Series((choice == target).flatten().numpy(), dtype="boolean")
                columns["prefers"] = prefers.where(known).array
            for c in range(self.candidates.shape[-1]):
                columns |= self._token(f"candidate_{c + 1}", options[..., c])
                columns[f"candidate_{c + 1}_logprob"] = self.candidate_logprobs[..., c].flatten()
        columns = {
            name: column.numpy() if isinstance(column, Tensor) else column
            for name, column in columns.items()
        }
        frame = pd.DataFrame(columns, index=index).reset_index().drop(columns="reading")
        first = ["model", "lens", "layer", "prompt", "position"]
        return frame[[*first, *(c for c in frame.columns if c not in first)]]

    def _token(self, name: str, tokens: Int[Tensor, "..."]) -> dict[str, Any]:
        """Columns of tokens as text and as ids."""
        text = [self.words.get(token) for token in tokens.flatten().tolist()]
        return {name: text, f"{name}_id": _or_missing(tokens)}

    def plot(self, **options: Any) -> Any:
        """Draw it: the top tokens by layer and position, or the agreement by layer.

        Args:
            options: Of :func:`spade_lens.plot`.
        """
        return verb("plot")(self, **options)

    def save(self, folder: str | PathLike[str]) -> Path:
        """Write ``readout.safetensors`` and ``readout.json``, and return the folder.

        Args:
            folder: The folder, made if it does not exist; a readout in it is replaced.
        """
        return save_record(self, folder, kind="readout")

    @classmethod
    def load(cls, folder: str | PathLike[str]) -> "Readout":
        """Return a readout that :meth:`save` wrote, equal to it in every field.

        Args:
            folder: The folder.

        Raises:
            FileNotFoundError: If one of the files is missing.
            ValueError: If the files are damaged or do not belong together.
        """
        return load_record(cls, folder, kind="readout")

    @staticmethod
    @checked
    def join(parts: Sequence["Readout"]) -> "Readout":
        """Return one readout of several with the same lenses and layers, reading after reading."""
        if not parts:
            raise ValueError("No readouts were given. Give at least one.")
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


_READING_FIRST = {"prompt", "position", "target", "candidates", "ambiguous"}


def _or_missing(numbers: Int[Tensor, "..."]) -> Any:
    """Whole numbers as a column in which a negative one is missing."""
    column = pd.Series(numbers.flatten().numpy(), dtype="Int64")
    return column.mask(column < 0).array


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
