"""The loop that writes text: batches, stops, streaming and progress, for any strategy."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch

from spade_lens.checks import as_several, check_number, is_whole, plain_name, whole_numbers
from spade_lens.generation.generated import Generated, Written
from spade_lens.generation.heuristics import HeuristicError
from spade_lens.generation.rows import Rows
from spade_lens.generation.sampling import Draws, Sampling
from spade_lens.generation.steering import Steering
from spade_lens.generation.stops import StopLike, Stops
from spade_lens.generation.strategy import Plain, Round, Strategy, Writer
from spade_lens.models.errors import UnsupportedModelError
from spade_lens.models.hooks import side_by_side
from spade_lens.models.model import Model
from spade_lens.models.patches import PatchesLike
from spade_lens.models.places import LayersLike, check_layers
from spade_lens.prompts.inputs import PromptsLike
from spade_lens.prompts.prompt import Prompt
from spade_lens.settings import Settings, limits, progress_bar, scoped

OnToken: TypeAlias = Callable[[int, int, str], object]
"""Called with (number of the prompt, token id, its text) as soon as a token stands."""


@scoped
@torch.no_grad()
def generate(
    prompts: PromptsLike,
    max_new_tokens: int = 64,
    *,
    model: Model,
    strategy: Strategy | None = None,
    sampling: Sampling | None = None,
    stop: StopLike = None,
    patches: PatchesLike = (),
    layers: LayersLike = (),
    on_token: OnToken | None = None,
    settings: Settings | None = None,
) -> Generated:
    """Write text after prompts.

    By default every next token is the likeliest one, as in Hugging Face's ``generate`` with
    ``do_sample=False``. Prompts of any lengths run side by side; a text that has ended leaves the
    batch.

    Example:
        >>> sl.generate(["ab", "abc"], 3, model=model)
        Generated(2 texts of tiny-llama, 6 tokens, plain)

    Args:
        prompts: A string, the messages of a chat, a prompt, or a list of these.
        max_new_tokens: How many tokens to write at most.
        model: The model.
        strategy: How tokens are made: plain by default, or ``ExitPrefill``, ``TokenExit``,
            ``Speculate``, ``Deal`` or your own from ``spade_lens.generation``.
        sampling: How tokens are drawn; None takes the likeliest.
        stop: Where a text ends: token ids and strings, one or several. None for the model's own
            end of text, ``()`` for none at all.
        patches: Writes to the residual stream. At ``positions="last"`` they also reach every new
            token, at ``"all"`` all tokens, at ``"prompt"`` and anything else only the prompt.
        layers: Layers to capture at every position where a new token was read.
        on_token: Called as soon as a token stands.
        settings: Memory limit, batch size and progress; see :class:`spade_lens.Settings`.

    Returns:
        The texts, in the order of the prompts.

    Raises:
        TypeError: If an argument is of another type.
        ValueError: If a prompt leaves no room in the context, an argument is out of range, or a
            stop can never come.
        UnsupportedModelError: If the strategy needs a key/value cache and the model has none: on a
            ``HookedTransformer``, and while hooks may act.
    """
    check_number("max_new_tokens", max_new_tokens, least=1)
    strategy = Plain() if strategy is None else strategy
    check_strategy(model, strategy)
    if on_token is not None and not callable(on_token):
        raise TypeError(
            f"on_token={on_token!r} was given; expected a function of (prompt, token, text)."
        )
    prompts = model.prompts(prompts)
    for i, prompt in enumerate(prompts):
        check_room(model, i, prompt, max_new_tokens)
    stops = Stops(model, stop)
    layers = [] if as_several(layers) == [] else check_layers(model, layers)
    steering = Steering(model, prompts, patches, layers)
    draws = Draws(sampling, prompts)
    written = {i: Written() for i in range(len(prompts))}
    with progress_bar(
        total=len(prompts) * max_new_tokens, desc="generate", unit="token", model=model
    ) as bar:
        for batch in batches(model, prompts, max_new_tokens + strategy.drafts + 1):
            rows = Rows(
                *(model, batch, steering, draws, max_new_tokens),
                borders=strategy.borders,
                drafts=strategy.drafts,
            )
            try:
                for i, tokens in write_batch(rows, strategy, stops, written):
                    bar.update(len(tokens))
                    if on_token is not None:
                        for token in tokens:
                            on_token(i, token, model.word(token))
            except HeuristicError as error:
                error.texts = tuple(stops.cut(stops.text(w.tokens)) for w in written.values())
                raise
    return Generated.of(model, strategy.name, prompts, list(written.values()), steering)


def write_batch(
    rows: Rows, strategy: Strategy, stops: Stops, written: Mapping[int, Written]
) -> Iterator[tuple[int, Sequence[int]]]:
    """Write the texts of one batch, which shrinks as they end; yield new tokens of a prompt."""
    rows.stops = stops
    writer = strategy.writer(rows)
    if not isinstance(writer, Writer):
        raise TypeError(
            f"writer() of the strategy {strategy.name!r} gave {writer!r:.80}; expected an object "
            "with round() and select(rows)."
        )
    while True:
        stays = []
        for row, new in enumerate(_checked(writer.round(), rows, strategy.name)):
            text = written[rows.numbers[row]]
            n = text.take(new, stops, rows.left[row])
            rows.tokens[row] += new.tokens[:n]
            rows.left[row] -= n
            yield rows.numbers[row], new.tokens[:n]
            if not text.ended:
                stays.append(row)
        if not stays:
            return
        if len(stays) < len(rows.tokens):
            rows.select(stays)
            writer.select(stays)


def _checked(rounds: Any, rows: Rows, name: str) -> list[Round]:
    """Return what a strategy gave, which may be a user's own, once it is a round of every row."""
    several = as_several(rounds) or []
    if len(several) != len(rows.tokens) or not all(isinstance(one, Round) for one in several):
        raise TypeError(
            f"round() of the strategy {name!r} gave {rounds!r:.80}; expected a Round for each of "
            f"{len(rows.tokens)} rows."
        )
    for one in several:
        tokens, logprobs = as_several(one.tokens) or [], as_several(one.logprobs) or []
        fit = all(is_whole(token) and 0 <= token < rows.model.d_vocab for token in tokens)
        if not tokens or not fit or len(logprobs) != len(tokens):
            raise ValueError(
                f"round() of the strategy {name!r} gave {one!r:.80}; expected at least one token "
                f"id below {rows.model.d_vocab}, and as many log-probabilities."
            )
    return several


