"""Rule vectors written into dummy prompts, layer by layer.

A dummy prompt has demonstrations that say nothing, in the real ones' places, and the real query.
The model's answers with the vectors in place are compared with floors (no demonstrations, the
dummy prompt as it is), the ceiling (the few-shot prompt) and the controls.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from os import PathLike

import pandas as pd
import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from spade_lens.checks import warn
from spade_lens.icl.patching.conditions import (
    Condition,
    check_conditions,
    default_conditions,
)
from spade_lens.icl.patching.result import PatchSweep, answered
from spade_lens.icl.setup import PromptSetup
from spade_lens.icl.vectors import demonstration_labels
from spade_lens.lenses.answers import full_answers, read_answers
from spade_lens.models.identity import run_identity
from spade_lens.models.model import Model
from spade_lens.models.patches import Patch
from spade_lens.models.places import LayersLike, check_layers
from spade_lens.models.residuals import Residuals, capture
from spade_lens.prompts.prompt import Prompt
from spade_lens.replay.run import capture_for_replay, replay
from spade_lens.settings import Settings, limits, scoped
from spade_lens.stats.intervals import proportion_interval
from spade_lens.storage.content import content_sha256
from spade_lens.storage.parts import in_parts
from spade_lens.tasks.episodes import Episode
from spade_lens.tensors import (
    label_mean_of_others,
    mean_of_others,
    random_like,
    stack_by_demonstration,
)

BASELINES = ("zero-shot", "dummy", "few-shot")
MEANS_OF_OTHERS = "every answer counts the same, first tokens flagged"
"""Part of what decides a table, so that tables of plain means, or without ``ambiguous``, are not
continued."""


@scoped
def patch_sweep(
    model: Model,
    episodes: Sequence[Episode],
    *,
    conditions: Sequence[Condition] | None = None,
    layers: LayersLike = None,
    setup: PromptSetup | None = None,
    folder: str | PathLike[str] | None = None,
    settings: Settings | None = None,
) -> PatchSweep:
    """Patch every episode's dummy prompt under every condition at every layer.

    Residuals are captured once; every patched run starts at the patched layer.

    Example:
        >>> tight = sl.prompts.Template(pair="{input}>{output}", query="{input}>", separator=";")
        >>> task = tasks.RuleTask("t", {"x": ("a", "bb", "ccc"), "y": ("d", "ee", "fff")})
        >>> sweep = icl.patch_sweep(  # doctest: +SKIP
        ...     model, task.episodes(8, shots=2), setup=icl.PromptSetup(tight, ("z",))
        ... )
        >>> sweep.summary()  # doctest: +SKIP

    Args:
        model: The model.
        episodes: Of one task, with as many demonstrations each.
        conditions: What is patched; by default :func:`spade_lens.icl.default_conditions`.
        layers: The layers to patch at, 0 to ``n_layers``; all by default.
        setup: How prompts and dummies are written, and the seed of shuffled labels and random
            vectors.
        folder: Where finished layers are kept, so that an interrupted sweep can be continued;
            none by default.
        settings: Memory limit, batch size and progress; see :class:`spade_lens.Settings`.

    Raises:
        TypeError: If something else than episodes is given.
        ValueError: If episodes, conditions or layers do not fit together or the model, the
            residuals do not fit ``memory_limit``, or ``folder`` holds another sweep.

    Warns:
        UserWarning: If the model's own few-shot answers are no better than chance: then there is
            nothing to explain.
    """
    setup = setup or PromptSetup()
    layers = check_layers(model, layers)
    conditions = default_conditions(episodes) if conditions is None else conditions
    shots = check_conditions(conditions, episodes)
    # Of baselines and random vectors the prompt's own residuals are needed in any case.
    relatives = {"own": list(episodes)}
    sources = {}
    for condition in conditions:
        name, source = condition.source_episodes(episodes, setup)
        sources[condition.name] = name
        relatives[name] = source
    dummies = setup.dummies(episodes)
    sweep = _Sweep(
        model=model,
        conditions=tuple(conditions),
        task=episodes[0].task,
        base=setup.prompts(model, dummies),
        prompts={name: setup.prompts(model, source) for name, source in relatives.items()},
        episodes=relatives,
        sources=sources,
        zero_shot=setup.prompts(model, [episode.zero_shot() for episode in episodes]),
        shots=shots,
        seed=setup.seed,
    )
    sweep.check_means()
    config = {
        "model": run_identity(model),
        "episodes": content_sha256(
            [relatives, dummies, sweep.prompts, sweep.base, sweep.zero_shot]
        ),
        "conditions": [condition.to_json() for condition in conditions],
        "template": asdict(setup.template),
        "seed": setup.seed,
        "means": MEANS_OF_OTHERS,
    }
    names = ["baselines", *(f"layer-{layer:03}" for layer in layers)]
    frame = in_parts(names, sweep.part, folder=folder, config=config, desc="patch", model=model)
    if not sweep.warned:  # by what was on disk
        sweep.warn_at_chance(frame[frame["condition"] == BASELINES[-1]])
    return PatchSweep(frame, config)


@dataclass
class _Sweep:
    """What the parts of one sweep have in common. The first that needs residuals captures them."""

    model: Model
    conditions: tuple[Condition, ...]
    task: str
    base: list[Prompt]
    prompts: dict[str, list[Prompt]]
    episodes: dict[str, list[Episode]]
    sources: dict[str, str]
    zero_shot: list[Prompt]
    shots: int
    seed: int
    warned: bool = False
    _captured: tuple[Residuals, dict[tuple[str, str], Tensor]] | None = None

    def check_means(self) -> None:
        """Raise, before anything runs, if a mean over other prompts cannot be had."""
        nothing = torch.zeros(1, len(self.base), self.shots, 1)
        for condition in self.conditions:
            self._mean(condition, nothing)

    def warn_at_chance(self, few_shot: pd.DataFrame) -> None:
        """Warn if these answers are no better than chance."""
        self.warned = True
        n, right = len(few_shot), int(few_shot["prefers"].sum())
        chance = 1 / min(len(prompt.candidates) for prompt in self.prompts["own"])
        low, _ = proportion_interval(right, n)
        if low <= chance:
            warn(
                f"On task {self.task!r} the model prefers the right answer in {right} of {n} "
                f"few-shot prompts, which may be chance ({chance:.2f}): there is nothing to "
                "explain. Use more demonstrations, more prompts or another task."
            )

    def part(self, name: str) -> pd.DataFrame:
        """Return the rows of the baselines, or of one layer."""
        if name == "baselines":
            return self._baselines()
        layer = int(name.removeprefix("layer-"))
        residuals, vectors = self._capture()
        written = [
            [(condition, at) for at in condition.written(layer, self.model.n_layers)]
            for condition in self.conditions
        ]
        frames = []
        for chunk in self._chunks(sum(len(each) for each in written)):
            n = len(chunk)
            rows = [i for _ in self.conditions for i in chunk]
            patches = [
                self._patch(condition, at, chunk, c * n, vectors)
                for c, each in enumerate(written)
                for condition, at in each
            ]
            final = replay(
                self.model, residuals, rows, patches, settings=limits(self.model).part(1 / 4)
            )
            answers = read_answers(self.model, final, [self.base[i] for i in rows])
            names = [condition.name for condition in self.conditions for _ in chunk]
            frames.append(answered(answers, self.task, names, layer, rows))
        frame = pd.concat(frames, ignore_index=True)
        order = {condition.name: c for c, condition in enumerate(self.conditions)}
        return frame.sort_values(
            "condition", key=lambda names: names.map(order), kind="stable", ignore_index=True
        )

    def _chunks(self, n_patches: int) -> list[range]:
        """Return chunks of prompts whose patches fit an eighth of the memory."""
        element = torch.finfo(self.model.dtype).bits // 8
        each = n_patches * self.shots * self.model.d_model * element
        most = limits(self.model).rows(each, fraction=1 / 8)
        n = len(self.base)
        return [range(first, min(n, first + most)) for first in range(0, n, most)]

    def _baselines(self) -> pd.DataFrame:
        # First, as long as the memory is free.
        zero_shot = full_answers(self.model, self.zero_shot)
        residuals, vectors = self._capture()
        n_layers = self.model.n_layers
        # Dummy and few-shot prompts have run already: their last residuals are what answers.
        few_shot = vectors["own", "final"][n_layers, :, 0]
        baselines = (
            zero_shot,
            read_answers(self.model, residuals.at_answers(n_layers), self.base),
            read_answers(self.model, few_shot, self.prompts["own"]),
        )
        n = len(self.base)
        frames = [
            answered(answers, self.task, [name] * n, -1, range(n))
            for name, answers in zip(BASELINES, baselines, strict=True)
        ]
        self.warn_at_chance(frames[-1])
        return pd.concat(frames, ignore_index=True)

    def _capture(self) -> tuple[Residuals, dict[tuple[str, str], Tensor]]:
        """Return the dummies' residuals, and every source's vectors at both sites."""
        if self._captured is None:
            part = 1 / (len(self.prompts) + 2)
            memory = limits(self.model)
            # First, because it may not fit.
            base = capture_for_replay(self.model, self.base, settings=memory.part(2 * part))
            vectors = {}
            for name, prompts in self.prompts.items():
                positions = [[*prompt.spans["labels"], prompt.answer] for prompt in prompts]
                stack = capture(
                    self.model, prompts, positions=positions, settings=memory.part(part)
                ).stack
                both = stack_by_demonstration(stack, self.shots + 1)
                vectors[name, "labels"], vectors[name, "final"] = both[:, :, :-1], both[:, :, -1:]
            self._captured = base, vectors
        return self._captured

    def _patch(
        self,
        condition: Condition,
        layer: int,
        chunk: range,
        first_row: int,
        vectors: dict[tuple[str, str], Tensor],
    ) -> Patch:
        """Return one condition's write at one layer, in the rows of a chunk of prompts."""
        if condition.site == "labels":
            demos = list(condition.demonstrations(self.shots))
            at = [[self.base[i].spans["labels"][demo] for demo in demos] for i in chunk]
        else:
            demos, at = [0], [[self.base[i].answer] for i in chunk]
        values = self._values(condition, layer, vectors)[chunk.start : chunk.stop][:, demos]
        return Patch(
            layer,
            prompts=range(first_row, first_row + len(chunk)),
            positions=at,
            values=rearrange(condition.scale * values, "batch place d -> (batch place) d"),
            mode=condition.mode,
        )

    def _values(
        self, condition: Condition, layer: int, vectors: dict[tuple[str, str], Tensor]
    ) -> Float[Tensor, "batch place d_model"]:
        from_layer = condition.source_layer(layer, self.model.n_layers)
        own = vectors[self.sources[condition.name], condition.site][from_layer]
        values = self._mean(condition, rearrange(own, "batch place d -> 1 batch place d"))
        if condition.source == "random":
            # Another seed at every layer, or a window would write one direction all along.
            values = random_like(values, seed=self.seed * 1000 + layer)
        return values[0]

    def _mean(
        self, condition: Condition, values: Float[Tensor, "1 batch place d_model"]
    ) -> Float[Tensor, "1 batch place d_model"]:
        source = self.sources[condition.name]
        rules = [episode.rule for episode in self.episodes[source]]
        if condition.mean == "rule":
            answers = [episode.answer for episode in self.episodes[source]]
            return mean_of_others(values, rules, answers=answers)
        if condition.mean == "label":
            labels = demonstration_labels(self.prompts[source])
            return label_mean_of_others(values, labels, rules)
        return values
