"""The experiments on attention: cut edges, saliency of weights, and which heads carry the rule."""

import pandas as pd

from spade_lens import plots
from spade_lens.icl.attention.head_effects import head_effects, top_heads
from spade_lens.icl.attention.heads import head_contributions, head_outputs
from spade_lens.icl.attention.knockout import knockout as cut_edges
from spade_lens.icl.attention.knockout import layer_windows
from spade_lens.icl.attention.saliency import saliency_flows
from spade_lens.icl.patching.function_vectors import NAME, function_vector_sweep
from spade_lens.icl.patching.sweep import MEANS_OF_OTHERS
from spade_lens.icl.setup import PromptSetup
from spade_lens.report.tables import grid
from spade_lens.stats.choose_layer import choose_layer
from spade_lens.stats.summary import summarise
from spade_lens.studies.base import Findings
from spade_lens.studies.icl.demonstrations import measures_text
from spade_lens.studies.icl.plan import IclPlan, rules_of_one_prompt
from spade_lens.studies.icl.registry import experiment
from spade_lens.studies.icl.study import IclStudy


@experiment("knockout")
def knockout(study: IclStudy) -> Findings:
    """Cut edges of attention, and as many random ones: the change of the logit difference."""
    model, seed = study.model, study.plan.seed
    frame = study.by_prompts("knockout", lambda prompts: cut_edges(model, prompts, seed=seed))
    by = ["task", "edges", "control", "start", "stop"]
    summary = summarise(frame, ("change", "logit_diff", "correct", "agrees"), by=by)
    cut = summary[(summary["measure"] == "change") & (summary["edges"] != "nothing")]
    windows = [f"{a} to {b}" for a, b in zip(cut["start"], cut["stop"], strict=True)]
    cut, rows = cut.assign(window=windows), ["edges", "control"]
    shown = grid(cut, rows, "window", control="as many random edges", signed=True)
    text = (
        "Change of the logit difference where edges are cut in the blocks between two layers\n\n"
        f"{shown}"
    )
    figures = {"": plots.plot(frame, "knockout")}
    return Findings({"": frame, "summary": summary}, figures, text)


@experiment("saliency")
def saliency(study: IclStudy) -> Findings:
    """Measure the mean saliency of each flow, by block."""
    model, seed = study.model, study.plan.seed
    frame = study.by_prompts("saliency", lambda prompts: saliency_flows(model, prompts, seed=seed))
    by_block = summarise(frame, "saliency", by=["task", "flow", "control", "block"])
    windows = layer_windows(model.n_layers)[1:]
    window = {b: f"blocks {a} to {z - 1}" for a, z in windows for b in range(a, z)}
    # Saliency has no unit: only ratios of it can be read.
    rest = frame.loc[~frame["control"] & (frame["flow"] == "rest"), "saliency"].mean()
    relative = frame.assign(value=frame["saliency"] / rest, window=frame["block"].map(window))
    means = summarise(relative, "value", by=["flow", "control", "window"])
    text = (
        "Mean saliency of a pair of tokens, in units of the mean of 'rest' over all blocks\n\n"
        f"{grid(means, ['flow', 'control'], 'window', control='random positions as labels')}"
    )
    return Findings({"": frame, "summary": by_block}, {"": plots.plot(frame, "saliency")}, text)


_BLOCKS = 8
"""Blocks of a part on disk."""


def _check_heads(plan: IclPlan) -> None:
    half = plan.episodes[: len(plan.episodes) // 2]
    alone = rules_of_one_prompt(half) or rules_of_one_prompt(plan.episodes)
    if alone or not half:
        raise ValueError(
            f"samples={len(plan.episodes)} are too few to choose heads: a rule "
            f"({(alone or ['any'])[0]!r}) needs at least two prompts in the first half, which "
            "chooses, as means are over the other prompts of a rule. Give more samples."
        )


@experiment("heads", check=_check_heads)
def heads(study: IclStudy) -> Findings:
    """Choose heads and a layer on the first half of the prompts; add their vector in the other."""
    model, plan = study.model, study.plan
    setup = PromptSetup(plan.template, seed=plan.seed)
    # Refuses a model that has no function vectors now, and not once all heads are measured.
    head_contributions(model, head_outputs(model, study.prompts[:1]))
    half = len(plan.episodes) // 2
    n = min(plan.few, half)
    starts = range(0, model.n_layers, _BLOCKS)
    blocks = [range(first, min(model.n_layers, first + _BLOCKS)) for first in starts]
    parts = {f"blocks-{part[0]:03}-{part[-1]:03}": part for part in blocks}
    effects = study.parts(
        "head-effects",
        list(parts),
        lambda part: head_effects(
            model, plan.episodes[:half], n=n, blocks=parts[part], setup=setup
        ),
        few=n,
        means=MEANS_OF_OTHERS,
    )
    means = summarise(effects, "effect", by=["task", "block", "head"])
    chosen = top_heads(effects, min(plan.heads, max(1, len(means) // 4)))
    places = list(zip(means["block"], means["head"], strict=True))
    means["chosen"] = [place in chosen for place in places]
    layers = study.some_layers()
    sweep = study.parts(
        "function-vectors",
        ["all"],
        lambda _: function_vector_sweep(
            model, plan.episodes, chosen, layers=layers, setup=setup
        ).to_frame(),
        heads=chosen,
        layers=layers,
        means=MEANS_OF_OTHERS,
    )
    layer, rest = choose_layer(sweep, NAME)
    at_layer = summarise(rest[rest["layer"].isin([-1, layer])])
    summary = summarise(sweep)
    tables = {
        "": effects,
        "summary": means,
        "vectors": sweep,
        "vectors-summary": summary,
        "chosen": at_layer,
    }
    figures = {
        "": plots.plot(effects, "heads", chosen=chosen),
        "vectors": plots.plot(summary, "patching"),
        "vectors-logit-difference": plots.plot(summary, "patching", measure="logit_diff"),
    }
    best = pd.concat(means[[place == head for place in places]] for head in chosen)
    text = (
        f"The {len(chosen)} heads whose means bring back most of the logit difference where labels "
        f"are shuffled, in {n} of the first {half} prompts\n\n"
        f"{grid(best.assign(what='effect'), ['block', 'head'], 'what', signed=True)}\n\n"
        "Their function vector, added at the layer where the accuracy was highest on the "
        f"first {half} prompts, measured on the other {int(at_layer['n'].iloc[0])}\n\n"
        f"{measures_text(at_layer, ['condition', 'layer'])}"
    )
    return Findings(tables, figures, text)
