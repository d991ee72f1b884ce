"""Which tokens to keep past the exit: a family of keep sets, and how to learn more of them.

The paper keeps the start token and the answer token. A prompt's rule may sit at the labels of its
demonstrations and its question at the query. Keeping those lets the exit come earlier, at the
price of a longer tail. Everything here is ours. A keep set is chosen once, on calibration prompts,
by places that mean the same in every prompt ("the last label"), never by position.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from einops import reduce
from jaxtyping import Float
from torch import Tensor

from spade_lens.checks import as_several
from spade_lens.lenses.answers import own_answers, read_answers
from spade_lens.lenses.keep import Keep, KeepRule, Place, last_labels, name_of
from spade_lens.lenses.lens import Reading
from spade_lens.lenses.spade import Spade
from spade_lens.models.model import Model
from spade_lens.models.residuals import capture
from spade_lens.prompts.prompt import Prompt
from spade_lens.settings import Settings, progress_bar, scoped

KeepsLike = KeepRule | str | Sequence[str | KeepRule] | Mapping[str, KeepRule]
"""A keep rule, several by name, names of keep sets, or ``"auto"`` for :func:`keep_family`."""

LEARNED = re.compile(r"(attention|learned) ([1-9]\d*)")
"""Names of keep sets that are ranked or learned on calibration prompts, with their sizes."""

_LEARN_FROM = 16
"""Keep sets are learned from so many prompts."""


def keep_sets(
    model: Model, prompts: Sequence[Prompt], keep: KeepsLike, layers: Sequence[int]
) -> dict[str, KeepRule]:
    """Return the keep sets that were asked for, by name; sets are learned for the middle layer."""
    named = named_keeps(prompts, keep)
    return {name: rule or _learned(model, prompts, name, layers) for name, rule in named.items()}


def named_keeps(prompts: Sequence[Prompt], keep: KeepsLike) -> dict[str, KeepRule | None]:
    """Return the keep sets that were asked for, by name; None for those that are learned."""
    rules: dict[str, KeepRule | None]
    if isinstance(keep, Mapping):
        rules = dict(keep)
    elif not callable(keep) and (given := [keep] if isinstance(keep, str) else as_several(keep)):
        family = keep_family(prompts)
        names = list(family) if given == ["auto"] else given
        texts = [str(one) for one in names if not callable(one)]
        unknown = [n for n in texts if n not in family and not LEARNED.fullmatch(n)]
        if unknown:
            raise ValueError(
                f"There is no keep set {unknown}. Expected 'auto' for the whole family, rules "
                f"such as Keep(last=8), or, of these prompts, some of {list(family)}, "
                "'attention N' and 'learned N'."
            )
        rules = {}
        for one in names:
            name, rule = (name_of(one), one) if callable(one) else (one, family.get(one))
            if rules.setdefault(name, rule) != rule:
                raise ValueError(
                    f"Two keep rules are called {name!r}. Give rules by name: "
                    "keep={'mine': rule, 'other': ...}."
                )
    elif callable(keep):
        rules = {name_of(keep): keep}
    else:
        raise TypeError(
            f"keep={keep!r} was given; expected 'auto', a rule such as Keep(last=8), names of "
            "keep sets, or rules by name."
        )
    if not rules or not all(rule is None or callable(rule) for rule in rules.values()):
        raise ValueError(f"keep={keep!r} was given; expected at least one rule such as Keep().")
    return rules


def _learned(model: Model, prompts: Sequence[Prompt], name: str, layers: Sequence[int]) -> KeepRule:
    kind, size = name.split()
    first, middle = prompts[:_LEARN_FROM], layers[len(layers) // 2]
    if kind == "attention":
        return replace(attention_keep(model, first, size=int(size), layer=middle), name=name)
    return replace(greedy_keep(model, first, size=int(size), layers=[middle])[-1], name=name)


def keep_family(prompts: Sequence[Prompt]) -> dict[str, KeepRule]:
    """Return the keep sets worth trying on prompts, by name, fewest tokens first.

    Returns:
        ``start+answer`` (the paper's); ``last w`` for w = 2 to 32; ``query``; ``labels``;
        ``query+last k labels`` for k = 1, 2, 4; ``query+labels``. All hold the start token and
        the answer token.
    """
    shared = _shared_spans(prompts)
    family: dict[str, KeepRule] = {"start+answer": Keep()}
    family |= {f"last {w}": Keep(last=w) for w in (2, 4, 8, 16, 32)}
    family |= {span: Keep(spans=(span,)) for span in ("query", "labels") if span in shared}
    if {"query", "labels"} <= shared:
        for k in (1, 2, 4):
            family[f"query+last {k} labels"] = last_labels(k, query=True)
        family["query+labels"] = Keep(spans=("query", "labels"))
    return family


@scoped
def greedy_keep(
    model: Model,
    prompts: Sequence[Prompt],
    *,
    size: int,
    layers: Sequence[int],
    settings: Settings | None = None,
) -> list[Keep]:
    """Learn keep sets of 1 to ``size`` places: greedy forward selection.

    The search starts with start and answer token. Each step adds the place that raises the score
    most. The score is the log-probability that SPADE gives the full model's own answer (its
    likeliest candidate or token), the mean over prompts and layers. Agreement would not do: it
    stays zero until several tokens are there together. No targets are used. Places are those that
    all prompts have: in spans without a ``/`` in their name, and among the last 16 tokens.
    """
    places = common_places(prompts, size)
    residuals = capture(model, prompts, layers=[*layers, model.n_layers])
    spade = Spade(model)
    own = own_answers(model, residuals.at_answers(model.n_layers), prompts).choice
    path: list[Keep] = []
    chosen: tuple[Place, ...] = ()
    for _ in progress_bar(range(size), desc="greedy keep", unit="token", model=model):
        options = [place for place in places if place not in chosen]
        readings = [
            Reading(i, prompt.answer, Keep(places=(*chosen, place))(prompt, prompt.answer))
            for place in options
            for i, prompt in enumerate(prompts)
        ]
        of = [reading.prompt for reading in readings]
        finals = spade.final_residuals(residuals, readings, sorted(set(layers)))
        logprobs = torch.stack(
            [
                read_answers(model, rows, [prompts[i] for i in of], tokens=own[of]).option_logprob
                for rows in finals
            ]
        )
        scores = reduce(logprobs, "layer (option prompt) -> option", "mean", option=len(options))
        chosen = (*chosen, options[int(scores.argmax())])
        path.append(Keep(places=chosen))
    return path


def attention_keep(model: Model, prompts: Sequence[Prompt], *, size: int, layer: int) -> Keep:
    """Return the places that the answer token attends to most above a layer.

    Places are ranked by the attention weight that the answer token gives them in the full model,
    the mean over blocks from ``layer`` up, heads and prompts. Indirect paths to the answer token
    are not counted.
    """
    places = common_places(prompts, size)
    if not 0 <= layer < model.n_layers:
        raise ValueError(
            f"layer={layer} was given; expected a layer from 0 to {model.n_layers - 1}."
        )
    score = torch.zeros(len(places))
    for prompt in prompts:
        weights = _attention(model, prompt, layer)
        for i, place in enumerate(places):
            kept = {*Keep(places=(place,))(prompt, prompt.answer)} - {0, prompt.answer}
            # A whole span counts by its mean token, because it costs by the token.
            score[i] += weights[sorted(kept)].mean() if kept else 0
    ranked = score.argsort(descending=True, stable=True)[:size].tolist()
    return Keep(places=tuple(places[i] for i in ranked))


def _attention(model: Model, prompt: Prompt, layer: int) -> Float[Tensor, " pos"]:
    """Return attention weights of the answer token: the sum over blocks, the mean over heads."""
    weights = torch.zeros(prompt.answer + 1)

    def add(pattern: Tensor, hook: object) -> None:
        of_answer = pattern[0, :, prompt.answer, : prompt.answer + 1]  # [head pos]
        weights.add_(of_answer.float().mean(dim=0).cpu())

    blocks = range(layer, model.n_layers)
    with model.hooks([(f"blocks.{b}.attn.hook_pattern", add) for b in blocks]):
        capture(model, [prompt], layers=[model.n_layers], positions=[[prompt.answer]])
    return weights


def common_places(prompts: Sequence[Prompt], size: int) -> list[Place]:
    """Return the single tokens that all prompts have, counted from the ends of spans."""
    # Spans first: of two names for the same tokens, a span's says more.
    lengths = {
        span: min(len(p.spans[span]) for p in prompts)
        for span in sorted(_shared_spans(prompts))
        if "/" not in span
    }
    lengths[""] = min(16, *(p.answer + 1 for p in prompts))
    places: dict[tuple[tuple[int, ...], ...], Place] = {}
    for span, length in lengths.items():
        for index in range(-1, -length - 1, -1):
            rule = Keep(places=((span, index),))
            kept = tuple(rule(p, p.answer) for p in prompts)
            if all(len(k) > 2 for k in kept):  # neither start nor answer token
                places.setdefault(kept, (span, index))
    if not 1 <= size <= len(places):
        raise ValueError(f"size={size} was given; expected 1 to {len(places)} places.")
    return list(places.values())


def _shared_spans(prompts: Sequence[Prompt]) -> set[str]:
    return set(prompts[0].spans).intersection(*(p.spans for p in prompts))
