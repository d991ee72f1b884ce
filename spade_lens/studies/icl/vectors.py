"""The experiments on rule vectors: their geometry, and the tokens decoded from them."""

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor

from spade_lens import plots
from spade_lens.icl.decoded_tokens import decoded_tokens
from spade_lens.icl.geometry.convergence import convergence
from spade_lens.icl.geometry.dpca import factor_variance
from spade_lens.icl.geometry.dpca_projections import factor_projections
from spade_lens.icl.geometry.probes import probe
from spade_lens.icl.vectors import RuleVectors, rule_vectors
from spade_lens.models.model import Model
from spade_lens.prompts.prompt import Prompt
from spade_lens.report.tables import grid, spread
from spade_lens.stats.summary import summarise
from spade_lens.studies.base import Findings
from spade_lens.studies.icl.plan import IclPlan
from spade_lens.studies.icl.registry import experiment
from spade_lens.studies.icl.study import IclStudy
from spade_lens.tasks.episodes import Episode

_OF_INPUT = "class of the input"
_COMPONENTS = ("rule", "label", "demo", "rule x label")
"""Whose first components are drawn. With two classes the last one is the class of the input."""


def _check_geometry(plan: IclPlan) -> None:
    """Check that the prompts can tell rule, label and demonstration apart."""
    if not plan.episodes[0].labels:
        return
    rule, label = numbered(plan.episodes)
    nothing = torch.rand(1, *label.shape, 1, generator=torch.Generator().manual_seed(0))
    try:
        factor_variance(nothing, rule=rule, label=label, shuffles=0, seed=plan.seed)
    except ValueError as error:
        raise ValueError(
            f"samples={len(plan.episodes)} with shots={plan.shots} are too few for the geometry. "
            f"{error}"
        ) from error


@experiment("geometry", check=_check_geometry)
def geometry(study: IclStudy) -> Findings:
    """Measure how alike rule vectors are, what probes tell, and what their variance depends on.

    Rules are the mappings of a task with labels. Word pairs have one rule, so the other task is
    the second there.
    """
    plan, seed = study.plan, study.plan.seed
    labelled = bool(plan.episodes[0].labels)
    prompts = study.prompts if labelled else [*study.prompts, *study.others]
    layers, some_layers = study.all_layers(), study.some_layers()
    if labelled:
        rule, label = numbered(plan.episodes)
    else:
        rule = torch.tensor([0] * len(study.prompts) + [1] * len(study.others))
        label = None

    @cache
    def vectors() -> RuleVectors:
        return rule_vectors(study.model, prompts, layers={*layers, *some_layers})

    def table(name: str, make: Callable[[], pd.DataFrame], layers: Sequence[int]) -> pd.DataFrame:
        return study.parts(name, ["all"], lambda _: make(), layers=layers)

    tables = {
        "": table(
            "convergence",
            lambda: convergence(vectors().at(layers), rule=rule, label=label, seed=seed),
            layers,
        )
    }
    figures = {"": plots.plot(tables[""], "convergence")}
    classes = {"rule": rule} if len(rule.unique()) > 1 else {}
    if label is not None:
        classes["label"] = label
        if plan.classes is not None:
            classes[_OF_INPUT] = _of_inputs(plan.episodes, plan.classes)
    if classes:
        tables["probes"] = _probes(study, classes, some_layers, vectors)
        figures["probes"] = plots.plot(tables["probes"], "probes")
    if label is not None:
        tables["factors"] = table(
            "factors",
            lambda: factor_variance(vectors().at(layers), rule=rule, label=label, seed=seed),
            layers,
        )
        figures["factors"] = plots.plot(tables["factors"], "factors")
        tables["projections"] = table(
            "projections",
            lambda: factor_projections(
                vectors().at(some_layers), rule=rule, label=label, parts=_COMPONENTS, seed=seed
            ),
            some_layers,
        )
        figures["projections"] = _projections(plan.episodes, tables)
    return Findings(tables, figures, _text(tables, layers))


def numbered(episodes: Sequence[Episode]) -> tuple[Tensor, Tensor]:
    """Return every episode's rule [batch] and every demonstration's label [batch demo], from 0."""
    rules = {rule: i for i, rule in enumerate(dict.fromkeys(e.rule for e in episodes))}
    labels = {label: i for i, label in enumerate(episodes[0].labels)}
    return (
        torch.tensor([rules[e.rule] for e in episodes]),
        torch.tensor([[labels[output] for _, output in e.demonstrations] for e in episodes]),
    )


def _projections(episodes: Sequence[Episode], tables: dict[str, pd.DataFrame]) -> Figure:
    """Draw the layer at which most of the variance is the rule's, as far as halves agree on it."""
    frame, factors = tables["projections"], tables["factors"]
    of_rule = factors[factors["layer"].isin(frame["layer"]) & (factors["factor"] == "rule")]
    ordered = of_rule.sort_values("held_out")["layer"].tolist()
    rules = list(dict.fromkeys(e.rule for e in episodes))
    named = frame.assign(
        rule=[rules[i] for i in frame["rule"]],
        label=[episodes[0].labels[i] for i in frame["label"]],
    )
    layer = ordered[-1] if ordered else int(frame["layer"].iloc[0])  # one rule has no share
    return plots.plot(named, "projections", layer=layer)


