"""The experiments on rule vectors themselves: their geometry, and what can be read in them."""

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
from spade_lens.icl.vectors import RuleVectors
from spade_lens.models.model import Model
from spade_lens.prompts.prompt import Prompt
from spade_lens.report.grid import grid, spread
from spade_lens.stats.summary import summarise
from spade_lens.studies.icl.likeness import beside_others, capture_vectors
from spade_lens.studies.icl.plan import numbered
from spade_lens.studies.icl.study import Found, Study
from spade_lens.tasks.episodes import Episode
from spade_lens.tensors import mean_by_label

_TOP = 5
_FOLDS = 5
_OF_INPUT = "class of the input"
_PARTS = ("rule", "label", "demo", "rule x label")
"""Whose first components are drawn. With two classes the last one is the class of the input."""


def geometry(study: Study) -> Found:
    """How alike rule vectors are, what probes tell, and what their variance depends on.

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
        every = tuple(sorted({*layers, *some_layers}))
        return RuleVectors(capture_vectors(study, prompts, every), layers=every)

    tables = {
        "": study.parts(
            "convergence",
            ["all"],
            lambda _: convergence(vectors().at(layers), rule=rule, label=label, seed=seed),
            layers=layers,
        )
    }
    figures = {"": plots.plot(tables[""], "convergence")}
    if label is None and plan.shots > 1:  # mappings are each other's control, word pairs have none
        tables["others"] = study.parts(
            "convergence-beside-others",
            ["all"],
            lambda _: beside_others(study, vectors().at(layers).tensor, layers),
            layers=layers,
        )
        figures["others"] = plots.plot(tables["others"], "convergence_beside_others")
    classes = {"rule": rule} if len(rule.unique()) > 1 else {}
    if label is not None:
        classes["label"] = label
        if plan.classes is not None:
            classes[_OF_INPUT] = _of_inputs(plan.episodes, plan.classes)
    if classes:
        tables["probes"] = _probes(study, classes, some_layers, vectors)
        figures["probes"] = plots.plot(tables["probes"], "probes")
    if label is not None:
        tables["factors"] = study.parts(
            "factors",
            ["all"],
            lambda _: factor_variance(vectors().at(layers), rule=rule, label=label, seed=seed),
            layers=layers,
        )
        figures["factors"] = plots.plot(tables["factors"], "factors")
        tables["projections"] = study.parts(
            "projections",
            ["all"],
            lambda _: factor_projections(
                vectors().at(some_layers), rule=rule, label=label, parts=_PARTS, seed=seed
            ),
            layers=some_layers,
        )
        figures["projections"] = _projections(study, tables)
    return Found(tables, figures, _geometry_text(tables, layers))


def _projections(study: Study, tables: dict[str, pd.DataFrame]) -> Figure:
    """At the layer where most of the variance is the rule's, as far as halves agree on it."""
    episodes, frame, factors = study.plan.episodes, tables["projections"], tables["factors"]
    shares = factors[factors["layer"].isin(frame["layer"]) & (factors["factor"] == "rule")]
    agreed = shares.sort_values("held_out")["layer"].tolist()
    rules = list(dict.fromkeys(e.rule for e in episodes))
    named = frame.assign(
        rule=[rules[i] for i in frame["rule"]],
        label=[episodes[0].labels[i] for i in frame["label"]],
    )
    layer = agreed[-1] if agreed else int(frame["layer"].iloc[0])  # of one rule there is no share
    return plots.plot(named, "projections", layer=layer)


def _of_inputs(episodes: Sequence[Episode], of_word: Mapping[str, str]) -> Tensor:
    """The class of every demonstration's input [batch demo], from 0."""
    keys = {key: i for i, key in enumerate(dict.fromkeys(of_word.values()))}
    return torch.tensor([[keys[of_word[word]] for word, _ in e.demonstrations] for e in episodes])


def _inputs(episodes: Sequence[Episode]) -> Tensor:
    """The input of every demonstration [batch demo], from 0."""
    shown = [[word for word, _ in e.demonstrations] for e in episodes]
    number = {word: i for i, word in enumerate(dict.fromkeys(w for row in shown for w in row))}
    return torch.tensor([[number[word] for word in row] for row in shown])


def _probes(
    study: Study,
    classes: dict[str, Tensor],
    layers: Sequence[int],
    vectors: Callable[[], RuleVectors],
) -> pd.DataFrame:
    parts = {f"{name.split()[0]}-{layer:03}": (name, layer) for name in classes for layer in layers}
    words = _inputs(study.plan.episodes)
    by_word = {"words": words, "folds": min(_FOLDS, len(words.unique()))}

    def make(part: str) -> pd.DataFrame:
        name, layer = parts[part]
        # Words known by heart are no class: those tested are others than those fitted.
        options: dict[str, Any] = by_word if name == _OF_INPUT else {"folds": _FOLDS}
        frame = probe(vectors().at(layer), classes[name], seed=study.plan.seed, **options)
        return frame.assign(probed=name)

    return study.parts("probes", list(parts), make, by_word=_OF_INPUT)


