"""A readout: what lenses read at every layer, as a result that tabulates, saves and draws itself.

This module does not know how it was read.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
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

    def save_html(self, path: str | PathLike[str], *, labels: Sequence[str] | None = None) -> Path:
        """Write one HTML page to look into, for a browser, and return its path.

        A notebook shows the same page where the readout is a cell's value; of a large readout it
        shows a part.

        Args:
            path: The file, ending in ``.html``; a file of this name is replaced.
            labels: What stands above each position or prompt, as in :func:`spade_lens.view.html`.

        Raises:
            ValueError: If the path has another ending or cannot be written, or there are not as
                many labels as readings.
        """
        return verb("save_html")(self, path, labels=labels)

    def _repr_html_(self) -> str:
        return verb("notebook_html")(self, repr(self))

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
