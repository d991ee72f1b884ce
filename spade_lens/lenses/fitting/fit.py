"""Fit the linear lenses: L-SPADE in closed form, the tuned lens by descent, others to candidates.

The first two go over a calibration text, learn from most of its documents, choose by some and
report on the rest. A fit shows its progress, and can be interrupted and taken up again.
"""

from collections.abc import Callable
from os import PathLike
from typing import Any, cast

from spade_lens.checks import checked
from spade_lens.lenses.fitting.candidates import fit_candidates
from spade_lens.lenses.fitting.descent import better_of, descend
from spade_lens.lenses.fitting.plan import CandidatePlan, FitPlan, SpadePlan, TunedPlan
from spade_lens.lenses.fitting.ridge import ridge_maps
from spade_lens.lenses.fitting.run import FitRun
from spade_lens.lenses.fitting.text import TextSource
from spade_lens.lenses.linear import AffineMaps, FittedLens, LinearSpade, TunedLens
from spade_lens.lenses.spade import Spade
from spade_lens.models.model import Model
from spade_lens.settings import Settings, scoped

_PLANS: dict[str, Callable[..., FitPlan | CandidatePlan]] = {
    "l-spade": SpadePlan,
    "tuned": TunedPlan,
    "candidates": CandidatePlan,
}


@scoped
def fit(
    kind: str | FitPlan | CandidatePlan,
    model: Model,
    text: TextSource = None,
    *,
    checkpoint: str | PathLike[str] | None = None,
    settings: Settings | None = None,
    **options: Any,
) -> FittedLens:
    """Fit a linear lens: one affine map for every layer.

    ``"l-spade"`` gives L-SPADE, whose maps come closest to SPADE's final residual: ridge regression
    in closed form, from sums that one pass over the text adds up for all layers, so that memory
    does not grow with the text. The strength of the ridge is chosen for every layer on documents
    of its own. All of this is our choice: the paper's abstract (arXiv 2507.17618) says that
    L-SPADE is linear and gives a confidence, no more.

    ``"tuned"`` gives the tuned lens of Belrose et al. 2023 (arXiv 2303.08112), whose maps begin
    as the identity and descend on KL(model || lens). Ours: Adam instead of SGD, in coordinates in
    which a layer's residuals are white, which takes a fraction of the steps; and the identity
    stays at layers where the descent did not help on documents of its own.

    ``"candidates"`` fits to what an early exit is decided by: prompts of a task, over their
    candidates, with the keep set that answers. ``target="spade"`` gives another L-SPADE,
    ``target="right"`` a candidate head, which learns the right answer. Ours: the candidates'
    cross-entropy, descended with L-BFGS, and a ridge towards ``start`` that is chosen by folds.
    Choose thresholds on other prompts than these.

    Example:
        >>> text = ["abcdefgh" * 9, "ijklmnop" * 9, "qrstuvwx" * 9]
        >>> lens = fit("l-spade", model, text, n_tokens=24, layers=[1, 2], per_piece="all")
        >>> lens
        LinearSpade(model, maps)  # L-SPADE of tiny-llama, 2 layers from 1 to 2, full rank
        >>> lens.held_out.columns.tolist()[:3]
        ['layer', 'lens', 'kl_to_model']
        >>> decided = [Prompt((1, a, b), candidates=(3, 4)) for a in (5, 6) for b in range(3, 11)]
        >>> fit("candidates", model, decided, keep=Keep(last=2), layers=[2]).name
        'task L-SPADE (start+last 2)'

    Args:
        kind: ``"l-spade"``, ``"tuned"``, ``"candidates"``, or a plan:
            :class:`~spade_lens.lenses.fitting.plan.SpadePlan`,
            :class:`~spade_lens.lenses.fitting.plan.TunedPlan`,
            :class:`~spade_lens.lenses.fitting.plan.CandidatePlan`.
        model: The model.
        text: What to learn from: a text file, a folder of them, a Hugging Face data set or its
            name, a list of texts or of prompts; see
            :func:`~spade_lens.lenses.fitting.text.calibration_text`. By default the model writes
            it. For ``"candidates"``: prompts with candidates.
        checkpoint: A folder in which to keep partial results, so that the same call goes on from
            there; they are removed at the end.
        settings: Memory limit, batch size and progress; see :class:`spade_lens.Settings`.
        options: Fields of the plan: ``layers``, ``per_piece``, ``n_pieces``, ``n_tokens``,
            ``bos``, ``passes``, ``rate``, ``held_out``, ``seed``; for L-SPADE also ``keep``,
            ``positions``, ``ridges`` and ``rank``. For ``"candidates"``: those of
            :class:`~spade_lens.lenses.fitting.plan.CandidatePlan`.

    Returns:
        The lens; ``lens.held_out`` says how good it is.

    Raises:
        TypeError: If an option is unknown.
        ValueError: If the kind is unknown, the text is too little or no text, or an option is out
            of range.
        FloatingPointError: If the descent diverges.
    """
    plan = _plan(kind, options)
    if isinstance(plan, CandidatePlan):
        return fit_candidates(plan, model, text, checkpoint)
    if isinstance(plan, SpadePlan):
        return _linear_spade(plan, model, text, checkpoint)
    return _tuned_lens(plan, model, text, checkpoint)


def _plan(kind: str | FitPlan | CandidatePlan, options: dict[str, Any]) -> FitPlan | CandidatePlan:
    if isinstance(kind, str) and kind not in _PLANS:
        raise ValueError(f"There is no fit of kind {kind!r}; expected {' or '.join(_PLANS)}.")
    if not isinstance(kind, str | FitPlan | CandidatePlan):
        raise TypeError(
            f"A kind of type {type(kind).__name__} was given; expected "
            f"{' or '.join(map(repr, _PLANS))}, or a plan: fit('l-spade', model)."
        )
    plan = _PLANS[kind]() if isinstance(kind, str) else kind
    names = list(vars(plan))
    unknown = sorted(set(options) - set(names))
    if unknown:
        raise TypeError(
            f"Options {unknown} were given; expected some of {names} for a {type(plan).__name__}."
        )
    made: Any = checked(type(plan))  # mypy sees an object here
    return cast(FitPlan | CandidatePlan, made(**vars(plan) | options))


def _linear_spade(
    plan: SpadePlan, model: Model, text: TextSource, checkpoint: str | PathLike[str] | None
) -> LinearSpade:
    spade = plan.spade(model)
    run = FitRun.begin(model, text, plan, checkpoint)
    problems = run.problems(spade)
    validation = run.rows(run.split.validation, spade, "choose")
    maps, ridges = ridge_maps(problems, run.layers, plan, validation)
    about: dict[str, Any] = {"ridge": ridges}
    if plan.passes:
        refined = descend(run, maps, problems, spade)
        maps, about["not_refined"] = better_of(model, maps, refined, validation)
    name = spade.name.replace("SPADE", "L-SPADE", 1)
    return run.finish(LinearSpade(model, maps, name=name), spade, about)


def _tuned_lens(
    plan: FitPlan, model: Model, text: TextSource, checkpoint: str | PathLike[str] | None
) -> TunedLens:
    run = FitRun.begin(model, text, plan, checkpoint)
    problems = run.problems(None)
    identity = AffineMaps.identity(run.layers, model.d_model).to(model.device)
    descended = descend(run, identity, problems, None)
    validation = run.rows(run.split.validation, None, "choose")
    maps, unchanged = better_of(model, identity, descended, validation)
    about = {"left_at_identity": unchanged}
    return run.finish(TunedLens(model, maps), Spade(model), about)
