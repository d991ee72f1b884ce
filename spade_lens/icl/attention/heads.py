"""What attention heads write at the answer position.

A head's *output* is what goes into the attention's output projection, ``[d_head]``; its
*contribution* is what comes out for it alone, and is added to the residual stream. Heads are
reached by TransformerLens hooks (``blocks.{b}.attn.hook_z``, ``blocks.{b}.hook_attn_out``). No
weight is looked up, so a model that norms what its heads write is seen to do so.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from spade_lens.models.errors import UnsupportedModelError
from spade_lens.models.model import Model
from spade_lens.models.residuals import pad_after
from spade_lens.prompts.prompt import Prompt
from spade_lens.settings import Settings, limits, progress_bar, scoped

Head = tuple[int, int]
"""A block and a head in it, both from 0. Block b lies between layer b and layer b + 1."""

_ROWS_AT_ONCE = 1024


@scoped
@torch.no_grad()
def head_outputs(
    model: Model,
    prompts: Sequence[Prompt],
    *,
    blocks: Sequence[int] | None = None,
    settings: Settings | None = None,
) -> Float[Tensor, "block batch head d_head"]:
    """The output of every head at every prompt's answer position, before the output projection.

    Example:
        >>> icl.head_outputs(model, prompts).shape
        torch.Size([4, 2, 4, 8])

    Args:
        model: The model.
        prompts: The prompts.
        blocks: Blocks, from 0; all by default.
        settings: Memory limit, batch size and progress; see :class:`spade_lens.Settings`.

    Returns:
        The outputs, blocks ascending; :func:`spade_lens.icl.head_contributions` makes vectors of
        the residual stream of them.

    Raises:
        ValueError: If a prompt cannot be run, a block is out of range, or it does not fit
            ``memory_limit``.
        UnsupportedModelError: If the model's heads cannot be reached by hooks.
    """
    model.check_prompts(prompts)
    blocks = check_blocks(model, blocks)
    n_heads = count_heads(model)
    out: Tensor | None = None
    with progress_bar(total=len(prompts), desc="heads", unit="prompt") as bar:
        for chunk in _chunks(model, prompts, len(blocks), n_heads):
            found = _outputs(model, [prompts[i] for i in chunk], blocks)
            if out is None:
                out = found.new_empty(len(blocks), len(prompts), found.shape[-1])
            out[:, chunk] = found
            bar.update(len(chunk))
    assert out is not None, "there is at least one prompt"
    return rearrange(
        out, "block batch (head d_head) -> block batch head d_head", head=n_heads
    ).contiguous()


def head_contributions(
    model: Model,
    outputs: Float[Tensor, "block batch head d_head"],
    *,
    blocks: Sequence[int] | None = None,
) -> Float[Tensor, "block batch head d_model"]:
    """What every head adds to the residual stream: its output through the output projection.

    The contributions of all heads and the projection's bias, which is no head's, add up to what
    the attention adds.

    Example:
        >>> outputs = icl.head_outputs(model, prompts, blocks=[1, 3])
        >>> icl.head_contributions(model, outputs, blocks=[1, 3]).shape
        torch.Size([2, 2, 4, 32])

    Args:
        model: The model.
        outputs: From :func:`spade_lens.icl.head_outputs`, or means of such.
        blocks: The blocks that they are of; all by default.

    Raises:
        ValueError: If the blocks are not those of ``outputs``.
        UnsupportedModelError: If heads cannot be told apart in what the attention adds, because a
            norm comes between (Gemma 2 and 3), or cannot be reached by hooks.
    """
    blocks = check_blocks(model, blocks)
    _, n_batch, n_heads, _ = outputs.shape
    if len(blocks) != len(outputs):
        raise ValueError(
            f"Outputs of {len(outputs)} blocks were given for the blocks {blocks}. Give the "
            "blocks= that head_outputs was given."
        )
    alone = torch.eye(n_heads, dtype=outputs.dtype, device=outputs.device)
    out = outputs.new_empty(len(blocks), n_batch, n_heads, model.d_model)
    for n, block in enumerate(blocks):
        rows = outputs[n][:, :, None] * alone[:, :, None]  # [batch head head d_head]
        added = written_by(model, block, rearrange(rows, "b h head d_head -> (b h) head d_head"))
        out[n] = rearrange(added, "(b h) d_model -> b h d_model", h=n_heads)
    return out


@torch.no_grad()
def block_with(
    model: Model,
    block: int,
    resid: Float[Tensor, "row d_model"],
    outputs: Float[Tensor, "row head d_head"],
) -> tuple[Float[Tensor, "row d_model"], Float[Tensor, "row d_model"]]:
    """One block on single tokens whose heads give what they are told to.

    With all its heads' outputs given, a token needs no others before it.

    Args:
        model: The model.
        block: The block.
        resid: For every row, the token's residual before the block.
        outputs: What its heads give.

    Returns:
        The residual after the block, and what the attention added to it.

    Raises:
        UnsupportedModelError: If the model's heads cannot be reached by hooks.
    """
    after, added = torch.empty_like(resid), torch.empty_like(resid)
    for first in range(0, len(resid), _ROWS_AT_ONCE):
        some = slice(first, first + _ROWS_AT_ONCE)
        after[some], added[some] = _block_with(model, block, resid[some], outputs[some])
    return after, added


def written_by(
    model: Model, block: int, outputs: Float[Tensor, "row head d_head"]
) -> Float[Tensor, "row d_model"]:
    """What a block's attention adds for outputs of its heads, the projection's bias taken off.

    Raises:
        UnsupportedModelError: If it is not linear in them, or the heads cannot be reached.
    """
    nothing = torch.zeros_like(outputs[:1])
    # Two more rows for the check: something, and twice as much.
    rows = torch.cat([nothing, nothing + 1, nothing + 2, outputs])
    none, once, twice, added = block_with(
        model, block, outputs.new_zeros(len(rows), model.d_model), rows
    )[1].tensor_split([1, 2, 3])
    once, twice = once - none, twice - none
    if (twice - 2 * once).norm() > 0.05 * twice.norm():
        raise UnsupportedModelError(
            f"What the attention of {model.name} adds to the residual stream is not the sum of "
            "what its heads give: a norm stands between. So no head has a contribution of its own, "
            "and there are no function vectors. Effects of heads can be measured."
        )
    return added - none


def check_blocks(model: Model, blocks: Sequence[int] | None) -> list[int]:
    """The blocks asked for, ascending, each once; all of them for None.

    Raises:
        ValueError: If there are none or one is out of range.
    """
    if blocks is None:
        return list(range(model.n_layers))
    outside = [block for block in blocks if not 0 <= block < model.n_layers]
    if outside or not len(blocks):
        raise ValueError(
            f"Blocks {list(blocks)} were asked for; {model.name} has blocks 0 to "
            f"{model.n_layers - 1}."
        )
    return sorted(set(blocks))


def count_heads(model: Model) -> int:
    """How many heads a block has, from the shape of its pattern [batch head q k].

    Raises:
        UnsupportedModelError: If it cannot be told.
    """
    seen: list[int] = []

    def look(pattern: Tensor, hook: object) -> None:
        seen.append(pattern.shape[1])

    one = torch.zeros(1, 1, model.d_model, dtype=model.dtype, device=model.device)
    at = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    with model.hooks([("blocks.0.attn.hook_pattern", look)]):
        model.run_blocks(one, at, 0, 1)
    if not seen:
        raise _unreachable(model)
    return seen[0]


def _block_with(model: Model, block: int, resid: Tensor, outputs: Tensor) -> tuple[Tensor, Tensor]:
    added: list[Tensor] = []
    replaced: list[int] = []

    def give(own: Tensor, hook: object) -> Tensor:
        replaced.append(block)
        return outputs.reshape(own.shape)

    def look(attention: Tensor, hook: object) -> None:
        added.append(attention[:, 0])

    hooks: list[tuple[str, Callable[..., Any]]] = [
        (f"blocks.{block}.attn.hook_z", give),
        (f"blocks.{block}.hook_attn_out", look),
    ]
    at = torch.zeros(len(resid), 1, dtype=torch.long, device=model.device)
    with model.hooks(hooks):
        after = model.run_blocks(resid[:, None], at, block, block + 1)
    if not replaced or not added:
        raise _unreachable(model)
    return after[:, 0], added[0]


def _outputs(
    model: Model, prompts: Sequence[Prompt], blocks: Sequence[int]
) -> Float[Tensor, "block batch width"]:
    """The outputs of all heads of a block side by side."""
    tokens = pad_after([p.tokens[: p.answer + 1] for p in prompts], model.device)
    at = torch.arange(tokens.shape[1], device=model.device).expand_as(tokens)
    rows = torch.arange(len(prompts), device=model.device)
    last = torch.tensor([p.answer for p in prompts], device=model.device)
    seen: dict[int, Tensor] = {}

    def keep(block: int) -> Callable[..., None]:
        def hook(outputs: Tensor, hook: object) -> None:
            seen[block] = outputs[rows, last].flatten(1)

        return hook

    resid = model.embed(tokens, at)
    with model.hooks([(f"blocks.{block}.attn.hook_z", keep(block)) for block in blocks]):
        model.run_blocks(resid, at, 0, max(blocks) + 1)
    if len(seen) < len(blocks):
        raise _unreachable(model)
    return torch.stack([seen[block] for block in blocks])


def _chunks(
    model: Model, prompts: Sequence[Prompt], n_blocks: int, n_heads: int
) -> list[list[int]]:
    """Prompts of like lengths, as many at a time as fit beside the result."""
    element = torch.finfo(model.dtype).bits // 8
    result = 2 * n_blocks * len(prompts) * model.d_model * element
    memory_limit = limits(model).memory_limit
    budget = memory_limit * 2**30 - result
    if budget < 0.1 * memory_limit * 2**30:
        raise ValueError(
            f"Head outputs of {n_blocks} blocks and {len(prompts)} prompts take about "
            f"{result / 2**30:.2f} GiB, more than fits memory_limit={memory_limit} GiB. Ask for "
            "fewer blocks, give fewer prompts at a time, or raise memory_limit."
        )
    chunks: list[list[int]] = []
    for i in sorted(range(len(prompts)), key=lambda i: prompts[i].answer):
        length = prompts[i].answer + 1
        # As capture() allows for, and scores and weights of every head, which hooks make explicit.
        each = length * (32 * model.d_model * element + 3 * n_heads * element * length)
        if chunks:
            n = len(chunks[-1]) + 1
            if n * length <= limits(model).batch_tokens and n * each <= budget:
                chunks[-1].append(i)
                continue
        chunks.append([i])
    return chunks


def _unreachable(model: Model) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"The heads of {model.name} cannot be reached: its attention does not run TransformerLens' "
        "hook_z, hook_pattern and hook_attn_out in every block."
    )
