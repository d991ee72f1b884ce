"""The experiment that takes everything away but some positions."""

import pandas as pd

from spade_lens import plots
from spade_lens.icl import piece_units, smallest_sets, sufficiency_map
from spade_lens.icl_study.study import Found, Study
from spade_lens.icl_study.text import grid, spread
from spade_lens.report import prompt_means

SHARE = 0.5
"""Of the full model's lead, what the smallest set must keep: first of two is half luck."""


def sufficiency(study: Study) -> Found:
    """Which positions suffice at which layer, and the smallest sets that do."""
    model, plan = study.model, study.plan
    layers, some_layers = study.all_layers(), study.some_layers()
    frame = study.by_prompts(
        "sufficiency",
        lambda some: sufficiency_map(
            model,
            some,
            layers=layers,
            seed=plan.seed,
            memory_limit=plan.memory_limit,
            progress=study.progress,
        ),
        layers=layers,
    )
    smallest = study.by_prompts(
        "smallest-sets",
        lambda some: smallest_sets(
            model,
            some,
            layers=some_layers,
            units=piece_units,
            share=SHARE,
            seed=plan.seed,
            memory_limit=plan.memory_limit,
            progress=study.progress,
        ),
        n=plan.few,
        layers=some_layers,
    )
    for column in ("kept", "spans"):
        smallest[column] = [" ".join(map(str, value)) for value in smallest[column]]
    by = ["task", "of", "control", "lens", "layer"]
    agreement = prompt_means(frame, "agrees", by=by)
    shown = agreement[agreement["layer"].isin(spread(layers))].rename(columns={"lens": "kept"})
    columns = {"sufficient": "found", "units": "pieces", "tokens": "tokens", "random": "random"}
    means = [
        prompt_means(smallest, value, by=["layer"]).assign(what=name)
        for value, name in columns.items()
        if smallest[value].notna().any()
    ]
    text = (
        "Agreement with the full model where only these positions go on, by layer\n\n"
        f"{grid(shown, ['kept'], 'layer')}\n\n"
        f"The smallest sets of pieces that keep {SHARE:g} of the model's lead ({plan.few} "
        "prompts): whether one was found, its size, and the share of random sets that do it as "
        "well\n\n"
        f"{grid(pd.concat(means), ['layer'], 'what')}"
    )
    tables = {"": frame, "summary": agreement, "smallest": smallest}
    figures = {
        "": plots.plot_sufficiency(frame),
        "accuracy": plots.plot_sufficiency(frame, "correct"),
    }
    return Found(tables, figures, text)
