"""Do rule vectors of word pairs become alike because of the rule? Beside those of other prompts.

An experiment of its own, ``likeness``, which ``claims.py`` runs with the others.
"""

from collections.abc import Sequence

import pandas as pd
import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor

from spade_lens import icl, plots, stats
from spade_lens.plots.lines import Layout, line_figure
from spade_lens.prompts import Prompt
from spade_lens.studies import Findings, experiment
from spade_lens.studies.icl.study import IclStudy


@experiment("likeness")
def likeness(study: IclStudy) -> Findings:
    """Compare a task's vectors with those of the same words without the rule, and with others.

    Without a rule are prompts whose outputs are shuffled. With nothing taken off, all vectors of a
    layer have much in common. With the mean of vectors without the rule taken off (of a shuffle
    that is not compared), all that is common to prompts with the rule makes them alike.

    Returns:
        A table as :func:`spade_lens.icl.convergence` gives it, with ``prompts`` (whose) and
        ``center`` (what is taken off). Rows of ``"own less shuffled"`` are mean differences of
        the same prompts, with Student's interval.
    """
    layers = study.all_layers()
    frame = study.parts("likeness", ["all"], lambda _: beside_others(study, layers), layers=layers)
    return Findings({"": frame}, {"": plot_likeness(frame)})


@plots.figure(
    "likeness",
    needs=("layer", "comparison", "prompts", "center"),
    source="the likeness experiment of benchmarks/likeness.py",
)
def plot_likeness(frame: pd.DataFrame) -> Figure:
    """Draw the similarity within a prompt beside that without the rule, and across tasks."""
    shown = frame["comparison"].isin(["within a prompt", "across rules"])
    rows = frame[shown & (frame["prompts"] != "own less shuffled")]
    names = {"nothing": "nothing subtracted", "mean of shuffled": "mean of shuffled subtracted"}
    panel = rows["center"].replace(names)
    return line_figure(
        rows.assign(panel=panel, line=rows["prompts"], x=rows["layer"], control=False),
        Layout(ylabel="cosine similarity", height=2.0),
    )


def beside_others(study: IclStudy, layers: Sequence[int]) -> pd.DataFrame:
    n, seed = len(study.prompts), study.plan.seed
    every = icl.rule_vectors(study.model, [*study.prompts, *study.others], layers=layers)
    own, other = every.tensor[:, :n], every.tensor[:, n:]
    shuffled, middle = (
        icl.rule_vectors(study.model, shuffled_prompts(study, seed + first), layers=layers).tensor
        for first in (0, n)
    )
    centers: dict[str, str | Tensor] = {
        "nothing": "none",
        "mean of shuffled": middle.mean(dim=(1, 2)),
    }
    frames = []
    for center, taken in centers.items():
        for prompts, some in {"own": own, "outputs shuffled": shuffled}.items():
            frame = icl.convergence(
                icl.RuleVectors(some, layers=tuple(layers)), center=taken, seed=seed
            )
            frames.append(frame.assign(prompts=prompts, center=center))
    if other.shape[1]:
        task = torch.tensor([0] * n + [1] * other.shape[1])
        across = icl.convergence(every, rule=task, center="none", seed=seed)
        across = across[(across["comparison"] == "across rules") & ~across["control"]]
        frames.append(across.assign(prompts="own and another task's", center="nothing"))
    less = similarity_within(own) - similarity_within(shuffled)
    rows = [
        {"layer": layer, "prompt": i, "less": value}
        for layer, values in zip(layers, less.tolist(), strict=True)
        for i, value in enumerate(values)
    ]
    means = stats.summarise(pd.DataFrame(rows), "less", by=["layer"]).drop(columns="measure")
    paired = means.assign(
        comparison="within a prompt",
        labels="any",
        control=False,
        prompts="own less shuffled",
        center="nothing",
    )
    return pd.concat([*frames, paired], ignore_index=True)


def shuffled_prompts(study: IclStudy, seed: int) -> list[Prompt]:
    plan, tokenizer = study.plan, study.model.tokenizer
    return [
        episode.shuffled(seed + i).prompt(tokenizer, template=plan.template)
        for i, episode in enumerate(plan.episodes)
    ]


def similarity_within(vectors: Float[Tensor, "layer batch demo d_model"]) -> Tensor:
    """Every prompt's mean cosine similarity of two of its vectors [layer batch]."""
    whole = torch.nn.functional.normalize(vectors.double(), dim=-1).sum(dim=2)
    n = vectors.shape[2]
    # The square of a sum of n units is n, for each with itself, and twice the sum over pairs.
    return (whole.square().sum(dim=-1) - n) / (n * (n - 1))
