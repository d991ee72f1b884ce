"""Do rule vectors of word pairs become alike because of the rule? Beside those of other prompts."""

from collections.abc import Sequence

import pandas as pd
import torch
from torch import Tensor

from spade_lens.icl.geometry.convergence import convergence, similarity_within
from spade_lens.icl.vectors import RuleVectors, rule_vectors
from spade_lens.prompts.prompt import Prompt
from spade_lens.stats.summary import summarise
from spade_lens.studies.icl.study import Study


def beside_others(study: Study, vectors: Tensor, layers: Sequence[int]) -> pd.DataFrame:
    """The likeness of a task's vectors, of those of the same words without the rule, and across.

    Without a rule are prompts whose outputs are shuffled. With nothing taken off, all vectors of a
    layer have much in common; with the mean of vectors without the rule taken off (of a shuffle
    that is not compared), all that is common to prompts with the rule makes them alike.

    Args:
        study: Of word pairs, with more than one demonstration.
        vectors: Rule vectors of its prompts and then of the other task's [layer batch demo
            d_model].
        layers: Their layers.

    Returns:
        Rows as :func:`spade_lens.icl.convergence` gives them, with ``prompts`` (whose) and
        ``center`` (what is taken off). Those of ``"own less shuffled"`` are mean differences of
        the same prompts, with Student's interval.
    """
    n, seed = len(study.prompts), study.plan.seed
    own, other = vectors[:, :n], vectors[:, n:]
    shuffled, middle = (
        capture_vectors(study, _shuffled(study, seed + first), layers) for first in (0, n)
    )
    centers: dict[str, str | Tensor] = {
        "nothing": "none",
        "mean of shuffled": middle.mean(dim=(1, 2)),
    }
    frames = []
    for center, taken in centers.items():
        for prompts, some in {"own": own, "outputs shuffled": shuffled}.items():
            frame = convergence(RuleVectors(some, layers=tuple(layers)), center=taken, seed=seed)
            frames.append(frame.assign(prompts=prompts, center=center))
    if other.shape[1]:
        task = torch.tensor([0] * n + [1] * other.shape[1])
        every = RuleVectors(vectors, layers=tuple(layers))
        across = convergence(every, rule=task, center="none", seed=seed)
        across = across[(across["comparison"] == "across rules") & ~across["control"]]
        frames.append(across.assign(prompts="own and another task's", center="nothing"))
    less = similarity_within(own) - similarity_within(shuffled)
    rows = [
        {"layer": layer, "prompt": i, "less": value}
        for layer, values in zip(layers, less.tolist(), strict=True)
        for i, value in enumerate(values)
    ]
    paired = (
        summarise(pd.DataFrame(rows), "less", by=["layer"])
        .drop(columns="measure")
        .assign(
            comparison="within a prompt",
            labels="any",
            control=False,
            prompts="own less shuffled",
            center="nothing",
        )
    )
    return pd.concat([*frames, paired], ignore_index=True)


def capture_vectors(study: Study, prompts: Sequence[Prompt], layers: Sequence[int]) -> Tensor:
    """Rule vectors of some prompts [layer batch demo d_model]."""
    return rule_vectors(study.model, prompts, layers=layers).tensor


def _shuffled(study: Study, seed: int) -> list[Prompt]:
    plan, tokenizer = study.plan, study.model.tokenizer
    return [
        episode.shuffled(seed + i).prompt(tokenizer, template=plan.template)
        for i, episode in enumerate(plan.episodes)
    ]
