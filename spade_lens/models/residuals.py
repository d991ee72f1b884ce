"""Capture the residual stream: chosen layers, chosen positions, any prompts, patched or not.

Prompts of different lengths run side by side, padded after their ends, where causal attention
never looks. The result has no padding. Nothing above the last layer asked for is computed.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange, repeat
from jaxtyping import Float, Int
from torch import Tensor

from spade_lens.checks import is_whole, whole_numbers
from spade_lens.lazy import verb
from spade_lens.models.hooks import rows_are, side_by_side
from spade_lens.models.model import Model
from spade_lens.models.patches import PatchesLike, Writes
from spade_lens.models.places import (
    LayersLike,
    PositionsLike,
    as_positions,
    check_layers,
    pad_after,
)
from spade_lens.prompts.inputs import PromptsLike
from spade_lens.prompts.prompt import Prompt, prompt_from_json
from spade_lens.settings import Settings, limits, progress_bar, scoped
from spade_lens.storage.files import as_path, naming_damage
from spade_lens.storage.records import made_of, read_pair, write_pair

if TYPE_CHECKING:
    import pandas as pd


_FILE = "residuals.safetensors"


@dataclass(frozen=True, eq=False)
class Residuals:
    """Residuals of several prompts at several layers; a *slot* is one position of one prompt.

    Args:
        stack: The residuals.
        layers: The layer of every entry of the first axis.
        prompt: The prompt of every slot, as an index into ``prompts``.
        position: The position of every slot in its prompt.
        prompts: The prompts.
        start_is_pure: Whether nothing was written to the start tokens (no patch, no hook), so
            that they are what the start token alone gives.
        word: Returns the text of a token id.
    """

    stack: Float[Tensor, "layer slot d_model"]
    layers: tuple[int, ...]
    prompt: Int[Tensor, " slot"]
    position: Int[Tensor, " slot"]
    prompts: tuple[Prompt, ...]
    start_is_pure: bool = True
    word: Callable[[int], str] = field(default=str, compare=False)

    def __repr__(self) -> str:
        n_layers, n_slots, d_model = self.stack.shape
        return (
            f"Residuals({len(self.prompts)} prompts, layers {list(self.layers)}, {n_slots} slots, "
            f"d_model={d_model}, {self.stack.dtype})"
        )

    @cached_property
    def _slots(self) -> dict[tuple[int, int], int]:
        places = zip(self.prompt.tolist(), self.position.tolist(), strict=True)
        return {place: slot for slot, place in enumerate(places)}

    def slots(self, prompt: int, positions: Iterable[int]) -> list[int]:
        """Return the slots of one prompt's positions.

        Raises:
            TypeError: If the prompt or a position is no whole number.
            ValueError: If one of them was not captured.
        """
        positions = list(positions) if isinstance(positions, Iterable) else [positions]
        if not all(map(is_whole, (prompt, *positions))):
            raise TypeError(
                f"prompt={prompt!r} and positions={positions!r} were given; expected whole numbers."
            )
        try:
            return [self._slots[prompt, position] for position in positions]
        except KeyError as error:
            raise ValueError(
                f"The residual of prompt {prompt} at position {error.args[0][1]} was not captured. "
                "Add the position when calling capture()."
            ) from None

    def layer(self, layer: int) -> Float[Tensor, "slot d_model"]:
        """Return all slots at one layer.

        Raises:
            ValueError: If the layer was not captured.
        """
        if not is_whole(layer) or layer not in self.layers:
            raise ValueError(
                f"Layer {layer!r} was not captured, only {list(self.layers)}. Add it when calling "
                "capture()."
            )
        return self.stack[self.layers.index(layer)]

    def at(self, prompt: int) -> Float[Tensor, "layer pos d_model"]:
        """Return one prompt's residuals at its captured positions, in their order.

        Raises:
            TypeError: If the prompt is no whole number.
            ValueError: If there is no such prompt.
        """
        n = len(self.prompts)
        [prompt] = whole_numbers(
            [prompt], "prompt=", f"the number of a prompt, from 0 to {n - 1}", below=n
        )
        return self.stack[:, (self.prompt == prompt).to(self.stack.device)]

    def at_answers(self, layer: int) -> Float[Tensor, "prompt d_model"]:
        """Return the residual at each prompt's answer position.

        Example:
            >>> capture(model, prompts, layers=3).at_answers(3).shape
            torch.Size([2, 32])

        Raises:
            ValueError: If the layer, or the answer position of a prompt, was not captured.
        """
        return self.layer(layer)[self.answer_slots]

    @property
    def answer_slots(self) -> list[int]:
        """The slot of each prompt's answer position."""
        return [self.slots(i, [p.answer])[0] for i, p in enumerate(self.prompts)]

    def to_frame(self) -> "pd.DataFrame":
        """Make a table with one row for every layer and slot.

        Example:
            >>> frame = capture(model, "ab", layers=[0, 4], positions="last").to_frame()
            >>> frame[["layer", "position", "token"]].values.tolist()
            [[0, 2, 'b'], [4, 2, 'b']]

        Returns:
            Columns ``layer``, ``prompt``, ``position``, ``token``, ``token_id`` and ``norm``, the
            Euclidean norm of the residual.
        """
        import pandas as pd

        places = zip(self.prompt.tolist(), self.position.tolist(), strict=True)
        ids = [self.prompts[i].tokens[p] for i, p in places]
        n = len(self.layers)
        columns = {
            "layer": repeat(torch.tensor(self.layers), "layer -> (layer slot)", slot=len(ids)),
            "prompt": repeat(self.prompt, "slot -> (layer slot)", layer=n),
            "position": repeat(self.position, "slot -> (layer slot)", layer=n),
            "token": [self.word(token) for token in ids] * n,
            "token_id": ids * n,
            "norm": rearrange(self.stack.float().norm(dim=-1), "layer slot -> (layer slot)").cpu(),
        }
        return pd.DataFrame(columns)

    def _words(self) -> "_Words":
        ids = sorted({token for prompt in self.prompts for token in prompt.tokens})
        return _Words({token: self.word(token) for token in ids})

    def __getstate__(self) -> dict[str, Any]:
        """Copy and pickle the words alone, not the model that ``word`` is a method of."""
        return vars(self) | {"word": self._words()}

    def plot(self, **options: Any) -> Any:
        """Draw the norms; see :func:`spade_lens.plot`."""
        return verb("plot")(self, **options)

    def save(self, folder: str | PathLike[str]) -> Path:
        """Write ``residuals.safetensors`` and ``residuals.json``, and return the folder.

        Args:
            folder: The folder, made if it does not exist; residuals in it are replaced.
        """
        tensors = {"stack": self.stack, "prompt": self.prompt, "position": self.position}
        content = {
            "layers": self.layers,
            "start_is_pure": self.start_is_pure,
            "prompts": [vars(prompt) | {"spans": dict(prompt.spans)} for prompt in self.prompts],
            "words": self._words().of,
        }
        return write_pair(as_path(folder) / _FILE, "residuals", tensors, content).parent

    @classmethod
    def load(cls, folder: str | PathLike[str]) -> "Residuals":
        """Read what :meth:`save` wrote, onto the CPU.

        Raises:
            FileNotFoundError: If a file is missing.
            ValueError: If the files are damaged or do not belong together.
        """
        path = as_path(folder) / _FILE
        content, tensors = read_pair(path, "residuals")
        with naming_damage(path.with_suffix(".json"), again="save the residuals"):
            words = {int(token): str(text) for token, text in content["words"].items()}
            plain = {
                "layers": content["layers"],
                "prompts": tuple(prompt_from_json(prompt) for prompt in content["prompts"]),
                "start_is_pure": content["start_is_pure"],
                "word": _Words(words),
            }
            residuals = made_of(cls, tensors | plain)
            if residuals.stack.shape[:2] != (len(residuals.layers), len(residuals.prompt)):
                raise ValueError(f"{residuals.layers} are not the layers of the residuals")
            return residuals


