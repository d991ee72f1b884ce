"""Rule vectors and task vectors: residuals at answer positions, with what they were taken from.

A *rule vector* is the residual at a demonstration's answer position, the last token of its label
(span ``labels``). A *task vector* is the mean over prompts of the residual at the final position,
as Hendel et al. take it (arXiv 2310.15916). This module does not know what vectors are used for.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any, SupportsIndex, TypeAlias

import pandas as pd
import torch
from jaxtyping import Float, Int
from matplotlib.figure import Figure
from torch import Tensor

from spade_lens.checks import plain_name, spelled, whole_numbers
from spade_lens.icl.setup import PromptSetup
from spade_lens.lazy import verb
from spade_lens.models.identity import hooks_of, identity_of, refuse_another, refuse_unnamed
from spade_lens.models.model import Model
from spade_lens.models.places import LayersLike
from spade_lens.models.residuals import capture, still_gives
from spade_lens.prompts.inputs import PromptsLike
from spade_lens.prompts.prompt import Prompt, prompt_from_json
from spade_lens.settings import Settings, scoped
from spade_lens.storage.files import as_path, naming_damage
from spade_lens.storage.records import made_of, read_pair, write_pair
from spade_lens.tasks.episodes import Episode, check_episodes
from spade_lens.tensors import stack_by_demonstration

_KIND = "rule vectors"


@dataclass(frozen=True, eq=False)
class RuleVectors:
    """Rule vectors, with their layers and, where they are known, prompts and rules.

    Example:
        >>> vectors = icl.RuleVectors(torch.randn(2, 8, 4, 16), layers=(12, 18))
        >>> vectors
        RuleVectors(layers 12, 18; 8 prompts of 4 demonstrations; d_model 16)
        >>> vectors.at(18).shape
        (1, 8, 4, 16)

    Args:
        tensor: The vectors.
        layers: The layer of every entry of the first axis; 0, 1, 2, ... by default.
        prompts: The prompts that they were taken from.
        rules: The rule of every prompt.
        task: The task's name.
        model: The model that they were taken from.
        hooks: The name of the hooks that were in force then; None if there were none.
        captured: Whether they are what the model gave for the prompts, as :func:`rule_vectors`
            says. Then :meth:`save` sees whether it still does.

    Raises:
        ValueError: If layers, prompts or rules are not as many as the tensor's.
    """

    tensor: Float[Tensor, "layer batch demo d_model"]
    layers: tuple[int, ...] = ()
    prompts: tuple[Prompt, ...] = ()
    rules: tuple[str, ...] = ()
    task: str = ""
    model: Model | None = None
    hooks: str | None = None
    captured: bool = False

    def __post_init__(self) -> None:
        if self.tensor.ndim != 4:
            raise ValueError(
                f"A tensor of shape {tuple(self.tensor.shape)} was given; expected rule vectors "
                "[layer batch demo d_model]."
            )
        plain_name(self.task, "a task")
        n = len(self.tensor)
        expected = f"the layers of the {n} entries of the first axis, each once"
        layers = whole_numbers(self.layers, "layers=", expected, empty=True) or list(range(n))
        object.__setattr__(self, "layers", tuple(layers))
        if len(layers) != n:
            raise ValueError(f"layers={layers} was given; expected {expected}.")
        for name in ("prompts", "rules"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
            given, n_prompts = len(getattr(self, name)), self.tensor.shape[1]
            if given not in (0, n_prompts):
                raise ValueError(
                    f"{given} {name} were given for vectors of {n_prompts} prompts; give one each."
                )

    def __repr__(self) -> str:
        layers = spelled(self.layers)
        _, n, demos, width = self.shape
        of = f"{self.task}; " if self.task else ""
        return (
            f"RuleVectors({of}layers {layers}; {n} prompts of {demos} demonstrations; d_model "
            f"{width})"
        )

    @property
    def shape(self) -> tuple[int, ...]:
        """The tensor's shape: layers, prompts, demonstrations, width."""
        return tuple(self.tensor.shape)

    @property
    def labels(self) -> Int[Tensor, "batch demo"] | None:
        """Each demonstration's label, as a number among its prompt's candidates.

        None if prompts are not known or a label is no candidate, as in tasks of word pairs.
        """
        labels = demonstration_labels(self.prompts) if self.prompts else None
        return None if labels is None or (labels < 0).any() else labels

    @property
    def rule_numbers(self) -> Int[Tensor, " batch"] | None:
        """The rule of every prompt, numbered from 0. None if rules are not known."""
        names = list(dict.fromkeys(self.rules))
        return torch.tensor([names.index(rule) for rule in self.rules]) if names else None

    @property
    def positions(self) -> Int[Tensor, "batch demo"] | None:
        """The position of every vector in its prompt. None if prompts are not known."""
        at = [prompt.spans["labels"] for prompt in self.prompts]
        return torch.tensor(at) if at else None

    def at(self, layers: SupportsIndex | Iterable[SupportsIndex]) -> "RuleVectors":
        """Return the vectors of one layer or of several, in this order.

        Raises:
            TypeError: If a layer is no whole number.
            ValueError: If there are no vectors of a layer, or one is asked for twice.
        """
        wanted = whole_numbers(
            layers, "layers=", f"some of the layers {spelled(self.layers)}, each once"
        )
        missing = [layer for layer in wanted if layer not in self.layers]
        if missing:
            raise ValueError(
                f"Layers {missing} were asked for; these vectors are of layers "
                f"{spelled(self.layers)}. Give some of those."
            )
        rows = [self.layers.index(layer) for layer in wanted]
        return replace(self, tensor=self.tensor[rows], layers=tuple(wanted))

    def to_frame(self) -> pd.DataFrame:
        """Return one row per layer, prompt and demonstration.

        The columns are ``layer``, ``prompt``, ``demo`` and ``norm``. Where prompts are known,
        ``position``, ``label_id`` and (with the model's tokenizer) ``label`` stand beside them,
        where rules are known ``rule``.
        """
        n_layers, n, demos, _ = self.shape
        frame = pd.DataFrame(
            [(layer, i, demo) for layer in self.layers for i in range(n) for demo in range(demos)],
            columns=["layer", "prompt", "demo"],
        )
        if self.rules:
            frame["rule"] = [self.rules[i] for i in frame["prompt"]]
        if self.positions is not None:
            frame["position"] = self.positions.flatten().tolist() * n_layers
            ids = [p.tokens[at] for p in self.prompts for at in p.spans["labels"]]
            if self.model is not None and self.model.tokenizer is not None:
                frame["label"] = [self.model.word(token) for token in ids] * n_layers
            frame["label_id"] = ids * n_layers
        return frame.assign(norm=self.tensor.float().norm(dim=-1).flatten().tolist())

    def plot(self, **options: Any) -> Figure:
        """Draw how similar the vectors are, layer by layer (:func:`spade_lens.icl.convergence`)."""
        figure: Figure = verb("plot")(verb("convergence")(self), **options)
        return figure

    def save(self, path: str | PathLike[str]) -> Path:
        """Write the tensor as safetensors, and all else as JSON beside it.

        Example:
            >>> import pathlib, tempfile
            >>> vectors = icl.RuleVectors(torch.ones(2, 1, 3, 32), model=model, task="t")
            >>> path = vectors.save(pathlib.Path(tempfile.mkdtemp()) / "vectors.safetensors")
            >>> icl.RuleVectors.load(path, model)
            RuleVectors(t; layers 0, 1; 1 prompts of 3 demonstrations; d_model 32)

        Args:
            path: The file, ending in ``.safetensors``; the JSON has the same name.

        Returns:
            The path.

        Raises:
            ValueError: If the path has another ending, the model is not known or no longer gives
                these vectors, they were taken inside hooks without a name, or a file cannot be
                written.
        """
        path = _safetensors(path)
        if self.model is None:
            raise ValueError(
                "These vectors do not know the model they are of, so a reader could not check "
                "it. Make them with RuleVectors(..., model=model)."
            )
        identity = identity_of(self.model) | {"hooks": self.hooks}
        refuse_unnamed(identity, "A file of rule vectors")
        self._refuse_stale(self.model)
        content = {
            "layers": self.layers,
            "prompts": [asdict(prompt) for prompt in self.prompts],
            "rules": self.rules,
            "task": self.task,
            "model": identity,
            "captured": self.captured,
        }
        return write_pair(path, _KIND, {"vectors": self.tensor}, content)

    @classmethod
    def load(cls, path: str | PathLike[str], model: Model) -> "RuleVectors":
        """Read vectors that :meth:`save` wrote, onto the model's device.

        Raises:
            FileNotFoundError: If one of the two files is missing.
            ValueError: If they belong to another model or do not belong together.
        """
        path = _safetensors(path)
        content, tensors = read_pair(path, _KIND)
        refuse_another(model, content.get("model"), f"The file {str(path)!r}")
        with naming_damage(path.with_suffix(".json"), again="save them"):
            values = {
                "tensor": tensors["vectors"].to(model.device),
                "layers": content["layers"],
                "prompts": tuple(prompt_from_json(prompt) for prompt in content["prompts"]),
                "rules": content["rules"],
                "task": content["task"],
                "model": model,
                "hooks": content["model"]["hooks"],
                "captured": content["captured"],
            }
            return made_of(cls, values)

    def _refuse_stale(self, model: Model) -> None:
        """Raise if the model no longer gives the shortest prompt's first vector.

        Vectors that were taken inside hooks are not looked at: the hooks are not there any more.
        """
        if not self.captured or self.hooks is not None or model.hooked:
            return
        i = min(range(len(self.prompts)), key=lambda n: len(self.prompts[n]))
        prompt, row = self.prompts[i], self.layers.index(max(self.layers))
        place = {"layer": self.layers[row], "position": prompt.spans["labels"][0]}
        if not still_gives(model, self.tensor[row, i, 0], prompt, **place):
            raise ValueError(
                f"The rule vectors of prompt {i} are not what {model.name} gives now: it has been "
                "changed since they were taken. Take them again and save them before a change."
            )


