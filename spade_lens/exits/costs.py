"""What a forward costs: FLOPs and layer-tokens of blocks, checks and answers.

FLOPs are those of matrix products, attention scores included, two for a multiplication and an
addition, as ``torch.utils.flop_counter`` counts them. They are not derived from an architecture:
every block runs once on one token and once on two under that counter, and since a block's cost is
a multiple of its tokens plus a multiple of its (query, key) pairs, this gives both factors.
Blocks whose cost depends on the tokens' content (mixtures of experts) are priced as on these.

One *layer-token* is one token going through one block.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate, pairwise
from typing import Any
from weakref import WeakKeyDictionary

import torch
from einops import rearrange
from jaxtyping import Bool, Int
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from spade_lens.exits.answer_head import AnswerHead
from spade_lens.exits.confidence import Confidence, Over
from spade_lens.lenses.lens import Lens, Reading, finals_of, keep_of
from spade_lens.lenses.spade import Spade
from spade_lens.models.backbone import Backbone
from spade_lens.models.hooks import quiet
from spade_lens.models.model import Model
from spade_lens.models.residuals import Residuals
from spade_lens.prompts.prompt import Prompt


def flop_counter() -> FlopCounterMode:
    """Return a context that counts FLOPs, those of torch's fused attention included.

    Torch's own counter has none for the CPU's, and some of its releases stop where there are fewer
    heads of keys than of queries.

    Example:
        >>> with flop_counter() as counter:
        ...     _ = torch.ones(2, 3) @ torch.ones(3, 4)
        >>> counter.get_total_flops()
        48
    """

    def attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        batch, heads, n_queries, d_query = query
        return int(2 * batch * heads * n_queries * key[-2] * (d_query + value[-1]))

    fused = [getattr(torch.ops.aten, name) for name in _FUSED if hasattr(torch.ops.aten, name)]
    return FlopCounterMode(display=False, custom_mapping=dict.fromkeys(fused, attention))


_FUSED = tuple(
    f"_scaled_dot_product_{kind}"
    for kind in (
        "flash_attention_for_cpu",
        "flash_attention",
        "efficient_attention",
        "cudnn_attention",
    )
)


_MEASURED: WeakKeyDictionary[Backbone, tuple[list[int], list[int], int]] = WeakKeyDictionary()
"""What a model's pieces cost. Counting is slow compared with running a short prompt."""