@dataclass(frozen=True)
class _Words:
    """The text of token ids, without the tokenizer that wrote it."""

    of: dict[int, str]

    def __call__(self, token: int) -> str:
        return self.of[token]


@scoped
@torch.no_grad()
def capture(
    model: Model,
    prompts: PromptsLike,
    *,
    layers: LayersLike = None,
    positions: PositionsLike = None,
    patches: PatchesLike = (),
    settings: Settings | None = None,
) -> Residuals:
    """Capture the residual stream at chosen layers and positions only.

    Example:
        >>> capture(model, ["ab", "abc"], layers=[0, 4], positions="last")
        Residuals(2 prompts, layers [0, 4], 2 slots, d_model=32, torch.float32)

    Args:
        model: The model.
        prompts: A string, the messages of a chat, a prompt, or a list of these; of any lengths.
        layers: The layer or layers wanted, 0 to ``n_layers``, each once. The result has them in
            this order. All by default.
        positions: ``"all"`` (the default), ``"last"``, the name of a span of the prompts, a
            position or several in every prompt (negative ones count from the end), or one list of
            positions for each prompt.
        patches: Writes to the residual stream, made before their layer is captured.
        settings: Memory limit, batch size and progress; see :class:`spade_lens.Settings`.

    Returns:
        The residuals; slots come prompt by prompt, in the order of ``positions``.

    Raises:
        TypeError: If prompts, layers, positions or patches are of a wrong type.
        ValueError: If layers, positions or patches are out of range, what is asked for does not
            fit ``memory_limit``, or the model gives NaN or infinite residuals.
    """
    prompts = model.prompts(prompts)
    layers = check_layers(model, layers)
    positions = as_positions(prompts, positions)
    writes = Writes(model, prompts, patches)
    counts = torch.tensor([len(p) for p in positions])
    n_slots = int(counts.sum())
    shape = (len(layers), n_slots, model.d_model)
    result = len(layers) * n_slots * model.d_model * (torch.finfo(model.dtype).bits // 8)
    most = limits(model)
    if result > 0.9 * most.memory_bytes:
        raise ValueError(
            f"{len(layers)} layers of {n_slots} positions take {result / 2**30:.2f} GiB, more than "
            f"fits memory_limit={most.memory_limit} GiB. Ask for fewer layers or positions, give "
            "fewer prompts at a time, or raise memory_limit."
        )
    residuals = Residuals(
        stack=torch.empty(shape, dtype=model.dtype, device=model.device),
        layers=tuple(layers),
        prompt=torch.repeat_interleave(torch.arange(len(prompts)), counts),
        position=torch.tensor([p for at in positions for p in at], dtype=torch.long),
        prompts=tuple(prompts),
        start_is_pure=not model.hooked and not writes.to_starts,
        word=model.word,
    )
    ends = counts.cumsum(0).tolist()
    with progress_bar(total=len(prompts), desc="capture", unit="prompt", model=model) as bar:
        for chunk in _chunks(model, prompts, most.memory_bytes - result):
            slots = [s for i in chunk for s in range(ends[i] - len(positions[i]), ends[i])]
            _capture_chunk(model, residuals, chunk, slots, writes)
            bar.update(len(chunk))
    return residuals


def still_gives(
    model: Model, known: Float[Tensor, " d_model"], prompt: Prompt, *, layer: int, position: int
) -> bool:
    """Return whether a model gives a known residual now, up to rounding."""
    now = capture(model, [prompt], layers=layer, positions=[[position]]).stack[0, 0].float()
    known = known.to(now.device).float()
    rounding = 3e-2 if torch.finfo(model.dtype).bits < 32 else 1e-4
    return bool((now - known).norm() <= rounding * known.norm())


def _capture_chunk(
    model: Model, residuals: Residuals, chunk: Sequence[int], slots: Sequence[int], writes: Writes
) -> None:
    """Run some prompts and fill in their slots."""
    prompts = [residuals.prompts[i] for i in chunk]
    tokens = pad_after([prompt.tokens for prompt in prompts], model.device)  # [batch pos]
    positions = torch.arange(tokens.shape[1], device=model.device).expand_as(tokens)
    row_of = {prompt: row for row, prompt in enumerate(chunk)}
    # Made once: on a GPU every list of numbers that moves there waits.
    at = torch.tensor(slots, dtype=torch.long, device=model.device)
    row = torch.tensor(
        [row_of[i] for i in residuals.prompt[slots].tolist()], dtype=torch.long, device=model.device
    )
    column = residuals.position[slots].to(model.device)
    finite: dict[int, Tensor] = {}
    index = {layer: n for n, layer in enumerate(residuals.layers)}
    plan = writes.plan([(i, range(len(p))) for i, p in zip(chunk, prompts, strict=True)])

    def after_block(layer: int, resid: Tensor) -> Tensor | None:
        patched = writes.write(resid, plan, layer)
        if layer in index:
            kept = (resid if patched is None else patched)[row, column]  # [slot d_model]
            finite[layer] = torch.isfinite(kept).all()
            residuals.stack[index[layer], at] = kept
        return patched

    with rows_are(chunk, [len(prompt) for prompt in prompts]):
        resid = model.embed(tokens, positions)
        patched = after_block(0, resid)
        resid = resid if patched is None else patched
        model.run_blocks(resid, positions, 0, max(residuals.layers), after_block=after_block)
    if not torch.stack(list(finite.values())).all():
        layer = next(layer for layer, good in finite.items() if not good)
        raise ValueError(_not_finite(residuals, layer, slots))


def _chunks(model: Model, prompts: Sequence[Prompt], budget: float) -> list[list[int]]:
    """Return groups of prompts that may run side by side and fit the budget in bytes."""
    # An estimate: for every token a block holds a few residuals and an MLP of about four times
    # their width, in the model's dtype, and scores for every pair of tokens.
    per_token = 32 * model.d_model * (torch.finfo(model.dtype).bits // 8)
    most = limits(model)

    def fits(n_rows: int, longest: int) -> bool:
        padded = longest * n_rows
        small = padded <= most.batch_tokens and n_rows <= (most.batch_size or n_rows)
        return small and padded * (per_token + 32 * longest) <= budget

    return side_by_side(model, [len(prompt) for prompt in prompts], fits)


def _not_finite(residuals: Residuals, layer: int, slots: Sequence[int]) -> str:
    kept = residuals.layer(layer)[list(slots)]
    first = slots[int((~torch.isfinite(kept)).any(dim=-1).nonzero()[0])]
    return (
        f"The residual stream is NaN or infinite at layer {layer}, first in prompt "
        f"{int(residuals.prompt[first])} at position {int(residuals.position[first])}. Check "
        "the model's weights and your patches or hooks; in half precision, try "
        "dtype=torch.bfloat16 or torch.float32."
    )
