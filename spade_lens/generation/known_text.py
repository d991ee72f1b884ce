"""What is drafted and accepted in a greedy text that is known, for any draft length and ``eta``.

Drafts count up to the first wrong one. Up to there they follow the text itself. So one pass of a
drafter over the text says what it would draft anywhere, and the rounds of every setting are
counted from that, without the model. With ``eta`` a draft that is wrong may still go on, which
counts as drafted: then the pass also follows the drafter from there, until it is unsure.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from spade_lens.generation.drafters import Drafter, LayerDrafter, LayerState, guesses
from spade_lens.generation.loop import batches
from spade_lens.generation.rows import Rows
from spade_lens.generation.sampling import Draws
from spade_lens.generation.steering import Steering
from spade_lens.models.model import Model
from spade_lens.prompts.prompt import Prompt
from spade_lens.settings import Settings, progress_bar, scoped


@dataclass(frozen=True)
class KnownText:
    """A greedy text.

    Args:
        prompt: The prompt's tokens.
        new: The tokens that the model wrote, at least one; the last ended the text.
        max_new_tokens: How many it was asked for. Drafts never reach beyond.
    """

    prompt: Sequence[int]
    new: Sequence[int]
    max_new_tokens: int


@dataclass(frozen=True)
class TextDrafts:
    """What a drafter at a layer drafts in one text.

    Args:
        tokens: Its draft of every new token, after the text's own tokens.
        confidence: The probabilities of these drafts.
        beyond: After a draft that leaves the text, the probabilities of its next drafts.
    """

    tokens: list[int] = field(default_factory=list)
    confidence: list[float] = field(default_factory=list)
    beyond: list[list[float]] = field(default_factory=list)

    def round(self, new: Sequence[int], start: int, most: int, eta: float) -> tuple[int, int]:
        """Return how many tokens are drafted from a place in the text, and how many are right."""
        for n in range(most):
            at = start + n
            right = self.tokens[at] == new[at]
            if self.confidence[at] < eta:
                return n + 1, n + right
            if not right or at + 1 == len(new):
                break
        else:
            return most, most
        drafted = n + 1
        for confidence in self.beyond[at] if eta else ():
            if drafted == most:
                break
            drafted += 1
            if confidence < eta:
                break
        return drafted if eta else most, n + right


def rounds_of(
    text: KnownText,
    drafters: Sequence[Drafter],
    draft_tokens: int,
    eta: float,
    at_layer: TextDrafts | None,
    d_vocab: int,
) -> list[tuple[int, int, int]]:
    """Return the rounds in which :class:`~spade_lens.generation.Speculate` writes a known text.

    Args:
        text: The text.
        drafters: What guesses; the first that has a guess speaks.
        draft_tokens: How many tokens every round drafts, where the drafter has so many.
        eta: A draft from a layer ends after a token whose probability is below this.
        at_layer: What the last drafter drafts, if it reads a layer.
        d_vocab: The size of the vocabulary.

    Returns:
        For every round, how many tokens were drafted, accepted and written.
    """
    start, rounds = 0, []
    while start < len(text.new):
        # One token comes from the model itself.
        most = min(draft_tokens, text.max_new_tokens - start - 1)
        drafted = accepted = 0
        several: Sequence[Any] = drafters if most else ()
        for drafter in several:
            if drafter.layer:
                assert at_layer is not None  # it was recorded
                drafted, accepted = at_layer.round(text.new, start, most, eta)
            else:
                before = (*text.prompt, *text.new[:start])
                guessed = guesses(drafter, before, most, d_vocab)
                pairs = zip(guessed, text.new[start:], strict=False)
                wrong = (n for n, (guess, token) in enumerate(pairs) if guess != token)
                drafted = len(guessed)
                accepted = next(wrong, min(drafted, len(text.new) - start))
            if drafted:
                break
        written = min(accepted + 1, len(text.new) - start)
        rounds.append((drafted, min(accepted, written), written))
        start += written
    return rounds


@scoped
@torch.no_grad()
def record_drafts(
    drafter: LayerDrafter,
    texts: Sequence[KnownText],
    *,
    model: Model,
    draft_tokens: int,
    eta: float | None = None,
    settings: Settings | None = None,
) -> list[TextDrafts]:
    """Return what a drafter at a layer drafts in known texts, in one pass over them.

    Only the blocks below its layer run, for many texts side by side.

    Args:
        drafter: The drafter.
        texts: The texts, all asked for equally many tokens.
        model: The model that wrote them.
        draft_tokens: The longest draft that rounds will be counted for.
        eta: The least ``eta`` above 0 that they will be counted for; None if there is none.
        settings: Memory limit, batch size and progress; see :class:`spade_lens.Settings`.
    """
    prompts = [Prompt(tokens=tuple(text.prompt)) for text in texts]
    steering, draws = Steering(model, prompts, (), ()), Draws(None, prompts)
    recorded = [TextDrafts() for _ in texts]
    most_new = texts[0].max_new_tokens
    with progress_bar(
        total=sum(len(text.new) for text in texts), desc=drafter.name, unit="token", model=model
    ) as bar:
        for batch in batches(model, prompts, most_new + draft_tokens + 1):
            rows = Rows(
                *(model, batch, steering, draws, most_new),
                borders=(drafter.layer,),
                drafts=draft_tokens,
            )
            some = [texts[i] for i in batch]
            record = _Recorder(rows, drafter.begin(rows), some, [recorded[i] for i in batch])
            for step in range(max(len(text.new) for text in some)):
                record.step(step, draft_tokens, eta)
                bar.update(sum(step < len(text.new) for text in some))
    return recorded


class _Recorder:
    """Feeds a drafter the texts of one batch, and writes down what it drafts."""

    def __init__(
        self,
        rows: Rows,
        state: LayerState,
        texts: Sequence[KnownText],
        recorded: Sequence[TextDrafts],
    ) -> None:
        self._rows, self._state = rows, state
        self._texts, self._recorded = texts, recorded
        self._ran = [0] * len(texts)

    def step(self, step: int, most: int, eta: float | None) -> None:
        """Draft the token at a step of every text, and what the drafter adds to a wrong draft."""
        texts, recorded = self._texts, self._recorded
        new = [
            text.prompt if not step else text.new[step - 1 : step] if step < len(text.new) else []
            for text in texts
        ]
        hidden = self._feed(new, self._ran)
        self._ran = [ran + len(tokens) for ran, tokens in zip(self._ran, new, strict=True)]
        going = [row for row, text in enumerate(texts) if step < len(text.new)]
        tokens, sure = self._drafts(hidden)
        ahead = []
        for row in going:
            recorded[row].tokens.append(tokens[row])
            recorded[row].confidence.append(sure[row])
            recorded[row].beyond.append([])
            new_tokens = texts[row].new
            leaves = tokens[row] != new_tokens[step] or step + 1 == len(new_tokens)
            if leaves and eta is not None and sure[row] >= eta:
                ahead.append(row)
        most = min(most, texts[0].max_new_tokens - 1 - step)
        drafted = 1
        while ahead and eta is not None and drafted < most:
            first = [ran + drafted - 1 for ran in self._ran]
            given = [[tokens[row]] if row in ahead else [] for row in range(len(texts))]
            tokens, sure = self._drafts(self._feed(given, first))
            for row in ahead:
                recorded[row].beyond[-1].append(sure[row])
            ahead = [row for row in ahead if sure[row] >= eta]
            drafted += 1
        if drafted > 1:
            self._rows.crop(self._ran)
            self._state.crop(self._ran)

    def _feed(
        self, tokens: Sequence[Sequence[int]], first: Sequence[int]
    ) -> Float[Tensor, "row d_model"]:
        rows = self._rows
        return self._state.feed(rows.climb(rows.enter(tokens, first), 0))

    def _drafts(self, hidden: Float[Tensor, "row d_model"]) -> tuple[list[int], list[float]]:
        """Return every row's likeliest token and its probability."""
        logits = self._state.logits(hidden)
        tokens = logits.argmax(dim=-1)
        sure = logits.softmax(dim=-1).gather(1, tokens[:, None])[:, 0]
        return tokens.tolist(), sure.tolist()
