"""LayerSkip: train a language model so that its lower layers answer well.

Source: Elhoushi et al., LayerSkip (arXiv 2404.16710). Two parts: blocks are dropped at random, the
upper ones more often; and exits at lower layers add to the loss, through the model's own final norm
and unembedding. The formulas are the paper's. Of the implementations in use, torchtune's differs in
the scale of the losses: it sums layer numbers over the exits that are on, so that its layer 0 has
weight. In the paper's formula layer 0 has none.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from spade_lens.checks import check_fields, check_number
from spade_lens.models.errors import UnsupportedModelError


@dataclass(frozen=True)
class LayerSkip:
    """The recipe: layer dropout and early-exit loss.

    With T steps t = 0 ... T-1 and L blocks l = 0 ... L-1, the exit of block l reads x_{l+1}:

    - dropout: a sample skips block l with probability ``p_max`` S(t) D(l), where
      D(l) = exp(l ln2 / (L-1)) - 1. From scratch S(t) = exp(t ln2 / (T-1)) - 1, else S(t) = 1;
    - scale: e(l) = ``e_scale`` (0 + 1 + ... + l) for l < L-1, and
      e(L-1) = (L-1) + ``e_scale`` (0 + 1 + ... + L-2);
    - curriculum C(t, l), 0 or 1. Rotational: every ``period``-th exit, shifted by one each step.
      Gradual: from the last downwards, one more every T / (2 L) steps. All: every exit;
    - loss: the sum over l of C(t, l) e(l) CE_l, over the sum of C(t, l) e(l).

    In the paper the rotation takes the last exit too, so that most steps train lower exits alone.
    torchtune always keeps the last one on, whose weight is then most of the sum: ``last=True``.

    Example:
        >>> recipe = LayerSkip(steps=100, e_scale=1.0, period=2)
        >>> recipe.weights(1, 4).tolist()  # at step 1 exits 1 and 3 are on
        [0.0, 0.1428..., 0.0, 0.8571...]

    Args:
        steps: The number of steps of the training, T.
        p_max: The highest rate of dropout, that of the last block.
        e_scale: How much the lower exits count.
        curriculum: Which exits count at a step.
        period: R of the rotational curriculum.
        scratch: Whether dropout grows over the training, as the paper has it from scratch.
        last: Whether the last exit counts at every step.

    Raises:
        TypeError: If an argument is of another type.
        ValueError: If one is out of range.
    """

    steps: int
    p_max: float = 0.1
    e_scale: float = 0.2
    curriculum: str = "rotational"
    period: int = 3
    scratch: bool = True
    last: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
        check_number("steps", self.steps, least=2)
        check_number("period", self.period, least=1)
        for name in ("p_max", "e_scale"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ValueError(f"{name}={value} was given; expected 0 to 1.")
        if self.curriculum not in ("rotational", "gradual", "all"):
            raise ValueError(
                f"curriculum={self.curriculum!r} was given; expected 'rotational', 'gradual' or "
                "'all'."
            )

    def dropout(self, step: int, n_layers: int) -> Float[Tensor, " block"]:
        """Return the probability with which a sample skips every block at a step."""
        last = self._last_block(step, n_layers)
        of_step = math.exp(step * math.log(2) / (self.steps - 1)) - 1 if self.scratch else 1.0
        of_block = torch.exp(torch.arange(n_layers) * math.log(2) / last) - 1
        return self.p_max * of_step * of_block

    def weights(self, step: int, n_layers: int) -> Float[Tensor, " block"]:
        """Return the weight of the loss of every exit at a step; their sum is 1.

        Raises:
            ValueError: If no exit has weight at the step.
        """
        last = self._last_block(step, n_layers)
        scales = [self.e_scale * block * (block + 1) / 2 for block in range(last)]
        scales.append(last + self.e_scale * last * (last - 1) / 2)
        on = [self._is_on(step, block, n_layers) for block in range(n_layers)]
        weights = torch.tensor(on) * torch.tensor(scales)
        if not weights.any():
            raise ValueError(
                f"At step {step} none of the exits that are on has weight (period {self.period}, "
                f"e_scale {self.e_scale}, {n_layers} blocks). Give last=True, or a "
                "period below the number of blocks with an e_scale above 0."
            )
        return weights / weights.sum()

    def loss(self, model: Any, tokens: Int[Tensor, "batch pos"], step: int) -> Float[Tensor, ""]:
        """Return the loss of a batch at a step, dropout included.

        Example:
            >>> language_model = model.original  # a Hugging Face model
            >>> tokens = torch.randint(3, 97, (4, 16))
            >>> LayerSkip(steps=100, period=3).loss(language_model, tokens, step=0).shape
            torch.Size([])

        Args:
            model: A Hugging Face ``*ForCausalLM``; its class stays what it is.
            tokens: Whole texts, without padding.
            step: The step, counted from 0.

        Raises:
            UnsupportedModelError: If the model has no list of blocks and final norm as Llama's
                have, or does more than unembedding after the norm.
        """
        parts = _Parts.of(model)
        n_layers = len(parts.blocks)
        weights = self.weights(step, n_layers)
        exits = weights.nonzero()[:, 0].tolist()
        # [exit batch pos d_model]
        residuals = torch.stack(
            run_with_dropout(model, parts.blocks, tokens, self.dropout(step, n_layers), exits)
        )
        logits = parts.head(parts.norm(residuals[:, :, :-1]))
        nats = F.cross_entropy(
            logits.flatten(0, 2).float(),
            tokens[:, 1:].expand(len(exits), -1, -1).flatten(),
            reduction="none",
        )
        return nats.view(len(exits), -1).mean(dim=1) @ weights[exits].to(nats)

    def _last_block(self, step: int, n_layers: int) -> int:
        if n_layers < 2 or not 0 <= step < self.steps:
            raise ValueError(
                f"step={step} and {n_layers} blocks were given; expected a step from 0 to "
                f"{self.steps - 1} and at least 2 blocks."
            )
        return n_layers - 1

    def _is_on(self, step: int, block: int, n_layers: int) -> bool:
        if self.curriculum == "all" or (self.last and block == n_layers - 1):
            return True
        if self.curriculum == "rotational":
            return (block - step) % self.period == 0
        return (n_layers - 1 - block) * self.steps <= step * 2 * n_layers


@dataclass(frozen=True)
class _Parts:
    """The parts of a language model that exits need."""

    blocks: Sequence[nn.Module]
    norm: nn.Module
    head: nn.Module

    @classmethod
    def of(cls, model: Any) -> "_Parts":
        base = getattr(model, "base_model", None)
        blocks, norm = getattr(base, "layers", None), getattr(base, "norm", None)
        head = getattr(model, "get_output_embeddings", lambda: None)()
        if base is None or blocks is None or norm is None or head is None:
            raise UnsupportedModelError(
                f"{type(model).__name__} was given; expected a Hugging Face *ForCausalLM with "
                "base_model.layers, base_model.norm and output embeddings, as Llama has."
            )
        config = model.config.get_text_config()
        extras = ("final_logit_softcapping", "logits_scaling", "logit_scale")
        changed = {k: v for k in extras if (v := getattr(config, k, None)) not in (None, 1, 1.0)}
        if changed:
            raise UnsupportedModelError(
                f"{type(model).__name__} changes its logits after the unembedding ({changed}); "
                "expected a model whose logits are the unembedding of its final norm, as Llama's."
            )
        return cls(list(blocks), norm, head)


def run_with_dropout(
    model: Any,
    blocks: Sequence[nn.Module],
    tokens: Int[Tensor, "batch pos"],
    rates: Float[Tensor, " block"],
    exits: Sequence[int],
) -> list[Float[Tensor, "batch pos d_model"]]:
    """Run a model's blocks, each without the samples that skip it; return residuals after some.

    Args:
        model: The model.
        blocks: Its blocks.
        tokens: Token ids.
        rates: The probability with which a sample skips every block.
        exits: Blocks after which the residual stream is wanted, ascending.
    """
    stays = torch.rand(len(blocks), len(tokens)) >= rates[:, None]
    found: dict[int, Tensor] = {}

    def around(block: int, run: Callable[..., Any]) -> Callable[..., Any]:
        def forward(resid: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            found[block] = _run_rows(run, stays[block], resid, *args, **kwargs)
            return found[block]

        return forward

    with _forwards(blocks, around):
        model.base_model(input_ids=tokens, use_cache=False)
    return [found[block] for block in exits]


def _run_rows(
    run: Callable[..., Any], stays: Tensor, resid: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    """Run a block on some rows of a batch; the others pass it by."""
    if not stays.any():
        return resid
    rows = stays.nonzero()[:, 0].to(resid.device)

    def chosen(given: Any) -> Any:
        if isinstance(given, tuple):  # cosines and sines
            return tuple(map(chosen, given))
        per_row = isinstance(given, Tensor) and given.ndim > 1 and len(given) == len(stays)
        return given[rows] if per_row else given

    everyone = len(rows) == len(stays)
    if not everyone:
        args, kwargs = chosen(args), {name: chosen(value) for name, value in kwargs.items()}
    out = run(resid if everyone else resid[rows], *args, **kwargs)
    if not isinstance(out, Tensor):
        raise UnsupportedModelError(
            f"A block returned {type(out).__name__}; expected its residual stream, as Llama's do."
        )
    return out if everyone else resid.index_copy(0, rows, out.to(resid.dtype))


@contextmanager
def _forwards(
    modules: Sequence[nn.Module], around: Callable[[int, Callable[..., Any]], Callable[..., Any]]
) -> Iterator[None]:
    """Put a function around every module's forward, and take it away again."""
    held = [vars(module).get("forward") for module in modules]
    try:
        for number, module in enumerate(modules):
            module.forward = around(number, module.forward)
        yield
    finally:
        for module, before in zip(modules, held, strict=True):
            if before is None:
                vars(module).pop("forward", None)
            else:
                module.forward = before
