"""What a rule vector says: the tokens that SPADE, the logit lens and a patchscope read in it.

Here the two halves of the library meet. The logit lens unembeds the vector as it is. SPADE runs
it through the remaining blocks after the start token. A patchscope (Ghandeharioun et al., arXiv
2401.06102) puts it into another prompt, whose demonstrations ask to repeat a word, and reads what
is repeated. Ours: the patchscope's prompt, the same layer on both sides, and that vectors stand
in position 1 for SPADE unless told otherwise.
"""

from collections.abc import Sequence

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from spade_lens.icl.geometry.convergence import check_layer_names, check_shape
from spade_lens.models.model import Model
from spade_lens.models.residuals import capture, check_layers
from spade_lens.prompts.few_shot import few_shot_prompt
from spade_lens.prompts.prompt import Prompt, start_token_id
from spade_lens.settings import Settings, progress_bar, scoped

METHODS = ("SPADE", "logit lens", "patchscope")

_ROWS_AT_ONCE = 64


def identity_prompt(model: Model) -> Prompt:
    r"""The patchscope's prompt: three words, each repeated, and a place for a vector.

    Example:
        >>> icl.identity_prompt(model).text
        'cat -> cat\n1135 -> 1135\nhello -> hello\n? ->'

    Raises:
        ValueError: If the model has no tokenizer.
    """
    if model.tokenizer is None:
        raise ValueError(
            f"{model.name} was loaded without a tokenizer, so no prompt can be written for the "
            "patchscope. Give target=, or load(..., tokenizer=...)."
        )
    words = [("cat", "cat"), ("1135", "1135"), ("hello", "hello")]
    return few_shot_prompt(model.tokenizer, words, "?")


@scoped
@torch.no_grad()
def meanings(
    model: Model,
    vectors: Float[Tensor, "layer batch demo d_model"],
    *,
    layers: Sequence[int] | None = None,
    methods: Sequence[str] = METHODS,
    positions: Int[Tensor, "batch demo"] | None = None,
    start: int | None = None,
    target: Prompt | None = None,
    top_k: int = 5,
    controls: bool = True,
    seed: int = 0,
    settings: Settings | None = None,
) -> pd.DataFrame:
    """The top tokens of every rule vector, by layer and method.

    Example:
        >>> vectors = torch.randn(2, 1, 3, model.d_model)  # [layer batch demo d_model]
        >>> frame = icl.meanings(model, vectors, layers=[1, 3], top_k=1, controls=False)
        >>> frame.groupby("method", sort=False).size().to_dict()
        {'SPADE': 6, 'logit lens': 6, 'patchscope': 6}

    Args:
        model: The model.
        vectors: The rule vectors, of prompts or averaged over prompts (then ``batch`` is 1).
        layers: The layers that ``vectors`` are of; 0, 1, 2, ... by default.
        methods: Which of ``"SPADE"``, ``"logit lens"`` and ``"patchscope"``.
        positions: For SPADE, the position of each vector in its prompt; 1 by default, right
            after the start token.
        start: For SPADE, the start token; by default the tokenizer's BOS.
        target: For the patchscope, the prompt that a vector is put into, in the place of the
            last token of its span ``query``; it is read at its answer position. By default
            :func:`identity_prompt`.
        top_k: How many tokens.
        controls: Whether a random vector of equal norm is read beside every vector.
        seed: Seed of these.
        settings: Memory limit, batch size and progress; see :class:`spade_lens.Settings`.

    Returns:
        One row for every method, layer and vector, and as many for the controls: ``model,
        method, layer, prompt, demo, control``, then ``top_1, top_1_logprob``, ... to k.

    Raises:
        ValueError: If layers or shapes do not fit, a method is unknown, ``top_k`` is not
            positive, or there is no start token or no place in the target.
    """
    n_layers, n_prompts, n_demos, _ = vectors.shape
    layers = check_layer_names(layers, n_layers)
    check_layers(model, layers)
    check_shape("positions", positions, (n_prompts, n_demos))
    unknown = [m for m in methods if m not in METHODS]
    if unknown or not methods or top_k < 1:
        raise ValueError(
            f"methods={list(methods)} and top_k={top_k} were given; expected some of "
            f"{list(METHODS)} and at least 1."
        )
    reader = _Reader(model, layers, methods, start, target)
    at = torch.ones(n_prompts, n_demos, dtype=torch.long) if positions is None else positions
    given = vectors.to(model.device, model.dtype)
    sets = [(False, given)]
    if controls:
        noise = torch.randn(given.shape, generator=torch.Generator().manual_seed(seed)).to(given)
        norm = given.norm(dim=-1, keepdim=True)
        sets.append((True, noise / noise.norm(dim=-1, keepdim=True) * norm))
    rows: list[dict[str, object]] = []
    total = len(methods) * len(sets) * n_layers
    with progress_bar(total=total, desc="meanings", unit="layer") as bar:
        for method in methods:
            for control, some in sets:
                for layer, at_layer in zip(layers, some, strict=True):
                    flat = at_layer.flatten(0, 1)
                    tokens, logprobs = reader.top(method, layer, flat, at.flatten(), top_k)
                    for i, (ids, values) in enumerate(zip(tokens, logprobs, strict=True)):
                        row: dict[str, object] = {
                            "model": model.name,
                            "method": method,
                            "layer": layer,
                            "prompt": i // n_demos,
                            "demo": i % n_demos,
                            "control": control,
                        }
                        for k, (token, value) in enumerate(zip(ids, values, strict=True)):
                            row[f"top_{k + 1}"] = reader.word(token)
                            row[f"top_{k + 1}_logprob"] = value
                        rows.append(row)
                    bar.update()
    return pd.DataFrame(rows)


