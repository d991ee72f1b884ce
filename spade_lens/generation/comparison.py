"""A strategy beside plain greedy text: the same tokens or not, and how fast, in turns.

The speed of a shared machine drifts, so the two take turns. Every turn of the strategy is compared
with the mean of the plain turns just before and after it.
"""

from dataclasses import dataclass
from statistics import median

from spade_lens.checks import check_number, visible
from spade_lens.generation.generated import Generated
from spade_lens.generation.loop import check_strategy, generate
from spade_lens.generation.scoring import score_text
from spade_lens.generation.stops import StopLike
from spade_lens.generation.strategy import Strategy
from spade_lens.models.clock import seconds_of
from spade_lens.models.model import Model
from spade_lens.prompts.inputs import PromptsLike
from spade_lens.prompts.prompt import Prompt
from spade_lens.settings import Settings, progress_bar, scoped

_TIE = 1e-3


@dataclass(frozen=True)
class Difference:
    """The first place at which two texts differ.

    Args:
        prompt: The prompt.
        step: The new token, from 0.
        nats: How much likelier the plain text's token is there, under the model.
    """

    prompt: int
    step: int
    nats: float

    def __str__(self) -> str:
        tie = ", a tie but for rounding" if abs(self.nats) < _TIE else ""
        return (
            f"differ first at new token {self.step} of prompt {self.prompt}, where the plain one "
            f"is {self.nats:.2g} nats likelier{tie}"
        )


@dataclass(frozen=True, eq=False)
class Comparison:
    """A strategy's text beside plain greedy text, and how many times as fast it was.

    Args:
        plain: The plain text.
        written: The strategy's.
        difference: Where they differ first; None where all tokens are the same.
        ratios: Plain time over the strategy's, round by round; the prompt's own time is included.
        clock: What was measured: ``CPU time``, on a GPU ``wall-clock time``.
    """

    plain: Generated
    written: Generated
    difference: Difference | None
    ratios: tuple[float, ...]
    clock: str

    @property
    def speedup(self) -> float:
        """How many times as fast as plain text it was: the median of the rounds."""
        return median(self.ratios)

    @property
    def verdict(self) -> str:
        """``faster`` or ``slower``; ``undecided`` where the rounds do not agree."""
        if min(self.ratios) <= 1 <= max(self.ratios):
            return "undecided"
        return "faster" if self.speedup > 1 else "slower"

    def __str__(self) -> str:
        drafted, accepted = self.written.rounds[:, 1:].sum(dim=0).tolist()
        drafts = f"{accepted} of {drafted} drafts" if drafted else "nothing was drafted"
        rows = {
            "tokens": "identical" if self.difference is None else str(self.difference),
            "acceptance": f"{self.written.acceptance:.2f} ({drafts})" if drafted else drafts,
            "tokens per round": f"{self.written.tokens_per_round:.2f}",
            self.clock: f"{self.speedup:.2f} [{min(self.ratios):.2f}, {max(self.ratios):.2f}] "
            f"times as fast, median and range of {len(self.ratios)} rounds: {self.verdict}",
        }
        if self.written.exit_layer is not None:
            rows["exit layer"] = f"{float(self.written.exit_layer.double().mean()):.1f} on average"
        title = f"{self.written.strategy} beside plain greedy text, {len(self.plain.token)} tokens"
        return visible("\n".join([title, *(f"  {name:<18}{row}" for name, row in rows.items())]))


@scoped
def compare(
    prompts: PromptsLike,
    strategy: Strategy,
    max_new_tokens: int = 64,
    *,
    model: Model,
    stop: StopLike = None,
    rounds: int = 3,
    settings: Settings | None = None,
) -> Comparison:
    """Write greedy text plainly and by a strategy, in turns, and compare tokens and times.

    Example:
        >>> from spade_lens.generation import Speculate, compare
        >>> both = compare("abab", Speculate(), 6, model=model)
        >>> both.difference is None, len(both.ratios)
        (True, 3)

    Args:
        prompts: A string, the messages of a chat, a prompt, or a list of these.
        strategy: What is compared with plain text.
        max_new_tokens: How many tokens to write at most.
        model: The model.
        stop: Where a text ends; see :func:`spade_lens.generate`.
        rounds: How many turns the strategy gets, after one that is not counted.
        settings: Memory limit, batch size and progress; see :class:`spade_lens.Settings`.

    Raises:
        TypeError: If an argument is of another type.
        ValueError: If one is out of range, or the strategy does not fit the model.
    """
    check_number("rounds", rounds, least=1)
    check_strategy(model, strategy)
    prompts = model.prompts(prompts)

    def run(by: Strategy | None) -> Generated:
        return generate(prompts, max_new_tokens, model=model, strategy=by, stop=stop)

    with progress_bar(total=2 * rounds + 3, desc="compare", unit="turn", model=model) as bar:

        def seconds(by: Strategy | None) -> float:
            taken = seconds_of(lambda: run(by), model.device, of_process=True)
            bar.update()
            return taken

        written, plain = run(strategy), run(None)  # a strategy that does not fit is refused first
        bar.update(2)
        plain_seconds, ratios = [seconds(None)], []
        for _ in range(rounds):
            own = seconds(strategy)
            plain_seconds.append(seconds(None))
            ratios.append((plain_seconds[-2] + plain_seconds[-1]) / 2 / own)
    return Comparison(
        plain=plain,
        written=written,
        difference=_difference(model, prompts, plain, written),
        ratios=tuple(ratios),
        clock="wall-clock time" if model.device.type == "cuda" else "CPU time",
    )


def _difference(
    model: Model, prompts: list[Prompt], plain: Generated, written: Generated
) -> Difference | None:
    for i, (ours, theirs) in enumerate(zip(plain.tokens, written.tokens, strict=True)):
        if ours != theirs:
            step = next(n for n in range(len(ours)) if ours[n] != theirs[n])
            before = Prompt(tokens=(*prompts[i].tokens, *ours[:step]))
            tokens = [[ours[step]], [theirs[step]]]
            first, second = score_text([before] * 2, tokens, model=model)["logprob"].tolist()
            return Difference(i, step, first - second)
    return None
