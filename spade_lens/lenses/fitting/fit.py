"""Fitting the linear lenses: :func:`fit_linear_spade` and :func:`fit_tuned_lens`.

Both go over a calibration text, learn from most of its documents, choose by some and report on
the rest, show how far they are, and can be interrupted and taken up again.
"""

from collections.abc import Sequence
from dataclasses import asdict
from os import PathLike
from typing import Any, Literal

from spade_lens.lenses.fitting.descent import Course
from spade_lens.lenses.fitting.ridge import ridge_maps
from spade_lens.lenses.fitting.rows import Positions
from spade_lens.lenses.fitting.run import FitRun
from spade_lens.lenses.fitting.text import TextSource
from spade_lens.lenses.keep import Keep, KeepRule
from spade_lens.lenses.linear import AffineMaps, LinearSpade, TunedLens
from spade_lens.lenses.spade import Spade
from spade_lens.models.model import Model
from spade_lens.settings import Settings, scoped

RIDGES = (1e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0)
"""Strengths of the ridge that are tried, relative to the variance of a coordinate."""


@scoped
def fit_linear_spade(
    model: Model,
    text: TextSource = None,
    *,
    keep: KeepRule | None = None,
    positions: Literal["keep", "reset"] = "keep",
    layers: Sequence[int] | None = None,
    per_piece: Positions = 32,
    ridges: Sequence[float] = RIDGES,
    rank: int | None = None,
    refine: int = 0,
    rate: float = 0.03,
    held_out: float = 0.1,
    seed: int = 0,
    checkpoint: str | PathLike[str] | None = None,
    settings: Settings | None = None,
) -> LinearSpade:
    """L-SPADE: at every layer the affine map that comes closest to SPADE's final residual.

    By ridge regression in closed form, from sums that one pass over the text adds up for all
    layers; memory does not grow with the text. The strength of the ridge is chosen for every
    layer on documents of its own. All of this is our choice: the paper's abstract says that
    L-SPADE is linear and gives a confidence, no more.

    Example:
        >>> from spade_lens.lenses.fitting.text import calibration_text
        >>> text = calibration_text(model, n_pieces=40, n_tokens=32)
        >>> lens = fit_linear_spade(model, text, layers=[1, 2], per_piece="all")
        >>> lens
        LinearSpade(model, maps)  # L-SPADE of tiny-llama, 2 layers from 1 to 2, full rank

    Args:
        model: The model.
        text: What to learn from, as in :func:`~spade_lens.lenses.fitting.text.calibration_text`, or what
            that function gave. By default the model writes it.
        keep: SPADE's keep set, which must end with the answer token; see
            :class:`~spade_lens.lenses.spade.Spade`.
        positions: Whether SPADE's tokens keep their positions.
        layers: The layers that get a map; by default all below the last.
        per_piece: How many positions of every piece to learn from, drawn at random; ``"all"`` of
            them; or its ``"answer"`` position, for prompts of a task. Never the start token.
        ridges: Strengths to choose from, relative to the variance of a coordinate.
        rank: The rank of what a map adds to the identity; None for any.
        refine: So many more passes over the text, with Adam, on KL(SPADE || L-SPADE). Each takes
            longer than the closed form.
        rate: The size of a refining step, relative to a final residual.
        held_out: The fraction of positions, by document, to choose by; as many to report on.
        seed: Of every choice.
        checkpoint: A folder in which to note where the fit stands, so that the same call goes on
            from there; the notes are removed at the end.
        settings: Memory limit, batch size and progress; see :class:`spade_lens.Settings`.

    Returns:
        The lens; ``lens.held_out`` says how good it is.

    Raises:
        ValueError: If the text is too little or no text, or an argument is out of range.
        FloatingPointError: If refining diverges.
    """
    if not ridges or not all(0 <= r < float("inf") for r in ridges):
        raise ValueError(f"ridges={list(ridges)} was given; expected numbers of at least 0.")
    if rank is not None and not 1 <= rank <= model.d_model:
        raise ValueError(
            f"rank={rank} was given; expected 1 to {model.d_model}, the width of {model.name}, or "
            "None."
        )
    spade = Spade(model, keep=keep, positions=positions)
    arguments = {
        "method": "L-SPADE: ridge regression on SPADE's final residual",
        "spade": spade.name,
        "keep": _rule(spade.rule),
        "spade_positions": positions,
        "ridges": [float(r) for r in ridges],
        "rank": rank,
        "refine": refine,
        "rate": rate,
    }
    course = Course(refine, rate, seed) if refine else None
    fit = FitRun.begin(
        model,
        text,
        layers=layers,
        per_piece=per_piece,
        held_out=held_out,
        seed=seed,
        checkpoint=checkpoint,
        arguments=arguments,
    )
    problems = fit.problems(spade)
    validation = fit.rows(fit.split.validation, spade, "choose")
    maps, chosen = ridge_maps(
        problems, fit.layers, ridges, rank, validation.start, validation.target
    )
    about: dict[str, Any] = {"ridge": chosen}
    if course is not None:
        maps, about["not_refined"] = fit.descend(maps, problems, spade, course, validation)
    name = spade.name.replace("SPADE", "L-SPADE", 1)
    return fit.finish(LinearSpade(model, maps, name=name), spade, about)


