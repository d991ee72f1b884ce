"""Function vectors: sums of what some heads write on average, and what they do in dummy prompts.

As Todd et al. take them (arXiv 2310.15213), at the final arrow; that means are of one mapping and
of other prompts is ours. The sweep's table has the columns of :func:`spade_lens.icl.patch_sweep`,
so that function vectors, task vectors and rule vectors can stand in one figure.
"""

from collections.abc import Hashable, Sequence
from typing import Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from spade_lens.icl.attention.heads import Head, count_heads, head_outputs, written_by
from spade_lens.lenses.answers import check_choices, full_answers, read_answers
from spade_lens.models.model import Model
from spade_lens.models.residuals import Patch, check_layers
from spade_lens.prompts.few_shot import ARROW, Template
from spade_lens.prompts.prompt import Prompt
from spade_lens.replay.run import capture_for_replay, replay
from spade_lens.settings import Settings, limits, progress_bar, scoped
from spade_lens.tasks.episodes import Episode, check_episodes
from spade_lens.tensors import mean_of_others, random_like

NAME = "function vector"
"""The condition's name; its controls are named after it."""


def function_vectors(
    model: Model,
    outputs: Float[Tensor, "block batch head d_head"],
    heads: Sequence[Head],
    rules: Sequence[Hashable],
    *,
    answers: Sequence[Hashable] | None = None,
    leave_out: bool = True,
) -> Float[Tensor, "batch d_model"]:
    """For every prompt, the sum of what the heads write on average in prompts of its rule.

    Example:
        >>> outputs = icl.head_outputs(model, prompts)
        >>> icl.function_vectors(model, outputs, [(1, 0), (2, 3)], ["same", "same"]).shape
        torch.Size([2, 32])

    Args:
        model: The model.
        outputs: From :func:`spade_lens.icl.head_outputs`, of all blocks.
        heads: The heads that are summed, for example of :func:`spade_lens.icl.top_heads`.
        rules: For each prompt, its rule, such as ``Episode.rule``.
        answers: For each prompt, its answer, as for :func:`spade_lens.tensors.mean_of_others`: without
            them, vectors that leave a prompt out lean to a wrong answer of it.
        leave_out: Whether a prompt's mean is over the other prompts of its rule, so that nothing
            of itself is in its vector. Otherwise over all, for use in prompts that are not among
            these. Ours.

    Raises:
        ValueError: If a head is out of range or named twice, there are none, the numbers of
            prompts differ, or a rule has no other prompt.
        UnsupportedModelError: As :func:`spade_lens.icl.head_contributions` does.
    """
    n_blocks, n_batch, n_heads, _ = outputs.shape
    if n_blocks != model.n_layers:
        raise ValueError(
            f"Outputs of {n_blocks} blocks were given; function vectors need those of all "
            f"{model.n_layers}. Call head_outputs without blocks=."
        )
    check_heads(heads, n_blocks, n_heads)
    total = outputs.new_zeros(n_batch, model.d_model)
    for block in sorted({block for block, _ in heads}):
        mean = _means(outputs[block], rules, answers, leave_out)
        chosen = [head for b, head in heads if b == block]
        rows = torch.zeros_like(mean)
        rows[:, chosen] = mean[:, chosen]
        total += written_by(model, block, rows)
    return total


