"""What is patched into dummy prompts: which vectors, where, how; and the controls beside them.

Ours, all of it: neither the layers, nor replacing or adding, nor averaging, nor the form of the
dummies is known to us from the papers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from spade_lens.tasks.episodes import Episode

SOURCES = ("own", "random", "shuffled", "opposite", "other task", "wrong layer")
MEANS = ("none", "rule", "label")
SITES = ("labels", "arrow")


@dataclass(frozen=True)
class Condition:
    """One way of patching.

    Example:
        >>> last = Condition("last label", demos=(-1,))
        >>> upward = Condition("labels up", window=None)
        >>> last.demonstrations(16), upward.written(28, 30)
        ((15,), (28, 29, 30))

    Args:
        name: What tables and figures call it.
        source: Whose vectors are written. ``"own"``: those of the few-shot prompt itself.
            ``"random"``: random ones of the same norms. ``"shuffled"``: of the prompt with
            shuffled labels. ``"opposite"``: of the opposite mapping. ``"other task"``: of another
            task's prompt. ``"wrong layer"``: the prompt's own from half the layers further up,
            counted round.
        site: ``"labels"``, the demonstrations' answer positions (local), or ``"arrow"``, the
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
        ValueError: If an argument is none of those named, or ones are put together that do not
            go together.
    """

    name: str
    source: str = "own"
    site: str = "labels"
    demos: tuple[int, ...] | None = None
    mean: str = "none"
    mode: str = "replace"
    scale: float = 1.0
    window: int | None = 1

    def __post_init__(self) -> None:
        known = {
            "source": (self.source, SOURCES),
            "site": (self.site, SITES),
            "mean": (self.mean, MEANS),
            "mode": (self.mode, ("replace", "add")),
        }
        for key, (given, expected) in known.items():
            if given not in expected:
                raise ValueError(
                    f"Condition {self.name!r}: {key}={given!r} was given; expected one of "
                    f"{expected}."
                )
        if self.window is not None and self.window < 1:
            raise ValueError(
                f"Condition {self.name!r}: window={self.window} was given; expected at least one "
                "layer, or None for all."
            )
        if self.site == "arrow" and (self.demos is not None or self.mean == "label"):
            raise ValueError(
                f"Condition {self.name!r} patches the arrow, where there are no demonstrations to "
                "choose and no labels to take means of."
            )
        if self.mean == "label" and self.source in ("shuffled", "other task"):
            raise ValueError(
                f"Condition {self.name!r}: means by label are of the prompt's own mapping or its "
                f"opposite; source={self.source!r} was given."
            )
        if self.demos is not None and not self.demos:
            raise ValueError(f"Condition {self.name!r} patches no demonstration; give one or None.")

    def demonstrations(self, shots: int) -> tuple[int, ...]:
        """The demonstrations whose answer positions are written, of ``shots`` in all.

        Raises:
            ValueError: If there is no such demonstration, or one is named twice.
        """
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
        """The layers that are written when ``layer`` is the patched one."""
        top = n_layers if self.window is None else min(n_layers, layer + self.window - 1)
        return tuple(range(layer, top + 1))

    def source_layer(self, layer: int, n_layers: int) -> int:
        """The layer whose vectors are written at ``layer``."""
        if self.source != "wrong layer":
            return layer
        return (layer + (n_layers + 1) // 2) % (n_layers + 1)


def default_conditions(
    episodes: Sequence[Episode], *, other: Sequence[Episode] | None = None
) -> tuple[Condition, ...]:
    """Local and global patching, and the controls that these episodes allow.

    Example:
        >>> episodes = task("animal/country").episodes(8)
        >>> [condition.name for condition in default_conditions(episodes)][:3]
        ['labels', 'labels up', 'labels up, mean of label']

    "up" is from the patched layer to the top.

    Args:
        episodes: Of one task, at least two of every rule.
        other: Episodes of another task, if its vectors are to be a control.
    """
    labelled = all(episode.labels for episode in episodes)
    conditions = [
        Condition("labels"),
        Condition("labels up", window=None),
        Condition("last label up", demos=(-1,), window=None),
        Condition("arrow", site="arrow"),
        Condition("arrow, mean of rule", site="arrow", mean="rule"),
        Condition("labels, wrong layer", source="wrong layer"),
    ]
    sources = ["random", "shuffled"]
    if labelled:
        conditions.insert(2, Condition("labels up, mean of label", mean="label", window=None))
        sources.append("opposite")
    if other is not None:
        sources.append("other task")
    for source in sources:
        conditions += [
            Condition(f"labels up, {source}", source=source, window=None),
            Condition(f"arrow, {source}", site="arrow", source=source),
        ]
    return tuple(conditions)


def check_conditions(conditions: Sequence[Condition], shots: int, *, other: bool) -> None:
    """Raise if conditions cannot be run together.

    Raises:
        ValueError: If there are none, two have one name, one names demonstrations that are not
            there, or one needs another task's episodes and ``other`` is False.
    """
    if not conditions:
        raise ValueError("No conditions were given. Give at least one, or leave the default.")
    names = [condition.name for condition in conditions]
    if len(set(names)) < len(names):
        raise ValueError(
            f"Two conditions have one name: {names}. Tables could not tell them apart."
        )
    for condition in conditions:
        condition.demonstrations(shots)
        if condition.source == "other task" and not other:
            raise ValueError(
                f"Condition {condition.name!r} needs another task's vectors. Give other=, as many "
                "episodes of another task with as many demonstrations."
            )
