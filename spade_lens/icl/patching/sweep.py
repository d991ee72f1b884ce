"""Patching sweeps: vectors of few-shot prompts, written into dummy prompts, layer by layer.

A dummy prompt has demonstrations that say nothing, in the real ones' places, and the real query.
What the model answers once the vectors are in is set between the floors (no demonstrations, the
dummy prompt as it is) and the ceiling (the few-shot prompt), beside the controls.
"""

import hashlib
import json
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from os import PathLike
from typing import Any

import pandas as pd
import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from spade_lens.icl.patching.conditions import Condition, check_conditions, default_conditions
from spade_lens.icl.vectors import demonstration_labels
from spade_lens.lenses.answers import check_choices, full_answers, read_answers
from spade_lens.models.model import Model
from spade_lens.models.residuals import Patch, Residuals, capture, check_layers
from spade_lens.prompts.few_shot import ARROW, Template
from spade_lens.prompts.prompt import Prompt
from spade_lens.replay.run import capture_for_replay, replay
from spade_lens.settings import Settings, limits, scoped
from spade_lens.stats.intervals import proportion_interval
from spade_lens.storage.parts import in_parts
from spade_lens.tasks.episodes import Episode, check_episodes
from spade_lens.tensors import label_mean_of_others, mean_of_others, random_like

BASELINES = ("zero-shot", "dummy", "few-shot")
MEANS_OF_OTHERS = "every answer counts the same"
"""So that what was swept when they were plain means is not gone on with."""


@scoped
def patch_sweep(
    model: Model,
    episodes: Sequence[Episode],
    *,
    conditions: Sequence[Condition] | None = None,
    other: Sequence[Episode] | None = None,
    layers: Sequence[int] | None = None,
    dummy_inputs: Sequence[str] = ("thing",),
    dummy_outputs: Sequence[str] = ("?",),
    template: Template = ARROW,
    seed: int = 0,
    folder: str | PathLike[str] | None = None,
    settings: Settings | None = None,
) -> pd.DataFrame:
    """Patch every episode's dummy prompt under every condition at every layer.

    Residuals are captured once; every patched run starts at the patched layer.

    Example:
        >>> task = task("animal/country")
        >>> frame = patch_sweep(model, task.episodes(64, shots=16))  # doctest: +SKIP

    Args:
        model: The model.
        episodes: Of one task, with as many demonstrations each.
        conditions: What is patched; by default :func:`spade_lens.icl.default_conditions`.
        other: As many episodes of another task with as many demonstrations, for the condition
            that writes another task's vectors.
        layers: The layers to patch at, 0 to ``n_layers``; all by default.
        dummy_inputs: Words in the inputs' places, taken in turn. Ours.
        dummy_outputs: Words in the outputs' places, taken in turn. Ours: ``"?"`` names no label;
            give the labels themselves for dummies that name them and say no rule.
        template: How a line is written.
        seed: Seed of random vectors and shuffled labels.
        folder: Where finished layers are kept, so that an interrupted sweep goes on; none by
            default.
        settings: Memory limit, batch size and progress; see :class:`spade_lens.Settings`.

    Returns:
        One row per condition, layer and prompt: ``task``, ``condition``, ``layer``, ``prompt``
        (its number), ``correct``, ``prefers`` and ``logit_diff`` (see
        :class:`spade_lens.lenses.Answers`; always by the episode's own answer, so under the opposite
        mapping a prompt that does not prefer it has flipped). The baselines ``zero-shot``,
        ``dummy`` and ``few-shot`` stand first, with layer -1.

    Raises:
        ValueError: If episodes, conditions, layers or ``other`` do not fit together or the
            model, the residuals do not fit ``memory_limit``, or ``folder`` holds another sweep.

    Warns:
        UserWarning: If the model's own few-shot answers are no better than chance: then there is
            nothing to explain.
    """
    layers = check_layers(model, layers)
    conditions = default_conditions(episodes, other=other) if conditions is None else conditions
    shots = check_episodes(episodes)
    if other is not None and (len(other) != len(episodes) or check_episodes(other) != shots):
        raise ValueError(
            f"other= has {len(other)} episodes of {check_episodes(other)} demonstrations; "
            f"expected {len(episodes)} of {shots}, as in the task itself."
        )
    check_conditions(conditions, shots, other=other is not None)
    relatives = {"own": list(episodes)}
    for source in sorted({condition.source for condition in conditions}):
        if source == "shuffled":
            relatives[source] = [e.shuffled(seed + i) for i, e in enumerate(episodes)]
        elif source == "opposite":
            relatives[source] = [episode.opposite() for episode in episodes]
        elif source == "other task":
            relatives[source] = list(other or ())
    dummies = [episode.dummy(dummy_inputs, dummy_outputs) for episode in episodes]

    def prompts_of(some: Sequence[Episode]) -> list[Prompt]:
        made = [e.prompt(model.tokenizer, template=template) for e in some]
        model.check_prompts(made)
        check_choices(made)
        return made

    sweep = _Sweep(
        model=model,
        conditions=tuple(conditions),
        task=episodes[0].task,
        base=prompts_of(dummies),
        sources={name: prompts_of(some) for name, some in relatives.items()},
        rules={name: [episode.rule for episode in some] for name, some in relatives.items()},
        answers={name: [episode.answer for episode in some] for name, some in relatives.items()},
        zero_shot=prompts_of([episode.zero_shot() for episode in episodes]),
        shots=shots,
        seed=seed,
    )
    sweep.check_means()
    config = {
        "model": {"name": model.name, "sha256": model.sha256},
        "episodes": _digest([*relatives.items(), *dummies]),
        "conditions": [asdict(condition) for condition in conditions],
        "template": asdict(template),
        "seed": seed,
        "means": MEANS_OF_OTHERS,
    }
    names = ["baselines", *(f"layer-{layer:03}" for layer in layers)]
    frame = in_parts(names, sweep.part, folder=folder, config=config, desc="patch")
    if not sweep.warned:  # by what was on disk
        sweep.warn_at_chance(frame[frame["condition"] == BASELINES[-1]])
    return frame