VectorsLike: TypeAlias = RuleVectors | Float[Tensor, "layer batch demo d_model"]
"""Rule vectors, or a tensor of them whose layers are 0, 1, 2, ..."""


def as_rule_vectors(given: VectorsLike) -> RuleVectors:
    """Return rule vectors of what is given."""
    if isinstance(given, RuleVectors):
        return given
    if not isinstance(given, Tensor):
        raise TypeError(
            f"Vectors of type {type(given).__name__} were given; expected RuleVectors, as "
            "rule_vectors gives them, or a tensor [layer batch demo d_model]."
        )
    return RuleVectors(given)


@scoped
def rule_vectors(
    model: Model,
    prompts: PromptsLike | Sequence[Episode],
    *,
    layers: LayersLike = None,
    setup: PromptSetup | None = None,
    settings: Settings | None = None,
) -> RuleVectors:
    """Capture the residual at the answer position of every demonstration, by layer.

    Example:
        >>> template = sl.prompts.Template(pair="{input}>{output}", query="{input}>", separator=";")
        >>> shown = [("a", "A"), ("b", "B")]
        >>> prompts = [sl.prompts.few_shot_prompt(model.tokenizer, shown, "c", template=template)]
        >>> rule_vectors(model, prompts, layers=[0, 2])
        RuleVectors(layers 0, 2; 1 prompts of 2 demonstrations; d_model 32)

    Args:
        model: The model.
        prompts: Few-shot prompts with as many demonstrations each, or the episodes of a task,
            whose rules are then known.
        layers: Layers, 0 to ``n_layers``; all by default.
        setup: How episodes are written.
        settings: Memory limit, batch size and progress; see :class:`spade_lens.Settings`.

    Raises:
        ValueError: If a prompt has no demonstrations or not as many as the others, or as
            :func:`spade_lens.capture` does.
    """
    given: Any = prompts
    rules, task = [], ""
    if _are_episodes(given):
        check_episodes(given)
        rules, task = [episode.rule for episode in given], given[0].task
        given = (setup or PromptSetup()).prompts(model, given)
    checked = model.prompts(given)
    n_demos = check_demonstrations(checked)
    residuals = capture(
        model, checked, layers=layers, positions=[prompt.spans["labels"] for prompt in checked]
    )
    stack = stack_by_demonstration(residuals.stack, n_demos)
    about = (tuple(checked), tuple(rules), task, model, hooks_of(model))
    return RuleVectors(stack, residuals.layers, *about, captured=True)