def sample_together(
    model: Model,
    prompts: Sequence[Prompt],
    n_new: int,
    draws: torch.Generator,
    sampling: Sampling | None = Sampling(),  # noqa: B008
) -> Iterator[tuple[int, Sequence[int]]]:
    """Sample texts of one length side by side from one stream of random numbers.

    Yields:
        (number of a prompt, its next tokens). Nothing but its length ends a text.
    """
    rows = Rows(
        *(model, range(len(prompts)), Steering(model, prompts, (), ())),
        *(Draws(sampling, prompts, shared=draws), n_new),
    )
    return write_batch(rows, Plain(), Stops(model, ()), {i: Written() for i in range(len(prompts))})


def batches(model: Model, prompts: Sequence[Prompt], more: int) -> list[list[int]]:
    """Return which prompts run side by side: their keys and values take memory."""
    lengths = [len(prompt) for prompt in prompts]
    return side_by_side(model, lengths, lambda n, longest: fits(model, n, longest, longest + more))


def fits(model: Model, n_rows: int, running: int, cached: int) -> bool:
    """Whether so many rows are few enough, of so many tokens each that run and are cached."""
    most = limits(model)
    if most.batch_size is not None and n_rows > most.batch_size:
        return False
    bytes_per_token = 2 * model.n_layers * model.d_model * (torch.finfo(model.dtype).bits // 8)
    in_memory = n_rows * cached * bytes_per_token <= most.memory_bytes / 2
    return n_rows * running <= 4 * most.batch_tokens and in_memory


def check_strategy(model: Model, strategy: Any) -> None:
    """Raise if the strategy is none or does not fit the model."""
    if isinstance(strategy, type) or not isinstance(strategy, Strategy):
        raise TypeError(
            f"strategy={strategy!r} was given; expected a strategy such as ExitPrefill(20) or "
            "Speculate(), or None for plain decoding."
        )
    plain_name(strategy.name, "a strategy")
    check_number(f"drafts of the strategy {strategy.name!r}: ", strategy.drafts, least=0)
    within = f"1 to {model.n_layers}, the layers of {model.name}, ascending"
    borders = whole_numbers(
        strategy.borders, f"borders of the strategy {strategy.name!r}: ", within, empty=True
    )
    inside = all(0 < layer <= model.n_layers for layer in borders)
    if as_several(strategy.borders) is None or borders != sorted(borders) or not inside:
        raise ValueError(
            f"The strategy {strategy.name!r} works at the layers {borders}; expected {within}."
        )
    needs_cache = bool(strategy.drafts or strategy.borders)
    if needs_cache and model.decoder() is None:
        raise UnsupportedModelError(
            f"The strategy {strategy.name!r} needs a key/value cache, and {model.name} gives none "
            "here: hooks are registered on it, or its blocks take no cache. Leave the hooks, or "
            "give strategy=None, which runs the whole text for every token."
        )


def check_room(model: Model, i: int, prompt: Prompt, n_new: int) -> None:
    """Raise if a text does not fit the context, or does not go on after its last token."""
    room = model.n_ctx - len(prompt) + 1  # the last token need not run
    if n_new > room:
        raise ValueError(
            f"Prompt {i} has {len(prompt)} tokens, and {n_new} more do not fit the context of "
            f"{model.n_ctx} of {model.name}. Expected at most {room} (max_new_tokens), or a "
            "shorter prompt."
        )
    if prompt.answer != len(prompt) - 1:
        raise ValueError(
            f"Prompt {i} is read at position {prompt.answer}; text goes on after its last token, "
            f"at {len(prompt) - 1}. Give a prompt that ends where the text goes on."
        )