def _geometry_text(tables: dict[str, pd.DataFrame], layers: Sequence[int]) -> str:
    some = spread(layers)
    alike = tables[""][tables[""]["layer"].isin(some)]
    kind = alike["control"].map({False: "", True: "rules shuffled"})
    text = [
        "Mean cosine similarity of rule vectors, the mean of all taken off, by layer",
        grid(alike.assign(control=kind), ["labels", "comparison", "control"], "layer", signed=True),
    ]
    if "others" in tables:
        beside = tables["others"]
        text += [
            "Beside the same words without the rule, and beside another task, by layer",
            grid(
                beside[beside["layer"].isin(some)],
                ["center", "prompts", "comparison"],
                "layer",
                signed=True,
            ),
        ]
    if "probes" in tables:
        probes = tables["probes"]
        probes = probes[probes["layer"].isin(spread(probes["layer"].tolist()))]
        kind = probes["control"].map({False: "", True: "classes shuffled"})
        text += [
            "Accuracy of linear probes on prompts that they were not fitted on, and, for the class "
            "of the input, on other words, by layer",
            grid(probes.assign(control=kind), ["probed", "control"], "layer"),
        ]
    if "factors" in tables:
        factors = tables["factors"][tables["factors"]["layer"].isin(some)]
        shown = factors.assign(
            mean=factors["share"], low=factors["control_low"], high=factors["control_high"]
        )
        text += [
            "Shares of variance, by layer, with the interval of shuffled vectors",
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


def reading(study: Study) -> Found:
    """What SPADE, the logit lens and a patchscope read in rule vectors, and in their means."""
    model, plan, layers = study.model, study.plan, study.some_layers()
    prompts = study.prompts[: plan.few]

    @cache
    def vectors() -> RuleVectors:
        return RuleVectors(capture_vectors(study, prompts, layers), tuple(layers), tuple(prompts))

    def each(_: str) -> pd.DataFrame:
        frame = decoded_tokens(model, vectors(), top_k=_TOP, seed=plan.seed)
        own = [[_word(model, p, at) for at in p.spans["labels"]] for p in prompts]
        places = list(zip(frame["prompt"], frame["demo"], strict=True))
        words = pd.Series([own[i][demo] for i, demo in places], index=frame.index)
        top = [f"top_{k}" for k in range(1, _TOP + 1) if f"top_{k}" in frame.columns]
        return frame.assign(
            label=words,
            first_is_label=frame["top_1"] == words,
            holds_label=frame[top].eq(words, axis=0).any(axis=1),
        )

    frame = study.parts("reading", ["all"], each, few=plan.few, layers=layers)
    means = study.parts(
        "reading-of-means",
        ["all"],
        lambda _: _of_means(study, vectors().tensor, layers),
        few=plan.few,
        layers=layers,
    )
    summary = pd.concat(
        summarise(frame, value, by=["method", "control", "layer"])
        for value in ("first_is_label", "holds_label")
    )
    first = summary[
        (summary["measure"] == "first_is_label") & summary["layer"].isin(spread(layers))
    ]
    kind = first["control"].map({False: "", True: "random vectors"})
    top = [f"top_{k}" for k in range(1, _TOP + 1) if f"top_{k}" in means.columns]
    words = [
        f"{of:<24} {method:<11} {layer:>3}   {'  '.join(map(repr, tokens))}"
        for of, method, layer, *tokens in means[["of", "method", "layer", *top]].to_numpy().tolist()
    ]
    text = (
        f"{len(prompts)} prompts. How often the top token of a rule vector is the label it stands "
        "at, by layer\n\n"
        f"{grid(first.assign(control=kind), ['method', 'control'], 'layer')}\n\n"
        "The top tokens of mean rule vectors: of what, read by what, layer\n\n"
    ) + "\n".join(words)
    return Found({"": frame, "summary": summary, "means": means}, {}, text)


def _of_means(study: Study, vectors: Tensor, layers: Sequence[int]) -> pd.DataFrame:
    """Readings of the mean rule vector of every label under every rule; of all for word pairs."""
    episodes = study.plan.episodes[: vectors.shape[1]]
    if episodes[0].labels:
        rule, label = numbered(episodes)
        of: dict[str, Tensor] = {}
        for i, name in enumerate(dict.fromkeys(e.rule for e in episodes)):
            mine = rule == i
            means = mean_by_label(vectors[:, mine], label[mine])  # [layer label d_model]
            for j, word in enumerate(episodes[0].labels[: means.shape[1]]):
                of[f"{word}, where {name}"] = means[:, j]
    else:
        of = {"all": vectors.mean(dim=(1, 2))}
    stack = torch.stack(list(of.values()), dim=1)[:, :, None]  # [layer mean 1 d_model]
    frame = decoded_tokens(study.model, RuleVectors(stack, tuple(layers)), top_k=_TOP)
    frame = frame[~frame["control"]].reset_index(drop=True)
    names = list(of)
    return frame.assign(of=[names[i] for i in frame["prompt"]]).drop(columns=["prompt", "demo"])


def _word(model: Model, prompt: Prompt, position: int) -> str:
    """A token's text, as readings give it."""
    return str(model.tokenizer.decode([prompt.tokens[position]]))
