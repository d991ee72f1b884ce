"""Attention knockout: what happens to the answer if some tokens cannot attend to some others.

An edge (q, k) lets the token at q attend to the token at k. Cut edges get a score of minus infinity
before the softmax, in every head of a window of blocks; the remaining weights again sum to 1.
The claim is that each demonstration's rule goes from its input to its label, and from there to the
final position. Then cutting these edges hurts, and cutting as many others does not. Windows and
control are ours. Scores are reached by TransformerLens hooks
(``blocks.{b}.attn.hook_attn_scores``); a model in which they do not cut is refused.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from spade_lens.icl.attention.edges import Edge, EdgeRule, check_edges, edge_rules, random_edges
from spade_lens.icl.attention.heads import batches, count_heads
from spade_lens.lenses.answers import Answers, check_targets, read_answers
from spade_lens.models.hooks import rows_are
from spade_lens.models.model import Model
from spade_lens.models.places import pad_after
from spade_lens.prompts.inputs import PromptsLike
from spade_lens.prompts.prompt import Prompt
from spade_lens.settings import Settings, limits, progress_bar, scoped

Window = tuple[int, int]
"""Start and stop: the blocks between two layers."""


def layer_windows(n_layers: int, *, n: int = 4) -> list[Window]:
    """Return the window of all blocks, and ``n`` windows side by side.

    Example:
        >>> layer_windows(30)
        [(0, 30), (0, 8), (8, 15), (15, 22), (22, 30)]
    """
    ends = [round(i * n_layers / n) for i in range(n + 1)]
    return [(0, n_layers), *((a, b) for a, b in zip(ends, ends[1:], strict=False) if a < b)]


@scoped
@torch.no_grad()
def knockout(
    model: Model,
    prompts: PromptsLike,
    *,
    edges: Mapping[str, EdgeRule] | Sequence[str] | None = None,
    windows: Sequence[Window] | None = None,
    draws: int = 1,
    seed: int = 0,
    settings: Settings | None = None,
) -> pd.DataFrame:
    """Cut edges in windows of blocks, and measure the answer.

    In one network whose answers are known in closed form, cutting attention to one of 11 examples
    found the example's exact effect with a correlation of .43 alone; see ``docs/in-context.md``.

    Example:
        >>> answered = [model.prompt("ab->AB,cd->", target="C")]
        >>> last = {"to the last": lambda p: [(p.answer, k) for k in range(p.answer)]}
        >>> frame = icl.knockout(model, answered, edges=last, windows=[(0, 4)])
        >>> frame[["edges", "control", "cut"]].values.tolist()
        [['nothing', False, 0], ['to the last', False, 11], ['to the last', True, 11]]

    Args:
        model: The model.
        prompts: Prompts with targets, and with the spans that the edges need.
        edges: Names of families of edges, from input to label to final position; all by default
            (see :data:`spade_lens.icl.attention.edges.EDGES`). Or families of your own: by name,
            a function from a prompt to pairs (q, k).
        windows: Pairs (start, stop): the edges are cut in the blocks between layer ``start`` and
            layer ``stop``. By default all blocks, and four windows side by side.
        draws: How many controls to run, each cutting as many other edges, drawn at random. Every
            token loses as many edges as in the cut, never that to the start token. Where it has
            too few, edges of other tokens are drawn. 0 leaves the control out.
        seed: Seed of the drawing.
        settings: Memory limit, batch size and progress; see :class:`spade_lens.Settings`.

    Returns:
        One row for every family, control, window and prompt: ``model, edges, control, draw,
        start, stop, prompt, cut`` (the number of edges); ``logit_diff``, the target's
        logit less the highest other one (among the candidates, where a prompt has such);
        ``change``, the same less that of the full model; ``correct`` and ``ambiguous``;
        ``agrees``, whether the
        top token is the full model's. The family ``"nothing"`` is the full model.
        ``stats.summarise`` averages the draws of a prompt first.

    Raises:
        ValueError: If a prompt has no target or lacks a span, a window or an edge is out of range,
            or a number is not positive.
        UnsupportedModelError: If the model's attention cannot be reached by hooks.
    """
    checked = model.prompts(prompts)
    windows = layer_windows(model.n_layers) if windows is None else list(windows)
    _check(model, checked, windows, draws)
    conditions = []
    for name, rule in edge_rules(edges).items():
        cut = [check_edges(rule(p), p, i, name) for i, p in enumerate(checked)]
        conditions.append(_Condition(name, False, 0, cut))
        for draw in range(draws):
            others = [
                random_edges(p, own, seed=seed, draw=draw)
                for p, own in zip(checked, cut, strict=True)
            ]
            conditions.append(_Condition(name, True, draw, others))
    budget = limits(model).memory_bytes / 2
    groups = batches(model, [len(p) for p in checked], count_heads(model), budget)
    frames = []
    with progress_bar(total=len(checked), desc="knockout", unit="prompt", model=model) as bar:
        for group in groups:
            with rows_are(group, [len(checked[i]) for i in group]):
                frames += _run(model, checked, group, conditions, windows)
            bar.update(len(group))
    frame = pd.concat(frames, ignore_index=True)
    frame.insert(0, "model", model.name)
    keys = ["order", "start", "stop", "prompt"]
    return frame.sort_values(keys, kind="stable", ignore_index=True).drop(columns="order")


@dataclass(frozen=True)
class _Condition:
    """What is cut: one list of edges for each prompt."""

    name: str
    control: bool
    draw: int
    edges: Sequence[Sequence[Edge]]


def _run(
    model: Model,
    prompts: Sequence[Prompt],
    group: Sequence[int],
    conditions: Sequence[_Condition],
    windows: Sequence[Window],
) -> list[pd.DataFrame]:
    """Run a batch of prompts under all conditions; a frame each, with its order."""
    batch = [prompts[i] for i in group]
    tokens = pad_after([p.tokens for p in batch], model.device)  # [batch pos]
    at = torch.arange(tokens.shape[1], device=model.device).expand_as(tokens)
    # Nothing below a window changes, so its runs begin where it begins.
    starts: dict[int, Tensor] = {0: model.embed(tokens, at)}
    wanted = {start for start, _ in windows}

    def keep(layer: int, resid: Tensor) -> None:
        if layer in wanted:
            starts[layer] = resid

    def answers_of(final: Float[Tensor, "batch pos d_model"]) -> Answers:
        rows = torch.arange(len(batch), device=model.device)
        return read_answers(model, final[rows, [p.answer for p in batch]], batch)

    full = answers_of(model.run_blocks(starts[0], at, 0, model.n_layers, after_block=keep))

    def table(order: int, window: Window, answers: Answers, condition: _Condition) -> pd.DataFrame:
        about = {
            "order": order,
            "edges": condition.name,
            "control": condition.control,
            "draw": condition.draw,
            "start": window[0],
            "stop": window[1],
            "prompt": list(group),
            "cut": [len(condition.edges[i]) for i in group],
            "logit_diff": answers.logit_diff.tolist(),
            "change": (answers.logit_diff - full.logit_diff).tolist(),
            "correct": answers.correct.tolist(),
            "ambiguous": answers.ambiguous.tolist(),
            "agrees": (answers.top == full.top).tolist(),
        }
        return pd.DataFrame(about)

    frames = [table(0, (0, 0), full, _Condition("nothing", False, 0, [()] * len(prompts)))]
    for order, condition in enumerate(conditions, start=1):
        cut = torch.zeros(*tokens.shape, tokens.shape[1], dtype=torch.bool)  # [batch q k]
        for row, i in enumerate(group):
            for q, k in condition.edges[i]:
                cut[row, q, k] = True
        cut = cut.to(model.device)
        for start, stop in windows:
            resid = run_cut(model, starts[start], at, cut, start, stop)
            answers = answers_of(model.run_blocks(resid, at, stop, model.n_layers))
            frames.append(table(order, (start, stop), answers, condition))
    return frames


def run_cut(
    model: Model,
    resid: Float[Tensor, "batch pos d_model"],
    positions: Int[Tensor, "batch pos"],
    cut: Bool[Tensor, "batch pos pos"],
    start: int,
    stop: int,
) -> Float[Tensor, "batch pos d_model"]:
    """Run blocks ``start`` to ``stop - 1`` with edges cut in all heads.

    ``cut`` is True at (row, q, k) where q may not attend to k. A token always attends to itself.
    """
    if not cut.any():
        return model.run_blocks(resid, positions, start, stop)
    mask = cut[:, None]  # [batch 1 q k], for all heads

    def cut_edges(scores: Tensor, hook: object) -> Tensor:
        return scores.masked_fill(mask, -torch.inf)

    def check(pattern: Tensor, hook: object) -> None:
        if not torch.isfinite(pattern).all():
            raise ValueError(
                f"Attention is NaN or infinite at {getattr(hook, 'name', 'a hook')}. Check the "
                "model's weights; in half precision, try dtype=torch.bfloat16 or torch.float32."
            )

    blocks = [f"blocks.{b}.attn." for b in range(start, stop)]
    hooks: list[tuple[str, Callable[..., Any]]] = []
    for block in blocks:
        hooks += [(block + "hook_attn_scores", cut_edges), (block + "hook_pattern", check)]
    with model.hooks(hooks, ragged=True):
        return model.run_blocks(resid, positions, start, stop)


def _check(model: Model, prompts: Sequence[Prompt], windows: Sequence[Window], draws: int) -> None:
    wrong = [w for w in windows if not 0 <= w[0] < w[1] <= model.n_layers]
    if wrong or not windows:
        raise ValueError(
            f"Windows {wrong} were given; expected pairs (start, stop) with start before stop, "
            f"from layer 0 to {model.n_layers}."
        )
    if draws < 0:
        raise ValueError(f"draws={draws} was given; expected 0 or more.")
    check_targets(prompts)
    alone = [i for i, p in enumerate(prompts) if p.candidates and set(p.candidates) == {p.target}]
    if alone:
        raise ValueError(
            f"Prompts {alone[:5]} have no candidate but the target, so there is no logit "
            "difference. Give Prompt.candidates another one."
        )
