"""What attention heads write at the answer position.

A head's *output*, ``[d_head]``, goes into the attention's output projection. Its *contribution* is
the part of the projection that comes from it alone, and is added to the residual stream. Heads are
reached by TransformerLens hooks (``blocks.{b}.attn.hook_z``, ``blocks.{b}.hook_attn_out``). No
weight is looked up, so that a norm behind the heads is noticed.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, SupportsIndex, TypeAlias

import torch
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor

from spade_lens.checks import whole_numbers
from spade_lens.models.errors import UnsupportedModelError
from spade_lens.models.hooks import quiet, rows_are, side_by_side
from spade_lens.models.model import Model
from spade_lens.models.places import pad_after
from spade_lens.prompts.inputs import PromptsLike
from spade_lens.prompts.prompt import Prompt
from spade_lens.settings import Settings, limits, progress_bar, scoped

Head = tuple[int, int]
"""A block and a head in it, both from 0. Block b lies between layer b and layer b + 1."""

BlocksLike: TypeAlias = SupportsIndex | Iterable[SupportsIndex] | None
"""A block, several, or None for all."""


@scoped
@torch.no_grad()
def head_outputs(
    model: Model,
    prompts: PromptsLike,
    *,
    blocks: BlocksLike = None,
    settings: Settings | None = None,
) -> Float[Tensor, "block batch head d_head"]:
    """Capture every head's output at the answer position, before the output projection.

    Example:
        >>> head_outputs(model, prompts).shape
        torch.Size([4, 2, 4, 8])
    """
    checked = model.prompts(prompts)
    blocks = check_blocks(model, blocks)
    n_heads = count_heads(model)
    lengths = [prompt.answer + 1 for prompt in checked]
    groups = batches(model, lengths, n_heads, _budget(model, len(blocks), len(checked)))
    parts = []
    with progress_bar(total=len(checked), desc="heads", unit="prompt", model=model) as bar:
        for group in groups:
            with rows_are(group, [lengths[i] for i in group]):
                parts.append(_outputs(model, [checked[i] for i in group], blocks))
            bar.update(len(group))
    order = torch.tensor([i for group in groups for i in group]).argsort()
    return rearrange(
        torch.cat(parts, dim=1)[:, order.to(model.device)],
        "block batch (head d_head) -> block batch head d_head",
        head=n_heads,
    ).contiguous()


def head_contributions(
    model: Model, outputs: Float[Tensor, "block batch head d_head"], *, blocks: BlocksLike = None
) -> Float[Tensor, "block batch head d_model"]:
    """Compute what every head adds to the residual stream, by the output projection.

    The contributions of all heads and the projection's bias, which is no head's, add up to what
    the attention adds.

    Example:
        >>> outputs = head_outputs(model, prompts, blocks=[1, 3])
        >>> head_contributions(model, outputs, blocks=[1, 3]).shape
        torch.Size([2, 2, 4, 32])
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
        # A row for every prompt and head, in which the other heads give 0.
        rows = einsum(outputs[n], alone, "b h d, h head -> b h head d")
        added = written_by(model, block, rearrange(rows, "b h head d -> (b h) head d"))
        out[n] = rearrange(added, "(b h) d_model -> b h d_model", h=n_heads)
    return out


@torch.no_grad()
def block_with(
    model: Model,
    block: int,
    resid: Float[Tensor, "row d_model"],
    outputs: Float[Tensor, "row head d_head"],
) -> tuple[Float[Tensor, "row d_model"], Float[Tensor, "row d_model"]]:
    """Run one block on single tokens; return the residuals after it, and what the attention added.

    With all its heads' outputs given, a token needs no others before it.

    Raises:
        ValueError: If hooks may act on the model.
    """
    if model.hooked:
        raise ValueError(
            f"Heads of {model.name} were to be replayed while hooks act on it. They run as single "
            "tokens, which hooks cannot tell from prompts. Do this outside model.hooks(...)."
        )
    n = limits(model).rows(32 * model.d_model * resid.element_size())
    parts = [
        _block_with(model, block, *rows)
        for rows in zip(resid.split(n), outputs.split(n), strict=True)
    ]
    after, added = (torch.cat(part) for part in zip(*parts, strict=True))
    return after, added


