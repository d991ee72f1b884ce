"""Exit tables under way: what is known so far, and by what a run knows its own notes."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from spade_lens.exits.confidence import Confidence
from spade_lens.lenses.lens import Lens
from spade_lens.lenses.linear import AffineMaps
from spade_lens.models.model import Model
from spade_lens.prompts.prompt import Prompt
from spade_lens.storage.checkpoint import Checkpoint

_STAGE = "exit-tables"


@dataclass(frozen=True)
class Known:
    """What is known of the prompts so far, filled in prompt by prompt.

    Args:
        confidence: By way of checking.
        check_answer: By way of checking.
        exit_answer: By way of answering.
        final_answer: What the full model answers.
    """

    confidence: Float[Tensor, "check layer prompt"]
    check_answer: Int[Tensor, "check layer prompt"]
    exit_answer: Int[Tensor, "spade layer prompt"]
    final_answer: Int[Tensor, " prompt"]

    @classmethod
    def begin(
        cls, notes: Checkpoint, *, n_checks: int, n_spades: int, n_layers: int, n: int
    ) -> tuple["Known", int]:
        """What the notes hold, and of how many prompts; nothing, of none, where there are none.

        Raises:
            ValueError: If they are another run's.
        """
        saved = notes.load(_STAGE, torch.device("cpu"))
        if saved is not None:
            done = int(saved.pop("done"))
            return cls(**saved), done
        return cls(
            confidence=torch.empty(n_checks, n_layers, n),
            check_answer=torch.empty(n_checks, n_layers, n, dtype=torch.long),
            exit_answer=torch.empty(n_spades, n_layers, n, dtype=torch.long),
            final_answer=torch.empty(n, dtype=torch.long),
        ), 0

    def save(self, notes: Checkpoint, done: int) -> None:
        """Note what is known once the first ``done`` prompts are, if it is time to."""
        notes.save(_STAGE, {**vars(self), "done": torch.tensor(done)})


def notes_of(
    folder: Path | None,
    model: Model,
    prompts: Sequence[Prompt],
    confidences: Sequence[Confidence],
    spades: Sequence[Lens],
    layers: Sequence[int],
) -> Checkpoint:
    """The notes of one run, known by all that decides its result."""
    if folder is None:
        return Checkpoint(None, {})  # hashing a model takes a while
    return Checkpoint(folder, identity(model, prompts, confidences, spades, layers))


def identity(
    model: Model,
    prompts: Sequence[Prompt],
    confidences: Sequence[Confidence],
    spades: Sequence[Lens],
    layers: Sequence[int],
) -> dict[str, Any]:
    """All that decides what :func:`exit_tables` finds, ready for JSON.

    A lens is known by its name, by what it keeps of every prompt, and by its maps and the way it
    numbers positions where it has such.
    """
    lenses = [*(c.lens for c in confidences), *spades]
    return {
        "model": model.sha256,
        "dtype": str(model.dtype),
        "layers": list(layers),
        "prompts": _sha256([[p.tokens, p.answer, p.candidates] for p in prompts]),
        "confidences": [c.name for c in confidences],
        "spades": [s.name for s in spades],
        "kept": [_sha256([[*map(int, s.keep(p, p.answer))] for p in prompts]) for s in lenses],
        "maps": [_maps_sha256(getattr(lens, "maps", None)) for lens in lenses],
        "positions": [str(getattr(lens, "positions", None)) for lens in lenses],
    }


def forget(notes: Checkpoint) -> None:
    """Remove the notes of tables that are done."""
    notes.clear(_STAGE)


def _sha256(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]  # messages show it


def _maps_sha256(maps: Any) -> str | None:
    """A hash of a linear lens's tensors; None for any other lens."""
    if not isinstance(maps, AffineMaps):
        return None
    digest = hashlib.sha256(json.dumps(maps.layers).encode())
    for name, tensor in sorted(maps.tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        data = tensor.detach().cpu().contiguous().view(-1)
        digest.update(data.view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]
