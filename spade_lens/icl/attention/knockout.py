"""Attention knockout: what happens to the answer if some tokens cannot look at some others.

An edge (q, k) lets the token at q look at the token at k. Cut edges get a score of minus infinity
before the softmax, in every head of a window of blocks; the rest of the attention then adds up
to 1 again. If each demonstration's rule goes from its input to its label, and from the labels to
the final arrow, cutting these edges should hurt, and cutting as many others should not. The
windows and the control are ours. Scores are reached by TransformerLens hooks
(``blocks.{b}.attn.hook_attn_scores``); a model in which they do not cut is refused.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from spade_lens.icl.attention.edges import EDGES, Edge, EdgeRule, check_edges, random_edges
from spade_lens.lenses.answers import read_answers
from spade_lens.models.errors import UnsupportedModelError
from spade_lens.models.model import Model
from spade_lens.models.residuals import pad_after
from spade_lens.prompts.prompt import Prompt
from spade_lens.settings import Settings, progress_bar, scoped


def layer_windows(n_layers: int, *, n: int = 4) -> list[tuple[int, int]]:
    """All blocks, and ``n`` windows side by side.

    Example:
        >>> icl.layer_windows(30)
        [(0, 30), (0, 8), (8, 15), (15, 22), (22, 30)]
    """
    ends = [round(i * n_layers / n) for i in range(n + 1)]
    return [(0, n_layers), *((a, b) for a, b in zip(ends, ends[1:], strict=False) if a < b)]


@scoped
@torch.no_grad()
def knockout(
    model: Model,
    prompts: Sequence[Prompt],
    *,
    edges: Mapping[str, EdgeRule] | None = None,
    windows: Sequence[tuple[int, int]] | None = None,
    draws: int = 1,
    seed: int = 0,
    batch_size: int = 16,
    settings: Settings | None = None,
) -> pd.DataFrame:
    """Cut edges in windows of blocks, and read the answer.

    Example:
        >>> answered = [model.prompt("ab->AB,cd->", target="C")]
        >>> last = {"to the last": lambda p: icl.edges_between(p, range(p.answer), [p.answer])}
        >>> frame = icl.knockout(model, answered, edges=last, windows=[(0, 4)])
        >>> frame[["edges", "control", "cut"]].values.tolist()
        [['nothing', False, 0], ['to the last', False, 11], ['to the last', True, 11]]

    Args:
        model: The model.
        prompts: Prompts with targets, and with the spans that the edges need.
        edges: Families of edges by name; those above by default.
        windows: Pairs (start, stop): the edges are cut in the blocks between layer ``start`` and
            layer ``stop``. By default :func:`layer_windows`.
        draws: As the control, so many times as many other edges are cut, drawn at random: for
            each token as many of the edges by which it looks at others, never at the start
            token; where it has not enough, edges of other tokens make up for it. 0 leaves the
            control out.
        seed: Seed of the drawing.
        batch_size: How many prompts run at a time.
        settings: Memory limit, batch size and progress; see :class:`spade_lens.Settings`.

    Returns:
        One row for every family, control, window and prompt: ``model, edges, control, draw,
        start, stop, prompt, cut`` (the number of edges); ``logit_diff``, the target's
        logit less the highest other one (among the candidates, where a prompt has such);
        ``change``, the same less that of the full model; ``correct``; ``agrees``, whether the
        top token is the full model's. The family ``"nothing"`` is the full model.
        ``stats.summarise`` averages the draws of a prompt first.

    Raises:
        ValueError: If a prompt has no target or lacks a span, a window or an edge is out of range,
            or a number is not positive.
        UnsupportedModelError: If the model's attention cannot be reached by hooks.
    """
    model.check_prompts(prompts)
    edges = EDGES if edges is None else edges
    windows = layer_windows(model.n_layers) if windows is None else list(windows)
    _check(model, prompts, windows, draws, batch_size)
    conditions = [_Condition("nothing", False, 0, [()] * len(prompts))]
    for name, rule in edges.items():
        cut = [check_edges(rule(p), p, i, name) for i, p in enumerate(prompts)]
        conditions.append(_Condition(name, False, 0, cut))
        for draw in range(draws):
            drawn = [
                random_edges(p, some, seed=seed, draw=draw)
                for p, some in zip(prompts, cut, strict=True)
            ]
            conditions.append(_Condition(name, True, draw, drawn))
    rows: list[dict[str, object]] = []
    n_runs = len(prompts) * (1 + len(windows) * (len(conditions) - 1))
    with progress_bar(total=n_runs, desc="knockout", unit="run") as bar:
        for first in range(0, len(prompts), batch_size):
            chunk = range(first, min(len(prompts), first + batch_size))
            rows += _run_chunk(model, prompts, chunk, conditions, windows, bar)
    frame = pd.DataFrame(rows)
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


def _run_chunk(
    model: Model,
    prompts: Sequence[Prompt],
    chunk: Sequence[int],
    conditions: Sequence[_Condition],
    windows: Sequence[tuple[int, int]],
    bar: "tqdm[Any]",
) -> list[dict[str, object]]:
    some = [prompts[i] for i in chunk]
    tokens = pad_after([p.tokens for p in some], model.device)
    at = torch.arange(tokens.shape[1], device=model.device).expand_as(tokens)
    # Nothing below a window changes, so its runs begin where it begins.
    starts: dict[int, Tensor] = {0: model.embed(tokens, at)}
    wanted = {start for start, _ in windows}

    def keep(layer: int, resid: Tensor) -> None:
        if layer in wanted:
            starts[layer] = resid

    final = model.run_blocks(starts[0], at, 0, model.n_layers, after_block=keep)
    full, top, right = _read(model, final, some)
    bar.update(len(some))
    rows = _rows(0, conditions[0], (0, 0), chunk, full, full, right, torch.ones_like(right))
    for order, condition in enumerate(conditions[1:], start=1):
        cut = torch.zeros(*tokens.shape, tokens.shape[1], dtype=torch.bool)
        for row, i in enumerate(chunk):
            for q, k in condition.edges[i]:
                cut[row, q, k] = True
        cut = cut.to(model.device)
        for start, stop in windows:
            resid = run_cut(model, starts[start], at, cut, start, stop)
            resid = model.run_blocks(resid, at, stop, model.n_layers)
            difference, best, right = _read(model, resid, some)
            window = (start, stop)
            rows += _rows(order, condition, window, chunk, difference, full, right, best == top)
            bar.update(len(some))
    return rows


def run_cut(
    model: Model,
    resid: Float[Tensor, "batch pos d_model"],
    positions: Int[Tensor, "batch pos"],
    cut: Bool[Tensor, "batch pos pos"],
    start: int,
    stop: int,
) -> Float[Tensor, "batch pos d_model"]:
    """Blocks ``start`` to ``stop - 1`` with edges cut in all heads.

    Args:
        model: The model.
        resid: The residual stream at layer ``start``.
        positions: The positions of the tokens.
        cut: True at (row, q, k) where q may not look at k. A token always sees itself.
        start: The layer at which ``resid`` was taken.
        stop: The layer wanted.

    Raises:
        UnsupportedModelError: If the model's attention cannot be reached by hooks.
        ValueError: If its attention is NaN or infinite.
    """
    if not cut.any():
        return model.run_blocks(resid, positions, start, stop)
    mask = cut[:, None]
    reached: set[str] = set()

    def sever(scores: Tensor, hook: object) -> Tensor:
        return scores.masked_fill(mask, -torch.inf)

    def look(pattern: Tensor, hook: object) -> None:
        if not torch.isfinite(pattern).all():
            raise ValueError(
                f"Attention is NaN or infinite at {getattr(hook, 'name', 'a hook')}. Check the "
                "model's weights; in half precision, try dtype=torch.bfloat16 or torch.float32."
            )
        # Some attention is hooked only after the fact: then the cut weights are still there.
        if not (pattern * mask).any():
            reached.add(str(getattr(hook, "name", "")))

    blocks = [f"blocks.{b}.attn." for b in range(start, stop)]
    hooks: list[tuple[str, Callable[..., Any]]] = []
    for block in blocks:
        hooks += [(block + "hook_attn_scores", sever), (block + "hook_pattern", look)]
    with model.hooks(hooks):
        out = model.run_blocks(resid, positions, start, stop)
    if len(reached) < len(blocks):
        raise UnsupportedModelError(
            f"The attention of {model.name} cannot be cut: {len(blocks) - len(reached)} of "
            f"{len(blocks)} blocks do not follow TransformerLens' hook_attn_scores."
        )
    return out


def _read(
    model: Model, final: Float[Tensor, "batch pos d_model"], prompts: Sequence[Prompt]
) -> tuple[Float[Tensor, " batch"], Int[Tensor, " batch"], Bool[Tensor, " batch"]]:
    """Return logit differences, top tokens, and whether they are right."""
    rows = torch.arange(len(prompts), device=model.device)
    answers = read_answers(model, final[rows, [p.answer for p in prompts]], prompts)
    return answers.logit_diff, answers.top, answers.correct


def _rows(
    order: int,
    condition: _Condition,
    window: tuple[int, int],
    chunk: Sequence[int],
    difference: Float[Tensor, " batch"],
    full: Float[Tensor, " batch"],
    right: Bool[Tensor, " batch"],
    agrees: Bool[Tensor, " batch"],
) -> list[dict[str, object]]:
    return [
        {
            "order": order,
            "edges": condition.name,
            "control": condition.control,
            "draw": condition.draw,
            "start": window[0],
            "stop": window[1],
            "prompt": i,
            "cut": len(condition.edges[i]),
            "logit_diff": float(difference[row]),
            "change": float(difference[row] - full[row]),
            "correct": bool(right[row]),
            "agrees": bool(agrees[row]),
        }
        for row, i in enumerate(chunk)
    ]


def _check(
    model: Model,
    prompts: Sequence[Prompt],
    windows: Sequence[tuple[int, int]],
    draws: int,
    batch_size: int,
) -> None:
    wrong = [w for w in windows if not 0 <= w[0] < w[1] <= model.n_layers]
    if wrong or not windows:
        raise ValueError(
            f"Windows {wrong} were given; expected pairs (start, stop) with start before stop, "
            f"from layer 0 to {model.n_layers}."
        )
    if draws < 0 or batch_size < 1:
        raise ValueError(
            f"draws={draws} and batch_size={batch_size} were given; expected at least 0 and 1."
        )
    without = [i for i, p in enumerate(prompts) if p.target is None]
    alone = [i for i, p in enumerate(prompts) if p.candidates and set(p.candidates) == {p.target}]
    if without or alone:
        raise ValueError(
            f"Prompts {(without or alone)[:5]} have no "
            + ("target" if without else "candidate but the target")
            + ", so there is no logit difference. Give Prompt.target"
            + ("." if without else " and another candidate.")
        )