@dataclass
class _Sweep:
    """What the parts of one sweep share; residuals are captured by the first that needs them."""

    model: Model
    conditions: tuple[Condition, ...]
    task: str
    base: list[Prompt]
    sources: dict[str, list[Prompt]]
    rules: dict[str, list[str]]
    answers: dict[str, list[str]]
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
        chance = 1 / min(len(prompt.candidates) for prompt in self.sources["own"])
        low, _ = proportion_interval(right, n)
        if low <= chance:
            warnings.warn(
                f"On task {self.task!r} the model prefers the right answer in {right} of {n} "
                f"few-shot prompts, which may be chance ({chance:.2f}): there is nothing to "
                "explain. Use more demonstrations, more prompts or another task.",
                stacklevel=2,
            )

    def part(self, name: str) -> pd.DataFrame:
        """The rows of the baselines, or of one layer."""
        if name == "baselines":
            return self._baselines()
        layer = int(name.removeprefix("layer-"))
        residuals, vectors = self._capture()
        written = [
            [(condition, at) for at in condition.written(layer, self.model.n_layers)]
            for condition in self.conditions
        ]
        frames = []
        for some in self._chunks(sum(len(each) for each in written)):
            n = len(some)
            rows = [i for _ in self.conditions for i in some]
            patches = [
                self._patch(condition, at, some, c * n, vectors)
                for c, each in enumerate(written)
                for condition, at in each
            ]
            final = replay(
                self.model,
                residuals,
                rows,
                patches,
                settings=limits(self.model).part(1 / 4),
            )
            answers = read_answers(self.model, final, [self.base[i] for i in rows]).to_frame()
            names = [condition.name for condition in self.conditions for _ in some]
            frames.append(self._labelled(answers, names, layer, rows))
        frame = pd.concat(frames, ignore_index=True)
        order = {condition.name: c for c, condition in enumerate(self.conditions)}
        return frame.sort_values(
            "condition", key=lambda names: names.map(order), kind="stable", ignore_index=True
        )

    def _chunks(self, n_patches: int) -> list[range]:
        """Prompts, as many at a time as an eighth of the memory holds the patches of."""
        element = torch.finfo(self.model.dtype).bits // 8
        each = n_patches * self.shots * self.model.d_model * element
        most = max(1, int(limits(self.model).memory_bytes / 8 / each))
        n = len(self.base)
        return [range(first, min(n, first + most)) for first in range(0, n, most)]

    def _baselines(self) -> pd.DataFrame:
        # First, as long as the memory is free.
        zero_shot = full_answers(self.model, self.zero_shot)
        residuals, vectors = self._capture()
        n_layers = self.model.n_layers
        ends = [residuals.slots(i, [prompt.answer])[0] for i, prompt in enumerate(self.base)]
        # Dummy and few-shot prompts have run already: their last residuals are what answers.
        found = (
            zero_shot,
            read_answers(self.model, residuals.layer(n_layers)[ends], self.base),
            read_answers(self.model, vectors["own", "arrow"][n_layers, :, 0], self.sources["own"]),
        )
        everyone = range(len(self.base))
        frames = [
            self._labelled(answers.to_frame(), [name] * len(everyone), -1, everyone)
            for name, answers in zip(BASELINES, found, strict=True)
        ]
        self.warn_at_chance(frames[-1])
        return pd.concat(frames, ignore_index=True)

    def _labelled(
        self, answers: pd.DataFrame, names: Sequence[str], layer: int, prompts: Sequence[int]
    ) -> pd.DataFrame:
        about = {"task": self.task, "condition": names, "layer": layer, "prompt": list(prompts)}
        return pd.DataFrame(about).join(answers)

    def _capture(self) -> tuple[Residuals, dict[tuple[str, str], Tensor]]:
        """The dummies' residuals, and every source's vectors at labels and arrow."""
        if self._captured is None:
            share = 1 / (len(self.sources) + 2)
            # First, for it is what may not fit.
            base = capture_for_replay(
                self.model,
                self.base,
                settings=limits(self.model).part(2 * share),
            )
            vectors = {}
            for name, prompts in self.sources.items():
                positions = [[*prompt.spans["labels"], prompt.answer] for prompt in prompts]
                stack = capture(
                    self.model,
                    prompts,
                    positions=positions,
                    settings=limits(self.model).part(share),
                ).stack
                both = rearrange(stack, "layer (batch n) d -> layer batch n d", n=self.shots + 1)
                vectors[name, "labels"], vectors[name, "arrow"] = both[:, :, :-1], both[:, :, -1:]
            self._captured = base, vectors
        return self._captured

    def _patch(
        self,
        condition: Condition,
        layer: int,
        some: range,
        first_row: int,
        vectors: dict[tuple[str, str], Tensor],
    ) -> Patch:
        """One condition's write at one layer, in the rows of some prompts."""
        if condition.site == "labels":
            demos = list(condition.demonstrations(self.shots))
            at = [[self.base[i].spans["labels"][demo] for demo in demos] for i in some]
        else:
            demos, at = [0], [[self.base[i].answer] for i in some]
        values = self._values(condition, layer, vectors)[some.start : some.stop][:, demos]
        return Patch(
            layer,
            prompts=tuple(first_row + n for n in range(len(some)) for _ in demos),
            positions=tuple(position for positions in at for position in positions),
            values=rearrange(condition.scale * values, "batch place d -> (batch place) d"),
            mode=condition.mode,
        )

    def _values(
        self, condition: Condition, layer: int, vectors: dict[tuple[str, str], Tensor]
    ) -> Float[Tensor, "batch place d_model"]:
        from_layer = condition.source_layer(layer, self.model.n_layers)
        found = vectors[self._source(condition), condition.site][from_layer][None]
        found = self._mean(condition, found)
        if condition.source == "random":
            # Another seed at every layer, or a window would write one direction all along.
            found = random_like(found, seed=self.seed * 1000 + layer)
        return found[0]

    def _source(self, condition: Condition) -> str:
        """Whose residuals: those of random vectors' norms, and of a wrong layer, are the own."""
        return condition.source if condition.source in self.sources else "own"

    def _mean(
        self, condition: Condition, found: Float[Tensor, "1 batch place d_model"]
    ) -> Float[Tensor, "1 batch place d_model"]:
        source = self._source(condition)
        if condition.mean == "rule":
            return mean_of_others(found, self.rules[source], answers=self.answers[source])
        if condition.mean == "label":
            labels = demonstration_labels(self.sources[source])
            return label_mean_of_others(found, labels, self.rules[source])
        return found


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, default=asdict).encode()).hexdigest()
