"""Make exit tables: one pass over the prompts for every check and every lens that answers.

A long pass saves partial results and resumes from them.
"""

from collections.abc import Iterator, Sequence
from hashlib import sha256
from os import PathLike

import torch
from torch import Tensor

from spade_lens.exits.costs import price
from spade_lens.exits.setup import CheckLike, Setup, targets
from spade_lens.exits.table import ExitTable
from spade_lens.lenses.lens import Lens, Reading, finals_of, keep_of
from spade_lens.lenses.measures import words_of
from spade_lens.models.hooks import numbered
from spade_lens.models.model import Model
from spade_lens.models.places import LayersLike
from spade_lens.models.residuals import capture
from spade_lens.prompts.inputs import PromptsLike
from spade_lens.prompts.prompt import Prompt
from spade_lens.settings import Settings, limits, progress_bar, scoped
from spade_lens.storage.checkpoint import Checkpoint, kept_folder

_STAGE = "exit-tables-3"

_NONE = torch.empty(0, dtype=torch.long)

_TOKENS_PER_PROMPT = 32
"""Makes parts of 64 prompts on a CPU; parts of 256 are not faster (SmolLM2-135M)."""


@scoped
def exit_tables(
    model: Model,
    prompts: PromptsLike,
    checks: CheckLike | Sequence[CheckLike],
    *,
    answerers: Lens | str | Sequence[Lens | str] | None = None,
    layers: LayersLike = None,
    checkpoint: str | PathLike[str] | None = None,
    settings: Settings | None = None,
) -> list[ExitTable]:
    """Run prompts once, for every check and every lens that answers.

    Example:
        >>> from spade_lens.exits import exit_tables
        >>> spades = [Spade(model), Spade(model, keep=Keep(last=2))]
        >>> tables = exit_tables(model, prompts, "logit", answerers=spades, layers=[2, 3])
        >>> [(table.check, table.keep) for table in tables]
        [('logit lens, entropy', 'SPADE'), ('logit lens, entropy', 'SPADE (start+last 2)')]

    Args:
        model: The model.
        prompts: A text, a prompt, or several.
        checks: What is checked, one or several; a lens or its name stands for its entropy, and
            ``"own"`` for the readout of each lens that answers, checked for its own exits alone.
        answerers: What answers, one or several; SPADE with the paper's two tokens by default.
        layers: The candidate layers. Ours: by default every second one from the middle up.
        checkpoint: A folder for partial results, saved about every half minute: the same call
            resumes from them after an interruption. They are removed at the end. A lens of your
            own is identified by all that it is made of, or by what its ``deciding()`` returns.
        settings: Memory limit, batch size and progress; see :class:`spade_lens.Settings`.

    Returns:
        A table for each pair of check and lens that answers, checks first.

    Raises:
        TypeError: If an argument is of another type.
        ValueError: If layers, prompts or lenses do not fit the model, there is nothing to check,
            two checks or lenses have one name, or the checkpoint is another call's.
    """
    setup = Setup.of(model, checks, answerers, layers)
    return tables_of(setup, setup.prompts(prompts), checkpoint=checkpoint)


@torch.no_grad()
def tables_of(
    setup: Setup, prompts: Sequence[Prompt], *, checkpoint: str | PathLike[str] | None = None
) -> list[ExitTable]:
    """Return a table for each pair of check and lens that answers; see :func:`exit_tables`."""
    if not setup.checks:
        raise ValueError("checks=[] was given; expected at least one lens or confidence to check.")
    setup.model.expect_rows(len(prompts))
    folder = kept_folder(checkpoint, setup.model)
    # Hashing a model takes a while.
    partial = Checkpoint(folder, {} if folder is None else setup.identity(prompts))
    values = partial.load(_STAGE, torch.device("cpu")) or {}
    done = len(values.get("final_answer", ()))
    counts = [len(prompt.candidates) for prompt in prompts]
    width = max(counts) if all(counts) else 0
    with progress_bar(
        total=len(prompts), initial=done, desc="exit table", unit="prompt", model=setup.model
    ) as bar:
        for part in _parts(setup, prompts, done):
            with numbered(range(part.start, part.stop)):
                read = _read_part(setup, prompts[part], width)
            # The prompts are the second axis where there are layers.
            values = {
                name: torch.cat([values[name], new], dim=min(new.ndim - 1, 1)) if values else new
                for name, new in read.items()
            }
            partial.save(_STAGE, values)
            bar.update(part.stop - part.start)
    tables = [
        ExitTable(
            model=setup.model.name,
            check=check.name,
            keep=answerer.name,
            layers=setup.layers,
            n_layers=setup.model.n_layers,
            confidence=values[f"confidence of {check.name}"],
            features=values[f"features of {check.name}"],
            check_answer=values[f"answer of {check.name}"],
            exit_answer=values[f"exit with {answerer.name}"],
            final_answer=values["final_answer"],
            target=targets(prompts),
            n_candidates=torch.tensor(counts),
            logprobs=values[f"logprobs with {answerer.name}"],
            right_option=torch.tensor([_right_option(p) for p in prompts]),
            identity=torch.tensor([_identity(p) for p in prompts]),
            kept=torch.tensor([len(keep_of(answerer, p, p.answer)) for p in prompts]),
            prices=price(setup.costs, prompts, setup.layers, check, answerer),
            words=words_of(
                setup.model,
                torch.cat(
                    [
                        values[f"answer of {check.name}"].flatten(),
                        values.get(f"screened answer of {check.name}", _NONE).flatten(),
                        values[f"exit with {answerer.name}"].flatten(),
                        values["final_answer"],
                        targets(prompts),
                    ]
                ),
            ),
            ambiguous=torch.tensor([p.shares_first_token for p in prompts]),
            screen=values.get(f"screen of {check.name}"),
            screen_answer=values.get(f"screened answer of {check.name}"),
        )
        for check, answerer in setup.pairs
    ]
    partial.clear(_STAGE)
    return tables


