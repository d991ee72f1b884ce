"""What a rule vector says: the tokens that SPADE, the logit lens or a patchscope decode from it.

Here the two halves of the library meet. The logit lens unembeds the vector as it is. SPADE runs
it through the remaining blocks after the start token. A patchscope (Ghandeharioun et al., arXiv
2401.06102) writes it into another prompt, whose demonstrations ask to repeat a word, and decodes
what is repeated. Ours: the patchscope's prompt, the same layer on both sides, and position 1 for
vectors that do not know their own.
"""

from collections.abc import Sequence

import pandas as pd
import torch
from einops import rearrange, repeat
from jaxtyping import Float, Int
from torch import Tensor

from spade_lens.icl.vectors import VectorsLike, as_rule_vectors
from spade_lens.lenses.lens import check_readable
from spade_lens.models.hooks import in_lens
from spade_lens.models.model import Model
from spade_lens.models.places import check_layers
from spade_lens.models.residuals import capture
from spade_lens.prompts.few_shot import few_shot_prompt
from spade_lens.prompts.prompt import Prompt
from spade_lens.settings import Settings, limits, progress_bar, scoped

METHODS = ("SPADE", "logit lens", "patchscope")


def identity_prompt(model: Model) -> Prompt:
    r"""Return the patchscope's prompt: three words, each repeated, and a place for a vector.

    Example:
        >>> identity_prompt(model).text
        'cat -> cat\n1135 -> 1135\nhello -> hello\n? ->'
    """
    if model.tokenizer is None:
        raise ValueError(
            f"{model.name} was loaded without a tokenizer, so no prompt can be written for the "
            "patchscope, and SPADE's start token is not known. Give target=, or load(..., "
            "tokenizer=...)."
        )
    words = [("cat", "cat"), ("1135", "1135"), ("hello", "hello")]
    return few_shot_prompt(model.tokenizer, words, "?")


@scoped
@torch.no_grad()
def decoded_tokens(
    model: Model,
    vectors: VectorsLike,
    *,
    methods: Sequence[str] = METHODS,
    target: Prompt | None = None,
    top_k: int = 5,
    seed: int = 0,
    settings: Settings | None = None,
) -> pd.DataFrame:
    """Decode the top tokens of every rule vector, by layer and method, beside random vectors.

    Example:
        >>> vectors = icl.RuleVectors(torch.randn(2, 1, 3, model.d_model), layers=(1, 3))
        >>> frame = icl.decoded_tokens(model, vectors, top_k=1)
        >>> frame.groupby("method", sort=False).size().to_dict()  # six vectors, six random ones
        {'SPADE': 12, 'logit lens': 12, 'patchscope': 12}

    Args:
        model: The model.
        vectors: The rule vectors, of prompts or averaged over prompts (then ``batch`` is 1). For
            SPADE a vector stands at its own position, or at position 1, right after the start
            token, if prompts are not known.
        methods: Which of ``"SPADE"``, ``"logit lens"`` and ``"patchscope"``.
        target: For the patchscope, the prompt into which a vector is written, in the place of the
            last token of its span ``query``; it is read at its answer position. By default three
            words, each repeated. Its first token is SPADE's start token.
        top_k: How many tokens.
        seed: Seed of the controls: a random vector of equal norm is decoded beside every vector.
        settings: Memory limit, batch size and progress; see :class:`spade_lens.Settings`.

    Returns:
        One row for every method, layer and vector, and as many for the controls: ``model,
        method, layer, prompt, demo, control``, then ``top_1, top_1_id, top_1_logprob``, ... to k.

    Raises:
        ValueError: If layers or shapes do not fit the model, a method is unknown, ``top_k`` is
            not positive, or there is no start token or no place in the target.
    """
    vectors = as_rule_vectors(vectors)
    check_layers(model, vectors.layers)
    unknown = [m for m in methods if m not in METHODS]
    if unknown or not methods or top_k < 1:
        raise ValueError(
            f"methods={list(methods)} and top_k={top_k} were given; expected some of "
            f"{list(METHODS)} and at least 1."
        )
    decoder = _Decoder(model, vectors.layers, methods, target)
    _, n_prompts, n_demos, _ = vectors.shape
    at = torch.ones(n_prompts, n_demos, dtype=torch.long)
    at = at if vectors.positions is None else vectors.positions
    own = vectors.tensor.to(model.device, model.dtype)
    noise = torch.randn(own.shape, generator=torch.Generator().manual_seed(int(seed))).to(own)
    random = noise / noise.norm(dim=-1, keepdim=True) * own.norm(dim=-1, keepdim=True)
    frames = []
    total = len(methods) * 2 * len(own)
    with progress_bar(total=total, desc="decoded tokens", unit="layer", model=model) as bar:
        for method in methods:
            for control, tensor in ((False, own), (True, random)):
                for layer, at_layer in zip(vectors.layers, tensor, strict=True):
                    rows = rearrange(at_layer, "batch demo d_model -> (batch demo) d_model")
                    top = decoder.top(method, layer, rows, at.flatten(), top_k)
                    about = {
                        "model": model.name,
                        "method": method,
                        "layer": layer,
                        "prompt": [i for i in range(n_prompts) for _ in range(n_demos)],
                        "demo": list(range(n_demos)) * n_prompts,
                        "control": control,
                    }
                    frames.append(pd.DataFrame(about).join(top))
                    bar.update()
    return pd.concat(frames, ignore_index=True)