class _Reader:
    """Takes vectors of one layer to logits, by any of the methods."""

    def __init__(
        self,
        model: Model,
        layers: Sequence[int],
        methods: Sequence[str],
        start: int | None,
        target: Prompt | None,
    ) -> None:
        self.model = model
        if "SPADE" in methods:
            if start is None and model.tokenizer is None:
                raise ValueError(
                    f"{model.name} was loaded without a tokenizer, so SPADE's start token is not "
                    "known. Give start=."
                )
            token = start_token_id(model.tokenizer) if start is None else start
            self.start = capture(model, [Prompt(tokens=(token,))], layers=layers)
        if "patchscope" in methods:
            self.target = identity_prompt(model) if target is None else target
            place = [p for p in self.target.spans.get("query", ()) if p < self.target.answer]
            if not place:
                raise ValueError(
                    "The patchscope's target has no place for a vector. Give it a span 'query' "
                    "before its answer position, as few_shot_prompt does."
                )
            self.place = place[-1]
            self.around = capture(model, [self.target], layers=layers)

    def top(
        self,
        method: str,
        layer: int,
        vectors: Float[Tensor, "row d_model"],
        positions: Int[Tensor, " row"],
        k: int,
    ) -> tuple[list[list[int]], list[list[float]]]:
        """Top tokens and their log-probabilities."""
        tokens: list[list[int]] = []
        logprobs: list[list[float]] = []
        for first in range(0, len(vectors), _ROWS_AT_ONCE):
            some = vectors[first : first + _ROWS_AT_ONCE]
            if method == "SPADE":
                some = self._spade(layer, some, positions[first : first + _ROWS_AT_ONCE])
            elif method == "patchscope":
                some = self._patchscope(layer, some)
            logits = self.model.logits(some)
            best = logits.log_softmax(dim=-1).topk(min(k, self.model.d_vocab), dim=-1)
            tokens += best.indices.tolist()
            logprobs += best.values.tolist()
        return tokens, logprobs

    def word(self, token: int) -> str:
        """The text of a token."""
        tokenizer = self.model.tokenizer
        return str(token) if tokenizer is None else str(tokenizer.decode([token]))

    def _spade(
        self, layer: int, vectors: Float[Tensor, "row d_model"], positions: Int[Tensor, " row"]
    ) -> Float[Tensor, "row d_model"]:
        start = self.start.layer(layer).expand(len(vectors), -1)
        at = torch.stack([torch.zeros_like(positions), positions], dim=1).to(vectors.device)
        pairs = torch.stack([start, vectors], dim=1)
        return self.model.run_blocks(pairs, at, layer, self.model.n_layers)[:, 1]

    def _patchscope(
        self, layer: int, vectors: Float[Tensor, "row d_model"]
    ) -> Float[Tensor, "row d_model"]:
        resid = self.around.layer(layer)[None].repeat(len(vectors), 1, 1)
        resid[:, self.place] = vectors
        at = torch.arange(resid.shape[1], device=resid.device).expand(resid.shape[:2])
        final = self.model.run_blocks(resid, at, layer, self.model.n_layers)
        return final[:, self.target.answer]
