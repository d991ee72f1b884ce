"""Function vectors: sums of what some heads write on average, and what they do in dummy prompts.

As Todd et al. take them (arXiv 2310.15213), at the final position. Means of one mapping and of
other prompts are ours. The sweep is a :class:`spade_lens.icl.PatchSweep`, so that function vectors,
task vectors and rule vectors can stand in one figure.
"""

from collections.abc import Hashable, Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from spade_lens.icl.attention.heads import Head, count_heads, head_outputs, written_by
from spade_lens.icl.patching.result import PatchSweep, answered
from spade_lens.icl.setup import PromptSetup
from spade_lens.lenses.answers import full_answers, read_answers
from spade_lens.models.identity import run_identity
from spade_lens.models.model import Model
from spade_lens.models.patches import Patch
from spade_lens.models.places import LayersLike, check_layers
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
) -> Float[Tensor, "batch d_model"]:
    """Sum up what some heads write on average in the other prompts of each prompt's rule.

    ``answers`` are as for :func:`spade_lens.tensors.mean_of_others`. Without them, vectors that
    leave a prompt out are biased against its answer.

    Example:
        >>> outputs = head_outputs(model, prompts)
        >>> function_vectors(model, outputs, [(1, 0), (2, 3)], ["same", "same"]).shape
        torch.Size([2, 32])
    """
    n_blocks, n_batch, n_heads, _ = outputs.shape
    if n_blocks != model.n_layers:
        raise ValueError(
            f"Outputs of {n_blocks} blocks were given; function vectors need those of all "
            f"{model.n_layers}. Call head_outputs without blocks=."
        )
    check_heads(model, heads)
    total = outputs.new_zeros(n_batch, model.d_model)
    for block in sorted({block for block, _ in heads}):
        mean = mean_of_others(outputs[block][None], rules, answers=answers)[0]
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
    layers: LayersLike = None,
    base: Literal["dummy", "zero-shot"] = "dummy",
    setup: PromptSetup | None = None,
    settings: Settings | None = None,
) -> PatchSweep:
    """Add every episode's function vector at the final position of its dummy prompt.

    Example:
        >>> tight = sl.prompts.Template(pair="{input}>{output}", query="{input}>", separator=";")
        >>> task = tasks.RuleTask("t", {"x": ("a", "bb", "ccc"), "y": ("d", "ee", "fff")})
        >>> setup = icl.PromptSetup(tight, dummy_inputs=("z",))
        >>> icl.function_vector_sweep(
        ...     model, task.episodes(8, shots=2), [(1, 0)], layers=[2], setup=setup
        ... )
        PatchSweep(t: 4 conditions x 1 layer x 8 prompts; tiny-llama)

    Args:
        model: The model.
        episodes: Of one task, with as many demonstrations each, at least two of every rule; other
            ones than those by which the heads were chosen.
        heads: The heads whose mean contributions are summed.
        layers: The layers to add at, 0 to ``n_layers``; all by default.
        base: What vectors are added to: ``"dummy"``, the prompts that
            :func:`spade_lens.icl.patch_sweep` patches, or ``"zero-shot"``, the queries alone.
        setup: How prompts and dummies are written, and the seed of random vectors and heads.
        settings: Memory limit, batch size and progress; see :class:`spade_lens.Settings`.

    Returns:
        The conditions are ``function vector`` and its controls: ``, random`` (random vectors of
        the same norms), ``, random heads`` (as many heads drawn from the others, where there are
        so many) and, with labels, ``, opposite`` (of the opposite mapping: the answer should
        flip). Floors and ceiling are those of :func:`spade_lens.icl.patch_sweep`.

    Raises:
        TypeError: If something else than episodes is given.
        ValueError: If an argument is not possible, a rule has one prompt only, or it does not fit
            ``memory_limit``.
        UnsupportedModelError: If the heads cannot be reached, or what they write is not a sum.
    """
    setup = setup or PromptSetup()
    layers = check_layers(model, layers)
    check_episodes(episodes)
    rules = [episode.rule for episode in episodes]
    mean_of_others(torch.zeros(1, len(rules), 1), rules)  # refuses a rule of one prompt
    n_heads = check_heads(model, heads)
    kinds = {
        "zero-shot": setup.prompts(model, [e.zero_shot() for e in episodes]),
        "dummy": setup.prompts(model, setup.dummies(episodes)),
        "few-shot": setup.prompts(model, episodes),
    }
    opposite = None
    if episodes[0].labels:
        opposite = setup.prompts(model, [episode.opposite() for episode in episodes])
    right = [episode.answer for episode in episodes]

    def outputs_of(prompts: Sequence[Prompt]) -> Tensor:
        return head_outputs(model, prompts, settings=limits(model).part(1 / 4))

    def vectors_of(outputs: Tensor, heads: Sequence[Head]) -> Tensor:
        return function_vectors(model, outputs, heads, rules, answers=right)

    outputs = outputs_of(kinds["few-shot"])
    own = vectors_of(outputs, heads)
    vectors = {NAME: own, f"{NAME}, random": random_like(own, seed=setup.seed)}
    others = _random_heads(heads, model.n_layers, n_heads, setup.seed)
    if others:
        vectors[f"{NAME}, random heads"] = vectors_of(outputs, others)
    if opposite is not None:
        vectors[f"{NAME}, opposite"] = vectors_of(outputs_of(opposite), heads)
    task, n = episodes[0].task, len(episodes)
    frames = [
        answered(full_answers(model, prompts), task, [name] * n, -1, range(n))
        for name, prompts in kinds.items()
    ]
    # All layers above, so that a replay runs the answer position alone.
    every = range(min(layers), model.n_layers + 1)
    residuals = capture_for_replay(
        model, kinds[base], layers=every, settings=limits(model).part(1 / 2)
    )
    rows = list(range(n)) * len(vectors)
    run = [kinds[base][i] for i in rows]
    names = [name for name in vectors for _ in range(n)]
    for layer in progress_bar(layers, desc="function vectors", model=model):
        add = Patch(
            layer,
            positions=[[prompt.answer] for prompt in run],
            values=torch.cat(list(vectors.values())),
            mode="add",
        )
        final = replay(model, residuals, rows, [add], settings=limits(model).part(1 / 4))
        frames.append(answered(read_answers(model, final, run), task, names, layer, rows))
    about = {"model": run_identity(model), "heads": heads, "base": base, "seed": setup.seed}
    return PatchSweep(pd.concat(frames, ignore_index=True), about)