@torch.no_grad()
def _measure(model: Backbone) -> tuple[list[int], list[int], int]:
    """Return FLOPs per token and per (query, key) pair by block, and of unembedding one row."""
    one, two = (_by_block(model, n) for n in (1, 2))
    # one = token + pair, two = 2 token + 4 pair.
    pair = [(b - 2 * a) // 2 for a, b in zip(one, two, strict=True)]
    token = [a - p for a, p in zip(one, pair, strict=True)]
    row = torch.zeros(1, model.d_model, dtype=model.dtype, device=model.device)
    with quiet(), flop_counter() as counter:
        model.unembed(row)
    return token, pair, int(counter.get_total_flops())


def _by_block(model: Backbone, n_tokens: int) -> list[int]:
    resid = torch.zeros(1, n_tokens, model.d_model, dtype=model.dtype, device=model.device)
    positions = torch.arange(n_tokens, device=model.device)[None]
    marks = [0]
    with quiet(), flop_counter() as counter:

        def mark(_layer: int, _resid: Tensor) -> None:
            marks.append(int(counter.get_total_flops()))

        model.run_blocks(resid, positions, 0, model.n_layers, after_block=mark)
    return [b - a for a, b in pairwise(marks)]


class Costs:
    """The costs of a model's pieces, measured by running them once."""

    def __init__(self, model: Model, head: AnswerHead | None = None) -> None:
        self.model = model
        self.head = head or AnswerHead(model)
        if model.structure not in _MEASURED:
            _MEASURED[model.structure] = _measure(model.structure)
        self.token, self.pair, self.unembedding = _MEASURED[model.structure]
        # Sums up to every layer, since spans of blocks are what is asked for.
        self._tokens_to = [0, *accumulate(self.token)]
        self._pairs_to = [0, *accumulate(self.pair)]
        # With the lens itself, so that its id stays its own.
        self._lenses: dict[tuple[int, int, int], tuple[Lens, int]] = {}

    def blocks(self, start: int, stop: int, queries: int, keys: int | None = None) -> int:
        """Return the FLOPs of so many queries and keys through blocks ``start`` to ``stop - 1``."""
        token = self._tokens_to[stop] - self._tokens_to[start]
        pair = self._pairs_to[stop] - self._pairs_to[start]
        return token * queries + pair * queries * (queries if keys is None else keys)

    def answer(self, prompt: Prompt, over: Over | None = None) -> int:
        """Return the FLOPs of unembedding one row."""
        return self.unembedding * self.head.unembeds(prompt, over) // self.model.d_vocab

    def lens(self, lens: Lens, prompt: Prompt, layer: int) -> tuple[int, int]:
        """Return FLOPs and layer-tokens of a lens from a layer on, without the unembedding.

        SPADE's kept tokens run through the remaining blocks. The start token does not run where
        its keys and values are stored (:meth:`Model.prefix`, computed once in a call of many
        prompts, and not charged). Other lenses are measured, once for each layer and number of kept
        tokens.
        """
        kept = keep_of(lens, prompt, prompt.answer)
        if isinstance(lens, Spade):
            queries = len(kept) - stored(self.model, prompt, kept)
            n_layers = self.model.n_layers
            flops = self.blocks(layer, n_layers, queries, len(kept))
            return flops, queries * (n_layers - layer)
        key = id(lens), layer, len(kept)
        if key not in self._lenses:
            self._lenses[key] = lens, self._measure_lens(lens, prompt, kept, layer)
        return self._lenses[key][1], 0

    def _measure_lens(self, lens: Lens, prompt: Prompt, kept: Sequence[int], layer: int) -> int:
        model = self.model
        positions = sorted({prompt.answer, *kept})
        residuals = Residuals(
            stack=torch.ones(
                1, len(positions), model.d_model, dtype=model.dtype, device=model.device
            ),
            layers=(layer,),
            prompt=torch.zeros(len(positions), dtype=torch.long),
            position=torch.tensor(positions),
            prompts=(prompt,),
        )
        reading = Reading(0, prompt.answer, tuple(kept))
        with torch.no_grad(), quiet(), flop_counter() as counter:
            finals_of(lens, residuals, [reading], [layer])
        return int(counter.get_total_flops())


def stored(model: Model, prompt: Prompt, kept: Sequence[int]) -> int:
    """Return how many kept tokens SPADE need not run: the start token, where it is stored."""
    reads_beyond_start = len(kept) > 1 and kept[0] == 0
    return int(reads_beyond_start and model.prefix(prompt.tokens[0]) is not None)


@dataclass(frozen=True, eq=False)
class Prices:
    """What every prompt costs at every stop; a *stop* is a candidate layer or the end.

    Args:
        stops: The candidate layers, ascending, and then ``n_layers``.
        trunk: FLOPs of the blocks up to every stop, on all the prompt's tokens.
        check: FLOPs of a check at every candidate layer, unembedding included.
        answer: FLOPs of answering after every stop: SPADE's tail and its unembedding, and at the
            end the ordinary unembedding.
        check_tokens: Layer-tokens of a check.
        answer_tokens: Layer-tokens of answering.
        length: The prompt's tokens.
        shared: Whether the check reads the very lens that answers, so that a prompt that leaves
            after a check needs no extra answer pass.
        screen: FLOPs of the cheaper check that comes before it; None where there is none.
        screen_tokens: Layer-tokens of that one.
    """

    stops: tuple[int, ...]
    trunk: Int[Tensor, "stop prompt"]
    check: Int[Tensor, "layer prompt"]
    answer: Int[Tensor, "stop prompt"]
    check_tokens: Int[Tensor, "layer prompt"]
    answer_tokens: Int[Tensor, "stop prompt"]
    length: Int[Tensor, " prompt"]
    shared: bool
    screen: Int[Tensor, "layer prompt"] | None = None
    screen_tokens: Int[Tensor, "layer prompt"] | None = None

    @property
    def full(self) -> Int[Tensor, " prompt"]:
        """FLOPs of the full model: all tokens through all blocks, one row unembedded."""
        return self.trunk[-1] + self.answer[-1]

    def of(self, prompts: Tensor) -> "Prices":
        """Return the prices of some prompts, by index or mask."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        tensors: dict[str, Any] = {
            name: value[..., prompts] for name, value in values.items() if isinstance(value, Tensor)
        }
        return replace(self, **tensors)

    def settle(
        self,
        stop: Int[Tensor, " prompt"],
        checked: Sequence[int],
        let_through: Bool[Tensor, "layer prompt"] | None = None,
    ) -> dict[str, Int[Tensor, " prompt"]]:
        """Return what every prompt costs in all, by name.

        Args:
            stop: The index of the stop at which a prompt left.
            checked: The candidate layers, by index, at which the lens was read while the prompt
                was there.
            let_through: For which of the prompts there it was read, where a cheaper check comes
                first; None for all.
        """
        prompt = torch.arange(len(stop))
        looked = torch.zeros(self.check.shape, dtype=torch.bool)
        looked[list(checked)] = torch.tensor(list(checked), dtype=torch.long)[:, None] <= stop
        made = looked if let_through is None else looked & let_through
        at_end = torch.zeros(1, len(stop), dtype=torch.bool)
        # The check at the exit has given the answer already.
        answered = self.shared & torch.cat([made, at_end])[stop, prompt]
        layers = torch.tensor(self.stops)[stop]
        tokens = layers * self.length + (self.check_tokens * made).sum(dim=0)
        flops_checks = (self.check * made).sum(dim=0)
        if self.screen is not None and self.screen_tokens is not None:
            flops_checks += (self.screen * looked).sum(dim=0)
            tokens += (self.screen_tokens * looked).sum(dim=0)
        return {
            "checks": made.sum(dim=0),
            "layer_tokens": tokens + self.answer_tokens[stop, prompt] * ~answered,
            "flops_blocks": self.trunk[stop, prompt],
            "flops_checks": flops_checks,
            "flops_answer": self.answer[stop, prompt] * ~answered,
        }


def price(
    costs: Costs,
    prompts: Sequence[Prompt],
    layers: Sequence[int],
    check: Confidence | None,
    answerer: Lens,
) -> Prices:
    """Return the prices of prompts for one check, if any, and one lens that answers."""
    screen = None if check is None else check.after
    lenses = [answerer, *(one.lens for one in (check, screen) if one is not None)]
    names = ["trunk", "check", "answer", "check_tokens", "answer_tokens"]
    names += [] if screen is None else ["screen", "screen_tokens"]
    columns: dict[str, list[list[int]]] = {name: [] for name in names}
    # Most prompts of a task cost the same; a prompt's cost depends on these only.
    by_kind: dict[Any, list[list[int]]] = {}
    for prompt in prompts:
        kept = [keep_of(lens, prompt, prompt.answer) for lens in lenses]
        kind = (
            len(prompt),
            prompt.tokens[0],
            len(prompt.candidates),
            *((len(k), k[0] == 0) for k in kept),
        )
        if kind not in by_kind:
            by_kind[kind] = _prices_of(costs, prompt, layers, check, answerer)
        for column, values in zip(columns.values(), by_kind[kind], strict=True):
            column.append(values)
    by_name = {name: torch.tensor(rows, dtype=torch.long) for name, rows in columns.items()}
    return Prices(
        stops=(*layers, costs.model.n_layers),
        length=torch.tensor([len(p) for p in prompts]),
        shared=check is not None and check.lens is answerer,
        **{name: rearrange(rows, "prompt stop -> stop prompt") for name, rows in by_name.items()},
    )


def _prices_of(
    costs: Costs, prompt: Prompt, layers: Sequence[int], check: Confidence | None, answerer: Lens
) -> list[list[int]]:
    """Return one prompt's values for the tensors of :class:`Prices`, in their order."""
    screen = None if check is None else check.after
    checks, screens = (_checks(costs, prompt, layers, one) for one in (check, screen))
    answers = [*(costs.lens(answerer, prompt, layer) for layer in layers), (0, 0)]
    return [
        [costs.blocks(0, stop, len(prompt)) for stop in (*layers, costs.model.n_layers)],
        [flops for flops, _ in checks],
        [flops + costs.answer(prompt) for flops, _ in answers],
        [tokens for _, tokens in checks],
        [tokens for _, tokens in answers],
        *([] if screen is None else [[s[of] for s in screens] for of in (0, 1)]),
    ]


def _checks(
    costs: Costs, prompt: Prompt, layers: Sequence[int], check: Confidence | None
) -> list[tuple[int, int]]:
    """Return FLOPs and layer-tokens of a check by layer, unembedding included."""
    if check is None:
        return [(0, 0) for _ in layers]
    unembedding = costs.answer(prompt, check.over)
    read = [costs.lens(check.lens, prompt, layer) for layer in layers]
    return [(flops + unembedding, tokens) for flops, tokens in read]
