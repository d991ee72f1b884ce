"""How sure a readout is: entropy, top-1 probability, margin, or a function of your own.

The three measures lie between 0 and 1 and larger is surer, so that one grid of thresholds serves
them all. Any lens can supply the readout. This module does not know when anybody exits.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from spade_lens.checks import check_fields
from spade_lens.lenses.lens import Lens
from spade_lens.prompts.prompt import Prompt

Over = Literal["candidates", "vocabulary"]
Measure: TypeAlias = str | Callable[[Tensor], Tensor]
"""The name of a measure, or a function from logits ``[row option]`` to confidences ``[row]``."""
Features: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""From a lens's final residuals ``[row d_model]`` and the logits ``[row option]`` to features."""


def _top_1(logits: Float[Tensor, "row option"]) -> Float[Tensor, " row"]:
    return logits.softmax(dim=-1).amax(dim=-1)


def _margin(logits: Float[Tensor, "row option"]) -> Float[Tensor, " row"]:
    if logits.shape[-1] == 1:
        return torch.ones_like(logits[:, 0])
    best = logits.log_softmax(dim=-1).topk(2, dim=-1).values.exp()
    return best[:, 0] - best[:, 1]


def _entropy(logits: Float[Tensor, "row option"]) -> Float[Tensor, " row"]:
    logprobs = logits.log_softmax(dim=-1)
    surprise = logprobs.masked_fill(logprobs == -torch.inf, 0)
    entropy = -(logprobs.exp() * surprise).sum(dim=-1)
    options = logits.isfinite().sum(dim=-1).clamp(min=2)  # one option: entropy 0, confidence 1
    # Rounding can carry the entropy of equal options past log(n).
    return (1 - entropy / options.log()).clamp(0, 1)


MEASURES: dict[str, Callable[[Tensor], Tensor]] = {
    "entropy": _entropy,
    "top-1": _top_1,
    "margin": _margin,
}
"""Measures by name. Add your own: ``MEASURES["mine"] = function``."""


def confidence_of(
    logits: Float[Tensor, "row option"], measure: Measure = "entropy"
) -> Float[Tensor, " row"]:
    """Return the confidence of each row of logits, in single precision; larger is surer.

    ``"top-1"`` is the probability of the likeliest option, ``"margin"`` that minus the probability
    of the second, and ``"entropy"`` 1 - H / log(n) for n options and entropy H; dividing by log(n)
    is ours. Or it is a function of your own. A logit is -inf where a row has fewer options.

    Example:
        >>> logits = torch.tensor([[0.0, 0.0], [0.0, 100.0]])
        >>> [confidence_of(logits, m).tolist() for m in ("entropy", "top-1", "margin")]
        [[0.0, 1.0], [0.5, 1.0], [0.0, 1.0]]
    """
    if isinstance(measure, str):
        return _named(measure)(logits.float())
    return checked_rows(measure(logits.float()), len(logits), f"The measure {_name(measure)!r}")


def checked_rows(returned: Any, n: int, of: str, *, what: str = "confidences") -> Tensor:
    """Return floats, one (or a vector of features) for each of ``n`` rows, of what ``of`` gave."""
    expected = f"a tensor of {what} of shape [{n}" + (", feature]" if what == "features" else "]")
    if not isinstance(returned, Tensor):
        raise TypeError(f"{of} returned a {type(returned).__name__}; expected {expected}.")
    if returned.ndim != (2 if what == "features" else 1) or len(returned) != n:
        raise ValueError(f"{of} returned shape {list(returned.shape)}; expected {expected}.")
    if returned.isnan().any():
        raise ValueError(f"{of} returned NaN; expected numbers.")
    return returned.float()