def written_by(
    model: Model, block: int, outputs: Float[Tensor, "row head d_head"]
) -> Float[Tensor, "row d_model"]:
    """Compute what a block's attention adds for outputs of its heads, without the bias."""
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
            "what its heads give: a norm comes between. So no head has a contribution of its own, "
            "and there are no function vectors. Use head_effects, which needs no such sum."
        )
    return added - none


def batches(
    model: Model, lengths: Sequence[int], n_heads: int, budget: float, *, kept: int = 1
) -> list[list[int]]:
    """Group prompts that may run side by side, as many at a time as fit so many bytes.

    ``kept`` is of how many blocks all that is computed is kept, as gradients need it.
    """
    most, element = limits(model), torch.finfo(model.dtype).bits // 8

    def fits(n_rows: int, longest: int) -> bool:
        # As capture() allows for, and the scores and weights of every head.
        each = kept * longest * element * (32 * model.d_model + 3 * n_heads * longest)
        small = n_rows * longest <= most.batch_tokens and n_rows <= (most.batch_size or n_rows)
        return small and n_rows * each <= budget

    return side_by_side(model, lengths, fits)


def check_blocks(model: Model, blocks: BlocksLike) -> list[int]:
    """Return the blocks asked for, in the order given; all of them for None."""
    if blocks is None:
        return list(range(model.n_layers))
    expected = f"one or several of the blocks 0 to {model.n_layers - 1} of {model.name}, each once"
    return whole_numbers(blocks, "blocks=", expected, below=model.n_layers)


def count_heads(model: Model) -> int:
    """Return how many heads a block has, from the shape of its pattern [batch head q k]."""
    seen: list[int] = []

    def see(pattern: Tensor, hook: object) -> None:
        seen.append(pattern.shape[1])

    one = torch.zeros(1, 1, model.d_model, dtype=model.dtype, device=model.device)
    at = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    with quiet(), model.hooks([("blocks.0.attn.hook_pattern", see)], ragged=True):
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

    def keep(attention: Tensor, hook: object) -> None:
        added.append(attention[:, 0])

    hooks: list[tuple[str, Callable[..., Any]]] = [
        (f"blocks.{block}.attn.hook_z", give),
        (f"blocks.{block}.hook_attn_out", keep),
    ]
    at = torch.zeros(len(resid), 1, dtype=torch.long, device=model.device)
    with model.hooks(hooks, ragged=True):
        after = model.run_blocks(resid[:, None], at, block, block + 1)
    if not replaced or not added:
        raise _unreachable(model)
    return after[:, 0], added[0]


def _outputs(
    model: Model, prompts: Sequence[Prompt], blocks: Sequence[int]
) -> Float[Tensor, "block batch width"]:
    """Capture the outputs of all heads, side by side as the projection takes them."""
    tokens = pad_after([p.tokens[: p.answer + 1] for p in prompts], model.device)
    at = torch.arange(tokens.shape[1], device=model.device).expand_as(tokens)
    rows = torch.arange(len(prompts), device=model.device)
    last = torch.tensor([p.answer for p in prompts], device=model.device)
    seen: dict[int, Tensor] = {}

    def keep(block: int) -> Callable[..., None]:
        def hook(outputs: Tensor, hook: object) -> None:
            seen[block] = outputs[rows, last].flatten(1)  # some models keep heads in one axis

        return hook

    resid = model.embed(tokens, at)
    hooks = [(f"blocks.{block}.attn.hook_z", keep(block)) for block in blocks]
    with model.hooks(hooks, ragged=True):
        model.run_blocks(resid, at, 0, max(blocks) + 1)
    if len(seen) < len(blocks):
        raise _unreachable(model)
    return torch.stack([seen[block] for block in blocks])


def _budget(model: Model, n_blocks: int, n_prompts: int) -> float:
    """Return the bytes that a batch may take beside the result."""
    element = torch.finfo(model.dtype).bits // 8
    result = 2 * n_blocks * n_prompts * model.d_model * element
    memory = limits(model)
    budget = memory.memory_bytes - result
    if budget < 0.1 * memory.memory_bytes:
        raise ValueError(
            f"Head outputs of {n_blocks} blocks and {n_prompts} prompts take about "
            f"{result / 2**30:.2f} GiB, more than fits memory_limit={memory.memory_limit} GiB. Ask "
            "for fewer blocks, give fewer prompts at a time, or raise memory_limit."
        )
    return budget


def _unreachable(model: Model) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"The heads of {model.name} cannot be reached: its attention does not run TransformerLens' "
        "hook_z, hook_pattern and hook_attn_out in every block."
    )
