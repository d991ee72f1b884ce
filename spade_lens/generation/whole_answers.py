"""Whole answers of several tokens: how likely they are, and whether they are chosen or written.

A prompt runs once. Its candidates are then scored side by side on copies of its cache, and greedy
text goes on from the same cache. So all figures of a prompt are of the same exit.
"""

import math
import unicodedata
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from spade_lens.checks import check_number
from spade_lens.generation.generated import Written
from spade_lens.generation.loop import batches, check_room, check_strategy, fits, write_batch
from spade_lens.generation.rows import Rows
from spade_lens.generation.sampling import Draws
from spade_lens.generation.scoring import forced_writer, read_forced
from spade_lens.generation.steering import Steering
from spade_lens.generation.stops import StopLike, Stops, text_of
from spade_lens.generation.strategy import Plain, Strategy
from spade_lens.lenses.answers import check_targets
from spade_lens.models.hooks import side_by_side
from spade_lens.models.model import Model
from spade_lens.prompts.inputs import PromptsLike
from spade_lens.prompts.prompt import Prompt
from spade_lens.settings import Settings, progress_bar, scoped

if TYPE_CHECKING:
    import pandas as pd


@scoped
@torch.no_grad()
def score_answers(
    prompts: PromptsLike,
    *,
    model: Model,
    strategy: Strategy | None = None,
    stop: StopLike = "\n",
    more_tokens: int = 4,
    settings: Settings | None = None,
) -> "pd.DataFrame":
    """Return whether whole answers of several tokens are right, by three ways of counting.

    An answer counts as right by its *first token*; by its *score*, the log-probability of all its
    tokens, which must be the highest of the prompt's candidates; or as *generated*, where greedy
    text is the answer. :func:`spade_lens.stats.summarise` gives the accuracies with intervals.

    Example:
        >>> asked = [model.prompt("ab->AB,cd->", target="CD", candidates=("CD", "XY"))]
        >>> scores = sl.generation.score_answers(asked, model=model, stop=",")
        >>> scores[["target_text", "n_tokens", "choice_text"]].values.tolist()
        [['CD', 2, 'CD']]
        >>> sl.stats.summarise(scores)["measure"].tolist()[:2]
        ['accuracy_first_token', 'accuracy_scored']

    Args:
        prompts: A prompt or several with a target, such as ``task.prompts(model.tokenizer, 40)``.
        model: The model.
        strategy: Plain by default, or ``ExitPrefill`` or ``TokenExit``: answers are theirs then.
        stop: What ends greedy text: token ids and strings, one or several.
        more_tokens: How many tokens longer than the answer greedy text may be, so that it can end.
        settings: Memory limit, batch size and progress; see :class:`spade_lens.Settings`.

    Returns:
        One row for every prompt: ``model``, ``strategy``, ``prompt`` (from 0 in every call, so
        name the ``task`` of tables that you put together), ``target_text``, ``n_tokens``,
        ``logprob`` and ``logprob_per_token`` of the right answer; ``greedy``, whether greedy text
        begins with its tokens; ``written``, the greedy text; ``correct_first_token`` (``among``
        says of what); ``correct_generated``, whether the greedy text is the answer, but for white
        space; ``ambiguous``. Where prompts have candidates also ``choice_text``,
        ``correct_scored`` and ``correct_scored_per_token``.

    Raises:
        TypeError: If the strategy drafts or searches, or an argument is of another type.
        ValueError: If a prompt has no target, or candidates without its target, or an answer does
            not fit the context.
    """
    import pandas as pd

    check_number("more_tokens", more_tokens, least=1)
    strategy = Plain() if strategy is None else strategy
    check_strategy(model, strategy)
    prompts = model.prompts(prompts)
    check_targets(prompts)
    options = [_options(i, prompt) for i, prompt in enumerate(prompts)]
    longest = [max(map(len, each)) for each in options]
    for i, prompt in enumerate(prompts):
        check_room(model, i, prompt, longest[i])
    stops, most_new = Stops(model, stop), max(longest) + more_tokens
    steering, draws = Steering(model, prompts, (), ()), Draws(None, prompts)
    table: dict[int, dict[str, Any]] = {}
    with progress_bar(total=len(prompts), desc="score answers", unit="prompt", model=model) as bar:
        for batch in batches(model, prompts, most_new):
            rows = Rows(model, batch, steering, draws, most_new, borders=strategy.borders)
            _prefill(rows, strategy)
            for i, scores in _scored(rows, strategy, [options[i] for i in batch]):
                about = {"model": model.name, "strategy": strategy.name, "prompt": i}
                table[i] = about | scores
            for i, text in _written(rows, strategy, stops, more_tokens):
                right = _plain(text) == _plain(stops.text(prompts[i].target_tokens))
                table[i] |= {"written": text, "correct_generated": right}
                bar.update()
    return pd.DataFrame([table[i] for i in range(len(prompts))])


