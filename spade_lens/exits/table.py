"""Everything that early exit could do on some prompts, captured in one pass.

An :class:`ExitTable` holds, for every prompt and candidate layer, what the check would say, what
SPADE would answer and what both would cost. Any policy can then be simulated on it, without the
model: see :mod:`spade_lens.exits.simulate`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import product
from os import PathLike
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from spade_lens.exits.candidates import as_confidence, candidate_layers, check_lenses, targets
from spade_lens.exits.confidence import AnswerHead, Confidence
from spade_lens.exits.costs import Costs, Prices, price
from spade_lens.exits.table_notes import Known, forget, notes_of
from spade_lens.lenses.lens import Lens, Reading
from spade_lens.lenses.spade import Spade
from spade_lens.models.model import Model
from spade_lens.models.residuals import Residuals, capture
from spade_lens.prompts.prompt import Prompt
from spade_lens.settings import Settings, limits, progress_bar, scoped
from spade_lens.storage.files import read_json, read_tensors, write_json, write_tensors
from spade_lens.storage.provenance import versions

_PROMPTS_AT_ONCE = 64
"""Notes are taken between parts of so many; parts of 256 are not faster (SmolLM2-135M, CPU)."""


@dataclass(frozen=True)
class ExitTable:
    """What one way of checking and one of answering say of every prompt at every layer.

    Args:
        model: The model's name.
        check: The name of the confidence that is checked.
        keep: The name of the lens that answers: SPADE's is that of its keep set.
        layers: The candidate layers, ascending.
        n_layers: The layer of the model's own output.
        confidence: The check's confidence; larger is surer.
        check_answer: What the check's readout would answer itself.
        exit_answer: What SPADE answers from there.
        final_answer: What the full model answers.
        target: The right token; -1 where none is known.
        kept: How many tokens SPADE keeps.
        prices: What everything costs; also holds the prompts' lengths.
    """

    model: str
    check: str
    keep: str
    layers: tuple[int, ...]
    n_layers: int
    confidence: Float[Tensor, "layer prompt"]
    check_answer: Int[Tensor, "layer prompt"]
    exit_answer: Int[Tensor, "layer prompt"]
    final_answer: Int[Tensor, " prompt"]
    target: Int[Tensor, " prompt"]
    kept: Int[Tensor, " prompt"]
    prices: Prices

    def __len__(self) -> int:
        return len(self.final_answer)

    @property
    def agrees(self) -> Bool[Tensor, "layer prompt"]:
        """Whether SPADE's answer is the full model's."""
        return self.exit_answer == self.final_answer

    @property
    def accuracy(self) -> float:
        """The full model's accuracy; NaN where no prompt has a target."""
        known = self.target >= 0
        return float((self.final_answer == self.target)[known].double().mean())

    def of(self, prompts: Sequence[int] | Tensor) -> "ExitTable":
        """The table of some prompts, by index, for example one half of a split."""
        some = torch.as_tensor(prompts)
        tensors: dict[str, Any] = {n: tensor[..., some] for n, tensor in _tensors(self).items()}
        return replace(self, prices=self.prices.of(some), **tensors)

    def save(self, folder: str | PathLike[str]) -> Path:
        """Write ``table.safetensors`` and, beside it, ``table.json`` with all the rest.

        :func:`~spade_lens.exits.table.load_table` brings it back.

        Args:
            folder: The folder, made where there is none; a table in it is replaced.

        Returns:
            The folder.
        """
        place = Path(folder).expanduser()
        place.mkdir(parents=True, exist_ok=True)
        prices = {f"prices.{name}": tensor for name, tensor in _tensors(self.prices).items()}
        # A copy of each: safetensors writes no two names for the same memory.
        tensors = {name: tensor.clone() for name, tensor in (_tensors(self) | prices).items()}
        content = {
            "format": 2,
            "kind": "exit table",
            "model": self.model,
            "check": self.check,
            "keep": self.keep,
            "layers": list(self.layers),
            "n_layers": self.n_layers,
            "stops": list(self.prices.stops),
            "shared": self.prices.shared,
            "tensors_sha256": write_tensors(place / "table.safetensors", tensors),
            "versions": versions(),
        }
        write_json(place / "table.json", content)
        return place

    def to_frame(self) -> pd.DataFrame:
        """A tidy table: one row for every candidate layer and prompt.

        Returns:
            Columns ``model, check, keep, layer, prompt, length, kept, confidence, check_answer,
            exit_answer, final_answer, agrees``; ``target, correct`` where there are targets;
            ``flops_blocks, flops_check, flops_answer, full_flops``.
        """
        n_layers, n = self.confidence.shape
        columns = {
            "layer": torch.tensor(self.layers).repeat_interleave(n),
            "prompt": torch.arange(n).repeat(n_layers),
            "length": self.prices.length.repeat(n_layers),
            "kept": self.kept.repeat(n_layers),
            "confidence": self.confidence.flatten(),
            "check_answer": self.check_answer.flatten(),
            "exit_answer": self.exit_answer.flatten(),
            "final_answer": self.final_answer.repeat(n_layers),
            "agrees": self.agrees.flatten(),
        }
        if (self.target >= 0).any():
            columns["target"] = self.target.repeat(n_layers)
            columns["correct"] = (self.exit_answer == self.target).flatten()
        columns |= {
            "flops_blocks": self.prices.trunk[:-1].flatten(),
            "flops_check": self.prices.check.flatten(),
            "flops_answer": self.prices.answer[:-1].flatten(),
            "full_flops": self.prices.full.repeat(n_layers),
        }
        frame = pd.DataFrame({name: column.numpy() for name, column in columns.items()})
        for place, name in enumerate(("model", "check", "keep")):
            frame.insert(place, name, getattr(self, name))
        return frame