@scoped
def final_position_vectors(
    model: Model,
    prompts: PromptsLike | Sequence[Episode],
    *,
    layers: LayersLike = None,
    setup: PromptSetup | None = None,
    settings: Settings | None = None,
) -> Float[Tensor, "layer batch d_model"]:
    """Capture the residual at every prompt's answer position, the final one in our prompts.

    Their mean over prompts (other than those to be patched) is the task vector of Hendel et al.

    Example:
        >>> vectors = final_position_vectors(model, prompts)
        >>> vectors.shape, vectors.mean(dim=1).shape  # the second is a task vector by layer
        (torch.Size([5, 2, 32]), torch.Size([5, 32]))

    Args:
        model: The model.
        prompts: The prompts, or the episodes of a task.
        layers: Layers, 0 to ``n_layers``; all by default.
        setup: How episodes are written.
        settings: Memory limit, batch size and progress; see :class:`spade_lens.Settings`.

    Raises:
        ValueError: As :func:`spade_lens.capture` does.
    """
    given: Any = prompts
    if _are_episodes(given):
        given = (setup or PromptSetup()).prompts(model, given)
    checked = model.prompts(given)
    positions = [[prompt.answer] for prompt in checked]
    return capture(model, checked, layers=layers, positions=positions).stack


def _are_episodes(given: Any) -> bool:
    return isinstance(given, Sequence) and len(given) > 0 and isinstance(given[0], Episode)


def demonstration_labels(prompts: Sequence[Prompt]) -> Int[Tensor, "batch demo"]:
    """Return which of its prompt's candidates each demonstration's label is; -1 for none."""
    check_demonstrations(prompts)
    rows = []
    for prompt in prompts:
        numbers = {token: i for i, token in enumerate(prompt.candidates)}
        rows.append([numbers.get(prompt.tokens[p], -1) for p in prompt.spans["labels"]])
    return torch.tensor(rows)


def check_demonstrations(prompts: Sequence[Prompt]) -> int:
    """Return how many demonstrations every one of the prompts has."""
    if not prompts:
        raise ValueError("No prompts were given. Give at least one.")
    counts = [len(prompt.spans.get("labels", ())) for prompt in prompts]
    wrong = [i for i, count in enumerate(counts) if count == 0 or count != counts[0]]
    if wrong:
        i = wrong[0]
        raise ValueError(
            f"Prompt {i} has {counts[i]} demonstrations (the tokens of its span 'labels') and "
            f"prompt 0 has {counts[0]}; rule vectors need as many in each, and at least one. Make "
            "prompts with few_shot_prompt or a task."
        )
    return counts[0]


def _safetensors(path: str | PathLike[str]) -> Path:
    path = as_path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"{path} must end in .safetensors, the format that vectors are saved in.")
    return path