def check_heads(model: Model, heads: Sequence[Head]) -> int:
    """Return how many heads a block has, if these can be summed."""
    given: Any = heads
    advice = (
        "expected at least one pair (block, head), each once, as icl.top_heads gives them: blocks "
        f"0 to {model.n_layers - 1}"
    )
    pairs = isinstance(given, Sequence) and not isinstance(given, str)
    if not pairs or any(not isinstance(h, tuple) or len(h) != 2 for h in given):
        raise TypeError(f"heads={given!r} was given; {advice}.")
    if not given or len(set(given)) < len(given):
        raise ValueError(f"heads={given!r} was given; {advice}.")
    outside = [(b, h) for b, h in given if not 0 <= b < model.n_layers]
    n_heads = 0 if outside else count_heads(model)
    outside = outside or [(b, h) for b, h in given if not 0 <= h < n_heads]
    if outside:
        raise ValueError(f"Heads {outside} were given; {advice}, heads 0 to {n_heads - 1}.")
    return n_heads


def _random_heads(heads: Sequence[Head], n_blocks: int, n_heads: int, seed: int) -> list[Head]:
    """As many others; none where there are not so many."""
    taken = set(heads)
    free = [(b, h) for b in range(n_blocks) for h in range(n_heads) if (b, h) not in taken]
    if len(free) < len(heads):
        return []
    order = np.random.default_rng(seed).permutation(len(free))[: len(heads)]
    return [free[int(i)] for i in order]
