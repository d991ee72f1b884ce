"""The measuring part of early_exit.py: what every check and keep set says of every prompt.

All else is simulated on these tables. They are kept in ``benchmarks/.early-exit/MODEL/TASK``, a
hundred prompts a part, and the same call goes on where it was interrupted.
"""

import hashlib
import random
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import spade_lens as sl
from spade_lens.exits import Confidence, ExitTable, Own, exit_tables, gate_features
from spade_lens.exits.answer_head import AnswerHead
from spade_lens.exits.costs import Costs, Prices, price
from spade_lens.exits.keep_search import keep_sets
from spade_lens.lenses.lens import Reading, finals_of, keep_of
from spade_lens.lenses.measures import words_of
from spade_lens.lenses.saving import load_lens
from spade_lens.lenses.spade import Spade
from spade_lens.models.residuals import Residuals
from spade_lens.settings import one_call
from spade_lens.storage.content import content_sha256
from spade_lens.storage.files import read_json, write_json
from spade_lens.tasks import DecisionTask
from spade_lens.tasks.resolve import as_decisions

HERE = Path(__file__).parent
PAIRS = HERE.parent.parent / "shared" / "data" / "icl_pairs"
"""Longer lists of word pairs than the library's own, where they are present."""

SHOTS = {
    "sst2": 4,
    "arc-easy-words": 4,
    "sciq-words": 4,
    "commonsenseqa-words": 4,
    "present-past": 16,
    "singular-plural": 16,
    "capitalize": 16,
    "country-capital": 16,
}
OWN = Own(features=gate_features)
"""Each keep set's own SPADE as its check, with what gates see."""

KEEPS = ("start+answer", "last 16", "last 32", "query+labels")
LAYERS = (12, 15, 18, 20, 22, 24, 26)
"""Of 30; :func:`layers_of` takes others in proportion."""

PART = 100
SEED = 0

FITTED_TO = "last 32"
"""The keep set whose readout the lens that is fitted to a task predicts."""

LEARN = 80
"""Prompts that such lenses are fitted on: of the split that demonstrations are drawn from."""


def layers_of(model: sl.Model) -> tuple[int, ...]:
    """Candidate layers at the same fractions of the depth."""
    return tuple(sorted({round(layer * model.n_layers / 30) for layer in LAYERS}))


def task_of(name: str, pairs: Path) -> tuple[DecisionTask, str]:
    """A task and where its data are from; word pairs are the longer list where there is one."""
    file = pairs / f"{name}.json"
    if not file.exists():
        task = as_decisions(name, shots=SHOTS[name])
        return task, task.source
    digest = hashlib.sha256(file.read_bytes()).hexdigest()[:16]
    task = as_decisions(file, shots=SHOTS[name])
    return task, f"{task.source} of {file.name}, sha256 {digest}"


def pool(model: sl.Model, task: DecisionTask, n: int, shots: int | None = None) -> list[sl.Prompt]:
    """Prompts of the calibration and the test split, mixed; demonstrations are of the third."""
    sizes = task.split_sizes()
    prompts = []
    for split in ("calibration", "test"):
        prompts += task.prompts(
            model.tokenizer, min(n, sizes[split]), seed=SEED, split=split, shots=shots, fewer=True
        )
    random.Random(SEED).shuffle(prompts)
    return prompts[:n]


def answerers(
    model: sl.Model, prompts: Sequence[sl.Prompt], keeps: Sequence[str], layers: Sequence[int]
) -> list[Spade]:
    """SPADE with every keep set."""
    rules = keep_sets(model, list(prompts), list(keeps), layers)
    return [Spade(model, keep=rule, name=name) for name, rule in rules.items()]


def measured(
    model: sl.Model,
    prompts: Sequence[sl.Prompt],
    spades: Sequence[Spade],
    folder: Path,
    *,
    layers: Sequence[int],
    run: bool = True,
) -> list[ExitTable]:
    """Tables of every keep set with the residuals at the answer, and with its own check.

    Without ``run`` they are of the prompts that are measured already. The residuals are the
    features of a check by the logit lens, so that every lens that reads nothing else can be checked
    afterwards; see :func:`with_check`.

    Raises:
        RuntimeError: If what was measured before is of other prompts, keep sets or layers.
    """
    found: list[list[ExitTable]] = []
    starts = range(0, len(prompts), PART)
    for i, start in enumerate(starts):
        place, some = folder / str(i), prompts[start : start + PART]
        # Pools of other sizes mix the same prompts otherwise.
        of = content_sha256([some, [spade.name for spade in spades], list(layers)])
        if not is_done(place, of):
            if not run:
                break
            new = exit_tables(
                model,
                some,
                [Confidence(sl.lenses.LogitLens(model), features=_residual), OWN],
                answerers=spades,
                layers=layers,
                checkpoint=place / "unfinished",
            )
            for k, table in enumerate(new):
                table.save(place / str(k))
            write_json(place / "done.json", {"of": of, "tables": len(new)})
        n = read_json(place / "done.json")["tables"]
        found.append([ExitTable.load(place / str(k)) for k in range(n)])
    return [joined(same) for same in zip(*found, strict=True)]