class _Decoder:
    """Takes vectors of one layer to tokens, by any of the methods."""

    def __init__(
        self, model: Model, layers: Sequence[int], methods: Sequence[str], target: Prompt | None
    ) -> None:
        self.model = model
        if "SPADE" in methods:
            start = (identity_prompt(model) if target is None else target).tokens[0]
            self.start = capture(model, [Prompt(tokens=(start,))], layers=layers)
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
    ) -> pd.DataFrame:
        """Return the top tokens and their log-probabilities, a row for every vector."""
        most = limits(self.model)
        n = most.rows(4 * self.model.d_vocab)
        if method != "logit lens":  # these run blocks, on so many tokens of every row
            tokens = 2 if method == "SPADE" else len(self.target)
            n = min(n, max(1, most.batch_tokens // tokens))
        ids, logprobs = [], []
        for rows, at in zip(vectors.split(n), positions.split(n), strict=True):
            with in_lens():
                if method == "SPADE":
                    rows = self._spade(layer, rows, at)
                elif method == "patchscope":
                    rows = self._patchscope(layer, rows)
                logits = self.model.logits(rows)
            best = logits.log_softmax(dim=-1).topk(min(k, self.model.d_vocab), dim=-1)
            check_readable(best.values[:, 0], f"vectors at layer {layer}, decoded by {method},")
            ids.append(best.indices.cpu())
            logprobs.append(best.values.cpu())
        columns: dict[str, list[object]] = {}
        pairs = zip(torch.cat(ids).T.tolist(), torch.cat(logprobs).T.tolist(), strict=True)
        for rank, (tokens, values) in enumerate(pairs, start=1):
            columns[f"top_{rank}"] = [self.model.word(token) for token in tokens]
            columns[f"top_{rank}_id"] = tokens
            columns[f"top_{rank}_logprob"] = values
        return pd.DataFrame(columns)

    def _spade(
        self, layer: int, vectors: Float[Tensor, "row d_model"], positions: Int[Tensor, " row"]
    ) -> Float[Tensor, "row d_model"]:
        start = self.start.layer(layer).expand(len(vectors), -1)
        at = torch.stack([torch.zeros_like(positions), positions], dim=1).to(vectors.device)
        pairs = torch.stack([start, vectors], dim=1)  # [row 2 d_model]
        return self.model.run_blocks(pairs, at, layer, self.model.n_layers)[:, 1]

    def _patchscope(
        self, layer: int, vectors: Float[Tensor, "row d_model"]
    ) -> Float[Tensor, "row d_model"]:
        around = self.around.layer(layer)
        resid = repeat(around, "pos d_model -> row pos d_model", row=len(vectors)).clone()
        resid[:, self.place] = vectors
        at = torch.arange(resid.shape[1], device=resid.device).expand(resid.shape[:2])
        final = self.model.run_blocks(resid, at, layer, self.model.n_layers)
        return final[:, self.target.answer]
