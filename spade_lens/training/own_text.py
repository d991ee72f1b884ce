"""Text that the model itself writes after prompts, for training what predicts its text."""

from collections.abc import Sequence
from os import PathLike

import torch

from spade_lens.checks import check_number, checked
from spade_lens.generation.loop import check_room, sample_together
from spade_lens.generation.sampling import Sampling
from spade_lens.lenses.fitting.text import CalibrationText
from spade_lens.models.identity import run_identity
from spade_lens.models.model import Model
from spade_lens.prompts.inputs import PromptsLike
from spade_lens.prompts.prompt import Prompt
from spade_lens.settings import Settings, progress_bar, scoped
from spade_lens.storage.checkpoint import Checkpoint, kept_folder
from spade_lens.storage.content import content_sha256

_LENGTH = 256


@scoped
@checked
@torch.no_grad()
def own_text(
    model: Model,
    prompts: PromptsLike,
    n_new: int = 128,
    *,
    temperatures: Sequence[float] = (1.0, 0.0),
    at_once: int = 80,
    seed: int = 0,
    folder: str | PathLike[str] | None = None,
    settings: Settings | None = None,
) -> CalibrationText:
    """Let the model write after prompts, each text at one temperature; only length ends a text.

    What drafts greedy text is best trained on text that is close to greedy; text at temperature 1
    keeps it from seeing loops alone. So both are made by default.

    Example:
        >>> from spade_lens.training.own_text import own_text
        >>> text = own_text(model, ["ab", "abc", "b"], 8)
        >>> [len(piece) for piece in text.pieces]
        [11, 12, 10]

    Args:
        model: The model.
        prompts: What stands before the text: strings, messages of chats, or prompts.
        n_new: How many tokens to write after each.
        temperatures: The first prompt's text is drawn at the first temperature, the second's at the
            second, and so on in turn; 0 takes the likeliest token.
        at_once: How many texts of 256 tokens are written side by side, or fewer longer ones; what
            is drawn depends on it.
        seed: The seed of all draws.
        folder: Where texts are kept as soon as they are written, to go on from; None keeps none.
        settings: Memory limit, batch size and progress; see :class:`spade_lens.Settings`.

    Returns:
        The prompts with what was written, in the order of the prompts.

    Raises:
        TypeError: If an argument is of another type.
        ValueError: If a prompt leaves no room in the context, a number is out of range, or the
            folder holds texts of another run.
    """
    check_number("n_new", n_new, least=1)
    check_number("at_once", at_once, least=1)
    given = model.prompts(prompts)
    for i, prompt in enumerate(given):
        check_room(model, i, prompt, n_new)
    if not temperatures:
        raise ValueError("No temperatures were given; expected at least one.")
    samplings = [Sampling(t, seed=seed) if t else None for t in temperatures]
    run = {
        "prompts": content_sha256([prompt.tokens for prompt in given]),
        **{"n_new": n_new, "temperatures": list(temperatures), "at_once": at_once, "seed": seed},
    }
    place = kept_folder(folder, model)
    kept = Checkpoint(place, run if place is None else run | {"model": run_identity(model)})
    pieces: list[Prompt] = list(given)
    with progress_bar(
        total=len(given) * n_new, desc="write text", unit="token", model=model
    ) as bar:
        for number, (which, batch) in enumerate(_batches(given, len(samplings), n_new, at_once)):
            stage = f"text-{number}"
            found = kept.load(stage, torch.device("cpu"))
            if found is None:
                texts: list[list[int]] = [[] for _ in batch]
                draws = torch.Generator().manual_seed(_seed(seed, number))
                some = [Prompt(tokens=given[i].tokens) for i in batch]
                for row, tokens in sample_together(model, some, n_new, draws, samplings[which]):
                    texts[row] += tokens
                    bar.update(len(tokens))
                found = {"tokens": torch.tensor(texts, dtype=torch.int32)}
                kept.save(stage, found, now=True)
            for i, new in zip(batch, found["tokens"].tolist(), strict=True):
                pieces[i] = Prompt(tokens=(*given[i].tokens, *new))
    about = {"source": f"written by {model.name}", **run, "pieces": len(pieces)}
    return CalibrationText(tuple(pieces), tuple(range(len(pieces))), about)


def _seed(seed: int, number: int) -> int:
    return int(content_sha256([seed, number])[:8], 16)


def _batches(
    prompts: Sequence[Prompt], n_samplings: int, n_new: int, at_once: int
) -> list[tuple[int, list[int]]]:
    """Return which prompts run side by side, and how: those of about one length."""
    found: list[tuple[int, list[int]]] = []
    for which in range(n_samplings):
        order = sorted(range(which, len(prompts), n_samplings), key=lambda i: len(prompts[i]))
        batch: list[int] = []
        for i in order:
            tokens = (len(batch) + 1) * max(_LENGTH, len(prompts[i]) + n_new)
            if batch and tokens > at_once * _LENGTH:
                found.append((which, batch))
                batch = []
            batch.append(i)
        found += [(which, batch)] if batch else []
    return found
