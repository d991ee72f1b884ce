"""Read answers and confidences at the answer position, and say what that costs.

Candidates are unembedded by their own rows of the matrix where that gives the model's own logits.
This is what early exit runs and charges; other readings use :mod:`spade_lens.lenses.answers`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor

from spade_lens.exits.confidence import Confidence, Over, checked_rows, confidence_of
from spade_lens.lenses.lens import check_readable
from spade_lens.models.hooks import rows_are
from spade_lens.models.model import Model
from spade_lens.models.places import pad_after
from spade_lens.models.unembedding import unembedding_rows
from spade_lens.prompts.prompt import Prompt


@dataclass(frozen=True, eq=False)
class HeadReading:
    """What a readout says of several rows, on the CPU.

    Args:
        answer: The likeliest candidate or, for a prompt without any, the likeliest token.
        confidence: The confidence; NaN where none was asked for.
        features: The confidence's features; of width 0 where there are none.
    """

    answer: Int[Tensor, " row"]
    confidence: Float[Tensor, " row"]
    features: Float[Tensor, "row feature"]


class AnswerHead:
    """Final norm and unembedding at the answer position.

    Rows of the unembedding matrix alone are used only where a probe shows that they give the
    model's own logits. With a soft cap or a scale on the logits, everything goes through
    ``model.unembed`` and is charged so.
    """

    def __init__(self, model: Model) -> None:
        self.model = model
        self._rows = unembedding_rows(model)

    @property
    def narrow(self) -> bool:
        """Whether candidates cost only their own rows."""
        # Hooks on the unembedding fire where it runs, and for rows of its matrix it does not.
        return self._rows is not None and not self.model.hooked

    def unembeds(self, prompt: Prompt, over: Over | None = None) -> int:
        """Return how many rows of the unembedding a readout of ``prompt`` takes."""
        if prompt.candidates and over != "vocabulary" and self.narrow:
            return len(prompt.candidates)
        return self.model.d_vocab

    @torch.no_grad()
    def read(
        self,
        finals: Float[Tensor, "row d_model"],
        prompts: Sequence[Prompt],
        check: Confidence | None = None,
    ) -> HeadReading:
        """Read the answer of every row, and how sure it is; the answers alone without a check."""
        over = None if check is None else check.over
        confidence = torch.full((len(prompts),), torch.nan)
        answer = torch.empty(len(prompts), dtype=torch.long)
        features: dict[int, Tensor] = {}
        kinds: dict[tuple[bool, bool], list[int]] = {}
        for i, prompt in enumerate(prompts):
            narrow = self.unembeds(prompt, over) < self.model.d_vocab
            kinds.setdefault((bool(prompt.candidates), narrow), []).append(i)
        for (decides, narrow), rows in kinds.items():
            candidates = [prompts[i].candidates for i in rows] if decides else None
            with rows_are(rows):
                logits, best = self._logits(finals[rows], candidates, narrow, over)
            answer[rows] = best.cpu()
            if check is not None:
                confidence[rows] = confidence_of(logits, check.measure).cpu()
                if check.features is not None:
                    made = check.features(finals[rows], logits)
                    of = f"The features of the confidence {check.name!r}"
                    made = checked_rows(made, len(rows), of, what="features").cpu()
                    features |= dict(zip(rows, made, strict=True))
        empty = torch.empty(len(prompts), 0)
        by_row = torch.stack([features[i] for i in range(len(prompts))]) if features else empty
        return HeadReading(answer, confidence, by_row)

    @torch.no_grad()
    def option_logprobs(
        self, finals: Float[Tensor, "row d_model"], prompts: Sequence[Prompt], width: int
    ) -> Float[Tensor, "row {width}"]:
        """Return log-probabilities of every row's candidates among themselves, on the CPU.

        Rows with fewer than ``width`` candidates end with -inf. With a width of 0 nothing is read.
        """
        if not width:
            return torch.empty(len(prompts), 0)
        candidates = [prompt.candidates for prompt in prompts]
        with rows_are(range(len(prompts))):
            logits, _ = self._logits(finals, candidates, self.narrow, "candidates")
        logprobs = logits.log_softmax(dim=-1).float().cpu()
        missing = width - logprobs.shape[-1]
        return torch.nn.functional.pad(logprobs, (0, missing), value=-torch.inf)

    def _logits(
        self,
        finals: Float[Tensor, "row d_model"],
        candidates: Sequence[Sequence[int]] | None,
        narrow: bool,
        over: Over | None,
    ) -> tuple[Float[Tensor, "row option"], Int[Tensor, " row"]]:
        """Return the logits that confidence is taken from, and the answers."""
        of = f"{self.model.name} at the answer position"
        if candidates is None:
            logits = self.model.logits(finals)
            highest, best = logits.max(dim=-1)
            check_readable(highest, of)
            return logits, best
        options = pad_after(candidates, finals.device)  # [row option]
        counts = torch.tensor([len(c) for c in candidates], device=finals.device)
        padding = torch.arange(options.shape[1], device=finals.device) >= counts[:, None]
        if narrow:
            logits = self._candidate_logits(self.model.final_norm(finals), options)
            among = logits = logits.masked_fill(padding, -torch.inf)
        else:
            logits = self.model.logits(finals)
            among = logits.gather(-1, options).masked_fill(padding, -torch.inf)
        highest, place = among.max(dim=-1, keepdim=True)
        check_readable(highest, of)
        best = options.gather(-1, place)[:, 0]
        return logits if over == "vocabulary" else among, best

    def _candidate_logits(
        self, normed: Float[Tensor, "row d_model"], options: Int[Tensor, "row option"]
    ) -> Float[Tensor, "row option"]:
        assert self._rows is not None
        weight, bias = self._rows
        logits = einsum(weight[options], normed, "row option d, row d -> row option")
        return (logits if bias is None else logits + bias[options]).float()
