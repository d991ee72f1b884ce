"""Saliency of attention: how much the loss depends on each attention weight.

Source: Wang et al., "Label Words are Anchors" (arXiv 2305.14160). The saliency of a block is the
absolute value of A * dL/dA summed over heads: A are the attention weights, L the loss of the right
answer. Three means of it are taken by layer: from words to the labels after them, from labels to
the final position, and over all other pairs. Ours: taking absolute values before the sum over
heads, the two flows from inputs to labels, and the control with random positions in the labels'
places.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from spade_lens.icl.attention.heads import batches, count_heads
from spade_lens.lenses.answers import check_targets
from spade_lens.models.errors import UnsupportedModelError
from spade_lens.models.hooks import rows_are
from spade_lens.models.model import Model
from spade_lens.models.places import pad_after
from spade_lens.prompts.inputs import PromptsLike
from spade_lens.prompts.prompt import Prompt
from spade_lens.settings import Settings, limits, progress_bar, scoped


@scoped
def attention_saliency(
    model: Model,
    prompts: PromptsLike,
    *,
    heads: Literal["sum", "abs"] = "sum",
    settings: Settings | None = None,
) -> list[Float[Tensor, "block pos pos"]]:
    """Compute the saliency of every attention weight, by block; see :func:`saliency_flows`.

    Example:
        >>> answered = [model.prompt("ab->AB,cd->", target="C")]
        >>> attention_saliency(model, answered)[0].shape  # [block pos pos]
        torch.Size([4, 12, 12])

    Returns:
        For every prompt: row q, column k is how much it matters that the token at q attends to
        the token at k.
    """
    checked = model.prompts(prompts)
    check_targets(checked)
    by_prompt: dict[int, Tensor] = {}
    lengths, budget = [len(p) for p in checked], limits(model).memory_bytes / 2
    groups = batches(model, lengths, count_heads(model), budget, kept=model.n_layers)
    with progress_bar(total=len(checked), desc="saliency", unit="prompt", model=model) as bar:
        for group in groups:
            with rows_are(group, [lengths[i] for i in group]):
                by_block = _of_batch(model, [checked[i] for i in group], heads)
            for row, i in enumerate(group):
                by_prompt[i] = by_block[:, row, : lengths[i], : lengths[i]].cpu()
            bar.update(len(group))
    return [by_prompt[i] for i in range(len(checked))]


@torch.enable_grad()
def _of_batch(
    model: Model, prompts: Sequence[Prompt], heads: str
) -> Float[Tensor, "block batch pos pos"]:
    tokens = pad_after([p.tokens for p in prompts], model.device)
    at = torch.arange(tokens.shape[1], device=model.device).expand_as(tokens)
    # A leaf of its own, so that there is a gradient even if the model's weights require none.
    resid = model.embed(tokens, at).detach().requires_grad_()
    weights: dict[int, Tensor] = {}

    def hold(block: int) -> Callable[[Tensor, object], Tensor]:
        def hook(pattern: Tensor, hook: object) -> Tensor:
            weights[block] = pattern.clone()
            return weights[block]

        return hook

    names = [(f"blocks.{b}.attn.hook_pattern", hold(b)) for b in range(model.n_layers)]
    with model.hooks(names, ragged=True):
        final = model.run_blocks(resid, at, 0, model.n_layers)
    rows = torch.arange(len(prompts), device=model.device)
    last = final[rows, [p.answer for p in prompts]]
    logits = model.logits(last)
    target = torch.tensor([p.target for p in prompts], device=model.device)
    # Prompts do not see each other, so the sum's gradients are each prompt's own.
    loss = torch.nn.functional.cross_entropy(logits, target, reduction="sum")
    blocks = [weights[b] for b in sorted(weights)]
    slopes = torch.autograd.grad(loss, blocks, allow_unused=True) if blocks else ()
    if len(blocks) < model.n_layers or any(slope is None for slope in slopes):
        raise UnsupportedModelError(
            f"The attention of {model.name} cannot be differentiated: its output does not follow "
            "TransformerLens' hook_pattern in every block."
        )
    # Each [batch head q k]; heads are summed block by block, so that few such tensors exist.
    products = [(a * slope).detach() for a, slope in zip(blocks, slopes, strict=True)]
    if heads == "sum":
        return torch.stack([product.sum(dim=1).abs() for product in products])
    return torch.stack([product.abs().sum(dim=1) for product in products])


@scoped
def saliency_flows(
    model: Model,
    prompts: PromptsLike,
    *,
    heads: Literal["sum", "abs"] = "sum",
    start: bool = True,
    draws: int = 1,
    seed: int = 0,
    settings: Settings | None = None,
) -> pd.DataFrame:
    """Average the saliency of what flows to labels, from labels and elsewhere, by block.

    Args:
        model: The model.
        prompts: Prompts with targets and with the span ``labels``.
        heads: ``"sum"``: heads are summed before the absolute value, as in the paper's code, so
            that they may cancel out. ``"abs"``: after it. Ours.
        start: Whether attention to the start token counts, as in the paper's formula.
        draws: How many controls to compute, in which random positions take the labels' places.
        seed: Seed of the drawing.
        settings: Memory limit, batch size and progress; see :class:`spade_lens.Settings`.

    Returns:
        One row for every block, flow and prompt: ``model, block, prompt, flow, control, draw,
        saliency`` (the mean over pairs) and ``pairs``. The flows: ``words -> label`` (S_wp),
        from all tokens before a label to it; ``label -> final`` (S_pq), to the answer position;
        ``rest`` (S_ww), all other pairs. With spans of demonstrations, two parts of the first
        as well: ``own input -> label`` and ``other input -> label``. Block b lies between layer
        b and layer b + 1. A flow without pairs has no row.

    Raises:
        ValueError: If a prompt does not fit the model or has no target or labels, or an option
            is out of range.
        UnsupportedModelError: If the model's attention cannot be reached by hooks.
    """
    checked = model.prompts(prompts)
    without = [i for i, p in enumerate(checked) if not p.spans.get("labels")]
    if without:
        raise ValueError(
            f"Prompts {without[:5]} have no labels. Expected the span 'labels', as few_shot_prompt "
            "gives it, with at least one demonstration."
        )
    if draws < 0:
        raise ValueError(f"draws={draws} was given; expected 0 or more.")
    saliency = attention_saliency(model, checked, heads=heads)
    rows = []
    for i, (prompt, by_block) in enumerate(zip(checked, saliency, strict=True)):
        sets = [(False, 0, flows(prompt, prompt.spans["labels"], start=start))]
        sets[0][2].update(_input_flows(prompt))
        for draw in range(draws):
            instead = _instead_of_labels(prompt, seed, draw)
            sets.append((True, draw, flows(prompt, instead, start=start)))
        for control, draw, masks in sets:
            for flow, mask in masks.items():
                pairs = int(mask.sum())
                if not pairs:
                    continue
                means = by_block[:, mask].double().mean(dim=1).tolist()
                rows += [
                    {
                        "model": model.name,
                        "block": block,
                        "prompt": i,
                        "flow": flow,
                        "control": control,
                        "draw": draw,
                        "saliency": mean,
                        "pairs": pairs,
                    }
                    for block, mean in enumerate(means)
                ]
    return pd.DataFrame(rows)


def flows(
    prompt: Prompt, labels: Sequence[int], *, start: bool = True
) -> dict[str, Bool[Tensor, "pos pos"]]:
    """Return which pairs of positions belong to each of the paper's three flows.

    Example:
        >>> masks = flows(Prompt(tokens=(1, 5, 6, 7)), labels=[2])
        >>> {flow: mask.nonzero().tolist() for flow, mask in masks.items()}
        {'words -> label': [[2, 0], [2, 1]], 'label -> final': [[3, 2]],
         'rest': [[1, 0], [3, 0], [3, 1]]}
    """
    n = prompt.answer + 1
    pairs = torch.zeros(len(prompt), len(prompt), dtype=torch.bool)
    pairs[:n, :n] = torch.ones(n, n, dtype=torch.bool).tril(diagonal=-1)
    if not start:
        pairs[:, 0] = False
    to_label, to_final = torch.zeros_like(pairs), torch.zeros_like(pairs)
    to_label[list(labels)] = True
    to_final[prompt.answer, list(labels)] = True
    return {
        "words -> label": pairs & to_label,
        "label -> final": pairs & to_final,
        "rest": pairs & ~to_label & ~to_final,
    }


def _input_flows(prompt: Prompt) -> dict[str, Bool[Tensor, "pos pos"]]:
    own = torch.zeros(len(prompt), len(prompt), dtype=torch.bool)
    other = torch.zeros_like(own)
    inputs = [prompt.spans.get(f"demo{i}/input", ()) for i in range(len(prompt.spans["labels"]))]
    for i, label in enumerate(prompt.spans["labels"]):
        own[label, list(inputs[i])] = True
        other[label, [p for earlier in inputs[:i] for p in earlier]] = True
    return {"own input -> label": own, "other input -> label": other}


def _instead_of_labels(prompt: Prompt, seed: int, draw: int) -> list[int]:
    """Return as many positions that are no labels, neither the start nor the answer token."""
    labels = [p for p in prompt.spans["labels"] if p < prompt.answer]
    free = [p for p in range(1, prompt.answer) if p not in labels]
    rng = np.random.default_rng([seed, draw, *prompt.tokens])
    return [free[int(i)] for i in rng.permutation(len(free))[: len(labels)]]
