"""The experiment that takes everything away but some positions."""

from collections.abc import Sequence

import pandas as pd

from spade_lens import plots
from spade_lens.icl.positions.smallest_sets import smallest_sets
from spade_lens.icl.positions.sufficiency import position_sets, sufficiency_map
from spade_lens.lenses.keep import name_of
from spade_lens.report.tables import grid, spread
from spade_lens.stats.summary import summarise
from spade_lens.studies.base import Findings
from spade_lens.studies.icl.registry import experiment
from spade_lens.studies.icl.study import IclStudy

COPYING = ("query", "query+labels", "query+same labels", "query+other labels")
"""The sets that tell a label copied from a rule carried."""


@experiment("sufficiency")
def sufficiency(study: IclStudy) -> Findings:
    """Which positions suffice at which layer, and the smallest sets that do."""
    model, plan = study.model, study.plan
    layers, some_layers = study.all_layers(), study.some_layers()
    sets = position_sets(study.prompts)  # of all prompts, so that every part has the same
    names = [name_of(rule) for rule in sets]
    frame = study.by_prompts(
        "sufficiency",
        lambda some: sufficiency_map(model, some, sets=sets, layers=layers, seed=plan.seed),
        layers=layers,
        sets=names,
    )
    smallest = study.by_prompts(
        "smallest-sets",
        lambda some: smallest_sets(
            model, some, layers=some_layers, units="pieces", fraction=plan.lead, seed=plan.seed
        ),
        n=plan.few,
        layers=some_layers,
        lead=plan.lead,
    )
    for column in ("kept", "spans"):
        smallest[column] = [" ".join(map(str, value)) for value in smallest[column]]
    by = ["task", "of", "control", "lens", "layer"]
    agreement = summarise(frame, "agrees", by=by)
    shown = agreement[agreement["layer"].isin(spread(layers))].rename(columns={"lens": "kept"})
    columns = {"sufficient": "found", "units": "pieces", "tokens": "tokens", "random": "random"}
    means = [
        summarise(smallest, value, by=["layer"]).assign(what=name)
        for value, name in columns.items()
        if smallest[value].notna().any()
    ]
    text = (
        "Agreement with the full model where only these positions go on, by layer\n\n"
        f"{grid(shown, ['kept'], 'layer')}\n\n"
        f"The smallest sets of pieces that keep {plan.lead:g} of the model's lead ({plan.few} "
        "prompts): whether one was found, its size, and the share of random sets that do it as "
        "well\n\n"
        f"{grid(pd.concat(means), ['layer'], 'what')}"
    )
    figures = {
        "": plots.plot(frame, "sufficiency"),
        "accuracy": plots.plot(frame, "sufficiency", value="correct"),
        "smallest": plots.plot(smallest, "smallest_sets"),
    }
    if set(COPYING) <= set(names):
        figures["copying"] = plots.plot(frame, "sufficiency", value="correct", sets=COPYING)
        text += f"\n\n{_copying(frame, layers)}"
    tables = {"": frame, "summary": agreement, "smallest": smallest}
    return Findings(tables, figures, text)


def _copying(frame: pd.DataFrame, layers: Sequence[int]) -> str:
    """Whether the right answer comes out where it cannot have been copied, as text."""
    some = frame[frame["of"].isin(COPYING) & frame["layer"].isin(spread(layers))]
    accuracy = summarise(some, "correct", by=["of", "control", "lens", "layer"])
    return (
        "Copied, or carried? Accuracy with the labels of the answer's class alone, which may be "
        "copied, and with those of other classes alone, which may not\n\n"
        f"{grid(accuracy.rename(columns={'lens': 'kept'}), ['kept'], 'layer')}"
    )