def of_demonstrations(
    model: sl.Model,
    task: DecisionTask,
    prompts: Sequence[sl.Prompt],
    n: int,
    folder: Path,
    *,
    run: bool = True,
) -> ExitTable | None:
    """The full model's table on the same queries with half of the demonstrations.

    These cost about what the rules leave; early_exit_rules.py mixes them with all.
    """
    shots = task.shots // 2
    place, of = folder / f"shots-{shots}", content_sha256(prompts)
    if not is_done(place, of):
        if not run:
            return None
        shorter = pool(model, task, n, shots=shots)[: len(prompts)]
        if [p.target for p in shorter] != [p.target for p in prompts]:
            raise RuntimeError(f"{task.name}: other queries with {shots} demonstrations.")
        [table] = exit_tables(
            model,
            shorter,
            "logit",
            answerers="logit",
            layers=[0],
            checkpoint=place / "unfinished",
        )
        table.save(place)
        write_json(place / "done.json", {"of": of})
    return ExitTable.load(place)


def is_done(place: Path, of: str) -> bool:
    """Say whether a folder holds finished tables.

    Raises:
        RuntimeError: If they are of something else.
    """
    if not (place / "done.json").exists():
        return False
    if read_json(place / "done.json").get("of") != of:
        raise RuntimeError(f"{place} holds tables of other prompts; move it away.")
    return True


def fitted(
    model: sl.Model, task: DecisionTask, spade: Spade, folder: Path, *, run: bool = True
) -> list[Confidence]:
    """Checks by lenses that are fitted to the task; none where they are not, without ``run``.

    The first predicts what SPADE reads with its keep set, the second the right candidate.
    """
    ways: dict[str, dict[str, Any]] = {
        "task-l-spade": {"keep": spade.rule},
        "candidate-head": {"target": "right"},
    }
    found = []
    for name, options in ways.items():
        place = folder / name
        if not (place / "lens.json").exists():
            if not run:
                return []
            most = min(LEARN, task.split_sizes()["train"])
            learn = task.prompts(model.tokenizer, most, seed=SEED, split="train", fewer=True)
            sl.fit("candidates", model, learn, layers=layers_of(model), **options).save(place)
        found.append(Confidence(load_lens(place, model), features=gate_features))
    return found


@one_call()
def screened(
    own: ExitTable,
    cheap: ExitTable,
    model: sl.Model,
    prompts: Sequence[sl.Prompt],
    spade: Spade,
    check: Confidence,
) -> ExitTable:
    """The table of SPADE's own check after a cheaper one, of the tables of both."""
    model.expect_rows(len(prompts))
    return replace(
        own,
        check=check.name,
        screen=cheap.confidence,
        screen_answer=cheap.check_answer,
        prices=price(Costs(model, AnswerHead(model)), prompts, own.layers, check, spade),
        words=own.words | cheap.words,
    )


def _residual(finals: Tensor, logits: Tensor) -> Tensor:
    return finals


@one_call()  # one look at the model, and the start token stored for many rows, as in a pass
def with_check(
    table: ExitTable,
    model: sl.Model,
    prompts: Sequence[sl.Prompt],
    spade: Spade,
    check: Confidence,
) -> ExitTable:
    """The table of another check, by a lens that reads at the answer alone.

    Args:
        table: Of the check with the residuals, for the keep set of ``spade``.
        model: The model.
        prompts: The table's prompts.
        spade: What answers.
        check: What is checked.
    """
    head, n = AnswerHead(model), len(prompts)
    model.expect_rows(n)
    residuals = Residuals(
        stack=table.features.to(model.dtype),
        layers=table.layers,
        prompt=torch.arange(n),
        position=torch.tensor([p.answer for p in prompts]),
        prompts=tuple(prompts),
    )
    readings = [
        Reading(i, p.answer, keep_of(check.lens, p, p.answer)) for i, p in enumerate(prompts)
    ]
    finals = finals_of(check.lens, residuals, readings, table.layers)
    with torch.no_grad():
        read = [head.read(at_layer, prompts, check) for at_layer in finals]
    answers = torch.stack([one.answer for one in read])
    words = table.words | words_of(model, answers.flatten())
    return replace(
        table,
        check=check.name,
        confidence=torch.stack([one.confidence for one in read]),
        features=torch.stack([one.features for one in read]),
        check_answer=answers,
        prices=price(Costs(model, head), prompts, table.layers, check, spade),
        words=words,
    )


def joined(parts: Sequence[ExitTable]) -> ExitTable:
    """One table of several of the same check, keep set and layers."""
    values: dict[str, Any] = {}
    for field in fields(ExitTable):
        given = [getattr(part, field.name) for part in parts]
        if field.name == "words":
            values["words"] = {token: word for words in given for token, word in words.items()}
        elif field.name == "logprobs":
            width = max(one.shape[-1] for one in given)
            given = [_widened(one, width) for one in given]
            values["logprobs"] = torch.cat(given, dim=1)
        elif isinstance(given[0], Tensor):
            values[field.name] = torch.cat(given, dim=min(given[0].ndim - 1, 1))
    tensors = {
        f.name: torch.cat([getattr(part.prices, f.name) for part in parts], dim=-1)
        for f in fields(Prices)
        if isinstance(getattr(parts[0].prices, f.name), Tensor)
    }
    return replace(parts[0], prices=replace(parts[0].prices, **tensors), **values)


def _widened(logprobs: Tensor, width: int) -> Tensor:
    missing = width - logprobs.shape[-1]
    return torch.nn.functional.pad(logprobs, (0, missing), value=-torch.inf)
