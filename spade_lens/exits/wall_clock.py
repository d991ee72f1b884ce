"""Wall-clock time of early exit beside that of the plain model: measured, never inferred.

The speed of a shared machine drifts, so engines and the plain model take turns. Every turn of an
engine is compared with the mean of the model's turns just before and after it. The median of
these ratios is reported with an interval.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any, Literal

import torch
from scipy.stats import binom
from torch import Tensor

from spade_lens.exits.engine import SpadeExit
from spade_lens.models.clock import seconds_of
from spade_lens.models.model import Model
from spade_lens.models.places import pad_after
from spade_lens.prompts.inputs import PromptsLike
from spade_lens.prompts.prompt import Prompt
from spade_lens.settings import Settings, progress_bar, scoped

Baseline = Literal["answer logits", "left-padded", "all logits"]


@dataclass(frozen=True)
class WallClock:
    """How many times as fast as the plain model an engine is.

    Args:
        speedup: The median of the ratios.
        low: Lower end of an interval that covers the median 19 times in 20 (order statistics);
            with fewer than six rounds there is no such interval, and this is the lowest ratio.
        high: The upper end.
        rounds: The number of ratios.
        seconds: The median time of the engine.
        baseline_seconds: The median time of the plain model.
        baseline: What the plain model computed.
    """

    speedup: float
    low: float
    high: float
    rounds: int
    seconds: float
    baseline_seconds: float
    baseline: str

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a row of a table."""
        return asdict(self)


@scoped
def compare_wall_clock(
    engines: SpadeExit | Sequence[SpadeExit],
    prompts: PromptsLike,
    *,
    rounds: int = 9,
    baseline: Baseline = "answer logits",
    settings: Settings | None = None,
) -> list[WallClock]:
    """Time engines against the plain Hugging Face forward of the same batches.

    The model has a turn before and after every engine's. The plain forward gets every advantage:
    prompts padded after their ends without any mask (so that torch takes its fastest attention),
    no cache, the same batches, and by default logits of the answer positions only. That saves it
    most of the unembedding, which runs over the whole vocabulary; the engine unembeds candidates
    alone where prompts have any. ``"left-padded"`` is what most users write for a batch: padding
    before the prompts, masked, and ``logits_to_keep=1``. ``"all logits"`` computes every logit.
    A batch of one is measured with ``settings=Settings(batch_size=1)``.

    Args:
        engines: One engine or several, of one model.
        prompts: A text, a prompt, or several.
        rounds: How many turns each engine gets, after one to warm up.
        baseline: ``"answer logits"``, ``"left-padded"`` or ``"all logits"``.
        settings: Memory limit, batch size and progress; see :class:`spade_lens.Settings`.

    Returns:
        The result of every engine, in their order.

    Raises:
        TypeError: If something else than engines or prompts is given.
        ValueError: If ``rounds`` is less than 1, the baseline is none of those, there is no
            engine, engines differ in their model, or it is not a plain Hugging Face model.
    """
    if rounds < 1:
        raise ValueError(f"rounds={rounds} was given; expected 1 or more.")
    engines = list(engines) if isinstance(engines, Sequence) else [engines]
    if not all(isinstance(engine, SpadeExit) for engine in engines):
        raise TypeError(f"engines={engines!r} was given; expected SpadeExit, one or several.")
    models = list({id(engine.setup.model): engine.setup.model for engine in engines}.values())
    if len(models) != 1:
        raise ValueError(
            f"{len(engines)} engines of {len(models)} models were given; expected at least one "
            "engine, and all of one model."
        )
    model = models[0]
    prompts = model.prompts(prompts)
    batches = engines[0].batches(prompts)
    plain = _plain(model, prompts, batches, baseline)
    runs = [lambda engine=engine: engine.run(prompts) for engine in engines]

    for run in (plain, *runs):
        run()
    bases = [seconds_of(plain, model.device)]
    ratios: list[list[float]] = [[] for _ in engines]
    seconds: list[list[float]] = [[] for _ in engines]
    with progress_bar(total=rounds * len(runs), desc="wall clock", unit="turn", model=model) as bar:
        for _ in range(rounds):
            for e, run in enumerate(runs):
                seconds[e].append(seconds_of(run, model.device))
                bases.append(seconds_of(plain, model.device))
                ratios[e].append((bases[-2] + bases[-1]) / 2 / seconds[e][-1])
                bar.update()
    return [_summary(ratios[e], seconds[e], bases, baseline) for e in range(len(engines))]


def _summary(
    ratios: Sequence[float], seconds: Sequence[float], bases: Sequence[float], baseline: str
) -> WallClock:
    rounds, ordered = len(ratios), sorted(ratios)
    # The k-th smallest and largest enclose the median but for twice the chance that fewer than k
    # of the ratios lie on one side of it.
    outside = max(int(binom.ppf(0.025, rounds, 0.5)) - 1, 0)
    return WallClock(
        speedup=median(ordered),
        low=ordered[outside],
        high=ordered[-1 - outside],
        rounds=rounds,
        seconds=median(seconds),
        baseline_seconds=median(bases),
        baseline=baseline,
    )


def _plain(
    model: Model, prompts: Sequence[Prompt], batches: Sequence[Sequence[int]], baseline: str
) -> Callable[[], list[Tensor]]:
    original: Any = model.original
    if not hasattr(original, "base_model") or not hasattr(original, "get_output_embeddings"):
        raise ValueError(
            f"{model.name} is a {type(original).__name__}; the comparison needs a plain Hugging "
            "Face model as its baseline."
        )

    @torch.no_grad()
    def run() -> list[Tensor]:
        answers = []
        for batch in batches:
            tokens = pad_after([prompts[i].tokens for i in batch], model.device)
            rows = torch.arange(len(batch), device=model.device)
            last = torch.tensor([prompts[i].answer for i in batch], device=model.device)
            if baseline == "left-padded":
                padded = _left_padded([prompts[i] for i in batch], model.device)
                logits = original(**padded, use_cache=False, logits_to_keep=1).logits[:, -1]
            elif baseline == "all logits":
                logits = original(tokens, use_cache=False).logits[rows, last]
            else:
                final = original.base_model(tokens, use_cache=False).last_hidden_state
                logits = original.get_output_embeddings()(final[rows, last])
            answers.append(logits.argmax(dim=-1).cpu())
        return answers

    return run


def _left_padded(prompts: Sequence[Prompt], device: torch.device) -> dict[str, Tensor]:
    """Return the inputs of a batch whose answer positions are its last column."""
    rows = [prompt.tokens[: prompt.answer + 1] for prompt in prompts]
    width = max(map(len, rows))
    tokens = [[row[0]] * (width - len(row)) + list(row) for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    attention_mask = torch.tensor(mask, device=device)
    return {
        "input_ids": torch.tensor(tokens, device=device),
        "attention_mask": attention_mask,
        "position_ids": (attention_mask.cumsum(dim=1) - 1).clamp(min=0),
    }
