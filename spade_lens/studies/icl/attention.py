"""The experiments on attention: cut edges, and the saliency of weights."""

import pandas as pd

from spade_lens import plots
from spade_lens.icl.attention.knockout import knockout as cut_edges
from spade_lens.icl.attention.knockout import layer_windows
from spade_lens.icl.attention.saliency import saliency_flows
from spade_lens.report.grid import grid
from spade_lens.stats.summary import summarise
from spade_lens.studies.base import Findings
from spade_lens.studies.icl.registry import experiment
from spade_lens.studies.icl.study import IclStudy


@experiment("knockout")
def knockout(study: IclStudy) -> Findings:
    """Cut edges of attention, and as many random ones: the change of the logit difference."""
    model, seed = study.model, study.plan.seed
    frame = study.by_prompts("knockout", lambda prompts: cut_edges(model, prompts, seed=seed))
    by = ["task", "edges", "control", "start", "stop"]
    summary = pd.concat(
        summarise(frame, value, by=by) for value in ("change", "logit_diff", "correct", "agrees")
    )
    cut = summary[(summary["measure"] == "change") & (summary["edges"] != "nothing")]
    windows = [f"{a} to {b}" for a, b in zip(cut["start"], cut["stop"], strict=True)]
    shown = cut.assign(window=windows, control=_named(cut))
    text = (
        "Change of the logit difference where edges are cut in the blocks between two layers\n\n"
        f"{grid(shown, ['edges', 'control'], 'window', signed=True)}"
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
    means["control"] = _named(means, "random positions as labels")
    text = (
        "Mean saliency of a pair of tokens, in units of the mean of 'rest' over all blocks\n\n"
        f"{grid(means, ['flow', 'control'], 'window')}"
    )
    return Findings({"": frame, "summary": by_block}, {"": plots.plot(frame, "saliency")}, text)


def _named(frame: pd.DataFrame, control: str = "as many random edges") -> "pd.Series[str]":
    return frame["control"].map({False: "", True: control})