@scoped
@torch.no_grad()
def function_vector_sweep(
    model: Model,
    episodes: Sequence[Episode],
    heads: Sequence[Head],
    *,
    layers: Sequence[int] | None = None,
    base: Literal["dummy", "zero-shot"] = "dummy",
    scale: float = 1.0,
    baselines: bool = True,
    dummy_inputs: Sequence[str] = ("thing",),
    dummy_outputs: Sequence[str] = ("?",),
    template: Template = ARROW,
    seed: int = 0,
    settings: Settings | None = None,
) -> pd.DataFrame:
    """Add every episode's function vector at the final arrow of its dummy prompt.

    Example:
        >>> tight = sl.prompts.Template(pair="{input}>{output}", query="{input}>", separator=";")
        >>> task = tasks.RuleTask("t", {"x": ("a", "bb", "ccc"), "y": ("d", "ee", "fff")})
        >>> frame = icl.function_vector_sweep(
        ...     model, task.episodes(8, shots=2), [(1, 0)], layers=[2], template=tight,
        ...     dummy_inputs=("z",), baselines=False,
        ... )
        >>> list(frame["condition"].unique())[:3]
        ['function vector', 'function vector, random', 'function vector, random heads']

    Args:
        model: The model.
        episodes: Of one task, with as many demonstrations each, at least two of every rule; other
            ones than those by which the heads were chosen.
        heads: The heads whose mean contributions are summed.
        layers: The layers to add at, 0 to ``n_layers``; all by default.
        base: What is added to: ``"dummy"``, the prompts that :func:`spade_lens.icl.patch_sweep`
            patches, or ``"zero-shot"``, the queries alone.
        scale: What the vectors are multiplied by.
        baselines: Whether the floors and the ceiling stand first. Leave them out where the frame
            is joined to one of :func:`spade_lens.icl.patch_sweep`, which has the same.
        dummy_inputs: As in :func:`spade_lens.icl.patch_sweep`.
        dummy_outputs: Likewise.
        template: How a line is written.
        seed: Seed of random vectors and of the choice of random heads.
        settings: Memory limit, batch size and progress; see :class:`spade_lens.Settings`.

    Returns:
        The columns of :func:`spade_lens.icl.patch_sweep`. The conditions: ``function vector``; as
        controls ``, random`` (random vectors of the same norms), ``, random heads`` (as many
        heads drawn from the others, where there are so many) and, with labels, ``, opposite`` (of
        the opposite mapping: the answer should flip).

    Raises:
        ValueError: If an argument is not possible, a rule has one prompt only, or it does not fit
            ``memory_limit``.
        UnsupportedModelError: As :func:`spade_lens.icl.head_contributions` does.
    """
    layers = check_layers(model, layers)
    check_episodes(episodes)
    if base not in ("dummy", "zero-shot"):
        raise ValueError(f"base={base!r} was given; expected 'dummy' or 'zero-shot'.")
    rules = [episode.rule for episode in episodes]
    mean_of_others(torch.zeros(1, len(rules), 1), rules)  # refuses a rule of one prompt
    n_heads = count_heads(model)
    check_heads(heads, model.n_layers, n_heads)

    def prompts_of(some: Sequence[Episode]) -> list[Prompt]:
        made = [e.prompt(model.tokenizer, template=template) for e in some]
        model.check_prompts(made)
        check_choices(made)
        return made

    kinds = {
        "zero-shot": prompts_of([e.zero_shot() for e in episodes]),
        "dummy": prompts_of([e.dummy(dummy_inputs, dummy_outputs) for e in episodes]),
        "few-shot": prompts_of(episodes),
    }
    opposite = None
    if episodes[0].labels:
        opposite = prompts_of([episode.opposite() for episode in episodes])

    def outputs_of(some: Sequence[Prompt]) -> Tensor:
        return head_outputs(model, some, settings=limits(model).part(1 / 4))

    outputs = outputs_of(kinds["few-shot"])
    asked = [episode.answer for episode in episodes]
    own = function_vectors(model, outputs, heads, rules, answers=asked)
    vectors = {NAME: own, f"{NAME}, random": random_like(own, seed=seed)}
    others = _random_heads(heads, model.n_layers, n_heads, seed)
    if others:
        vectors[f"{NAME}, random heads"] = function_vectors(
            model, outputs, others, rules, answers=asked
        )
    if opposite is not None:
        flipped = function_vectors(model, outputs_of(opposite), heads, rules, answers=asked)
        vectors[f"{NAME}, opposite"] = flipped
    frames = []
    if baselines:
        for name, prompts in kinds.items():
            answers = full_answers(model, prompts)
            frames.append(_labelled(answers.to_frame(), episodes, [name], -1))
    vectors = {name: scale * some for name, some in vectors.items()}
    frames += _swept(model, kinds[base], vectors, layers, episodes)
    return pd.concat(frames, ignore_index=True)


def check_heads(heads: Sequence[Head], n_blocks: int, n_heads: int) -> None:
    """Raise if heads cannot be summed.

    Raises:
        ValueError: If there are none, one is out of range or stands there twice.
    """
    outside = [(b, h) for b, h in heads if not (0 <= b < n_blocks and 0 <= h < n_heads)]
    if outside or not len(heads) or len(set(heads)) < len(heads):
        raise ValueError(
            f"Heads {outside or list(heads)} were given; expected at least one pair (block, head), "
            f"each once, of blocks 0 to {n_blocks - 1} and heads 0 to {n_heads - 1}."
        )


def _swept(
    model: Model,
    prompts: Sequence[Prompt],
    vectors: dict[str, Float[Tensor, "batch d_model"]],
    layers: Sequence[int],
    episodes: Sequence[Episode],
) -> list[pd.DataFrame]:
    # All layers above, so that in a replay the answer alone runs.
    every = range(min(layers), model.n_layers + 1)
    residuals = capture_for_replay(model, prompts, layers=every, settings=limits(model).part(1 / 2))
    rows = list(range(len(prompts))) * len(vectors)
    run = [prompts[i] for i in rows]
    frames = []
    for layer in progress_bar(layers, desc="function vectors"):
        add = Patch(
            layer,
            prompts=tuple(range(len(rows))),
            positions=tuple(prompt.answer for prompt in run),
            values=torch.cat(list(vectors.values())),
            mode="add",
        )
        final = replay(model, residuals, rows, [add], settings=limits(model).part(1 / 4))
        answers = read_answers(model, final, run).to_frame()
        frames.append(_labelled(answers, episodes, list(vectors), layer))
    return frames


def _labelled(
    answers: pd.DataFrame, episodes: Sequence[Episode], names: Sequence[str], layer: int
) -> pd.DataFrame:
    about = {
        "task": episodes[0].task,
        "condition": [name for name in names for _ in episodes],
        "layer": layer,
        "prompt": list(range(len(episodes))) * len(names),
    }
    return pd.DataFrame(about).join(answers)


def _random_heads(heads: Sequence[Head], n_blocks: int, n_heads: int, seed: int) -> list[Head]:
    """As many others; none where there are not so many."""
    taken = set(heads)
    free = [(b, h) for b in range(n_blocks) for h in range(n_heads) if (b, h) not in taken]
    if len(free) < len(heads):
        return []
    drawn = np.random.default_rng(seed).permutation(len(free))[: len(heads)]
    return [free[int(i)] for i in drawn]


def _means(
    outputs: Float[Tensor, "batch head d_head"],
    rules: Sequence[Hashable],
    answers: Sequence[Hashable] | None,
    leave_out: bool,
) -> Float[Tensor, "batch head d_head"]:
    if leave_out:
        return mean_of_others(outputs[None], rules, answers=answers)[0]
    if len(rules) != len(outputs):
        raise ValueError(
            f"{len(rules)} rules were given for {len(outputs)} prompts; give one each."
        )
    mean = torch.empty_like(outputs)
    for rule in set(rules):
        mine = [i for i, other in enumerate(rules) if other == rule]
        mean[mine] = outputs[mine].mean(dim=0)
    return mean
