"""Fit a linear lens to the decisions of a task: from its prompts, over their candidates.

Ours. By default L-SPADE is fitted to text, to the whole vocabulary and to the paper's keep set. As
the check of an early exit it is read on a task's prompts, over their candidates, beside the keep
set that answers. Here it is fitted to just that. A hundred prompts are few: a ridge shrinks every
map towards its start, and its strength is chosen by folds.
"""

import time
from dataclasses import dataclass
from hashlib import sha256
from os import PathLike
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from spade_lens.lenses.fitting.options import Added, Options, Problem
from spade_lens.lenses.fitting.plan import CandidatePlan
from spade_lens.lenses.fitting.rows import Places, Rows, rows_at
from spade_lens.lenses.linear import AffineMaps, CandidateHead, LinearSpade
from spade_lens.lenses.spade import Spade
from spade_lens.models.identity import run_identity
from spade_lens.models.model import Model
from spade_lens.prompts.prompt import Prompt
from spade_lens.settings import progress_bar
from spade_lens.storage.checkpoint import Checkpoint, kept_folder

_PROMPTS_AT_ONCE = 32
"""Prompts between two savings of what the model says of them."""


def fit_candidates(
    plan: CandidatePlan, model: Model, given: Any, checkpoint: str | PathLike[str] | None
) -> LinearSpade | CandidateHead:
    """Return a lens fitted to prompts' candidates; see :func:`spade_lens.fit`."""
    began = time.monotonic()
    layers, spade = plan.mapped(model), plan.spade(model)
    prompts = _decisions(plan, model, given)
    text = repr([(p.tokens, p.answer, p.candidates, p.target) for p in prompts])
    record = plan.described() | {
        "layers": list(layers),
        "prompts": {"n": len(prompts), "sha256": sha256(text.encode()).hexdigest()},
        "model": run_identity(model),
    }
    stages = Checkpoint(kept_folder(checkpoint, model), record)
    rows = _rows(model, prompts, layers, spade, stages)
    decisions = _Decisions.of(plan, model, prompts, rows)
    name = CandidateHead.kind
    if spade is not None:
        name = spade.name.replace("SPADE", "task L-SPADE", 1)
    fitted: list[Added | None] = []
    ridges: list[float | None] = []
    figures: list[dict[str, Any]] = []
    with progress_bar(total=len(layers), desc="fit", unit="layer", model=model) as bar:
        for i, layer in enumerate(layers):
            problem = decisions.problem(i, layer)
            ridge, unseen = decisions.by_folds(problem)
            ridges.append(ridge)
            fitted.append(None if ridge is None else decisions.solve(problem, ridge))
            figures += decisions.figures(i, layer, {name: unseen, "logit lens": problem.x})
            bar.update()
    stages.clear("rows")
    about = record | {
        "ridge": ridges,
        "held_out": figures,
        "held_out_by": f"{plan.folds} folds, over the candidates",
        "seconds": round(time.monotonic() - began, 1),
    }
    maps = _maps(plan, model, layers, fitted)
    if spade is None:
        return CandidateHead(model, maps, about=about)
    return LinearSpade(model, maps, name=name, about=about)


def _decisions(plan: CandidatePlan, model: Model, given: Any) -> list[Prompt]:
    """Return the prompts, after a look at whether they can be learned from."""
    if given is None:
        raise ValueError(
            "No prompts were given; a fit to candidates learns from prompts of a task, such as "
            "task.prompts(model.tokenizer, 150, split='train')."
        )
    prompts = model.prompts(given)
    least = 2 * plan.folds
    if len(prompts) < least:
        raise ValueError(
            f"{len(prompts)} prompts were given for {plan.folds} folds; expected at least {least}, "
            "and a hundred or more to be good."
        )
    for i, prompt in enumerate(prompts):
        if len(prompt.candidates) < 2:
            raise ValueError(
                f"Prompt {i} has {len(prompt.candidates)} candidates; expected two or more in "
                "every prompt."
            )
        if plan.target == "right" and prompt.target not in prompt.candidates:
            raise ValueError(
                f"Prompt {i} has no target among its candidates, which target='right' needs. Give "
                "prompts with targets, or say target='spade'."
            )
    return prompts


def _rows(
    model: Model,
    prompts: list[Prompt],
    layers: tuple[int, ...],
    spade: Spade | None,
    stages: Checkpoint,
) -> Rows:
    """Return the residuals of the answer positions, some prompts at a time, from where it was."""
    saved = stages.load("rows", model.device)
    parts = [] if saved is None else [Rows(saved["start"], saved["model"], saved.get("spade"))]
    done = sum(len(part.model) for part in parts)
    with progress_bar(
        total=len(prompts), initial=done, desc="learn", unit="prompt", model=model
    ) as bar:
        for first in range(done, len(prompts), _PROMPTS_AT_ONCE):
            some = tuple(prompts[first : first + _PROMPTS_AT_ONCE])
            places = Places(some, tuple((p.answer,) for p in some))
            parts = [Rows.join([*parts, rows_at(model, places, layers, spade)])]
            named = {k: v for k, v in vars(parts[0]).items() if v is not None}
            stages.save("rows", named, now=first + len(some) == len(prompts))
            bar.update(len(some))
    return parts[0]