@dataclass(frozen=True)
class Confidence:
    """A lens, and what is taken for the confidence of its readout.

    Example:
        >>> from spade_lens.exits import Confidence
        >>> Confidence(LogitLens(model), "margin").name
        'logit lens, margin'
        >>> def log_odds(logits):
        ...     return logits.topk(2).values.diff(dim=-1)[:, 0].neg()
        >>> Confidence(LogitLens(model), log_odds).name
        'logit lens, log_odds'

    Args:
        lens: Supplies the readout: L-SPADE, the tuned lens, the logit lens, SPADE itself.
        measure: A name or a function; see :func:`confidence_of`. The paper uses the entropy.
        over: The options: the prompt's ``"candidates"``, or the ``"vocabulary"``. By default
            the candidates where a prompt has any. The paper leaves this open. What a readout
            *answers* is always one of the candidates where a prompt has any.
        features: What a policy of your own sees beside the confidence (``Checks.features``): a
            function from the lens's final residuals ``[row d_model]`` and the options' logits
            ``[row option]`` to ``[row feature]``.
        after: A cheaper confidence that is read first, at the same layers. This one is then read
            only for prompts that the policy lets through; see
            :class:`~spade_lens.exits.Screened`.

    Raises:
        TypeError: If ``lens`` is no lens, ``measure`` neither a name nor a function, or ``after``
            no confidence.
        ValueError: If there is no measure of that name, ``over`` is neither, or ``after`` comes
            after another.
    """

    lens: Lens
    measure: Measure = "entropy"
    over: Over | None = None
    features: Features | None = None
    after: "Confidence | None" = None

    def __post_init__(self) -> None:
        check_fields(self)
        if not isinstance(self.lens, Lens):
            raise TypeError(
                f"lens={self.lens!r} was given; expected a lens such as LogitLens(model)."
            )
        _check_read(self.measure, self.over, self.after)

    @property
    def name(self) -> str:
        """The name in tables."""
        over = f" over {self.over}" if self.over else ""
        after = f", after {self.after.name}" if self.after else ""
        return f"{self.lens.name}, {_name(self.measure)}{over}{after}"

    def __repr__(self) -> str:
        return f"Confidence({self.name!r})"

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """Raise if candidates are asked for and a prompt has none."""
        if self.after is not None:
            self.after.check_prompts(prompts)
        if self.over == "candidates":
            bare = next((i for i, p in enumerate(prompts) if not p.candidates), None)
            if bare is not None:
                raise ValueError(
                    f"over='candidates' was asked for; prompt {bare} has no candidates. Give "
                    "prompts with candidates, or over='vocabulary'."
                )


@dataclass(frozen=True)
class Own:
    """Among checks: each answering lens's own readout, for its own exits alone.

    ``"own"`` stands for ``Own()``.

    Example:
        >>> from spade_lens.exits import Confidence, Own, exit_tables
        >>> check = Own(after=Confidence(LogitLens(model)))
        >>> [table] = exit_tables(model, prompts, check, layers=[2, 3])
        >>> table.check
        'SPADE, entropy, after logit lens, entropy'

    Args:
        measure: As in :class:`Confidence`; ``over``, ``features`` and ``after`` too.
    """

    measure: Measure = "entropy"
    over: Over | None = None
    features: Features | None = None
    after: Confidence | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        _check_read(self.measure, self.over, self.after)

    def of(self, lens: Lens) -> Confidence:
        """Return the confidence of one lens that answers."""
        return Confidence(lens, self.measure, self.over, self.features, self.after)


def _check_read(measure: Any, over: Any, after: Any) -> None:
    """Raise if what is taken from a readout cannot be."""
    if over not in (None, "candidates", "vocabulary"):
        raise ValueError(f"over={over!r} was given; expected 'candidates', 'vocabulary' or None.")
    if isinstance(measure, str):
        _named(measure)
    elif not callable(measure):
        raise TypeError(
            f"measure={measure!r} was given; expected {', '.join(map(repr, MEASURES))}, or a "
            "function from logits to confidences."
        )
    if after is None:
        return
    if not isinstance(after, Confidence):
        raise TypeError(
            f"after={after!r} was given; expected a confidence such as "
            "Confidence(LogitLens(model))."
        )
    if after.after is not None:
        raise ValueError(
            f"after={after!r} comes after another; expected a confidence that comes first."
        )


def _named(measure: str) -> Callable[[Tensor], Tensor]:
    if measure not in MEASURES:
        raise ValueError(
            f"measure={measure!r} was given; expected {', '.join(map(repr, MEASURES))}, or a "
            "function from logits to confidences."
        )
    return MEASURES[measure]


def _name(measure: Measure) -> str:
    return measure if isinstance(measure, str) else getattr(measure, "__name__", repr(measure))
