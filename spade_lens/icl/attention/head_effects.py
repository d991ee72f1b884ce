"""The average indirect effect of every attention head: which heads carry the rule of a prompt.

After Todd et al. (arXiv 2310.15213): in a prompt with shuffled labels, one head's output at the
final position is replaced by its mean over prompts that show the rule. The effect is the gain of
the right answer. Means of one mapping and of other prompts, and the logit difference, are ours.
"""

from collections.abc import Sequence
from typing import Literal

import pandas as pd
import torch
from einops import rearrange, repeat
from jaxtyping import Float
from torch import Tensor

from spade_lens.checks import checked
from spade_lens.icl.attention.heads import BlocksLike, Head, block_with, check_blocks, head_outputs
from spade_lens.icl.setup import PromptSetup
from spade_lens.lenses.answers import read_answers
from spade_lens.models.model import Model
from spade_lens.models.patches import Patch
from spade_lens.prompts.prompt import Prompt
from spade_lens.replay.run import capture_for_replay, replay
from spade_lens.settings import Settings, limits, progress_bar, scoped
from spade_lens.tasks.episodes import Episode, check_episodes
from spade_lens.tensors import mean_of_others

Measure = Literal["logit_diff", "probability"]


@scoped
@torch.no_grad()
def head_effects(
    model: Model,
    episodes: Sequence[Episode],
    *,
    n: int | None = None,
    blocks: BlocksLike = None,
    measure: Measure = "logit_diff",
    setup: PromptSetup | None = None,
    settings: Settings | None = None,
) -> pd.DataFrame:
    """Measure how far each head's mean output restores the right answer to shuffled prompts.

    A prompt runs once for every head, from the head's block to the top.

    Example:
        >>> tight = sl.prompts.Template(pair="{input}>{output}", query="{input}>", separator=";")
        >>> task = tasks.RuleTask("t", {"x": ("a", "bb", "ccc"), "y": ("d", "ee", "fff")})
        >>> setup = icl.PromptSetup(template=tight)
        >>> frame = icl.head_effects(model, task.episodes(8, shots=2), n=1, setup=setup)
        >>> list(frame.columns), len(frame)
        (['task', 'block', 'head', 'prompt', 'effect'], 16)

    Args:
        model: The model.
        episodes: Of one task, with as many demonstrations each, at least two of every rule.
        n: In how many of the prompts, the first ones, heads are replaced; all by default. The
            means are over all prompts (of the same rule, but the one in question; every answer
            counts the same) in any case.
        blocks: Blocks, from 0; all by default.
        measure: ``"logit_diff"``: the gain of the right answer's logit less the highest of the
            wrong ones. Ours. ``"probability"``: that of the right answer's probability.
        setup: How prompts are written, and the seed of the shuffled labels.
        settings: Memory limit, batch size and progress; see :class:`spade_lens.Settings`.

    Returns:
        One row per block, head and prompt: ``task``, ``block``, ``head``, ``prompt`` (its number)
        and ``effect``. Means with intervals are those of ``stats.summarise(frame, "effect",
        by=["block", "head"])``.

    Raises:
        ValueError: If an argument is not possible, a rule has one prompt only, or it does not fit
            ``memory_limit``.
        UnsupportedModelError: If the model's heads cannot be reached by hooks.
    """
    setup = setup or PromptSetup()
    check_episodes(episodes)
    blocks = check_blocks(model, blocks)
    n = len(episodes) if n is None else n
    if not 1 <= n <= len(episodes):
        raise ValueError(f"n={n} was given; expected 1 to {len(episodes)} prompts.")
    shown = setup.prompts(model, episodes)
    base = setup.prompts(model, setup.shuffled(episodes[:n]))
    rules = [episode.rule for episode in episodes]
    mean_of_others(torch.zeros(1, len(rules), 1), rules)  # refuses a rule of one prompt
    quarter = limits(model).part(1 / 4)
    outputs = head_outputs(model, shown, blocks=blocks, settings=quarter)
    answers = [episode.answer for episode in episodes]
    means = mean_of_others(outputs, rules, answers=answers)[:, :n]
    own = head_outputs(model, base, blocks=blocks, settings=quarter)
    # All layers above, so that in a replay the answer alone runs.
    layers = range(min(blocks), model.n_layers + 1)
    residuals = capture_for_replay(model, base, layers=layers, settings=quarter)
    n_heads = own.shape[2]
    rows = [i for i in range(n) for _ in range(n_heads)]
    run = [base[i] for i in rows]
    before = _measured(model, residuals.at_answers(model.n_layers), base, measure)
    frames = []
    for k, block in enumerate(progress_bar(blocks, desc="head effects", model=model)):
        after, _ = block_with(
            model, block, residuals.at_answers(block)[rows], _one_replaced(own[k], means[k])
        )
        # Nothing but the answer position has changed, so this is a patch of the layer above.
        write = Patch(block + 1, positions=[[prompt.answer] for prompt in run], values=after)
        final = replay(model, residuals, rows, [write], settings=quarter)
        effect = _measured(model, final, run, measure) - before[rows]
        about = {"task": episodes[0].task, "block": block, "head": list(range(n_heads)) * n}
        frame = pd.DataFrame({**about, "prompt": rows, "effect": effect.tolist()})
        frames.append(frame.sort_values(["head", "prompt"], kind="stable"))
    return pd.concat(frames, ignore_index=True)


@checked
def top_heads(effects: pd.DataFrame, n: int = 10) -> list[Head]:
    """Return the (block, head) pairs of the highest mean effect, the highest first.

    Heads look better than they are on the prompts that chose them: measure their function vector on
    others.

    Example:
        >>> import pandas as pd
        >>> rows = {"block": [0, 0, 1, 1], "head": [0, 1, 0, 1], "effect": [0.1, 0.5, 0.3, -1.0]}
        >>> icl.top_heads(pd.DataFrame(rows), 2)
        [(0, 1), (1, 0)]

    Args:
        effects: From :func:`spade_lens.icl.head_effects`.
        n: How many. Ours: 10, of models with some hundreds of heads.

    Raises:
        ValueError: If the table lacks a column, or has not so many heads.
    """
    missing = [column for column in ("block", "head", "effect") if column not in effects.columns]
    if missing:
        raise ValueError(f"The frame lacks {missing}; make it with spade_lens.icl.head_effects.")
    means = effects.groupby(["block", "head"])["effect"].mean()
    if not 1 <= n <= len(means):
        raise ValueError(f"n={n} was given; expected 1 to {len(means)}, the heads of this table.")
    best = means.sort_values(ascending=False, kind="stable").index[:n]
    return [(int(block), int(head)) for block, head in best]


def _one_replaced(
    own: Float[Tensor, "batch head d_head"], means: Float[Tensor, "batch head d_head"]
) -> Float[Tensor, "row head d_head"]:
    """Return a row for every prompt and head: the prompt's own outputs, except that head's."""
    n_heads = own.shape[1]
    rows = repeat(own, "batch head d_head -> batch row head d_head", row=n_heads).clone()
    every = torch.arange(n_heads, device=own.device)
    rows[:, every, every] = means
    return rearrange(rows, "batch row head d_head -> (batch row) head d_head")


def _measured(
    model: Model, final: Float[Tensor, "row d_model"], prompts: Sequence[Prompt], measure: Measure
) -> Float[Tensor, " row"]:
    answers = read_answers(model, final, prompts)
    return answers.logit_diff if measure == "logit_diff" else answers.logprob.exp()
