"""What a study of learning in context will do, checked before anything is trained."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from os import PathLike
from typing import Any, ClassVar

from spade_lens.checks import check_fields, check_number, whole_numbers
from spade_lens.studies.base import Plan
from spade_lens.training.in_context.fitted import RECIPE
from spade_lens.training.in_context.network import NetworkSize
from spade_lens.training.in_context.task import InContextTask
from spade_lens.training.plan import TrainPlan

PARTS = ("risk", "probes", "pasting", "validation", "selection")


@dataclass(frozen=True)
class InContextPlan(Plan):
    """Train small transformers that learn in context, and ask them what has a known answer.

    Every seed has a Phi, first weights and prompts of its own. Needs no model: ``sl.study(plan)``.
    Source: Guo et al. (arXiv 2310.10616). The controls, and the parts
    ``validation`` and ``selection``, are ours.

    Example:
        >>> plan = sl.studies.InContextPlan(seeds=(0, 1, 2))  # doctest: +SKIP
        >>> sl.study(plan).tables["ratios"]  # doctest: +SKIP

    Args:
        task: The task; its seed is replaced by each of ``seeds``.
        size: The network; likewise.
        training: How it is trained; likewise.
        seeds: The seeds.
        batch: Prompts of a step.
        prompts: Prompts to measure on. As many others fit the probes.
        paste_steps: Steps in which a new input layer is trained; 0 leaves pasting out.
        parts: Which of ``"risk"``, ``"probes"``, ``"pasting"``, ``"validation"`` (of one
            representation) and ``"selection"`` (of several). A part that a task has no use for is
            left out.
        checkpoints: A folder for the checkpoints of training, in which a seed has its own; by
            default in ``parts`` of ``out``.
        layers: Layers to probe and to read at; by default all.
        seed: Seed of all prompts that are measured on.
        out: The folder for results.

    Raises:
        TypeError: If an argument is of another type.
        ValueError: If one is out of range, or ``out`` cannot be written.
    """

    needs_model: ClassVar[bool] = False

    task: InContextTask = field(default_factory=InContextTask)
    size: NetworkSize = field(default_factory=NetworkSize)
    training: TrainPlan = RECIPE
    seeds: Sequence[int] = (0,)
    batch: int = 32
    prompts: int = 1000
    paste_steps: int = 400
    parts: Sequence[str] = PARTS
    checkpoints: str | PathLike[str] | None = None
    out: str | PathLike[str] = field(default="spade-lens-in-context", kw_only=True)

    def __post_init__(self) -> None:
        check_fields(self)
        self._check_counts("batch", "prompts")
        check_number("paste_steps", self.paste_steps, least=0)
        if self.prompts < 20:
            raise ValueError(f"prompts={self.prompts} was given; expected 20 or more.")
        seeds = whole_numbers(self.seeds, "seeds=", "whole numbers from 0, at least one, each once")
        for seed in seeds:
            check_number("seeds", seed, least=0)
        unknown = [part for part in self.parts if part not in PARTS]
        if unknown or not self.parts:
            raise ValueError(f"parts={list(self.parts)} was given; expected some of {PARTS}.")
        if not self.task.noise:
            raise ValueError(
                "A task with noise=0 was given; expected some noise, since the Bayes ridge "
                "regression that everything is compared with needs it."
            )
        self._check_parts()
        self._set(seeds=tuple(seeds), parts=tuple(self.parts))
        self.check_layers(self.size.n_layers)
        super().__post_init__()

    def _check_parts(self) -> None:
        """Raise if a part cannot be measured after a training that takes minutes."""
        task, supervised = self.task, self.task.form == "supervised"
        if task.examples < 3:
            raise ValueError(
                f"A task of examples={task.examples} was given; expected at least 3, or there is "
                "too little to learn in context from."
            )
        pastes = supervised and self.paste_steps > 0
        if pastes and "pasting" in self.parts and self.size.n_layers < 2:
            raise ValueError(
                f"n_layers={self.size.n_layers} was given; pasting cuts between two blocks and "
                "expects at least 2. Give more layers, or paste_steps=0."
            )
        impossible = [] if pastes else ["pasting"]
        impossible += [] if supervised and task.representations == 1 else ["validation"]
        impossible += [] if supervised and task.representations > 1 else ["selection"]
        if set(self.parts) <= set(impossible):
            raise ValueError(
                f"parts={list(self.parts)} was given for a {task.form} task of "
                f"{task.representations} representations and paste_steps={self.paste_steps}, for "
                "which nothing of it can be measured; expected 'risk' or 'probes' among them."
            )

    def of(self, seed: int) -> tuple[InContextTask, NetworkSize, TrainPlan]:
        """Return task, size and training of a seed."""
        return (
            replace(self.task, seed=seed),
            replace(self.size, seed=seed),
            replace(self.training, seed=seed),
        )

    @property
    def config(self) -> dict[str, Any]:
        """The arguments that decide the results, ready for JSON."""
        names = ("batch", "prompts", "paste_steps", "seed")
        return {
            "task": asdict(self.task),
            "size": asdict(self.size),
            "training": self.training.described,
            "seeds": list(self.seeds),
            "parts": list(self.parts),
            "layers": "all" if self.chosen_layers is None else list(self.chosen_layers),
            **{name: getattr(self, name) for name in names},
        }