def _options(i: int, prompt: Prompt) -> list[tuple[int, ...]]:
    """Return the whole answers to score: the right one first, then the other candidates."""
    if prompt.candidate_tokens and prompt.target_tokens not in prompt.candidate_tokens:
        raise ValueError(
            f"Prompt {i} has target_tokens={prompt.target_tokens}, which are none of its "
            f"candidate_tokens={prompt.candidate_tokens}; expected the whole answer among them."
        )
    others = [one for one in prompt.candidate_tokens if one != prompt.target_tokens]
    return [prompt.target_tokens, *others]


def _prefill(rows: Rows, strategy: Strategy) -> None:
    """Run all of the prompts but their last tokens, so that all answers share their cache."""
    forced_writer(strategy, rows).prefill()
    if rows.caches and not any(rows.done) and max(map(len, rows.tokens)) > 1:
        whole, rows.tokens = rows.tokens, [tokens[:-1] for tokens in rows.tokens]
        rows.run_pending()
        rows.tokens = whole


def _scored(
    rows: Rows, strategy: Strategy, options: Sequence[Sequence[tuple[int, ...]]]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (number of a prompt, the columns that its scored answers give)."""
    model = rows.model
    flat = [(row, answer) for row, each in enumerate(options) for answer in each]
    parts = side_by_side(
        model,
        [len(answer) for _, answer in flat],
        lambda n, longest: fits(model, n, longest, rows.room),
    )
    scores: dict[tuple[int, tuple[int, ...]], float] = {}
    of_target: dict[int, dict[str, Any]] = {}
    for part in parts:
        copied, some = rows.copies([flat[at][0] for at in part]), [flat[at] for at in part]
        writer = forced_writer(strategy, copied)
        for n, logits in read_forced(copied, writer, [answer for _, answer in some]):
            row, answer = some[n]
            tokens = torch.tensor(answer, device=logits.device)
            each = logits.log_softmax(dim=-1).gather(1, tokens[:, None])
            scores[row, answer] = float(each.double().sum())
            if answer == options[row][0]:
                prompt = rows.steering.prompts[rows.numbers[row]]
                of_target[row] = _of_target(prompt, logits, tokens)
    for row, answers in enumerate(options):
        i = rows.numbers[row]
        of_row = [scores[row, answer] for answer in answers]
        yield i, _columns(model, rows.steering.prompts[i], answers, of_row) | of_target[row]


def _of_target(
    prompt: Prompt, logits: Float[Tensor, "token d_vocab"], tokens: Int[Tensor, " token"]
) -> dict[str, Any]:
    """Return what the logits of the right answer's places say."""
    first = logits[0]
    if prompt.candidates:
        options = list(prompt.candidates)
        chosen = options[int(first[options].argmax())]
    else:
        chosen = int(first.argmax())
    return {
        "greedy": bool((logits.argmax(dim=-1) == tokens).all()),
        "correct_first_token": chosen == prompt.target,
        "among": "candidates" if prompt.candidates else "vocabulary",
        "ambiguous": prompt.shares_first_token,
    }


def _columns(
    model: Model, prompt: Prompt, options: Sequence[tuple[int, ...]], scores: Sequence[float]
) -> dict[str, Any]:
    n = len(options[0])
    columns = {
        "target_text": text_of(model.tokenizer, options[0]),
        "n_tokens": n,
        "logprob": scores[0],
        "logprob_per_token": scores[0] / n,
    }
    if not prompt.candidates:
        return columns
    per_token = [score / len(one) for score, one in zip(scores, options, strict=True)]
    # The right one stands first; a tie is not right.
    best = len(scores) - 1 - int(np.argmax(scores[::-1]))
    return columns | {
        "choice_text": text_of(model.tokenizer, options[best]),
        "correct_scored": best == 0,
        "correct_scored_per_token": per_token[0] > max(per_token[1:], default=-math.inf),
    }


def _written(
    rows: Rows, strategy: Strategy, stops: Stops, more_tokens: int
) -> Iterator[tuple[int, str]]:
    """Yield (number of a prompt, its greedy text), a little longer than the answer can be."""
    prompts, numbers = rows.steering.prompts, list(rows.numbers)
    room = [rows.model.n_ctx - len(prompts[i]) + 1 for i in numbers]
    wanted = [len(prompts[i].target_tokens) + more_tokens for i in numbers]
    rows.left = [min(pair) for pair in zip(wanted, room, strict=True)]
    written = {i: Written() for i in numbers}
    for _ in write_batch(rows, strategy, stops, written):
        pass
    for i, text in written.items():
        tokens = text.tokens[:-1] if text.ended == "stop token" else text.tokens
        yield i, stops.cut(stops.text(tokens))


def _plain(text: str) -> str:
    """Return a text with plain spaces, composed as Unicode's normal form C has it."""
    return unicodedata.normalize("NFC", " ".join(text.split()))