@scoped
@torch.no_grad()
def exit_tables(
    model: Model,
    prompts: Sequence[Prompt],
    confidences: Confidence | Lens | Sequence[Confidence | Lens],
    *,
    spades: Lens | Sequence[Lens] | None = None,
    layers: Sequence[int] | None = None,
    settings: Settings | None = None,
    checkpoint: str | PathLike[str] | None = None,
) -> list[ExitTable]:
    """One pass over the prompts for every way of checking and every way of answering.

    Example:
        >>> from spade_lens.exits import exit_tables
        >>> spades = [Spade(model), Spade(model, keep=Keep(last=2))]
        >>> tables = exit_tables(model, prompts, LogitLens(model), spades=spades, layers=[2, 3])
        >>> [(table.check, table.keep) for table in tables]
        [('logit lens, entropy', 'SPADE'), ('logit lens, entropy', 'SPADE (start+last 2)')]

    Args:
        model: The model.
        prompts: The prompts.
        confidences: What is checked, one or several; a lens alone stands for its entropy.
        spades: What answers, one or several; SPADE with the paper's two tokens by default.
        layers: The candidate layers; by default those of :class:`SpadeExit`.
        settings: Memory limit, batch size and progress; see :class:`spade_lens.Settings`.
        checkpoint: A folder in which to note what is known every half minute or so, so that the
            same call goes on from there after an interruption. The notes are gone at the end.
            A lens of your own is known there by its name and what it keeps, no more; hooks on
            the model are not known at all.

    Returns:
        A table for each pair, confidences first.

    Raises:
        ValueError: If layers, prompts or lenses do not fit the model, two ways have one name, or
            the checkpoint is another call's.
    """
    several = confidences if isinstance(confidences, Sequence) else [confidences]
    checked = [c for c in map(as_confidence, several) if c is not None]
    answering = list(spades) if isinstance(spades, Sequence) else [spades or Spade(model)]
    candidates = candidate_layers(model, layers)
    model.check_prompts(prompts)
    for names in ([c.name for c in checked], [s.name for s in answering]):
        if len(set(names)) < len(names) or not names:
            raise ValueError(f"Expected one name each, and at least one; got {names}.")
    for confidence, spade in product(checked, answering):
        check_lenses(model, confidence, spade)
        confidence.check_prompts(prompts)

    head = AnswerHead(model)
    n = len(prompts)
    reads = {id(lens): lens for lens in (*(c.lens for c in checked), *answering)}
    lenses = list(reads.values())
    folder = None if checkpoint is None else Path(checkpoint).expanduser()
    notes = notes_of(folder, model, prompts, checked, answering, candidates)
    sizes = {"n_checks": len(checked), "n_spades": len(answering), "n_layers": len(candidates)}
    known, done = Known.begin(notes, **sizes, n=n)
    with progress_bar(total=n, initial=done, desc="exit table", unit="prompt") as bar:
        for part in _parts(model, prompts, lenses, len(candidates), done):
            some = [prompts[i] for i in part]
            residuals, wanted = _residuals(model, some, lenses, candidates)
            last = residuals.layer(model.n_layers)[wanted]
            known.final_answer[part] = head.read(last, some)[1]
            for lens in lenses:
                readings = [
                    Reading(i, p.answer, tuple(lens.keep(p, p.answer))) for i, p in enumerate(some)
                ]
                finals = lens.final_residuals(residuals, readings, candidates)
                for row, at_layer in enumerate(finals):
                    for c, confidence in enumerate(checked):
                        if confidence.lens is lens:
                            measure, over = confidence.measure, confidence.over
                            read = head.read(at_layer, some, measure=measure, over=over)
                            known.confidence[c, row, part], known.check_answer[c, row, part] = read
                    for s, spade in enumerate(answering):
                        if spade is lens:
                            known.exit_answer[s, row, part] = head.read(at_layer, some)[1]
            known.save(notes, done=part[-1] + 1)
            bar.update(len(part))
    costs = Costs(model, head)
    tables = []
    for (c, confidence), (s, spade) in product(enumerate(checked), enumerate(answering)):
        tables.append(
            ExitTable(
                model=model.name,
                check=confidence.name,
                keep=spade.name,
                layers=candidates,
                n_layers=model.n_layers,
                confidence=known.confidence[c],
                check_answer=known.check_answer[c],
                exit_answer=known.exit_answer[s],
                final_answer=known.final_answer,
                target=targets(prompts),
                kept=torch.tensor([len(spade.keep(p, p.answer)) for p in prompts]),
                prices=price(costs, prompts, candidates, confidence, spade),
            )
        )
    forget(notes)
    return tables