def _right_option(prompt: Prompt) -> int:
    known = prompt.target in prompt.candidates
    return prompt.candidates.index(prompt.target) if known else -1


def _identity(prompt: Prompt) -> int:
    """Return a number that other tokens hardly share: 63 bits of their hash."""
    text = repr((prompt.tokens, prompt.answer)).encode()
    return int.from_bytes(sha256(text).digest()[:8], "big") >> 1


def _read_part(setup: Setup, prompts: Sequence[Prompt], width: int) -> dict[str, Tensor]:
    """Return confidences, features and answers of some prompts: ``[layer prompt ...]`` by name."""
    model, layers, head = setup.model, setup.layers, setup.head
    positions = [sorted({p.answer, *_kept(setup, p)}) for p in prompts]
    residuals = capture(model, prompts, layers=[*layers, model.n_layers], positions=positions)
    final = head.read(residuals.at_answers(model.n_layers), prompts)
    values = {"final_answer": final.answer}
    for lens in setup.lenses:
        readings = [Reading(i, p.answer, keep_of(lens, p, p.answer)) for i, p in enumerate(prompts)]
        finals = finals_of(lens, residuals, readings, layers)
        for check in setup.checks:
            if check.lens is lens:
                read = [head.read(at_layer, prompts, check) for at_layer in finals]
                for name in ("confidence", "answer", "features"):
                    values[f"{name} of {check.name}"] = torch.stack(
                        [getattr(r, name) for r in read]
                    )
            if check.after is not None and check.after.lens is lens:
                read = [head.read(at_layer, prompts, check.after) for at_layer in finals]
                values[f"screen of {check.name}"] = torch.stack([r.confidence for r in read])
                values[f"screened answer of {check.name}"] = torch.stack([r.answer for r in read])
        for answerer in setup.answerers:
            if answerer is lens:
                answers = [head.read(at_layer, prompts).answer for at_layer in finals]
                values[f"exit with {answerer.name}"] = torch.stack(answers)
                stops = (*finals, residuals.at_answers(model.n_layers))
                logprobs = [head.option_logprobs(at_stop, prompts, width) for at_stop in stops]
                values[f"logprobs with {answerer.name}"] = torch.stack(logprobs)
    return values


def _kept(setup: Setup, prompt: Prompt) -> set[int]:
    """Return the positions that any of the lenses keeps."""
    return {position for lens in setup.lenses for position in keep_of(lens, prompt, prompt.answer)}


def _parts(setup: Setup, prompts: Sequence[Prompt], done: int) -> Iterator[slice]:
    """Yield as many prompts at a time as half the memory holds residuals of, after ``done``."""
    model = setup.model
    bytes_per_slot = (len(setup.layers) + 1) * model.d_model * model.dtype.itemsize
    most = limits(model)
    most_slots = 0.5 * most.memory_bytes / bytes_per_slot
    most_prompts = most.batch_size or most.batch_tokens // _TOKENS_PER_PROMPT
    first, held = done, 0
    for i, prompt in enumerate(prompts[done:], start=done):
        slots = len(_kept(setup, prompt)) + 1
        if i > first and (held + slots > most_slots or i - first == most_prompts):
            yield slice(first, i)
            first, held = i, 0
        held += slots
    if first < len(prompts):
        yield slice(first, len(prompts))