@scoped
def fit_tuned_lens(
    model: Model,
    text: TextSource = None,
    *,
    layers: Sequence[int] | None = None,
    per_piece: Positions = 32,
    passes: int = 2,
    rate: float = 0.1,
    held_out: float = 0.1,
    seed: int = 0,
    checkpoint: str | PathLike[str] | None = None,
    settings: Settings | None = None,
) -> TunedLens:
    """The tuned lens: maps that begin as the identity and descend on KL(model || lens).

    Source: Belrose et al. 2023 (arXiv 2303.08112). Ours: Adam instead of SGD, in coordinates in
    which a layer's residuals are white, which takes a fraction of the steps; and the identity
    stays where the descent did not help on documents of its own.

    Example:
        >>> from spade_lens.lenses.fitting.text import calibration_text
        >>> text = calibration_text(model, n_pieces=40, n_tokens=32)
        >>> lens = fit_tuned_lens(model, text, layers=[1, 2])
        >>> lens.held_out.columns.tolist()[:3]
        ['layer', 'lens', 'kl_to_model']

    Args:
        model: The model.
        text: What to learn from, as in :func:`fit_linear_spade`.
        layers: The layers that get a map; by default all below the last.
        per_piece: How many positions of every piece to learn from, as in
            :func:`fit_linear_spade`.
        passes: How often to go through the text.
        rate: The size of a step, relative to a final residual.
        held_out: The fraction of positions, by document, to choose by; as many to report on.
        seed: Of every choice.
        checkpoint: A folder for notes, as in :func:`fit_linear_spade`.
        settings: Memory limit, batch size and progress; see :class:`spade_lens.Settings`.

    Returns:
        The lens; ``lens.held_out`` says how good it is.

    Raises:
        ValueError: If the text is too little or no text, or an argument is out of range.
        FloatingPointError: If the descent diverges.
    """
    course = Course(passes, rate, seed)
    arguments = {
        "method": "tuned lens: descent on KL(model || lens) from the identity",
        "passes": passes,
        "rate": rate,
    }
    fit = FitRun.begin(
        model,
        text,
        layers=layers,
        per_piece=per_piece,
        held_out=held_out,
        seed=seed,
        checkpoint=checkpoint,
        arguments=arguments,
    )
    problems = fit.problems(None)
    validation = fit.rows(fit.split.validation, None, "choose")
    maps = AffineMaps.identity(fit.layers, model.d_model).to(model.device)
    maps, left = fit.descend(maps, problems, None, course, validation)
    return fit.finish(TunedLens(model, maps), Spade(model), {"left_at_identity": left})


def _rule(rule: KeepRule) -> dict[str, Any] | str:
    """A keep set in words that JSON knows."""
    if isinstance(rule, Keep):
        return asdict(rule)
    return getattr(rule, "__qualname__", repr(rule))