def _tensors(record: Any) -> dict[str, Tensor]:
    """The fields of a dataclass that are tensors, by name."""
    named = {field.name: getattr(record, field.name) for field in fields(record)}
    return {name: value for name, value in named.items() if isinstance(value, Tensor)}


def _residuals(
    model: Model,
    prompts: Sequence[Prompt],
    lenses: Sequence[Lens],
    layers: Sequence[int],
) -> tuple[Residuals, list[int]]:
    """What all lenses need, and the slots of the answer positions."""
    needed = [sorted({p.answer, *_kept(p, lenses)}) for p in prompts]
    residuals = capture(
        model,
        prompts,
        layers=[*layers, model.n_layers],
        positions=needed,
    )
    return residuals, [residuals.slots(i, [p.answer])[0] for i, p in enumerate(prompts)]


def _kept(prompt: Prompt, lenses: Sequence[Lens]) -> set[int]:
    return {position for lens in lenses for position in lens.keep(prompt, prompt.answer)}


def _parts(
    model: Model,
    prompts: Sequence[Prompt],
    lenses: Sequence[Lens],
    n_layers: int,
    done: int,
) -> Iterator[list[int]]:
    """As many prompts at a time as half the memory holds residuals of, from the ``done``-th on."""
    element = torch.finfo(model.dtype).bits // 8
    most = 0.5 * limits(model).memory_bytes / ((n_layers + 1) * model.d_model * element)
    part: list[int] = []
    held = 0
    for i, prompt in enumerate(prompts[done:], start=done):
        slots = len(_kept(prompt, lenses)) + 1
        if part and (held + slots > most or len(part) == _PROMPTS_AT_ONCE):
            yield part
            part, held = [], 0
        part.append(i)
        held += slots
    if part:
        yield part


_KIND = ("exit table", 2)


def load_table(folder: str | PathLike[str]) -> ExitTable:
    """A table that ``table.save(folder)`` wrote, equal to it in every field.

    Example:
        >>> table = load_table("tables/antonym")  # doctest: +SKIP

    Args:
        folder: The folder with ``table.json`` and ``table.safetensors``.

    Raises:
        FileNotFoundError: If one of the files is missing.
        ValueError: If the files are damaged, do not belong together or are of a kind that is not
            known here.
    """
    place = Path(folder).expanduser()
    content = read_json(place / "table.json")
    if (content.get("kind"), content.get("format")) != _KIND:
        raise ValueError(
            f"{place / 'table.json'} describes a {content.get('kind')!r}, format "
            f"{content.get('format')!r}; expected {_KIND[0]!r}, format {_KIND[1]}. It may be from "
            "another version of spade_lens."
        )
    plain = ("model", "check", "keep", "layers", "n_layers", "stops", "shared", "tensors_sha256")
    absent = [key for key in plain if key not in content]
    if absent:
        raise ValueError(f"{place / 'table.json'} lacks {absent}; make and save the table again.")
    path = place / "table.safetensors"
    tensors = read_tensors(
        path, content["tensors_sha256"], of="table", again="make and save the table"
    )
    own = {n: t for n, t in tensors.items() if not n.startswith("prices.")}
    priced = {n.removeprefix("prices."): t for n, t in tensors.items() if n.startswith("prices.")}
    return ExitTable(
        model=content["model"],
        check=content["check"],
        keep=content["keep"],
        layers=tuple(content["layers"]),
        n_layers=content["n_layers"],
        prices=Prices(stops=tuple(content["stops"]), shared=content["shared"], **priced),
        **own,
    )
