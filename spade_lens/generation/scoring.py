"""How likely a given continuation is: teacher-forced, in one pass, also after an exit."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from spade_lens.checks import as_several, whole_numbers
from spade_lens.generation.loop import batches, check_room, check_strategy
from spade_lens.generation.rows import Rows, Run
from spade_lens.generation.sampling import Draws
from spade_lens.generation.steering import Steering
from spade_lens.generation.strategy import Plain, Strategy
from spade_lens.models.hooks import rows_are
from spade_lens.models.model import Model
from spade_lens.prompts.inputs import PromptsLike
from spade_lens.prompts.prompt import Prompt, token_ids
from spade_lens.settings import Settings, progress_bar, scoped

if TYPE_CHECKING:
    import pandas as pd


@runtime_checkable
class Forced(Protocol):
    """Writes a batch whose tokens may be given."""

    def prefill(self) -> None:
        """Run what of the prompts does not run as new tokens do."""
        ...

    def force(self) -> Run:
        """Run all tokens that have not run yet as new ones do."""
        ...


@scoped
@torch.no_grad()
def score_text(
    prompts: PromptsLike,
    continuations: Any,
    *,
    model: Model,
    strategy: Strategy | None = None,
    settings: Settings | None = None,
) -> "pd.DataFrame":
    """Return how likely continuations of several tokens are, and whether greedy text gives them.

    Example:
        >>> from spade_lens.generation import score_text
        >>> scores = score_text(["ab", "ba"], ["cd", "c"], model=model)
        >>> scores["n_tokens"].tolist()
        [2, 1]

    Args:
        prompts: A string, a prompt or several.
        continuations: One text for every prompt, with its leading space, or its token ids.
        model: The model.
        strategy: Plain by default, or one that takes given tokens: ``ExitPrefill``, ``TokenExit``.
        settings: Memory limit, batch size and progress; see :class:`spade_lens.Settings`.

    Returns:
        One row for every prompt: ``prompt``, ``continuation``, ``n_tokens``, ``logprob`` (of all
        its tokens, in nats) and ``greedy``: whether every token is the likeliest at its place.

    Raises:
        TypeError: If continuations are no texts or token ids, or the strategy drafts.
        ValueError: If there is not one continuation for every prompt, one is empty, or it does
            not fit the context.
    """
    import pandas as pd

    prompts = model.prompts(prompts)
    wanted = _token_lists(model, prompts, continuations)
    found: dict[int, tuple[float, bool]] = {}
    with progress_bar(total=len(prompts), desc="score text", unit="prompt", model=model) as bar:
        for i, logits in forced_logits(model, prompts, wanted, strategy):
            target = torch.tensor(wanted[i], device=logits.device)
            each = logits.log_softmax(dim=-1).gather(1, target[:, None])
            found[i] = float(each.sum()), bool((logits.argmax(dim=-1) == target).all())
            bar.update()
    return pd.DataFrame(
        {
            "prompt": range(len(prompts)),
            "continuation": ["".join(map(model.word, tokens)) for tokens in wanted],
            "n_tokens": [len(tokens) for tokens in wanted],
            "logprob": [found[i][0] for i in range(len(prompts))],
            "greedy": [found[i][1] for i in range(len(prompts))],
        }
    )


def forced_logits(
    model: Model,
    prompts: Sequence[Prompt],
    continuations: Sequence[Sequence[int]],
    strategy: Strategy | None = None,
) -> Iterator[tuple[int, Float[Tensor, "token d_vocab"]]]:
    """Yield (number of a prompt, the logits that each token of its continuation is read from).

    Raises:
        TypeError: If the strategy has no prefill of its own.
        ValueError: If a continuation does not fit the context.
    """
    strategy = Plain() if strategy is None else strategy
    check_strategy(model, strategy)
    longest = max(map(len, continuations))
    for i, prompt in enumerate(prompts):
        check_room(model, i, prompt, len(continuations[i]))
    steering = Steering(model, prompts, (), ())
    for batch in batches(model, prompts, longest):
        draws = Draws(None, prompts)
        rows = Rows(model, batch, steering, draws, longest, borders=strategy.borders)
        writer = forced_writer(strategy, rows)
        writer.prefill()
        for row, logits in read_forced(rows, writer, [continuations[i] for i in batch]):
            yield batch[row], logits


def forced_writer(strategy: Strategy, rows: Rows) -> Forced:
    """Return what writes a batch whose tokens are given.

    Raises:
        TypeError: If the strategy drafts or searches.
    """
    writer: Any = strategy.writer(rows)
    if not isinstance(writer, Forced):
        raise TypeError(
            f"The strategy {strategy.name!r} decides which tokens are written, not how likely they "
            "are. Give strategy=None."
        )
    return writer


def read_forced(
    rows: Rows, writer: Forced, continuations: Sequence[Sequence[int]]
) -> Iterator[tuple[int, Float[Tensor, "token d_vocab"]]]:
    """Yield (a row, the logits that each token of its continuation is read from)."""
    rows.tokens = [
        [*rows.steering.prompts[i].tokens, *new[:-1]]
        for i, new in zip(rows.numbers, continuations, strict=True)
    ]
    run = writer.force()
    for row, new in enumerate(continuations):
        last = slice(run.counts[row] - len(new), run.counts[row])
        with rows_are([rows.numbers[row]] * len(new)):
            yield row, rows.logits(run.resid[row, last])


def _token_lists(
    model: Model, prompts: Sequence[Prompt], continuations: Any
) -> list[tuple[int, ...]]:
    given = [continuations] if isinstance(continuations, str) else as_several(continuations)
    if given is None:
        raise TypeError(
            f"continuations={continuations!r} was given; expected a text for every prompt."
        )
    if len(given) != len(prompts):
        raise ValueError(
            f"{len(given)} continuations were given for {len(prompts)} prompts; give one for each."
        )
    expected = f"a text, or token ids below {model.d_vocab}"
    return [
        token_ids(model.tokenizer, one)
        if isinstance(one, str)
        else tuple(
            whole_numbers(
                one, f"continuations[{i}]=", expected, below=model.d_vocab, distinct=False
            )
        )
        for i, one in enumerate(given)
    ]
