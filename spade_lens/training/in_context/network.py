"""The network: TransformerLens' own small transformer, with vectors for tokens.

It is trained as the module that it is, which is faster than through a bridge. It is analysed
through a ``TransformerBridge`` over the same weights, so that all hook names work.
"""

from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from spade_lens.checks import check_fields, check_number, checked
from spade_lens.models.adapters import native_bridge, native_model
from spade_lens.models.recorder import tree_copy
from spade_lens.training.in_context.task import Drawn, InContextTask


@dataclass(frozen=True)
class NetworkSize:
    """The size of a network, and the seed of its first weights.

    Args:
        n_layers: The number of blocks.
        d_model: The width of the residual stream.
        n_heads: The number of heads of attention, which share the width.
        seed: The seed of the first weights.

    Raises:
        TypeError: If an argument is of another type.
        ValueError: If one is out of range, or heads do not divide the width.
    """

    n_layers: int = 5
    d_model: int = 64
    n_heads: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("n_layers", "d_model", "n_heads"):
            check_number(name, getattr(self, name), least=1)
        if self.d_model % self.n_heads:
            raise ValueError(
                f"d_model={self.d_model} was given with n_heads={self.n_heads}; expected a width "
                "that the number of heads divides."
            )


class InContextNetwork(nn.Module):
    """A transformer that predicts the target at every input, from the pairs before it.

    Layers are counted as everywhere: layer l is the residual stream after l blocks, and layer 0 is
    a linear map of the token plus a learned position.

    Example:
        >>> task = sl.training.InContextTask(examples=3)
        >>> network = sl.training.InContextNetwork(task, NetworkSize(2, 8, 2))
        >>> drawn = task.draw(5, seed=0)
        >>> network(drawn).shape, network.residuals(drawn).shape
        (torch.Size([5, 3, 1]), torch.Size([3, 5, 6, 8]))

    Args:
        task: The task, whose dimensions and number of examples it has.
        size: Its size.

    Raises:
        TypeError: If an argument is of another type.
        UnsupportedModelError: If this version of TransformerLens has no models of its own.
    """

    @checked
    def __init__(self, task: InContextTask, size: NetworkSize | None = None) -> None:
        super().__init__()
        self.task = task
        self.size = size = NetworkSize() if size is None else size
        generator = torch.Generator().manual_seed(size.seed)
        self.read_in = nn.Linear(task.d_token, size.d_model, bias=False, device="meta")
        weight = torch.randn(size.d_model, task.d_token, generator=generator)
        self.read_in.weight = nn.Parameter(weight * task.d_token**-0.5)
        self.body: Any = native_model(
            n_layers=size.n_layers,
            d_model=size.d_model,
            d_head=size.d_model // size.n_heads,
            n_heads=size.n_heads,
            n_ctx=task.n_tokens,
            # As many as the numbers that it gives would make it a language model.
            d_vocab=3 if task.d_y == 2 else 2,
            d_vocab_out=task.d_y,
            act_fn="gelu",
            normalization_type="LN",
            positional_embedding_type="standard",
            init_mode="gpt2",
            seed=size.seed,
        )
        self.body.tok_embed.requires_grad_(False)  # there are no tokens with a number

    def get_input_embeddings(self) -> nn.Module:
        """Return what reads tokens, which AdamW trains."""
        return self.read_in

    def get_output_embeddings(self) -> nn.Module:
        """Return what gives predictions, which AdamW trains."""
        head: nn.Module = self.body.head
        return head

    def embed(
        self, tokens: Float[Tensor, "prompt pos d_token"]
    ) -> Float[Tensor, "prompt pos d_model"]:
        """Return the residual stream at layer 0."""
        return self.read_in(tokens) + self.body.pos.weight[: tokens.shape[1]]

    def run_blocks(
        self, resid: Float[Tensor, "prompt pos d_model"], start: int, stop: int
    ) -> Float[Tensor, "prompt pos d_model"]:
        """Run blocks ``start`` to ``stop - 1``, as a causal sequence.

        These are the body's own blocks, with torch's fused attention, which trains in three
        quarters of the time. A test holds them against the bridge.
        """
        for block in self.body.layers[start:stop]:
            normed, at = block.ln1(resid), block.attn
            weight = torch.cat([at.q.weight, at.k.weight, at.v.weight])
            bias = torch.cat([at.q.bias, at.k.bias, at.v.bias])
            q, k, v = rearrange(
                F.linear(normed, weight, bias),
                "b pos (n head d) -> n b head pos d",
                n=3,
                d=at.d_head,
            )
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            resid = resid + at.o(rearrange(mixed, "b head pos d -> b pos (head d)"))
            resid = resid + block.mlp(block.ln2(resid))
        return resid

    def predict(self, resid: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows d_y"]:
        """Return predictions of residuals at the last layer."""
        return self.body.head(self.body.ln_out(resid))

    @checked
    def forward(self, drawn: Drawn) -> Float[Tensor, "prompt example d_y"]:
        """Return the prediction at every input.

        Raises:
            TypeError: If something else than drawn prompts is given.
            ValueError: If prompts do not fit the task.
        """
        tokens = self.task.tokens(drawn).to(self.read_in.weight)
        resid = self.run_blocks(self.embed(tokens), 0, self.size.n_layers)
        return self.predict(resid[:, list(self.task.x_positions)[: drawn.inputs.shape[1]]])

    def loss(self, batch: int) -> Float[Tensor, ""]:
        """Return the mean squared error on fresh prompts, drawn by torch's own generator."""
        drawn = self.task.draw(batch)
        return (self(drawn) - drawn.targets.to(self.read_in.weight)).square().mean()

    @torch.no_grad()
    def residuals(self, drawn: Drawn) -> Float[Tensor, "layer prompt pos d_model"]:
        """Return the residual stream at every layer, 0 to ``n_layers``."""
        stream = [self.embed(self.task.tokens(drawn).to(self.read_in.weight))]
        for layer in range(self.size.n_layers):
            stream.append(self.run_blocks(stream[-1], layer, layer + 1))
        return torch.stack(stream)

    def bridge(self) -> Any:
        """Return a ``TransformerBridge`` over the same weights, which reads vectors.

        It takes ``read_in(task.tokens(drawn))``, and its hook names are those of TransformerLens.
        """
        return native_bridge(tree_copy(self.body), "in-context")
