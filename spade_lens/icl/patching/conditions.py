"""What is patched into dummy prompts: which vectors, where and how, and the controls beside them.

All of it is ours. The papers, as far as we know them, leave open the layers, the form of the
dummies, whether to replace or add, and whether to average. This module knows words, not models.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from spade_lens.checks import check_fields, checked, plain_name
from spade_lens.icl.setup import PromptSetup
from spade_lens.storage.content import content_sha256
from spade_lens.tasks.episodes import Episode, check_episodes

SOURCES = ("own", "random", "shuffled", "opposite", "wrong layer")
MEANS = ("none", "rule", "label")
SITES = ("labels", "final")


@dataclass(frozen=True)
class Condition:
    """What is patched: vectors of a source, at some positions, from some layer up.

    Example:
        >>> last = Condition("last label", demos=(-1,))
        >>> upward = Condition("labels to the top", window=None)
        >>> last.demonstrations(16), upward.written(28, 30)
        ((15,), (28, 29, 30))
        >>> task = tasks.RuleTask("t", {"x": tuple("abc"), "y": tuple("def")})
        >>> Condition("of other queries", source=task.episodes(4, shots=2, seed=1))
        Condition('of other queries', source=<4 episodes of 't'>)

    Args:
        name: What tables and figures call it.
        source: Whose vectors are written. ``"own"``: those of the few-shot prompt itself.
            ``"random"``: random ones of the same norms. ``"shuffled"``: of the prompt with
            shuffled labels. ``"opposite"``: of the opposite mapping. ``"wrong layer"``: the
            prompt's own from half the layers further up, counted cyclically. Or episodes of your
            own, one for each that is patched, with as many demonstrations: of another task, or
            changed as you like.
        site: ``"labels"``, the demonstrations' answer positions (local), or ``"final"``, the
            prompt's own answer position (global).
        demos: Which demonstrations' answer positions, from 0, negative ones from the end; all of
            them by default.
        mean: ``"none"``: each prompt gets its own vectors. ``"rule"``: the mean over the other
            prompts of its rule, place by place, every answer counting the same. ``"label"``: the
            mean over the same label's vectors in the other prompts of its rule (labels only).
        mode: ``"replace"`` or ``"add"``.
        scale: What the vectors are multiplied by.
        window: How many layers are written, from the patched one up; None for all above it.

    Raises:
        TypeError: If the source is neither a name nor episodes.
        ValueError: If an argument is none of those named, or arguments exclude each other.
    """

    name: str
    source: str | Sequence[Episode] = "own"
    site: str = "labels"
    demos: tuple[int, ...] | None = None
    mean: str = "none"
    mode: str = "replace"
    scale: float = 1.0
    window: int | None = 1

    def __post_init__(self) -> None:
        check_fields(self)
        plain_name(self.name, "a condition")
        if not isinstance(self.source, str):
            check_episodes(self.source)
            object.__setattr__(self, "source", tuple(self.source))
        expected: dict[str, tuple[Any, ...]] = {
            "source": SOURCES if isinstance(self.source, str) else (self.source,),
            "site": SITES,
            "mean": MEANS,
            "mode": ("replace", "add"),
        }
        for key, allowed in expected.items():
            if getattr(self, key) not in allowed:
                raise ValueError(
                    f"Condition {self.name!r}: {key}={getattr(self, key)!r} was given; expected "
                    f"one of {allowed}" + (", or episodes." if key == "source" else ".")
                )
        if self.window is not None and self.window < 1:
            raise ValueError(
                f"Condition {self.name!r}: window={self.window} was given; expected at least one "
                "layer, or None for all."
            )
        if self.site == "final" and (self.demos is not None or self.mean == "label"):
            raise ValueError(
                f"Condition {self.name!r} patches the final position, where there are no "
                "demonstrations to choose and no labels to take means of."
            )
        if self.mean == "label" and (self.source == "shuffled" or self.episodes):
            raise ValueError(
                f"Condition {self.name!r}: means by label are of the prompt's own mapping or its "
                f"opposite; {self._source()} was given."
            )
        if self.demos is not None and not self.demos:
            raise ValueError(f"Condition {self.name!r} patches no demonstration; give one or None.")

    def __repr__(self) -> str:
        fields = self.__dataclass_fields__
        changed = [n for n in list(fields)[2:] if getattr(self, n) != fields[n].default]
        parts = [repr(self.name), *(f"{n}={getattr(self, n)!r}" for n in changed)]
        if self.source != "own":
            parts.insert(1, self._source())
        return f"Condition({', '.join(parts)})"

    @property
    def episodes(self) -> tuple[Episode, ...]:
        """The episodes that are the source. Empty where the source is a name."""
        return () if isinstance(self.source, str) else tuple(self.source)

    def demonstrations(self, shots: int) -> tuple[int, ...]:
        """Return the demonstrations whose answer positions are written, of ``shots`` in all."""
        if self.demos is None:
            return tuple(range(shots))
        outside = [demo for demo in self.demos if not -shots <= demo < shots]
        chosen = tuple(demo % shots for demo in self.demos)
        if outside or len(set(chosen)) < len(chosen):
            raise ValueError(
                f"Condition {self.name!r} names demonstrations {self.demos}; expected distinct "
                f"ones from {-shots} to {shots - 1}."
            )
        return chosen

    def written(self, layer: int, n_layers: int) -> tuple[int, ...]:
        """Return the layers that are written when ``layer`` is the patched one."""
        top = n_layers if self.window is None else min(n_layers, layer + self.window - 1)
        return tuple(range(layer, top + 1))

    def source_layer(self, layer: int, n_layers: int) -> int:
        """Return the layer whose vectors are written at ``layer``."""
        if self.source != "wrong layer":
            return layer
        return (layer + (n_layers + 1) // 2) % (n_layers + 1)

    def source_episodes(
        self, episodes: Sequence[Episode], setup: PromptSetup
    ) -> tuple[str, list[Episode]]:
        """Return the episodes whose vectors are written, and a name by which they are shared.

        Random vectors take their norms from the prompt's own, and a wrong layer's are its own.
        """
        if self.episodes:
            return content_sha256(self.episodes), list(self.episodes)
        if self.source == "shuffled":
            return self.source, setup.shuffled(episodes)
        if self.source == "opposite":
            return self.source, [episode.opposite() for episode in episodes]
        return "own", list(episodes)

    def to_json(self) -> dict[str, Any]:
        """Return plain values that tell this condition from others."""
        plain = replace(self, source="own") if self.episodes else self
        about = asdict(plain)
        return about | {"source": content_sha256(self.episodes)} if self.episodes else about

    def _source(self) -> str:
        if self.episodes:
            return f"source=<{len(self.episodes)} episodes of {self.episodes[0].task!r}>"
        return f"source={self.source!r}"


@checked
def default_conditions(
    episodes: Sequence[Episode], *, other: Sequence[Episode] | None = None
) -> tuple[Condition, ...]:
    """Return local and global patching, and the controls that these episodes allow.

    Example:
        >>> task = tasks.RuleTask("t", {"x": tuple("abc"), "y": tuple("def")})
        >>> episodes = task.episodes(2, shots=2)
        >>> [condition.name for condition in default_conditions(episodes)][:3]
        ['labels', 'labels to the top', 'labels to the top, mean of label']

    "To the top" is from the patched layer to the last.

    Args:
        episodes: Of one task, at least two of every rule.
        other: As many episodes of another task, if its vectors are to be a control.
    """
    check_episodes(episodes)
    labelled = all(episode.labels for episode in episodes)
    conditions = [
        Condition("labels"),
        Condition("labels to the top", window=None),
        Condition("last label to the top", demos=(-1,), window=None),
        Condition("final position", site="final"),
        Condition("final position, mean of rule", site="final", mean="rule"),
        Condition("labels, wrong layer", source="wrong layer"),
    ]
    sources: dict[str, str | Sequence[Episode]] = {"random": "random", "shuffled": "shuffled"}
    if labelled:
        means = Condition("labels to the top, mean of label", mean="label", window=None)
        conditions.insert(2, means)
        sources["opposite"] = "opposite"
    if other is not None:
        sources["other task"] = other
    for name, source in sources.items():
        conditions += [
            Condition(f"labels to the top, {name}", source=source, window=None),
            Condition(f"final position, {name}", site="final", source=source),
        ]
    return tuple(conditions)


def check_conditions(conditions: Sequence[Condition], episodes: Sequence[Episode]) -> int:
    """Return how many demonstrations episodes have, if conditions can be run on them together."""
    shots = check_episodes(episodes)
    if not conditions:
        raise ValueError("No conditions were given. Give at least one, or leave the default.")
    names = [condition.name for condition in conditions]
    if len(set(names)) < len(names):
        raise ValueError(
            f"Two conditions have one name: {names}. Tables could not tell them apart."
        )
    for condition in conditions:
        condition.demonstrations(shots)
        source = condition.episodes
        if source and (counts := (len(source), check_episodes(source))) != (len(episodes), shots):
            raise ValueError(
                f"The source of condition {condition.name!r} has {counts[0]} episodes of "
                f"{counts[1]} demonstrations; expected {len(episodes)} of {shots}, as in the task "
                "itself."
            )
    return shots
