"""The experiments that ask what demonstrations do to the answer: shots, patching, contributions."""

import warnings
from collections.abc import Sequence
from dataclasses import replace

import pandas as pd

from spade_lens import plots
from spade_lens.icl.patching.conditions import Condition, default_conditions
from spade_lens.icl.patching.contributions import Coalitions, measure_contributions
from spade_lens.icl.patching.sweep import MEANS_OF_OTHERS, patch_sweep
from spade_lens.icl.setup import PromptSetup
from spade_lens.icl.shots import accuracy_by_shots
from spade_lens.report.tables import grid, spread
from spade_lens.stats.choose_layer import choose_layer
from spade_lens.stats.summary import summarise
from spade_lens.studies.base import Findings
from spade_lens.studies.icl.plan import IclPlan, rules_of_one_prompt
from spade_lens.studies.icl.registry import experiment
from spade_lens.studies.icl.study import IclStudy


@experiment("shots")
def shots(study: IclStudy) -> Findings:
    """Accuracy after 0, 1, 2, 4, ... demonstrations."""
    plan = study.plan
    numbers = sorted({0, plan.shots, *(2**i for i in range(plan.shots.bit_length()))})
    numbers = [number for number in numbers if number <= plan.shots]

    def make(_: str) -> pd.DataFrame:
        return accuracy_by_shots(
            study.model,
            [plan.chosen_task],
            n=len(plan.episodes),
            shots=numbers,
            setup=PromptSetup(plan.template, seed=plan.seed),
        )

    frame = study.parts("shots", ["all"], make)
    summary = summarise(frame, by=("task", "shots"))
    figures = {
        "": plots.plot(summary, "by_shots"),
        "preference": plots.plot(summary, "by_shots", measure="preference", chance=plan.chance),
    }
    return Findings({"": frame, "summary": summary}, figures, measures_text(summary, ["shots"]))


def _check_patching(plan: IclPlan) -> None:
    alone = rules_of_one_prompt(plan.episodes)
    if alone:
        raise ValueError(
            f"samples={len(plan.episodes)} holds a single prompt of the rule {alone[0]!r}; "
            "patching takes means over the other prompts of a rule. Give more samples."
        )


@experiment("patching", check=_check_patching)
def patching(study: IclStudy) -> Findings:
    """All conditions at all layers; reported at layers that other prompts chose."""
    plan = study.plan
    conditions = default_conditions(plan.episodes, other=plan.other_episodes)
    with warnings.catch_warnings():
        # Said once for all experiments already.
        warnings.filterwarnings("ignore", message="On task .* nothing to explain")
        frame = patch_sweep(
            study.model,
            plan.episodes,
            conditions=conditions,
            layers=study.all_layers(),
            setup=PromptSetup(plan.template, seed=plan.seed),
            folder=study.folder(
                "patching",
                conditions=[condition.to_json() for condition in conditions],
                means=MEANS_OF_OTHERS,
            ),
        ).to_frame()
    summary = summarise(frame)
    chosen = summarise(at_chosen_layers(frame, conditions))
    n = int(chosen["n"].iloc[0])
    text = (
        f"At the layer where the accuracy was highest on the first {len(plan.episodes) - n}"
        f" prompts, measured on the other {n}. A control is at its condition's layer.\n\n"
        f"{measures_text(chosen, ['condition', 'layer'])}"
    )
    figures = {
        "": plots.plot(summary, "patching"),
        "logit-difference": plots.plot(summary, "patching", measure="logit_diff"),
    }
    return Findings({"": frame, "summary": summary, "chosen": chosen}, figures, text)


def at_chosen_layers(frame: pd.DataFrame, conditions: Sequence[Condition]) -> pd.DataFrame:
    """Every condition's rows at its chosen layer, without the prompts that chose.

    A control stands at the layer of the condition that differs from it in the source alone, or
    it would be the better for a choice of its own.
    """
    own = [condition for condition in conditions if condition.source == "own"]
    rows: list[pd.DataFrame] = []
    for condition in conditions:
        alike = [o for o in own if replace(condition, name=o.name, source="own") == o]
        layer, rest = choose_layer(frame, (alike or [condition])[0].name)
        if not rows:
            rows.append(rest[rest["layer"] < 0])
        rows.append(rest[(rest["condition"] == condition.name) & (rest["layer"] == layer)])
    return pd.concat(rows, ignore_index=True)


@experiment("contributions")
def contributions(study: IclStudy) -> Findings:
    """Leave one out, add one in, Shapley values, and how many demonstrations contribute."""
    plan, layers = study.plan, study.some_layers(5)  # a prompt takes minutes at each
    frame = measure_contributions(
        study.model,
        plan.episodes[: plan.few],
        layers=layers,
        coalitions=Coalitions(seed=plan.seed),
        setup=PromptSetup(plan.template),
        folder=study.folder("contributions", few=plan.few, layers=layers),
    )
    effective = summarise(frame, "effective", by=["task", "layer"])
    by_demo = summarise(frame, "shapley", by=["task", "layer", "demo"])
    columns = {"effective": f"effective of {plan.shots}", "all": "all", "none": "none"}
    once = frame.drop_duplicates(["layer", "prompt"])
    means = [effective.assign(what=columns["effective"])]
    means += [summarise(once, c, by=["layer"]).assign(what=columns[c]) for c in ("all", "none")]
    for same, name in ((True, "Shapley, label is the answer"), (False, "Shapley, another label")):
        some = frame[frame["same_label"] == same]
        if len(some):
            means.append(summarise(some, "shapley", by=["layer"]).assign(what=name))
    text = (
        f"{plan.few} prompts. The logit difference with the rule vectors of all demonstrations and "
        "of none;\nhow many contribute in effect; and the mean share of one demonstration.\n\n"
        f"{grid(pd.concat(means), ['layer'], 'what')}\n\n"
        f"Shapley values by demonstration (0 is the first)\n\n"
        f"{grid(by_demo[by_demo['layer'].isin(spread(layers))], ['demo'], 'layer', signed=True)}"
    )
    tables = {"": frame, "effective-number": effective, "by-demonstration": by_demo}
    figures = {
        "": plots.plot(frame, "contributions"),
        "by-demonstration": plots.plot(frame, "by_demonstration", layers=spread(layers, 6)),
        "effective-number": plots.plot(effective, "effective_number", shots=plan.shots),
    }
    return Findings(tables, figures, text)


def measures_text(summary: pd.DataFrame, rows: Sequence[str]) -> str:
    """Groups downwards, measures across."""
    shown = summary.assign(measure=summary["measure"].replace({"logit_diff": "logit difference"}))
    if "layer" in rows:
        shown["layer"] = shown["layer"].astype(str).replace("-1", "-")
    return grid(shown, rows, "measure")
