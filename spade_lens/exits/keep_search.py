"""Which tokens to carry past the exit: a family of keep sets, and how to choose among them.

The paper carries the start token and the answer token. Where a prompt's rule sits at its
demonstrations' labels and its question at the query, carrying those lets the exit come earlier,
at the price of a longer tail. Everything here is ours. A keep set is chosen once, on calibration
prompts, by places that mean the same in every prompt ("the last label"), never by position.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from spade_lens.lenses.answers import own_answers, read_answers
from spade_lens.lenses.keep import Keep, KeepRule, Place, last_labels
from spade_lens.lenses.lens import Reading
from spade_lens.lenses.spade import Spade
from spade_lens.models.model import Model
from spade_lens.models.residuals import capture
from spade_lens.prompts.prompt import Prompt
from spade_lens.settings import Settings, progress_bar, scoped


def keep_family(prompts: Sequence[Prompt]) -> dict[str, KeepRule]:
    """The keep sets worth trying on prompts, by name, fewest tokens first.

    Args:
        prompts: The prompts. The sets that need the spans ``query`` and ``labels`` are there
            only if all prompts have them.

    Returns:
        ``start+answer`` (the paper's); ``last w`` for w = 2 to 32; ``query``; ``labels``;
        ``query+last k labels`` for k = 1, 2, 4; ``query+labels``. All hold the start token and
        the answer token.
    """
    shared = set(prompts[0].spans).intersection(*(p.spans for p in prompts))
    found: dict[str, KeepRule] = {"start+answer": Keep()}
    found |= {f"last {w}": Keep(last=w) for w in (2, 4, 8, 16, 32)}
    if "query" in shared:
        found["query"] = Keep(spans=("query",))
    if "labels" in shared:
        found["labels"] = Keep(spans=("labels",))
    if {"query", "labels"} <= shared:
        for k in (1, 2, 4):
            found[f"query+last {k} labels"] = last_labels(k, query=True)
        found["query+labels"] = Keep(spans=("query", "labels"))
    return found


@scoped
def greedy_keep(
    model: Model,
    prompts: Sequence[Prompt],
    *,
    size: int,
    layers: Sequence[int],
    places: Sequence[Place] | None = None,
    settings: Settings | None = None,
) -> list[Keep]:
    """Learn keep sets of growing size: greedy forward selection of places.

    Beginning with start and answer token, the place is added that raises most the log-probability
    which SPADE gives the full model's own answer (its likeliest candidate or token), the mean
    over prompts and layers. Agreement itself would not do: it is zero and flat before several
    tokens are there together. No targets are used.

    Args:
        model: The model.
        prompts: Calibration prompts.
        size: How many places to add.
        layers: The layers at which the set should serve.
        places: What to choose from; by default every place that all prompts have in spans without
            a ``/`` in their name, and the last 16 tokens.
        settings: Memory limit, batch size and progress; see :class:`spade_lens.Settings`.

    Returns:
        The sets with 1, 2, ... ``size`` places added.

    Raises:
        ValueError: If there are fewer places than ``size``, or prompts or layers do not fit.
    """
    places = _places(prompts) if places is None else list(dict.fromkeys(places))
    if not 1 <= size <= len(places):
        raise ValueError(f"size={size} was given; expected 1 to {len(places)} places.")
    residuals = capture(model, prompts, layers=[*layers, model.n_layers])
    spade = Spade(model)
    last = [residuals.slots(i, [p.answer])[0] for i, p in enumerate(prompts)]
    own = own_answers(model, residuals.layer(model.n_layers)[last], prompts).choice
    path: list[Keep] = []
    chosen: tuple[Place, ...] = ()
    steps = progress_bar(range(size), desc="greedy keep", unit="token")
    for _ in steps:
        options = [place for place in places if place not in chosen]
        keeps = [
            Keep(places=(*chosen, place))(prompt, prompt.answer)
            for place in options
            for prompt in prompts
        ]
        readings = [
            Reading(i % len(prompts), prompts[i % len(prompts)].answer, keep)
            for i, keep in enumerate(keeps)
        ]
        finals = spade.final_residuals(residuals, readings, sorted(set(layers)))
        asked = [prompts[r.prompt] for r in readings]
        right = own[[r.prompt for r in readings]]
        score = torch.zeros(len(readings))
        for at_layer in finals:
            score += read_answers(model, at_layer, asked, tokens=right).option_logprob
        best = int(score.view(len(options), len(prompts)).mean(dim=1).argmax())
        chosen = (*chosen, options[best])
        path.append(Keep(places=chosen))
    return path


def attention_keep(
    model: Model,
    prompts: Sequence[Prompt],
    *,
    size: int,
    layer: int,
    places: Sequence[Place] | None = None,
) -> Keep:
    """The places that the answer token looks at most above a layer.

    Ranked by the attention weight they get from the answer token in the full model, the mean over
    blocks from ``layer`` up, heads and prompts. What reaches the answer token by way of others is
    not seen.

    Args:
        model: The model; its attention patterns come from TransformerLens hooks.
        prompts: Calibration prompts.
        size: How many places to take.
        layer: The layer of the exit.
        places: As in :func:`greedy_keep`.

    Raises:
        ValueError: If there are fewer places than ``size``, or the layer is the last.
    """
    places = _places(prompts) if places is None else list(dict.fromkeys(places))
    if not 1 <= size <= len(places) or not 0 <= layer < model.n_layers:
        raise ValueError(
            f"size={size} and layer={layer} were given; expected 1 to {len(places)} places and a "
            f"layer from 0 to {model.n_layers - 1}."
        )
    score = torch.zeros(len(places))
    for prompt in prompts:
        looks = _looks(model, prompt, layer)
        ordinary = {0, prompt.answer}
        for i, place in enumerate(places):
            kept = [p for p in Keep(places=(place,))(prompt, prompt.answer) if p not in ordinary]
            # A place that is a whole span counts by its mean token, for it costs by the token.
            score[i] += looks[kept].mean() if kept else 0
    ranked = score.argsort(descending=True, stable=True)[:size].tolist()
    return Keep(places=tuple(places[i] for i in ranked))


def _looks(model: Model, prompt: Prompt, layer: int) -> Float[Tensor, " pos"]:
    """Attention weights of the answer token, summed over blocks, the mean over heads."""
    looks = torch.zeros(prompt.answer + 1)

    def look(pattern: Tensor, hook: object) -> None:
        weights = pattern[0, :, prompt.answer, : prompt.answer + 1]
        looks.add_(weights.float().mean(dim=0).cpu())

    blocks = range(layer, model.n_layers)
    with model.hooks([(f"blocks.{b}.attn.hook_pattern", look) for b in blocks]):
        capture(
            model,
            [prompt],
            layers=[model.n_layers],
            positions=[[prompt.answer]],
        )
    return looks


def _places(prompts: Sequence[Prompt]) -> list[Place]:
    """Single tokens that all prompts have, counted from the ends of spans; no two the same."""
    shared = set(prompts[0].spans).intersection(*(p.spans for p in prompts))
    # Spans first: of two names for the same tokens, a span's says more.
    lengths = {
        span: min(len(p.spans[span]) for p in prompts) for span in sorted(shared) if "/" not in span
    }
    lengths[""] = min(16, *(p.answer + 1 for p in prompts))
    found: dict[tuple[tuple[int, ...], ...], Place] = {}
    for span, length in lengths.items():
        for index in range(-1, -length - 1, -1):
            rule = Keep(places=((span, index),))
            kept = tuple(rule(p, p.answer) for p in prompts)
            if all(len(k) > 2 for k in kept):  # neither start nor answer token
                found.setdefault(kept, (span, index))
    return list(found.values())
