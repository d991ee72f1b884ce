"""What alternating training learns from and is measured on, with the residuals computed once."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from spade_lens.models.identity import identity_of
from spade_lens.models.model import Model
from spade_lens.prompts.prompt import Prompt
from spade_lens.settings import Settings, scoped
from spade_lens.storage.content import content_sha256
from spade_lens.training.alternate.answers import CachedAnswers, CachedPairs
from spade_lens.training.alternate.updates import linear_layers

_BLOCKS = 4


@dataclass(frozen=True, eq=False)
class Prepared:
    """Both kinds of data at a layer of a model, for any number of plans.

    Args:
        model: The model.
        layer: The layer from which blocks are trained.
        sft: What fine-tuning learns from.
        pairs: What preference training learns from.
        held_out_sft: What fine-tuning is measured on.
        held_out_pairs: What preference training is measured on.
        about: What decides all these, ready for JSON.
    """

    model: Model
    layer: int
    sft: CachedAnswers
    pairs: CachedPairs
    held_out_sft: CachedAnswers
    held_out_pairs: CachedPairs
    about: dict[str, Any]


@scoped
def prepare(
    model: Model,
    sft: Sequence[Prompt],
    preferences: Sequence[Prompt],
    held_out: tuple[Sequence[Prompt], Sequence[Prompt]],
    *,
    layer: int | None = None,
    settings: Settings | None = None,
) -> Prepared:
    """Check both kinds of data, and run them up to the layer.

    The arguments are those of :func:`spade_lens.training.train_alternating`, and so are the errors.
    """
    layer = check_layer(model, layer)
    prompts = {
        "sft": _checked("sft", sft, pairs=False),
        "preferences": _checked("preferences", preferences, pairs=True),
        "held_out[0]": _checked("held_out[0]", held_out[0], pairs=False),
        "held_out[1]": _checked("held_out[1]", held_out[1], pairs=True),
    }
    for name, some in prompts.items():
        for number, prompt in enumerate(some):
            _check_fits(model, f"{name}[{number}]", prompt)
    linear_layers(model, layer)
    hashes = {n: content_sha256([p.deciding() for p in some]) for n, some in prompts.items()}
    about = {"model": identity_of(model), "layer": layer, "prompts": hashes}

    def answers(name: str) -> CachedAnswers:
        return CachedAnswers(model, layer, prompts[name], [p.target_tokens for p in prompts[name]])

    return Prepared(
        model,
        layer,
        answers("sft"),
        CachedPairs(model, layer, prompts["preferences"]),
        answers("held_out[0]"),
        CachedPairs(model, layer, prompts["held_out[1]"]),
        about,
    )


def check_layer(model: Model, layer: int | None) -> int:
    """Return the layer from which blocks are trained, four below the last by default."""
    if model.hooked:
        raise ValueError(
            f"Hooks are in force on {model.name}; expected none while it is trained. Leave "
            "model.hooks(...), or remove the modules' own hooks, and train then."
        )
    if layer is None:
        return max(0, model.n_layers - _BLOCKS)
    if not 0 <= layer < model.n_layers:
        raise ValueError(
            f"layer={layer} was given; expected 0 to {model.n_layers - 1}, so that a block of "
            f"{model.name} is left to train."
        )
    return layer


def _check_fits(model: Model, name: str, prompt: Prompt) -> None:
    """Raise if a prompt and one of its answers do not fit the model."""
    for answer in (prompt.target_tokens, *prompt.candidate_tokens):
        model.check_prompts([Prompt(answer)])
        n = len(prompt) + len(answer) - 1  # the last token of an answer predicts nothing
        if n > model.n_ctx:
            raise ValueError(
                f"{name} and an answer of {len(answer)} tokens take {n} positions; expected at "
                f"most {model.n_ctx}, the context of {model.name}. Give a shorter prompt."
            )
    model.check_prompts([prompt])


def _checked(name: str, prompts: Sequence[Prompt], *, pairs: bool) -> Sequence[Prompt]:
    """Return prompts that have the answers that are needed."""
    what = "prompts with a target"
    if pairs:
        what = "prompts with two candidates, one of them the target"
    if not prompts:
        raise ValueError(f"No prompts were given as {name}; expected {what}. Give at least one.")
    for number, prompt in enumerate(prompts):
        two = set(prompt.candidate_tokens)
        good = bool(prompt.target_tokens) and prompt.answer == len(prompt) - 1
        if not good or (pairs and (len(two) != 2 or prompt.target_tokens not in two)):
            raise ValueError(
                f"{name}[{number}] is {prompt!r}; expected {what}, read at its last token. Make it "
                "with model.prompt(text, target=..., candidates=(...))."
            )
    return prompts
