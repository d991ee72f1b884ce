"""Experiments by name. One registers itself, so that a new one is one function in one file.

This module knows nothing of any experiment.
"""

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from spade_lens.checks import checked
from spade_lens.studies.base import Findings


@dataclass(frozen=True)
class Experiment:
    """An experiment on in-context learning.

    ``check`` takes the plan and raises if it does not suit the experiment.
    """

    name: str
    run: Callable[[Any], Findings]
    check: Callable[[Any], None] | None = None


_EXPERIMENTS: dict[str, Experiment] = {}


@checked
def experiment(
    name: str, *, check: Callable[[Any], None] | None = None
) -> Callable[[Callable[[Any], Findings]], Callable[[Any], Findings]]:
    """Register a function as an experiment of :class:`~spade_lens.studies.IclPlan`.

    Example:
        >>> @sl.studies.experiment("lengths")
        ... def lengths(study):
        ...     def measure(prompts):
        ...         lengths = [len(prompt) for prompt in prompts]
        ...         return pd.DataFrame({"prompt": range(len(prompts)), "length": lengths})
        ...
        ...     frame = study.by_prompts("lengths", measure)
        ...     return sl.studies.Findings({"": frame}, text=f"{frame['length'].mean():.1f} tokens")

        ``sl.study(model, IclPlan("antonym", "lengths"))`` runs it, in parts that resume, and writes
        ``lengths.csv``, ``lengths.txt`` and ``lengths.json``.

    Args:
        name: What plans, files and the command line call it. An experiment of the same name is
            replaced.
        check: Takes the plan before a model is loaded, and raises ``ValueError`` if the experiment
            cannot be done.

    Returns:
        A decorator, which returns the function as it is.
    """

    def register(run: Callable[[Any], Findings]) -> Callable[[Any], Findings]:
        _EXPERIMENTS[name] = Experiment(name, run, check)
        return run

    return register


def experiment_names() -> list[str]:
    """Return the names of all experiments that are registered."""
    return list(_EXPERIMENTS)


def find_experiment(name: str) -> Experiment:
    """Return an experiment by its name."""
    if name not in _EXPERIMENTS:
        near = difflib.get_close_matches(name, _EXPERIMENTS, n=2)
        hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
        raise ValueError(
            f"There is no experiment {name!r}; expected some of {', '.join(_EXPERIMENTS)}.{hint}"
        )
    return _EXPERIMENTS[name]
