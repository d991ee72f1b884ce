"""How sure a readout is: entropy, top-1 probability or margin at the answer position.

All three are turned so that larger is surer, and lie between 0 and 1, so that one grid of
thresholds serves them all. Any lens can supply the readout. Decisions among candidates unembed
the candidates' rows alone where that is exactly what the model does.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from spade_lens.lenses.lens import Lens
from spade_lens.models.model import Model
from spade_lens.models.places import pad_after
from spade_lens.prompts.prompt import Prompt

Measure = Literal["entropy", "top-1", "margin"]
Over = Literal["candidates", "vocabulary"]


def confidence_of(
    logits: Float[Tensor, "row option"], measure: Measure = "entropy"
) -> Float[Tensor, " row"]:
    """Confidence of rows of logits, between 0 and 1, larger is surer.

    Example:
        >>> from spade_lens.exits import confidence_of
        >>> logits = torch.tensor([[0.0, 0.0], [0.0, 100.0]])
        >>> [confidence_of(logits, m).tolist() for m in ("entropy", "top-1", "margin")]
        [[0.0, 1.0], [0.5, 1.0], [0.0, 1.0]]

    Args:
        logits: Logits of the options; -inf where a row has fewer.
        measure: ``"top-1"``: the probability of the likeliest option. ``"margin"``: that less
            the probability of the second. ``"entropy"``: 1 - H / log(n) for n options, H being
            the entropy; dividing by log(n) is ours.

    Returns:
        The confidences, in single precision.

    Raises:
        ValueError: If the measure is none of these.
    """
    logprobs = logits.float().log_softmax(dim=-1)
    if measure == "top-1":
        return logprobs.amax(dim=-1).exp()
    if measure == "margin":
        if logits.shape[-1] == 1:
            return torch.ones_like(logprobs[:, 0])
        best = logprobs.topk(2, dim=-1).values.exp()
        return best[:, 0] - best[:, 1]
    if measure != "entropy":
        raise ValueError(f"measure={measure!r} was given; expected 'entropy', 'top-1' or 'margin'.")
    surprise = logprobs.masked_fill(logprobs == -torch.inf, 0)
    entropy = -(logprobs.exp() * surprise).sum(dim=-1)
    options = logits.isfinite().sum(dim=-1).clamp(min=2)  # one option: entropy 0, confidence 1
    # Rounding can carry the entropy of equal options past log(n).
    return (1 - entropy / options.log()).clamp(0, 1)


@dataclass(frozen=True)
class Confidence:
    """A lens and what is taken for the confidence of its readout.

    Example:
        >>> from spade_lens.exits import Confidence
        >>> Confidence(LogitLens(model), "margin").name
        'logit lens, margin'

    Args:
        lens: Supplies the readout: L-SPADE, the tuned lens, the logit lens, SPADE itself.
        measure: See :func:`confidence_of`. The paper uses the entropy.
        over: The options: ``"candidates"``, the prompt's own, or ``"vocabulary"``. By default
            the candidates where a prompt has such. The paper leaves this open. What a readout
            *answers* is always one of the candidates where a prompt has such.

    Raises:
        ValueError: If ``measure`` or ``over`` is not one of those.
    """

    lens: Lens
    measure: Measure = "entropy"
    over: Over | None = None

    def __post_init__(self) -> None:
        if self.over not in (None, "candidates", "vocabulary"):
            raise ValueError(
                f"over={self.over!r} was given; expected 'candidates', 'vocabulary' or None."
            )
        confidence_of(torch.zeros(1, 2), self.measure)

    @property
    def name(self) -> str:
        """What tables call it."""
        return f"{self.lens.name}, {self.measure}" + (f" over {self.over}" if self.over else "")

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """Raise if candidates are asked for and a prompt has none.

        Raises:
            ValueError: Then, with the first such prompt.
        """
        if self.over == "candidates":
            bare = next((i for i, p in enumerate(prompts) if not p.candidates), None)
            if bare is not None:
                raise ValueError(
                    f"over='candidates' was asked for; prompt {bare} has no candidates. Give "
                    "prompts with candidates, or over='vocabulary'."
                )


class AnswerHead:
    """Final norm and unembedding at the answer position, of candidates' rows where there are such.

    Rows of the unembedding matrix alone are used only where a probe shows that they give the
    model's own logits; with a soft cap or a scale on the logits everything goes through
    ``model.unembed``, and is charged so.

    Args:
        model: The model.
    """

    def __init__(self, model: Model) -> None:
        self.model = model
        self._rows = _unembedding_rows(model)

    @property
    def narrow(self) -> bool:
        """Whether candidates cost only their own rows."""
        return self._rows is not None

    def unembeds(self, prompt: Prompt, over: Over | None = None) -> int:
        """How many rows of the unembedding a readout of ``prompt`` takes."""
        if prompt.candidates and over != "vocabulary" and self.narrow:
            return len(prompt.candidates)
        return self.model.d_vocab

    @torch.no_grad()
    def read(
        self,
        finals: Float[Tensor, "row d_model"],
        prompts: Sequence[Prompt],
        *,
        measure: Measure = "entropy",
        over: Over | None = None,
    ) -> tuple[Float[Tensor, " row"], Int[Tensor, " row"]]:
        """Confidence and answer of a row of every prompt, on the CPU.

        Args:
            finals: What a lens made of the residuals.
            prompts: The prompt of every row.
            measure: See :func:`confidence_of`.
            over: See :class:`Confidence`.

        Returns:
            The confidence, and the likeliest candidate or, for a prompt without candidates, the
            likeliest token.
        """
        confidence = torch.empty(len(prompts))
        answer = torch.empty(len(prompts), dtype=torch.long)
        kinds: dict[tuple[bool, bool], list[int]] = {}
        for i, prompt in enumerate(prompts):
            narrow = self.unembeds(prompt, over) < self.model.d_vocab
            kinds.setdefault((bool(prompt.candidates), narrow), []).append(i)
        for (decides, narrow), rows in kinds.items():
            some = [prompts[i].candidates for i in rows] if decides else None
            judged, best = self._logits(finals[rows], some, narrow, over)
            confidence[rows] = confidence_of(judged, measure).cpu()
            answer[rows] = best.cpu()
        return confidence, answer

    def _logits(
        self,
        finals: Float[Tensor, "row d_model"],
        candidates: Sequence[Sequence[int]] | None,
        narrow: bool,
        over: Over | None,
    ) -> tuple[Float[Tensor, "row option"], Int[Tensor, " row"]]:
        """The logits that confidence is taken from, and the answers."""
        if candidates is None:
            logits = self.model.logits(finals)
            return logits, logits.argmax(dim=-1)
        options = pad_after(candidates, finals.device)
        counts = torch.tensor([len(c) for c in candidates], device=finals.device)
        padding = torch.arange(options.shape[1], device=finals.device) >= counts[:, None]
        if narrow:
            logits = self._candidate_logits(self.model.final_norm(finals), options)
            among = logits = logits.masked_fill(padding, -torch.inf)
        else:
            logits = self.model.logits(finals)
            among = logits.gather(-1, options).masked_fill(padding, -torch.inf)
        best = options.gather(-1, among.argmax(dim=-1, keepdim=True))[:, 0]
        return logits if over == "vocabulary" else among, best

    def _candidate_logits(
        self, normed: Float[Tensor, "row d_model"], options: Int[Tensor, "row option"]
    ) -> Float[Tensor, "row option"]:
        assert self._rows is not None
        weight, bias = self._rows
        logits = torch.einsum("rod,rd->ro", weight[options], normed)
        return (logits if bias is None else logits + bias[options]).float()


@torch.no_grad()
def _unembedding_rows(model: Model) -> tuple[Tensor, Tensor | None] | None:
    """Weight and bias of the unembedding, if logits are that and nothing else."""
    original: Any = getattr(model.original, "original_model", model.original)
    find = getattr(original, "get_output_embeddings", None)
    head = find() if find is not None else None
    weight, bias = getattr(head, "weight", None), getattr(head, "bias", None)
    if not isinstance(weight, Tensor) or weight.shape != (model.d_vocab, model.d_model):
        return None
    generator = torch.Generator().manual_seed(0)
    # Many times the size of a normed residual, so that a soft cap bites.
    for scale in (1, 30):
        some = torch.randn(4, model.d_model, generator=generator).to(model.device, model.dtype)
        expected = model.unembed(scale * some).float()
        ours = torch.nn.functional.linear(scale * some, weight, bias).float()
        tolerance = 3e-2 if torch.finfo(model.dtype).bits < 32 else 1e-4
        if (ours - expected).abs().max() > tolerance * expected.abs().max():
            return None
    return weight, bias