@dataclass(frozen=True)
class _Decisions:
    """Prompts to learn from, with what the model and SPADE say of them."""

    plan: CandidatePlan
    rows: Rows
    options: Options
    right: Float[Tensor, "row option"]
    fold: Int[Tensor, " row"]

    @classmethod
    def of(
        cls, plan: CandidatePlan, model: Model, prompts: list[Prompt], rows: Rows
    ) -> "_Decisions":
        options = Options.of(model, [p.candidates for p in prompts])
        targets = [-1 if p.target is None else p.target for p in prompts]
        right = (options.ids == torch.tensor(targets, device=model.device)[:, None]).float()
        right = right.masked_fill(options.padding, 0)
        draws = torch.Generator().manual_seed(int(plan.seed))
        order = torch.randperm(len(prompts), generator=draws)
        return cls(plan, rows, options, right, (order % plan.folds).to(model.device))

    @torch.no_grad()
    def problem(self, i: int, layer: int) -> Problem:
        """Return what is to be solved at a layer."""
        x = self.rows.start[i].float()  # [row d_model]
        start = x if self.plan.start is None else self.plan.start.maps(x, layer)
        wanted = self.right
        if self.rows.spade is not None:
            wanted = self.options.logprobs(self.rows.spade[i]).exp()
        return Problem(x, start, self.options, wanted, self.plan.rank or x.shape[1])

    @property
    def _ridges(self) -> list[float]:
        return sorted(map(float, self.plan.ridges), reverse=True)

    def solve(self, problem: Problem, ridge: float) -> Added:
        """Return the map of all rows, on the same path as in the folds."""
        return problem.solve([r for r in self._ridges if r >= ridge])[-1]

    @torch.no_grad()
    def by_folds(self, problem: Problem) -> tuple[float | None, Float[Tensor, "row d_model"]]:
        """Return the best ridge, and what maps with it make of rows they were not fitted to.

        The ridge is None where it is best to add nothing.
        """
        ridges: list[float | None] = [None, *self._ridges]
        unseen = problem.start.repeat(len(ridges), 1, 1)  # [ridge row d_model]
        for fold in range(self.plan.folds):
            held = self.fold == fold
            for n, added in enumerate(problem[~held].solve(self._ridges), start=1):
                unseen[n, held] += added(problem.x[held])
        losses = [float(self.options.loss(one, problem.wanted).mean()) for one in unseen]
        best = losses.index(min(losses))
        return ridges[best], unseen[best]

    @torch.no_grad()
    def figures(self, i: int, layer: int, finals: dict[str, Tensor]) -> list[dict[str, Any]]:
        """Return the records of ``LinearLens.held_out``, over the candidates."""
        references = {"model": self.options.logprobs(self.rows.model)}
        if self.rows.spade is not None:
            references["spade"] = self.options.logprobs(self.rows.spade[i])
            finals = finals | {"SPADE": self.rows.spade[i]}
        records = []
        for name, final in finals.items():
            read = self.options.logprobs(final)
            record: dict[str, Any] = {"layer": layer, "lens": name}
            for of, reference in references.items():
                gap = (reference - read).masked_fill(self.options.padding, 0)
                agrees = reference.argmax(dim=-1) == read.argmax(dim=-1)
                record[f"kl_to_{of}"] = float((reference.exp() * gap).sum(dim=-1).mean())
                record[f"agrees_with_{of}"] = float(agrees.double().mean())
            records.append(record | {"n": len(read)})
        return records


def _maps(
    plan: CandidatePlan, model: Model, layers: tuple[int, ...], fitted: list[Added | None]
) -> AffineMaps:
    """Return the start's maps and what is added to them, as factors where that is smaller."""
    d_model, biases, ups, downs = model.d_model, [], [], []
    for layer, added in zip(layers, fitted, strict=True):
        up = torch.zeros(d_model, 0, device=model.device)
        bias, down = torch.zeros(d_model, device=model.device), up.T
        if plan.start is not None:
            maps = plan.start.maps
            i = maps.layers.index(layer)
            up, bias = maps.up[i], maps.bias[i]
            down = torch.eye(d_model).to(up) if maps.down is None else maps.down[i]
        if added is not None:
            up, down = torch.cat([up, added.up], dim=1), torch.cat([down, added.down])
            bias = bias + added.bias
        biases.append(bias)
        ups.append(up)
        downs.append(down)
    rank = max(1, *(up.shape[1] for up in ups))
    if rank >= d_model:
        whole = torch.stack([up @ down for up, down in zip(ups, downs, strict=True)])
        return AffineMaps(layers, whole, torch.stack(biases))
    padded = [torch.nn.functional.pad(up, (0, rank - up.shape[1])) for up in ups]
    below = [torch.nn.functional.pad(d, (0, 0, 0, rank - len(d))) for d in downs]
    return AffineMaps(layers, torch.stack(padded), torch.stack(biases), torch.stack(below))