def _of_inputs(episodes: Sequence[Episode], of_word: Mapping[str, str]) -> Tensor:
    """Return the class of every demonstration's input [batch demo], from 0."""
    keys = {key: i for i, key in enumerate(dict.fromkeys(of_word.values()))}
    return torch.tensor([[keys[of_word[word]] for word, _ in e.demonstrations] for e in episodes])


def _inputs(episodes: Sequence[Episode]) -> Tensor:
    """Return the input of every demonstration [batch demo], from 0."""
    shown = [[word for word, _ in e.demonstrations] for e in episodes]
    number = {word: i for i, word in enumerate(dict.fromkeys(w for row in shown for w in row))}
    return torch.tensor([[number[word] for word in row] for row in shown])


def _probes(
    study: IclStudy,
    classes: dict[str, Tensor],
    layers: Sequence[int],
    vectors: Callable[[], RuleVectors],
) -> pd.DataFrame:
    plan = study.plan
    parts = {f"{name.split()[0]}-{layer:03}": (name, layer) for name in classes for layer in layers}
    words = _inputs(plan.episodes)
    by_word = {"words": words, "folds": min(plan.folds, len(words.unique()))}

    def make(part: str) -> pd.DataFrame:
        name, layer = parts[part]
        # Tested on words that it was not fitted on: words known by heart are no class.
        options: dict[str, Any] = by_word if name == _OF_INPUT else {"folds": plan.folds}
        frame = probe(vectors().at(layer), classes[name], seed=plan.seed, **options)
        return frame.assign(probed=name)

    return study.parts("probes", list(parts), make, by_word=_OF_INPUT, folds=plan.folds)


def _text(tables: dict[str, pd.DataFrame], layers: Sequence[int]) -> str:
    shown_layers = spread(layers)
    alike = tables[""][tables[""]["layer"].isin(shown_layers)]
    text = [
        "Mean cosine similarity of rule vectors, the mean of all taken off, by layer",
        grid(
            alike,
            ["labels", "comparison", "control"],
            "layer",
            control="rules shuffled",
            signed=True,
        ),
    ]
    if "probes" in tables:
        probes = tables["probes"]
        probes = probes[probes["layer"].isin(spread(probes["layer"].tolist()))]
        text += [
            "Accuracy of linear probes on prompts that they were not fitted on, and, for the class "
            "of the input, on other words, by layer",
            grid(probes, ["probed", "control"], "layer", control="classes shuffled"),
        ]
    if "factors" in tables:
        factors = tables["factors"][tables["factors"]["layer"].isin(shown_layers)]
        shown = factors.assign(
            mean=factors["fraction"], low=factors["control_low"], high=factors["control_high"]
        )
        text += [
            "Fractions of the variance, by layer, with the interval of shuffled vectors",
            grid(shown, ["factor"], "layer"),
            "What two halves of the prompts agree on",
            grid(
                factors.dropna(subset=["held_out"]).assign(
                    mean=factors["held_out"], low=float("nan"), high=float("nan")
                ),
                ["factor"],
                "layer",
            ),
        ]
    return "\n\n".join(text)


@experiment("reading")
def reading(study: IclStudy) -> Findings:
    """Decode rule vectors by SPADE, the logit lens and a patchscope."""
    model, plan, layers = study.model, study.plan, study.some_layers()
    prompts = study.prompts[: plan.few]

    def decode(_: str) -> pd.DataFrame:
        vectors = rule_vectors(model, prompts, layers=layers)
        frame = decoded_tokens(model, vectors, top_k=plan.top_k, seed=plan.seed)
        labels = [[_word(model, prompt, at) for at in prompt.spans["labels"]] for prompt in prompts]
        places = zip(frame["prompt"], frame["demo"], strict=True)
        words = pd.Series([labels[prompt][demo] for prompt, demo in places], index=frame.index)
        top = [f"top_{k}" for k in range(1, plan.top_k + 1) if f"top_{k}" in frame.columns]
        return frame.assign(
            label=words,
            first_is_label=frame["top_1"] == words,
            holds_label=frame[top].eq(words, axis=0).any(axis=1),
        )

    frame = study.parts("reading", ["all"], decode, few=plan.few, layers=layers, top_k=plan.top_k)
    summary = summarise(frame, ("first_is_label", "holds_label"), by=["method", "control", "layer"])
    first = summary[
        (summary["measure"] == "first_is_label") & summary["layer"].isin(spread(layers))
    ]
    text = (
        f"{len(prompts)} prompts. How often the top token of a rule vector is the label at its "
        "position, by layer\n\n"
        f"{grid(first, ['method', 'control'], 'layer', control='random vectors')}"
    )
    return Findings({"": frame, "summary": summary}, text=text)


def _word(model: Model, prompt: Prompt, position: int) -> str:
    """Return a token's text, as readings give it."""
    return model.word(prompt.tokens[position])
