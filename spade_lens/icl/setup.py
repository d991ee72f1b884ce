"""What experiments on episodes have in common: how episodes become prompts, and the seed.

This module knows tasks and a model's tokenizer. It knows nothing of any one experiment.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from spade_lens.checks import check_fields
from spade_lens.lenses.answers import check_choices
from spade_lens.models.model import Model
from spade_lens.prompts.few_shot import ARROW, Template
from spade_lens.prompts.prompt import Prompt
from spade_lens.tasks.episodes import Episode, write_episodes


@dataclass(frozen=True)
class PromptSetup:
    """How the episodes of an experiment are written, with their dummies and shuffled labels.

    Example:
        >>> setup = icl.PromptSetup(dummy_inputs=("z", "zz"), seed=3)
        >>> episodes = tasks.RuleTask("t", {"x": ("a", "b"), "y": ("c", "d")}).episodes(1, shots=2)
        >>> setup.dummies(episodes)[0].demonstrations
        (('z', '?'), ('zz', '?'))

    Args:
        template: How a demonstration and the query are written.
        dummy_inputs: Words in the places of a dummy prompt's inputs, taken in turn. Ours.
        dummy_outputs: Words in the places of its outputs. Ours: ``"?"`` names no label. Give the
            labels themselves for dummies that name them without a rule.
        seed: Seed of shuffled labels and of random vectors.

    Raises:
        TypeError: If the template is none, or the words of dummies are one string.
        ValueError: If there are no such words, or the seed is negative.
    """

    template: Template = ARROW
    dummy_inputs: Sequence[str] = ("thing",)
    dummy_outputs: Sequence[str] = ("?",)
    seed: int = 0

    def __post_init__(self) -> None:
        check_fields(self)
        if not isinstance(self.template, Template):
            raise TypeError(f"template={self.template!r} was given; expected a Template(...).")
        for name in ("dummy_inputs", "dummy_outputs"):
            words: Any = getattr(self, name)
            if isinstance(words, str):
                raise TypeError(f"{name}={words!r} was given; expected several: ({words!r},).")
            if not words:
                raise ValueError(f"{name}={words!r} was given; expected at least one word.")
            object.__setattr__(self, name, tuple(words))
        if self.seed < 0:
            raise ValueError(f"seed={self.seed} was given; expected 0 or more.")

    def prompts(self, model: Model, episodes: Sequence[Episode]) -> list[Prompt]:
        """Write episodes as prompts of a model, each with a right answer and a wrong one.

        Raises:
            ValueError: If the model has no tokenizer, or a prompt does not fit it.
        """
        if model.tokenizer is None:
            raise ValueError(
                f"{model.name} was loaded without a tokenizer, so episodes cannot be written. Give "
                "load(..., tokenizer=...)."
            )
        prompts = write_episodes(model.tokenizer, episodes, template=self.template)
        model.check_prompts(prompts)
        check_choices(prompts)
        return prompts

    def dummies(self, episodes: Sequence[Episode]) -> list[Episode]:
        """Return each episode with demonstrations that say nothing."""
        return [e.dummy(self.dummy_inputs, self.dummy_outputs) for e in episodes]

    def shuffled(self, episodes: Sequence[Episode]) -> list[Episode]:
        """Return each episode with shuffled labels, by a seed of its own."""
        return [episode.shuffled(self.seed + i) for i, episode in enumerate(episodes)]
